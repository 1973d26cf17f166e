"""Where a run writes, and the command that goes on from there."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import torch.distributed as dist

from nano3.config import Config, UserError
from nano3.parallel.mesh import Mesh
from nano3.train import checkpoint


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


def check_save(config: Config, save: Path) -> None:
    """Raise UserError where checkpoints cannot be written, or would take the place of what the run starts from."""
    base, setting = config.checkpoint.pretrained_checkpoint, "checkpoint.pretrained_checkpoint"
    ours = base is not None and checkpoint.is_ours(base)
    if ours and checkpoint.find(base, setting).parent.resolve() == save.resolve():
        raise UserError(f"checkpoint.save={save} holds the weights that {setting}={base} names; save elsewhere")
    probe = save / f".probe.{os.getpid()}"
    try:
        save.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(f"checkpoint.save={save}: cannot be written to: {error}") from None


def run_folders(config: Config, name: str, mesh: Mesh) -> tuple[Path, Path]:
    """Where a run writes, and where its checkpoints.  The first rank makes them and tells the others, who would find
    them made and take them for an earlier run's."""
    told: list[object] = [None]
    if mesh.is_main:
        try:
            folder = make_folder(config.logger.run_dir, name)
            save = Path(config.checkpoint.save or folder / "checkpoints")
            if config.checkpoint.save_interval >= 0:
                check_save(config, save)
            told = [(folder, save)]
        except UserError as error:
            told = [error]
    if mesh.host is not None:
        dist.broadcast_object_list(told, src=0, group=mesh.host)
    if isinstance(told[0], UserError):
        raise told[0]
    return told[0]


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
