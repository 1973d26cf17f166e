"""The loop: what a step computes, what a run leaves behind, how it stops."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from nano3.blocks import checksums_of
from nano3.cli import parser, resolve
from nano3.config import KINDS, UserError
from nano3.data.indexed import IndexedWriter
from nano3.data.loader import Batch, Place, micro_batches
from nano3.model.init import named_tensors
from nano3.model.moe import sequence_balance_loss
from nano3.train import checkpoint, locate
from nano3.train.loop import Trainer
from nano3.train.step import TrainingError, training_step
from nano3.train.storage import FileRecord, read_manifest
from tests.conftest import ROOT
from tests.oracles import hf_model
from tests.train.small import ALONE, SHRINK, trainer


def batches(t, first=0):
    c = t.config.train
    return micro_batches(t.data, "train", first, Place(c.global_batch_size, c.micro_batch_size))


def gradients_of_a_step(t, rows) -> dict[str, torch.Tensor]:
    kept = {}
    t.optimizer.step = lambda lr, fine: (kept.update(t.optimizer.reduced_gradients()), torch.zeros(()))[1]
    training_step(t.model, t.optimizer, rows, t.config, ALONE, 0.0, False)
    return kept


def model_alone(t):
    """The same numbers in a model without an optimizer, which takes gradients out of autograd's hands."""
    model = checkpoint.build(t.config.model)
    for name, tensor in named_tensors(t.model).items():
        *path, leaf = name.split(".")
        own = tensor.detach().clone()
        setattr(model.get_submodule(".".join(path)), leaf, nn.Parameter(own) if tensor.requires_grad else own)
    return model.train()


def test_gradient_of_a_step_is_the_plain_formula() -> None:
    """Mean token loss plus the coefficient times the mean balance loss of each layer, by autograd on whole logits."""
    t = trainer("model.moe_aux_loss_coeff=0.5", "train.micro_batch_size=4", "model.hybrid_override_pattern=MEE*")
    (x, y, *_), *_ = rows = batches(t)
    model = model_alone(t)
    out = model(x)
    loss = F.cross_entropy(model.logits(out.hidden).flatten(0, 1), y.flatten())
    loss = loss + 0.5 * sum(b.aux_B.mean() for b in out.balance)
    truth = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, [*model.parameters()]), strict=True))
    for n, g in gradients_of_a_step(t, rows).items():
        assert torch.allclose(g, truth[n], rtol=1e-4, atol=1e-7), n


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_do_not_change_the_gradient(micro: int) -> None:
    t = trainer(f"train.micro_batch_size={micro}")
    whole = trainer("train.micro_batch_size=4")
    got, truth = gradients_of_a_step(t, batches(t)), gradients_of_a_step(whole, batches(whole))
    for n in truth:
        assert torch.allclose(got[n], truth[n], rtol=1e-4, atol=1e-7), n


def test_masked_tokens_have_no_loss_and_do_not_count() -> None:
    t = trainer("model.moe_aux_loss_coeff=0", "train.micro_batch_size=4")
    (x, y, *_), *_ = batches(t)
    y[:, ::3] = -100
    y[1] = -100
    model = model_alone(t)
    logits = model.logits(model(x).hidden).flatten(0, 1)
    truth = torch.autograd.grad(F.cross_entropy(logits, y.flatten()), [*model.parameters()])  # mean over the unmasked
    for (n, g), expected in zip(gradients_of_a_step(t, [Batch(x, y)]).items(), truth, strict=True):
        assert torch.allclose(g, expected, rtol=1e-4, atol=1e-7), n


def test_selection_bias_moves_once_per_step_by_the_counts_of_the_whole_step() -> None:
    t = trainer("model.moe_router_bias_update_rate=0.25", "train.micro_batch_size=1", "train.recompute=full")
    t.model.train()
    counts = sum(t.model(b.tokens).balance[0].counts_E for b in batches(t))
    training_step(t.model, t.optimizer, batches(t), t.config, ALONE, 0.0, False)
    expected = 0.25 * torch.sign(counts.double().mean() - counts)
    assert torch.equal(t.model.routers["1"].e_score_correction_bias, expected.float())


