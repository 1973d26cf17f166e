"""Where a run writes, and the command that goes on from there."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from nano3.cli import to_yaml
from nano3.config import Config, UserError
from nano3.lock import locked
from nano3.parallel.mesh import Mesh, first_says
from nano3.train import locate, storage


def make_folder(asked: str | None, name: str) -> Path:
    """The folder asked for, or runs/NAME, numbered so that no earlier run is written over."""
    folder, n = Path(asked or f"runs/{name}"), 1
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=asked is not None)
            return folder
        except OSError as error:
            if asked is not None or not isinstance(error, FileExistsError):
                raise UserError(f"logger.run_dir={folder}: cannot be created: {error}") from None
        n += 1
        folder = Path(f"runs/{name}-{n}")


def check_save(config: Config, save: Path, first: int, base: str | None) -> None:
    """Raise UserError where checkpoints cannot be written, or would take the place of what the run starts from, or of
    folders that are not ours."""
    ours = base is not None and locate.is_ours(base)
    if ours and locate.find(base, "the weights that the run starts from").parent.resolve() == save.resolve():
        raise UserError(f"checkpoint.save={save} holds the weights that the run starts from, {base}; save elsewhere")
    if theirs := [p for p in storage.iterations(save) if int(p.name[5:]) > first and storage.foreign(p)]:
        raise UserError(
            f"checkpoint.save={save} holds {theirs[0].name}, which nano3 did not write and a save may replace; save "
            "elsewhere, or move it away"
        )
    probe = save / f".probe.{os.getpid()}"
    try:
        save.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(f"checkpoint.save={save}: cannot be written to: {error}") from None


def run_folders(config: Config, name: str, mesh: Mesh, first: int = 0, base: str | None = None) -> tuple[Path, Path]:
    """Where a run writes, and where its checkpoints.  The first rank makes them and tells the others, who would find
    them made and take them for an earlier run's.  first: steps done.  base: the weights that it starts from, or that
    its adapters belong to."""

    def make() -> tuple[Path, Path]:
        folder = make_folder(config.logger.run_dir, name)
        save = Path(config.checkpoint.save or folder / "checkpoints")
        if config.checkpoint.save_interval >= 0:
            check_save(config, save, first, base)
        return folder, save

    return first_says(mesh, make)


def write_settings(folder: Path, config: Config, mesh: Mesh) -> None:
    """config.yaml of a run, in one piece.  Raises UserError on every rank."""

    def write() -> None:
        settings = folder / "config.yaml"
        temporary = settings.with_name(f".{settings.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(to_yaml(config))
            temporary.replace(settings)
        except OSError as error:
            raise UserError(f"logger.run_dir={folder}: cannot be written to: {error}") from None

    first_says(mesh, write)


PATIENCE = 10.0  # seconds in which a job that is being replaced may end


@contextlib.contextmanager
def hold(save: Path, config: Config, mesh: Mesh) -> Iterator[None]:
    """Keep other runs out of the folder of checkpoints: two that write the same names would make one of both.

    Raises UserError on every rank.
    """
    with contextlib.ExitStack() as stack:
        if config.checkpoint.save_interval >= 0:
            refusal = f"checkpoint.save={save}: another run is saving there; wait for its end, or save elsewhere"
            first_says(mesh, lambda: stack.enter_context(locked(save / ".lock", refusal, PATIENCE)))
        yield


def resume_command(config: Config, name: str, settings: Path, checkpoints: Path, world: int) -> str:
    """What goes on from the last checkpoint, on as many ranks."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    nodes = [f"--nnodes={world // here}", "--rdzv-backend=c10d", "--rdzv-endpoint=HEAD:29400"]
    nodes = ["--standalone"] if here == world else nodes
    words = ["python"] if world == 1 else ["torchrun", *nodes, f"--nproc-per-node={here}"]
    words += ["train.py", "--mode", config.mode, "--preset", name, "--config-file", str(settings)]
    words.append(f"checkpoint.load={checkpoints}")
    if config.checkpoint.pretrained_checkpoint is not None and not config.peft.adapts:
        words.append("checkpoint.pretrained_checkpoint=null")  # where the run began, which the settings still name
    return shlex.join(words)
