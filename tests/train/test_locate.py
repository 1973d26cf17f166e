"""Which checkpoint a path means: when one is damaged, when a run went back, when another run writes there too."""

from pathlib import Path

import pytest

import merge_lora
from nano3.config import UserError
from nano3.parallel.mesh import ALONE
from nano3.train import folders, locate, storage
from nano3.train.checkpoint import Saver
from nano3.train.storage import MANIFEST, POINTER
from tests.train.small import small, trainer
from tests.train.test_adapters import LORA

GOOD = "checkpoint.resume_from_last_good=true"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 2, 4 and 6, of which the last is damaged."""
    trainer(f"logger.run_dir={tmp_path}/run", "checkpoint.save_interval=2").run()
    (tmp_path / "run" / "checkpoints" / "iter_0000006" / MANIFEST).unlink()
    return tmp_path / "run"


@pytest.mark.parametrize("path", ["", "checkpoints", "checkpoints/iter_0000006"])
def test_whatever_path_is_given(run: Path, path: str) -> None:
    """The folder of the run, of its checkpoints, or the damaged one itself."""
    with pytest.raises(UserError, match=r"checkpoint\.load="):
        trainer(f"checkpoint.load={run / path}")
    resumed = trainer(f"checkpoint.load={run / path}", GOOD)
    assert (resumed.progress.iteration, resumed.loaded.name) == (4, "iter_0000004")


def test_a_disk_that_gives_errors_is_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    intact = storage.intact

    def failing(path: Path, record: storage.FileRecord) -> bool:
        if path.parent.name == "iter_0000004":
            raise OSError(5, "Input/output error", str(path))
        return intact(path, record)

    monkeypatch.setattr(storage, "intact", failing)
    with pytest.raises(UserError, match=r"checkpoint.load: .*iter_0000004 cannot be read: .*Input/output error"):
        trainer(f"checkpoint.load={run}/checkpoints/iter_0000004")
    assert trainer(f"checkpoint.load={run}", GOOD).progress.iteration == 2


def test_what_a_run_went_back_from_comes_last(run: Path) -> None:
    """The pointer is at step 4, which is damaged: step 2 is of this run, step 5 of what was given up."""
    folder = run / "checkpoints"
    (folder / "iter_0000006").rename(folder / "iter_0000009")
    trainer(f"checkpoint.load={folder}/iter_0000004", f"checkpoint.save={folder}", "train.train_iters=5").run()
    (folder / POINTER).write_text("4")
    (folder / "iter_0000004" / MANIFEST).write_text("{")
    assert [p.name[-1] for p in locate.candidates(run, folder / "iter_0000004")] == ["2", "9", "5"]
    assert trainer(f"checkpoint.load={run}", GOOD).progress.iteration == 2
    (folder / "iter_0000002" / MANIFEST).unlink()
    assert trainer(f"checkpoint.load={run}", GOOD).progress.iteration == 5


def test_the_tokenizer_comes_from_what_is_loaded(run: Path) -> None:
    """Not from the damaged checkpoint, and not by a path that is looked up again."""
    (run / "checkpoints" / "iter_0000006" / "config.yaml").write_text("{")
    settings = ["model.vocab_size=256", "tokenizer.tokenizer_model=auto"]
    assert trainer(f"checkpoint.load={run}", GOOD, *settings).progress.iteration == 4


def test_adapters_keep_their_base_when_its_run_goes_on(tmp_path: Path) -> None:
    """They were trained beside the weights of one step; the folder has others soon."""
    base, lora = tmp_path / "base", tmp_path / "lora"
    trainer(f"logger.run_dir={base}").run()
    given = f"checkpoint.pretrained_checkpoint={base}/checkpoints"
    trainer(given, *LORA, f"logger.run_dir={lora}").run()
    merge = ["--lora-checkpoint", str(lora / "checkpoints"), "--no-progress"]
    assert merge_lora.main([*merge, "--output", str(tmp_path / "a")]) == 0
    trainer(f"checkpoint.load={base}", f"logger.run_dir={base}", "train.train_iters=8").run()
    more = ["train.train_iters=8", f"logger.run_dir={tmp_path}/more"]
    for again in (given, f"checkpoint.pretrained_checkpoint={base}"):
        resumed = trainer(f"checkpoint.load={lora}", again, *LORA, *more)
        assert resumed.recipe.base == f"{base}/checkpoints/iter_0000006"
    for i, where in enumerate([[], ["--pretrained", str(base)]]):
        assert merge_lora.main([*merge, *where, "--output", str(tmp_path / f"b{i}")]) == 0
        files = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("a", f"b{i}")]
        assert files[0] == files[1]


def test_adapters_are_not_saved_over_their_base(tmp_path: Path) -> None:
    """The base may be known from their recipe alone."""
    base, lora = tmp_path / "base", tmp_path / "lora"
    trainer(f"logger.run_dir={base}").run()
    given = f"checkpoint.pretrained_checkpoint={base}"
    trainer(given, *LORA, f"logger.run_dir={lora}", "train.train_iters=4").run()
    again = trainer(*LORA, f"checkpoint.load={lora}", f"checkpoint.save={base}/checkpoints", f"logger.run_dir={lora}2")
    with pytest.raises(UserError, match=r"holds the weights that the run starts from, .*iter_0000006; save elsewhere"):
        again.run()


def test_a_job_that_waited_for_another_does_not_begin_before_its_end(tmp_path: Path) -> None:
    """It looked for a checkpoint before the other saved its last."""
    where = [f"checkpoint.save={tmp_path}/save", f"checkpoint.load={tmp_path}/save", f"logger.run_dir={tmp_path}/run"]
    first, second = trainer(*where, "train.train_iters=2"), trainer(*where, "train.train_iters=5")
    first.run()
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"another run has saved there meanwhile; start again"):
        second.run()
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    assert trainer(*where, "train.train_iters=5").run() == 0


def test_data_workers_do_not_keep_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "PATIENCE", 0.1)
    where = [f"checkpoint.save={tmp_path}/save", "train.train_iters=2", "dataset.num_workers=2"]
    runs = [trainer(f"logger.run_dir={tmp_path}/{name}", *where) for name in "ab"]
    assert [t.run() for t in runs] == [0, 0]


def test_two_runs_do_not_save_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would write the other's temporary names: one checkpoint of both."""
    monkeypatch.setattr(folders, "PATIENCE", 0.1)
    where = [f"checkpoint.save={tmp_path}/save", "train.train_iters=2"]
    first, second = (trainer(f"logger.run_dir={tmp_path}/{name}", *where) for name in "ab")
    step = first._step

    def meanwhile():
        with pytest.raises(UserError, match=r"checkpoint\.save=.*save: another run is saving there"):
            second.run()
        return step()

    first._step = meanwhile
    first.run()
    second.run()  # now it may


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    """A job that is replaced may take a moment to end; ranks of one run ask once."""
    config = small(f"checkpoint.save={tmp_path}")
    with folders.hold(tmp_path, config, ALONE):
        pass
    with folders.hold(tmp_path, config, ALONE):
        assert (tmp_path / ".lock").exists()