def test_a_frozen_layer_keeps_its_selection_bias() -> None:
    """No gradient moves it, but every step would."""
    t, free = trainer("peft.freeze=['layers.*']"), trainer("peft.freeze=['layers.1.mixer.gate.weight']")
    for one in (t, free):
        one._step()
    biases = [next(iter(one.model.routers.values())).e_score_correction_bias for one in (t, free)]
    assert biases[0].count_nonzero() == 0 < biases[1].count_nonzero()


def test_balance_loss_is_one_at_perfect_balance_and_its_gradient_flows_through_scores() -> None:
    even = torch.full((2, 8, 4), 0.5, dtype=torch.float64)
    for t in range(8):
        even[:, t, [t % 4, (t + 1) % 4]] += 1e-9  # a choice, without changing the scores
    assert sequence_balance_loss(even, 2).tolist() == pytest.approx([1, 1], abs=1e-7)
    scores = torch.rand(1, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: sequence_balance_loss(s, 2), scores)


@pytest.mark.parametrize("kinds", ["full", "[mamba]", "[moe,attention]"])
def test_recompute_gives_the_same_gradients_and_keeps_less(kinds: str) -> None:
    def kept_bytes(t) -> int:
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: (seen.__setitem__(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()), x)[1],
            lambda x: x,
        ):
            t.model(batches(t)[0][0])
        return sum(seen.values())

    plain, less = trainer(), trainer(f"train.recompute={kinds}")
    truth = gradients_of_a_step(plain, batches(plain))
    for n, g in gradients_of_a_step(less, batches(less)).items():
        assert torch.equal(g, truth[n]), n
    assert kept_bytes(less) < kept_bytes(plain)
    assert less.config.recompute <= set(KINDS.values())


