"""Checkpoints: complete or absent, verified on load, nothing ever unpickled.

    DIR/iter_0000200/   config.yaml  model.safetensors  optimizer.safetensors  manifest.json
    DIR/latest_checkpointed_iteration.txt

A checkpoint is written under a temporary name, every file flushed to disk, and renamed when it is whole; only then is
the pointer replaced.  The manifest lists size and SHA-256 of each file.  Tensors carry the names of the model's
attributes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nano3.cli import to_yaml
from nano3.config import Config, ModelConfig, UserError, merge
from nano3.model.init import allocate, named_tensors
from nano3.model.model import Nano3
from nano3.train.optim import AdamW

FORMAT = 1
POINTER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    iteration: int = 0  # optimizer steps done
    samples: int = 0
    tokens: int = 0  # tokens that carried a loss


def save(folder: Path, config: Config, model: nn.Module, optimizer: AdamW, progress: Progress) -> Path:
    """Write DIR/iter_NNNNNNN and point to it.  Raises UserError if the disk refuses."""
    final = folder / f"iter_{progress.iteration:07d}"
    temporary = folder / f".incomplete_{final.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        (temporary / "config.yaml").write_text(to_yaml(config))
        save_file(_contiguous(named_tensors(model)), temporary / "model.safetensors")
        save_file(_contiguous(optimizer.state()), temporary / "optimizer.safetensors")
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _digest(p)} for p in sorted(temporary.iterdir())}
        manifest = {"format": FORMAT, "progress": vars(progress), "files": files}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in [*temporary.iterdir(), temporary]:
            _flush(path)
        if final.exists():  # a run that went back and came here again
            shutil.rmtree(final)
        temporary.rename(final)
        pointer = folder / f".{POINTER}"
        pointer.write_text(str(progress.iteration))
        _flush(pointer)
        pointer.replace(folder / POINTER)
        _flush(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"checkpoint.save={folder}: could not write iteration {progress.iteration}: {error}; "
            "earlier checkpoints are untouched"
        ) from None
    return final


def find(path: str | Path, setting: str) -> Path:
    """The iteration folder meant by `path`: itself, or the newest one in it.  `setting` is named in errors."""
    folder = Path(path)
    for candidate in (folder, folder / "checkpoints"):  # a run folder will do as well
        if (candidate / "manifest.json").is_file():
            return candidate
        if (candidate / POINTER).is_file():
            text = (candidate / POINTER).read_text().strip()
            chosen = candidate / f"iter_{int(text):07d}" if text.isdecimal() else candidate
            if (chosen / "manifest.json").is_file():
                return chosen
            raise UserError(f"{setting}={path}: {POINTER} says {text!r}, but {chosen} is not a checkpoint")
    raise UserError(f"{setting}={path}: no checkpoint there (expected iter_NNNNNNN folders or one of them)")


def read_manifest(folder: Path, setting: str) -> Progress:
    """Check format, sizes and checksums of every file.  Raises UserError naming the first that is wrong."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        version, files, progress = manifest["format"], manifest["files"], Progress(**manifest["progress"])
        expected = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{setting}: {folder / 'manifest.json'} is damaged; use an earlier iteration") from None
    if version != FORMAT:
        raise UserError(f"{setting}: {folder} has format {version}, this version of nano3 reads {FORMAT}; update nano3")
    for name, (size, digest) in expected.items():
        path = folder / name
        if Path(name).name != name or not path.is_file() or path.stat().st_size != size or _digest(path) != digest:
            raise UserError(
                f"{setting}: {path} is missing, cut short or altered; use an earlier iteration of the same run"
            )
    return progress


def read_config(folder: Path) -> Config:
    """The configuration that a checkpoint was written with."""
    return OmegaConf.to_object(
        merge(OmegaConf.structured(Config), OmegaConf.load(folder / "config.yaml"), str(folder / "config.yaml"))
    )


def load(path: str, setting: str, model: nn.Module, optimizer: AdamW | None) -> Progress:
    """Restore model and optimizer in place from a checkpoint of the same geometry."""
    folder = find(path, setting)
    progress = read_manifest(folder, setting)
    _copy_into(named_tensors(model), folder / "model.safetensors", setting)
    if optimizer is not None:
        with safe_open(folder / "optimizer.safetensors", "pt") as f:
            optimizer.load_state({k: f.get_tensor(k) for k in f.keys()})  # noqa: SIM118  (safe_open is not a dict)
    return progress


def load_model(path: str, setting: str, device: torch.device, dtype: torch.dtype | None = None) -> tuple[Nano3, Config]:
    """A model in eval mode, built from nothing but a checkpoint; `dtype` None keeps the one it was trained in."""
    folder = find(path, setting)
    read_manifest(folder, setting)
    config = read_config(folder)
    model = build(config.model)
    with safe_open(folder / "model.safetensors", "pt") as f:
        stored = f.get_tensor("embeddings.weight").dtype
    allocate(model, device, dtype or stored)
    _copy_into(named_tensors(model), folder / "model.safetensors", setting)
    return model.eval(), config


def build(c: ModelConfig, recompute: frozenset[str] = frozenset()) -> Nano3:
    """The model without memory, on the meta device."""
    with torch.device("meta"):
        return Nano3(c, recompute)


@torch.no_grad()
def _copy_into(tensors: dict[str, Tensor], file: Path, setting: str) -> None:
    with safe_open(file, "pt") as f:
        stored = {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118
        for name in tensors.keys() | stored.keys():
            mine = tuple(tensors[name].shape) if name in tensors else None
            if mine != stored.get(name):
                raise UserError(
                    f"{setting}: {file} does not fit the model: {name} is {stored.get(name, 'absent')} there and "
                    f"{mine or 'absent'} here; use the model settings it was trained with (config.yaml beside it)"
                )
        for name, tensor in tensors.items():
            tensor.copy_(f.get_tensor(name))


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: t.detach().contiguous() for k, t in tensors.items()}


def _digest(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
