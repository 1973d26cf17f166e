"""Checkpoints survive: kills at any moment, full disks, damage; precision, retention, weights alone."""

import os
import random
import re
import resource
import shlex
import signal
import time
from pathlib import Path

import pytest
import torch

import convert
from kernels.adamw import Moment, decode
from nano3.cli import parser, resolve, to_yaml
from nano3.config import UserError
from nano3.model.init import named_tensors
from nano3.parallel.mesh import ALONE
from nano3.train import checkpoint, locate
from nano3.train.checkpoint import Saver
from nano3.train.folders import resume_command
from nano3.train.storage import FORMAT, POINTER, Progress, digest, read_manifest, verify
from tests.oracles import hf_model, hf_name
from tests.train.small import small, trainer


def in_child(work) -> int:
    """Run `work` in a copy of this process.  Returns the child's pid; the child never comes back."""
    if pid := os.fork():
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def saver_of(t, folder: Path) -> Saver:
    return Saver(folder, t.config, ALONE)


def test_a_kill_while_saving_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    """50 kills, spread over the time that a save takes.  Whatever has a checkpoint's name is whole, and is found."""
    t = trainer()
    t._step()  # so that there are moments
    begin = time.monotonic()
    saver = saver_of(t, tmp_path / "timing")
    for i in range(3):
        saver.save(t.model, t.optimizer, Progress(i + 1))
    saver.wait()
    one = (time.monotonic() - begin) / 3
    draws, seen = random.Random(1), set()
    folder = tmp_path / "checkpoints"
    for kill in range(50):
        first = 3 * kill + 1

        def work(first: int = first) -> None:
            again = saver_of(t, folder)
            for i in range(first, first + 1000):
                again.save(t.model, t.optimizer, Progress(i))

        pid = in_child(work)
        time.sleep(draws.random() * 2.5 * one + 0.3 * one)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        done = sorted(folder.glob("iter_*")) if folder.exists() else []
        for one_of_them in done[-3:]:
            verify(one_of_them, read_manifest(one_of_them, "test"), "test")
        if done:
            newest = max(done, key=lambda p: (p / "manifest.json").stat().st_mtime_ns)
            found = locate.find(folder, "test")
            assert found == newest
            assert checkpoint.load(str(folder), "test", t.model, t.optimizer).iteration == int(newest.name[5:])
        seen.add((len(done), (folder / f".incomplete_iter_{first:07d}").exists()))
    assert len(seen) > 5  # the kills did fall into different moments


def test_a_disk_that_is_full_is_reported_and_harms_nothing(tmp_path: Path) -> None:
    t = trainer()
    saver = saver_of(t, tmp_path)
    saver.save(t.model, t.optimizer, Progress(1))
    saver.wait()
    before = digest(tmp_path / "iter_0000001" / "rank-00000.safetensors")

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # writing fails in the middle of the file
        again = saver_of(t, tmp_path)
        again.save(t.model, t.optimizer, Progress(2))
        with pytest.raises(UserError, match=r"could not write: .*earlier checkpoints are untouched"):
            again.wait()

    _, status = os.waitpid(in_child(work), 0)
    assert status == 0
    assert locate.find(tmp_path, "test").name == "iter_0000001"
    assert before == digest(tmp_path / "iter_0000001" / "rank-00000.safetensors")
    assert not (tmp_path / "iter_0000002").exists()


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    t = trainer()
    saver = saver_of(t, tmp_path / "file" / "checkpoints")
    saver.save(t.model, t.optimizer, Progress(1))
    with pytest.raises(UserError, match=re.escape(f"checkpoint.save={tmp_path / 'file' / 'checkpoints'}")):
        saver.wait()