def test_a_run_learns_and_leaves_a_log_settings_and_a_checkpoint(tmp_path: Path) -> None:
    t = trainer(f"logger.run_dir={tmp_path}", "train.train_iters=60", "optimizer.lr=1e-2", "train.global_batch_size=16")
    before = t.evaluate()
    assert t.run() == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if r["kind"] == "train"]
    assert [r["iteration"] for r in steps] == list(range(1, 61))
    assert all(math.isfinite(r["loss"]) and r["tokens_per_second"] > 0 and r["balance"] >= 1 for r in steps)
    assert steps[-1]["tokens"] == 60 * 16 * 24
    last = [r for r in rows if r["kind"] == "valid"][-1]
    assert last["loss"] < before - 1
    restored, config = checkpoint.load_model(str(tmp_path), "test", torch.device("cpu"))
    assert config == t.config
    for a, b in zip(restored.parameters(), t.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_can_leave_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(f"logger.run_dir={tmp_path}", "checkpoint.save_interval=-1").run()
    assert {p.name for p in tmp_path.iterdir()} == {"config.yaml", "metrics.jsonl"}
    assert "none: checkpoint.save_interval=-1" in capsys.readouterr().out


def test_resume_is_bitwise(tmp_path: Path) -> None:
    straight = trainer(f"logger.run_dir={tmp_path / 'a'}")
    straight.run()
    half = trainer(f"logger.run_dir={tmp_path / 'b'}", "checkpoint.save_interval=3")
    half.run()
    earlier = tmp_path / "b" / "checkpoints" / "iter_0000003"
    resumed = trainer(f"logger.run_dir={tmp_path / 'c'}", f"checkpoint.load={earlier}")
    assert resumed.progress.iteration == 3
    resumed.run()
    for a, b in zip(straight.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    ours, theirs = straight.optimizer.state(), resumed.optimizer.state()
    assert all(torch.equal(theirs[n][k], v) for n, kept in ours.items() for k, v in kept.items())
    assert straight.optimizer.steps == resumed.optimizer.steps == 6
    losses = [
        [json.loads(x)["loss"] for x in (tmp_path / d / "metrics.jsonl").read_text().splitlines() if '"train"' in x]
        for d in "ac"
    ]
    assert losses[0][3:] == losses[1]


def test_a_job_that_saves_where_it_loads_can_start_and_restart(tmp_path: Path) -> None:
    same = [f"checkpoint.save={tmp_path}/ck", f"checkpoint.load={tmp_path}/ck", f"logger.run_dir={tmp_path}/run"]
    trainer(*same, "train.train_iters=3").run()
    again = trainer(*same, "train.train_iters=5")
    assert again.progress.iteration == 3
    again.run()
    with pytest.raises(UserError, match="nothing is left to do"):
        trainer(*same, "train.train_iters=5").run()


def test_such_a_job_may_begin_with_weights(tmp_path: Path) -> None:
    trainer(f"logger.run_dir={tmp_path / 'base'}", "train.train_iters=2").run()
    weights = f"checkpoint.pretrained_checkpoint={tmp_path / 'base'}"
    with pytest.raises(UserError, match="give one of them"):
        trainer(weights, f"checkpoint.load={tmp_path / 'base'}")
    same = [
        f"checkpoint.save={tmp_path}/ck",
        f"checkpoint.load={tmp_path}/ck",
        f"logger.run_dir={tmp_path}/run",
        weights,
    ]
    first = trainer(*same, "train.train_iters=3")
    begun = trainer(weights)
    for name, p in named_tensors(first.model).items():
        assert torch.equal(p, named_tensors(begun.model)[name]), name
    first.run()
    again = trainer(*same, "train.train_iters=5")
    assert again.progress.iteration == 3
    for name, p in named_tensors(again.model).items():
        assert torch.equal(p, named_tensors(first.model)[name]), name


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest", "pointer"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    trainer(f"logger.run_dir={tmp_path}", "train.train_iters=3").run()
    folder = tmp_path / "checkpoints" / "iter_0000003"
    file = folder / "rank-00000.safetensors"
    data = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(data[:-1])
    elif damage == "flip":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "remove":
        file.unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(UserError, match=r"iter_|manifest"):
        trainer(f"checkpoint.load={tmp_path}/checkpoints")


def test_a_checkpoint_of_another_geometry_is_refused(tmp_path: Path) -> None:
    trainer(f"logger.run_dir={tmp_path}", "train.train_iters=3").run()
    with pytest.raises(UserError, match=r"iter_0000003 has another geometry than .* add model.head_dim=8$"):
        trainer(f"checkpoint.load={tmp_path}", "model.head_dim=16")
    # what no shape shows: another number of heads in the same width, experts per token, a clamp
    other = ["model.mamba_num_heads=8", "model.mamba_head_dim=4", "model.num_experts_per_tok=3"]
    other += ["model.time_step_limit=[0.01,1.0]"]
    said = r"add model.mamba_num_heads=4 model.mamba_head_dim=8 model.time_step_limit=\[0.0,.inf\] .*per_tok=2$"
    for setting in ("load", "pretrained_checkpoint"):
        with pytest.raises(UserError, match=said):
            trainer(f"checkpoint.{setting}={tmp_path}", *other)
    theirs = hf_model(trainer().config.model)
    theirs.save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match=r"/hf has another geometry.* add model.num_experts_per_tok=2$"):
        trainer(f"checkpoint.pretrained_checkpoint={tmp_path}/hf", "model.num_experts_per_tok=3")


def corrupted(tmp_path: Path) -> Path:
    trainer(f"logger.run_dir={tmp_path}", "train.train_iters=3").run()
    folder = tmp_path / "checkpoints" / "iter_0000003"
    manifest = read_manifest(folder, "test")
    entry = manifest.tensors["model.layers.1.mixer.experts.up_proj"]
    (chunk,) = entry.chunks
    file = folder / chunk.file
    with safe_open(file, "pt") as f:
        tensors = {name: f.get_tensor(name) for name in list(f.keys())}
    tensors[chunk.name][2, 1, 3] = math.nan
    save_file(tensors, file)
    manifest.files[chunk.file] = FileRecord(file.stat().st_size, checksums_of(file))
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def test_a_corrupted_weight_is_found_at_the_first_step(tmp_path: Path, run_script) -> None:
    folder = corrupted(tmp_path)
    done = run_script(
        *("train.py", "--mode", "pretrain", "--preset", "tiny", *SHRINK),
        *(f"checkpoint.load={folder}", f"logger.run_dir={tmp_path / 'b'}"),
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "layers.1.mixer.experts.up_proj" in done.stderr
    assert str(folder) in done.stderr


def test_divergence_later_ends_the_run_and_names_the_checkpoint(tmp_path: Path) -> None:
    t = trainer(f"logger.run_dir={tmp_path}", "checkpoint.save_interval=2", "train.train_iters=20")
    original, calls = t._step, []

    def step():
        calls.append(1)
        if len(calls) == 4:
            with torch.no_grad():
                t.model.lm_head.weight[0, 0] = math.inf
        return original()

    t._step = step
    with pytest.raises(TrainingError, match=r"step 4.*iter_0000002"):
        t.run()


COMPACT = ["train.precision=bf16", "optimizer.moments=8bit", "optimizer.masters=none", "optimizer.gradients=bf16"]


@pytest.mark.parametrize(
    "settings", [[], COMPACT, [*COMPACT, "optimizer.clip_grad=0"]], ids=["fp32", "8bit", "no clip"]
)
@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_step_that_is_not_finite_changes_nothing(what: str, settings: list[str]) -> None:
    t = trainer("model.moe_router_bias_update_rate=0.25", *settings)
    t.first = 0
    t._step()
    if what == "loss":
        with torch.no_grad():
            t.model.layers["3"].mixer.up_proj.weight[0, 0] = math.inf
    else:
        t.model.norm_f.weight.register_hook(lambda g: g * math.inf)
    state = t.optimizer.state().items()
    held = named_tensors(t.model) | {f"{name}.{kind}": x for name, kinds in state for kind, x in kinds.items()}
    before = {n: x.detach().clone() for n, x in held.items()}
    with pytest.raises(TrainingError, match=f"the {what} is"):
        training_step(t.model, t.optimizer, batches(t), t.config, ALONE, 1e-2, False)
    for n, x in held.items():
        assert torch.equal(x, before[n]), n


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_and_ends_cleanly(tmp_path: Path, sig: signal.Signals) -> None:
    command = [sys.executable, "train.py", "--mode", "pretrain", "--preset", "tiny", *SHRINK]
    command += ["train.train_iters=100000", "dataset.num_workers=1", f"logger.run_dir={tmp_path}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **output)
    for line in process.stdout:
        if line.startswith("step") and " 4/" in line:
            os.killpg(process.pid, sig)  # data workers too: as a terminal's Ctrl-C does, and a scheduler's SIGTERM
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in rest
    assert "stopped at step" in rest
    resume = next(line for line in rest.splitlines() if "checkpoint.load=" in line)
    assert "train.py" in resume
    assert locate.find(tmp_path, "test").name.startswith("iter_")


def test_a_blend_needs_no_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its ids are what they are; a sample begins with some of them."""
    with IndexedWriter(tmp_path / "ids", np.uint8) as w:
        for _ in range(40):
            w.add(np.arange(60))
    settings = [s for s in SHRINK if s != "dataset=mock"]
    settings += [f"dataset.blend={tmp_path}/ids", "dataset.split='80,20,0'", f"logger.run_dir={tmp_path}/run"]
    settings += ["scheduler.lr_warmup_iters=1", "scheduler.lr_wsd_decay_iters=2"]
    config, _ = resolve(parser().parse_args(["--mode", "pretrain", "--preset", "tiny", *settings]))
    assert Trainer(config, "tiny", ALONE).run() == 0
    assert "tokens from a blend; run folder" in capsys.readouterr().out
