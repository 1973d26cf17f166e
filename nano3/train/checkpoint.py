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
from torch import Tensor

from nano3.cli import to_yaml
from nano3.config import Config, ModelConfig, UserError, merge
from nano3.model.init import allocate, named_tensors
from nano3.model.layout import whole_shapes
from nano3.model.model import Nano3
from nano3.parallel.mesh import ALONE, Mesh
from nano3.train.collect import STATE, take_share, whole_model, whole_state
from nano3.train.optim import AdamW

FORMAT = 1
POINTER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    iteration: int = 0  # optimizer steps done
    samples: int = 0
    tokens: int = 0  # tokens that carried a loss


def save(folder: Path, config: Config, model: Nano3, optimizer: AdamW, progress: Progress) -> Path:
    """Write DIR/iter_NNNNNNN and point to it.  Every rank calls; the first one writes the whole, whatever the layout.

    Raises UserError if the disk refuses.
    """
    final = folder / f"iter_{progress.iteration:07d}"
    optimizer.finish_gather()
    tensors, state = whole_model(model), whole_state(model, optimizer)
    if not model.mesh.is_main:
        return final
    temporary = folder / f".incomplete_{final.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        (temporary / "config.yaml").write_text(to_yaml(config))
        save_file(tensors, temporary / "model.safetensors")
        save_file(state, temporary / "optimizer.safetensors")
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


def load(path: str, setting: str, model: Nano3, optimizer: AdamW) -> Progress:
    """Restore this rank's share of model and optimizer in place from a checkpoint of the same geometry, any layout."""
    folder = find(path, setting)
    progress = read_manifest(folder, setting)
    _copy_into(model, folder / "model.safetensors", setting)
    state: dict[str, dict[str, Tensor]] = {}
    with safe_open(folder / "optimizer.safetensors", "pt") as f:
        stored = set(f.keys())
        for name in optimizer.parameters:
            state[name] = {
                kind: optimizer.shard(name, take_share(model, name, f.get_tensor(f"{name}.{kind}")))
                for kind in STATE
                if f"{name}.{kind}" in stored
            }
    optimizer.load_state(state, progress.iteration)
    return progress


def load_model(path: str, setting: str, device: torch.device, dtype: torch.dtype | None = None) -> tuple[Nano3, Config]:
    """A model in eval mode, built from nothing but a checkpoint; `dtype` None keeps the one it was trained in."""
    folder = find(path, setting)
    read_manifest(folder, setting)
    config = read_config(folder)
    model = build(config.model, mesh=Mesh(device=device))
    with safe_open(folder / "model.safetensors", "pt") as f:
        stored = f.get_tensor("embeddings.weight").dtype
    allocate(model, device, dtype or stored)
    _copy_into(model, folder / "model.safetensors", setting)
    return model.eval(), config


def build(
    c: ModelConfig,
    recompute: frozenset[str] = frozenset(),
    mesh: Mesh = ALONE,
    parts: list[tuple[int, int]] | None = None,
) -> Nano3:
    """The model without memory, on the meta device."""
    with torch.device("meta"):
        return Nano3(c, recompute, mesh, parts)


@torch.no_grad()
def _copy_into(model: Nano3, file: Path, setting: str) -> None:
    shapes = {name: tuple(shape) for name, shape in whole_shapes(model.config).items()}
    with safe_open(file, "pt") as f:
        stored = {k: tuple(f.get_slice(k).get_shape()) for k in list(f.keys())}
        for name in shapes.keys() | stored.keys():
            if shapes.get(name) != stored.get(name):
                raise UserError(
                    f"{setting}: {file} does not fit the model: {name} is {stored.get(name, 'absent')} there and "
                    f"{shapes.get(name, 'absent')} here; use the model settings it was trained with "
                    "(config.yaml beside it)"
                )
        for name, tensor in named_tensors(model).items():
            tensor.copy_(take_share(model, name, f.get_tensor(name)))


def _digest(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