@pytest.mark.parametrize("damage", ["flip", "truncate", "manifest", "newer"])
def test_the_last_good_one_is_named_and_taken_when_asked(tmp_path: Path, damage: str) -> None:
    trainer(f"logger.run_dir={tmp_path}", "checkpoint.save_interval=2").run()  # 2, 4, 6
    bad = tmp_path / "checkpoints" / "iter_0000006"
    file = bad / ("rank-00000.safetensors" if damage in ("flip", "truncate") else "manifest.json")
    data = bytearray(file.read_bytes())
    if damage == "newer":
        data = data.replace(b'"format": %d' % FORMAT, b'"format": 9')
    elif damage == "flip":
        data[-100] ^= 4
    else:
        data = data[: len(data) // 2]
    file.write_bytes(data)
    load = f"checkpoint.load={tmp_path}/checkpoints"
    with pytest.raises(UserError, match=r"iter_0000006.*last good one is iteration 4: .*--resume-from-last-good"):
        trainer(load)
    resumed = trainer(load, "checkpoint.resume_from_last_good=true")
    assert resumed.progress.iteration == 4


def test_retention_keeps_the_newest_and_every_nth(tmp_path: Path) -> None:
    keep = ["checkpoint.most_recent_k=2", "checkpoint.save_retain_interval=4"]
    theirs = tmp_path / "checkpoints" / "iter_0000000" / "mp_rank_00"  # Megatron's name for a checkpoint
    theirs.mkdir(parents=True)
    trainer(f"logger.run_dir={tmp_path}", "train.train_iters=11", "checkpoint.save_interval=1", *keep).run()
    assert theirs.is_dir()
    theirs.rmdir()
    theirs.parent.rmdir()
    left = sorted(int(p.name[5:]) for p in (tmp_path / "checkpoints").glob("iter_*"))
    assert left == [4, 8, 10, 11]
    assert (tmp_path / "checkpoints" / POINTER).read_text() == "11"


def test_an_interval_alone_keeps_its_multiples_and_the_newest(tmp_path: Path) -> None:
    every = ["checkpoint.save_interval=1", "checkpoint.save_retain_interval=2"]
    trainer(f"logger.run_dir={tmp_path}", "train.train_iters=5", *every).run()
    assert [int(p.name[5:]) for p in sorted((tmp_path / "checkpoints").glob("iter_*"))] == [2, 4, 5]


def test_a_bad_place_for_checkpoints_is_refused_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"checkpoint\.save=.*file: cannot be written to"):
        trainer(f"logger.run_dir={tmp_path / 'a'}", f"checkpoint.save={tmp_path}/file").run()
    base = f"checkpoint.pretrained_checkpoint={tmp_path}/base"
    trainer(f"logger.run_dir={tmp_path / 'b'}", f"checkpoint.save={tmp_path}/base", "train.train_iters=1").run()
    steps = capsys.readouterr().out.count("step 1/")
    with pytest.raises(UserError, match=r"checkpoint\.save=.*base holds the weights"):
        trainer(f"logger.run_dir={tmp_path / 'c'}", f"checkpoint.save={tmp_path}/base", base).run()
    assert (steps, capsys.readouterr().out.count("step 1/")) == (1, 0)


def test_a_failed_evaluation_loses_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = trainer(f"logger.run_dir={tmp_path}", "validation.eval_interval=0", "checkpoint.save_interval=0")
    evaluate = t._evaluate

    def fail_at_the_end(log: object) -> float:
        if t.progress.iteration:
            raise RuntimeError("out of memory")
        return evaluate(log)

    monkeypatch.setattr(t, "_evaluate", fail_at_the_end)
    with pytest.raises(RuntimeError, match="out of memory"):
        t.run()
    t.saver.wait()
    assert locate.find(tmp_path, "test").name == f"iter_{t.config.iterations:07d}"