def test_folders_of_others_are_not_replaced(tmp_path: Path) -> None:
    theirs = tmp_path / "iter_0000006"
    theirs.mkdir()
    (theirs / "mp_rank_00.pt").write_text("Megatron's")
    with pytest.raises(UserError, match=r"iter_0000006, which nano3 did not write"):
        trainer(f"checkpoint.save={tmp_path}", f"logger.run_dir={tmp_path}/run").run()
    t = trainer()
    saver = Saver(tmp_path, t.config, ALONE)
    saver.save(t.model, t.optimizer, storage.Progress(6))
    with pytest.raises(UserError, match=r"could not write: .*iter_0000006 is there and is not nano3's"):
        saver.wait()
    assert (theirs / "mp_rank_00.pt").read_text() == "Megatron's"


def test_an_error_waits_for_the_save_that_is_under_way(tmp_path: Path) -> None:
    """A rank of several leaves without Python's finalisation, and takes its threads with it."""
    t = trainer(f"logger.run_dir={tmp_path}", "checkpoint.save_interval=2", "checkpoint.async_save=true")
    step = t._step

    def fails():
        if t.progress.iteration == 2:
            assert t.saver.pending is not None
            raise UserError("a broken record")
        return step()

    t._step = fails
    with pytest.raises(UserError, match="a broken record"):
        t.run()
    assert t.saver.pending is None
    assert (tmp_path / "checkpoints" / "iter_0000002" / MANIFEST).is_file()


def test_a_log_that_cannot_be_written_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    assert trainer(f"logger.run_dir={tmp_path}").run() == 0
    assert capsys.readouterr().out.count("metrics.jsonl cannot be written to: [Errno 28]") == 1


def test_a_line_that_a_kill_cut_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "tr')
    trainer(f"logger.run_dir={tmp_path}", "train.train_iters=1").run()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[0] == '{"kind": "tr'
    assert len(lines) > 2
    assert all(line.endswith("}") for line in lines[1:])