@pytest.mark.parametrize(("world", "here"), [(1, 1), (4, 4), (16, 8)])
def test_the_command_to_go_on_is_accepted(
    world: int, here: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    config = small("checkpoint.pretrained_checkpoint=weights")
    settings, checkpoints = tmp_path / "a run" / "config.yaml", tmp_path / "a run" / "checkpoints"
    settings.parent.mkdir()
    settings.write_text(to_yaml(config))
    words = shlex.split(resume_command(config, "tiny", settings, checkpoints, world))
    assert words[0] == ("python" if world == 1 else "torchrun")
    assert (f"--nnodes={world // here}" in words) == (here < world)
    went_on, _ = resolve(parser().parse_args(words[words.index("train.py") + 1 :]))
    assert went_on.checkpoint.load == str(checkpoints)
    assert went_on.checkpoint.pretrained_checkpoint is None
    went_on.checkpoint.load, went_on.checkpoint.pretrained_checkpoint = None, "weights"
    assert went_on == config


def test_weights_alone_start_a_new_run(tmp_path: Path) -> None:
    first = trainer(f"logger.run_dir={tmp_path}")
    first.run()
    second = trainer(f"checkpoint.pretrained_checkpoint={tmp_path}/checkpoints/iter_0000006")
    assert second.progress == Progress()
    assert second.optimizer.steps == 0
    for name, p in second.model.named_parameters():
        assert torch.equal(p, first.model.get_parameter(name)), name


@pytest.mark.parametrize(("saved", "resumed"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_a_change_of_precision_loses_none(tmp_path: Path, saved: str, resumed: str) -> None:
    """fp32 weights come from bf16's masters; bf16's masters come from fp32 weights."""
    first = trainer(f"logger.run_dir={tmp_path}", f"train.precision={saved}")
    first.run()
    second = trainer(f"checkpoint.load={tmp_path}/checkpoints", f"train.precision={resumed}", "train.train_iters=9")
    for name, master in first.optimizer.masters.items():
        assert torch.equal(second.optimizer.masters[name], master), name
        wide = first.optimizer.state()[name]["exp_avg_sq"]
        assert torch.equal(second.optimizer.state()[name]["exp_avg_sq"], wide)


NARROW = ("train.precision=bf16", "optimizer.gradients=bf16", "optimizer.masters=none")


@pytest.mark.parametrize("moments", ["8bit", "bf16"])
def test_a_resume_in_fewer_bytes_is_bitwise(tmp_path: Path, moments: str) -> None:
    """Moments and weights of 6 steps are those of 3, a stop, and 3 more: the random bits go on where they were."""
    forms = (*NARROW, f"optimizer.moments={moments}", "model.hidden_size=64")
    whole = trainer(f"logger.run_dir={tmp_path}/whole", *forms)
    whole.run()
    half = trainer(f"logger.run_dir={tmp_path}/half", "train.train_iters=6", "train.exit_duration_in_mins=0", *forms)
    half.run()
    assert half.progress.iteration == 2
    more = trainer(f"checkpoint.load={tmp_path}/half/checkpoints", f"logger.run_dir={tmp_path}/more", *forms)
    more.run()
    assert convert.main(["verify", f"{tmp_path}/whole", f"{tmp_path}/more"]) == 0
    keys = read_manifest(tmp_path / "more" / "checkpoints" / "iter_0000006", "test").tensors
    assert not any(k.startswith("master.") for k in keys)
    assert any(k.startswith("exp_avg_scale.") for k in keys) == (moments == "8bit")


@pytest.mark.parametrize(("saved", "resumed"), [("8bit", "fp32"), ("fp32", "8bit"), ("8bit", "bf16"), ("bf16", "8bit")])
def test_moments_of_another_form_are_converted(tmp_path: Path, saved: str, resumed: str) -> None:
    run = ("train.precision=bf16", "train.train_iters=9")
    first = trainer(f"logger.run_dir={tmp_path}", "train.precision=bf16", f"optimizer.moments={saved}")
    first.run()
    second = trainer(f"checkpoint.load={tmp_path}/checkpoints", *run, f"optimizer.moments={resumed}")
    assert second.optimizer.steps == first.optimizer.steps == 6
    name = "layers.0.mixer.in_proj.weight"
    there, here = (
        [decode(Moment(s[k], s.get(f"{k}_scale")), 32) for k in ("exp_avg", "exp_avg_sq")]
        for s in (first.optimizer.state()[name], second.optimizer.state()[name])
    )
    narrow = torch.bfloat16 if "bf16" in (saved, resumed) else None
    assert (
        second.optimizer.state()[name]["exp_avg"].dtype
        == {
            "fp32": torch.float32,
            "bf16": torch.bfloat16,
            "8bit": torch.int8,
        }[resumed]
    )
    for a, b in zip(there, here, strict=True):
        bound = 2.0**-8 if narrow is not None and resumed == "bf16" else 0.01 if resumed == "8bit" else 0.0
        assert (a - b).norm() <= bound * a.norm()
        assert a.norm() > 0
    assert torch.equal(first.optimizer.masters[name], second.optimizer.masters[name])
    second.run()


def test_masters_can_be_left_behind_and_made_again(tmp_path: Path) -> None:
    first = trainer(f"logger.run_dir={tmp_path}/a", "train.precision=bf16")
    first.run()
    second = trainer(
        f"checkpoint.load={tmp_path}/a/checkpoints", f"logger.run_dir={tmp_path}/b", "train.train_iters=9", *NARROW
    )
    for name, p in second.model.named_parameters():
        assert torch.equal(p, first.model.get_parameter(name)), name
    second.run()
    third = trainer(f"checkpoint.load={tmp_path}/b/checkpoints", "train.train_iters=12", "train.precision=bf16")
    for name, p in second.model.named_parameters():
        assert torch.equal(third.optimizer.masters[name], p.float()), name


def test_a_run_ends_by_itself_after_its_time(tmp_path: Path) -> None:
    t = trainer(f"logger.run_dir={tmp_path}", "train.train_iters=100000", "train.exit_duration_in_mins=0.02")
    assert t.run() == 0
    assert 0 < t.progress.iteration < 100000
    assert locate.find(tmp_path, "test").name == f"iter_{t.progress.iteration:07d}"


def test_a_background_save_holds_the_state_of_its_step(tmp_path: Path) -> None:
    """What training does after `save` has returned does not reach the file."""
    t = trainer()
    config = small("checkpoint.async_save=true")
    saver = Saver(tmp_path, config, ALONE)
    before = {n: p.detach().clone() for n, p in t.model.named_parameters()}
    saver.save(t.model, t.optimizer, Progress(1))
    with torch.no_grad():
        for p in t.model.parameters():
            p.zero_()
    saver.wait()
    model, _ = checkpoint.load_model(str(tmp_path), "test", torch.device("cpu"))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("fused", [False, True], ids=["released-names", "transformers-names"])
def test_a_hugging_face_folder_starts_a_run(tmp_path: Path, fused: bool) -> None:
    """Its weights, in both forms of names; another geometry is refused with the settings that would fit."""
    config = trainer().config.model
    theirs = hf_model(config)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_()
    theirs.save_pretrained(tmp_path / "hf", save_original_format=not fused)
    start = f"checkpoint.pretrained_checkpoint={tmp_path / 'hf'}"
    ours = trainer(start)
    expected = theirs.state_dict()
    for name, tensor in named_tensors(ours.model).items():
        assert torch.equal(tensor, expected[hf_name(name)]), name
    with pytest.raises(UserError, match=r"another geometry.*model.moe_intermediate_size=24"):
        trainer(start, "model.moe_intermediate_size=48")
