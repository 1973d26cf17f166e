"""Training checkpoints: any layout writes them, any other reads them; complete or absent, verified on load.

The engine is torch.distributed.checkpoint: it plans who writes and who reads which box of which tensor.  Its plans and
its files are ours (`storage.py`): a rank contributes the rows of each tensor that it owns, weights as well as
optimizer state, so nothing is written twice and nothing is gathered.

What is not stored needs no storing: the learning rate and the batches are functions of the samples seen, and training
draws no random numbers after initialisation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from nano3 import hf
from nano3.cli import to_yaml
from nano3.config import Config, ModelConfig, PeftConfig, TokenizerConfig, UserError, merge
from nano3.data.corpus import is_supervised, tokenizer_name
from nano3.model.init import allocate, named_tensors
from nano3.model.layout import Piece, pieces, split_of, whole_shapes
from nano3.model.lora import adapted, attach, in_fp8, kept
from nano3.model.model import Nano3
from nano3.parallel.mesh import ALONE, Mesh
from nano3.train import locate, storage
from nano3.train.engine import read, write
from nano3.train.locate import open_verified
from nano3.train.optim import AdamW
from nano3.train.storage import MANIFEST, Container, Manifest, Progress

RECIPE = "adapter.json"  # marks a checkpoint that holds adapters alone (`nano3/adapters.py`)


class Saver:
    """Writes checkpoints into one folder, in the background if asked to; every rank of a run has one.

    extra: further small text files of each.
    """

    def __init__(self, folder: Path, config: Config, mesh: Mesh, extra: dict[str, str] | None = None) -> None:
        self.folder, self.config, self.mesh, self.extra = folder, config, mesh, extra or {}
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future[Path] | None = None
        self.last: Path | None = None  # the newest that is complete

    def save(self, model: Nano3, optimizer: AdamW, progress: Progress) -> None:
        """Copy this rank's share to the CPU and start to write it; `wait`, or the next save, ends that."""
        self.wait()
        optimizer.finish_gather()
        shares: dict[str, list[Piece]] = {}
        for p in owned(model, optimizer):
            shares.setdefault(p.key, []).append(p._replace(tensor=p.tensor.to("cpu", copy=True)))
        self.pending = self.thread.submit(self._write, shares, progress)
        if not self.config.checkpoint.async_save:
            self.wait()

    def wait(self) -> None:
        """Until what was started is written.  Raises UserError if the disk refused; earlier checkpoints are whole."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        try:
            self.last = pending.result()
        except CheckpointException as error:
            cause = next((e for e, _ in error.failures.values()), error)
            raise UserError(
                f"checkpoint.save={self.folder}: could not write: {cause}; earlier checkpoints are untouched"
            ) from None

    def _write(self, shares: dict[str, list[Piece]], progress: Progress) -> Path:
        final = self.folder / f"iter_{progress.iteration:07d}"
        write(final, shares, progress, {"config.yaml": to_yaml(self.config), **self.extra}, self.mesh)
        if self.mesh.is_main:
            self._retire(final)
        return final

    def _retire(self, newest: Path) -> None:
        """Delete what checkpoint.most_recent_k and save_retain_interval do not keep, of checkpoints of ours: Megatron's
        folders have the same names.  The interval alone keeps its multiples and the newest, as it does there."""
        c = self.config.checkpoint
        newest_k = 1 if c.most_recent_k < 0 and c.save_retain_interval else c.most_recent_k
        if newest_k < 0:
            return
        everything = [p for p in storage.iterations(self.folder) if (p / MANIFEST).is_file()]
        done = everything[: everything.index(newest) + 1]
        for old in done[: max(0, len(done) - newest_k)]:
            if not (c.save_retain_interval and int(old.name[5:]) % c.save_retain_interval == 0):
                with contextlib.suppress(OSError):
                    storage.remove(old)


def owned(model: Nano3, optimizer: AdamW) -> Iterator[Piece]:
    """This rank's share of a checkpoint: its rows of every tensor, and of its masters and moments.

    With adapters only what training changes: the base weights stay where they came from.
    """
    mesh, state = model.mesh, optimizer.state()
    for name, tensor in named_tensors(model).items():
        local = tensor.shape
        if not kept(name, model.peft):
            continue
        split = split_of(name, model.config, mesh.tp.size)
        dense = split is None or split.axis == "tp"
        if dense and (mesh.tp.rank if split is None else split.copies > 1 and mesh.kv.rank) > 0:
            continue  # the same as another rank's
        if name not in optimizer.members:  # a buffer or frozen: the same, and whole, on each rank of its axis
            if optimizer.axis(name).rank == 0:
                yield from _named("model", name, tensor.detach(), 0, local, model)
            continue
        first = optimizer.first_row(name)
        yield from _named("model", name, optimizer.shard(name, tensor.detach()), first, local, model)
        for kind, share in state[name].items():
            yield from _named(kind, name, share, first, _like(share, local), model)


def _like(share: Tensor, local: torch.Size) -> torch.Size:
    """The shape of what a rank's part of a tensor has of this kind: scales are fewer than elements."""
    return torch.Size((local[0], *share.shape[1:]))


def _named(kind: str, name: str, held: Tensor, first: int, local: torch.Size, model: Nano3) -> Iterator[Piece]:
    for piece in pieces(name, held, first, local, model):
        if piece.tensor.numel():
            yield piece._replace(key=f"{kind}.{piece.key}")


def wanted(
    model: Nano3,
    optimizer: AdamW | None,
    keys: Collection[str],
    steps: int = 0,
    choose: Callable[[str], bool] = lambda name: True,
) -> dict[str, list[Piece]]:
    """What this rank reads, as views to be filled: all of its model, and its rows of the optimizer's state; or that of
    the tensors whose names are chosen.

    keys: what the checkpoint holds.  A weight that is kept in full precision here comes from the master if there is
    one, a master that was never apart from its weight from the weight: precision is not lost by a change of dtype.
    """
    found: list[Piece] = []
    for name, tensor in named_tensors(model).items():
        for piece in _named("model", name, tensor.detach(), 0, tensor.shape, model) if choose(name) else ():
            master = piece.key.replace("model.", "master.", 1)
            full = optimizer is not None and tensor.dtype.itemsize >= 4 and master in keys
            found.append(piece._replace(key=master) if full else piece)
    if optimizer is not None:
        stored = "8bit" if any(k.startswith("exp_avg_scale.") for k in keys) else "wide"
        for name, state in optimizer.resume_state(steps, stored).items():
            local, first = optimizer.parameters[name].shape, optimizer.first_row(name)
            for kind, share in state.items() if choose(name) else ():
                for piece in _named(kind, name, share, first, _like(share, local), model):
                    weight = piece.key.replace("master.", "model.", 1)
                    found.append(piece if piece.key in keys else piece._replace(key=weight))
    out: dict[str, list[Piece]] = {}
    for piece in found:
        out.setdefault(piece.key, []).append(piece)
    return out


def read_config(folder: Path) -> Config:
    """The configuration that a checkpoint was written with.  Raises UserError if its file is not there or damaged."""
    path = folder / "config.yaml"
    try:
        given = OmegaConf.load(path)
    except Exception as error:  # the YAML reader has many exceptions
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    return OmegaConf.to_object(merge(OmegaConf.structured(Config), given, str(path)))


def load(path: str | Path, setting: str, model: Nano3, optimizer: AdamW | None) -> Progress:
    """Find a checkpoint, verify it and restore it."""
    return restore(*open_verified(path, setting, model.mesh), setting, model, optimizer)


@torch.no_grad()
def restore(folder: Path, manifest: Manifest, setting: str, model: Nano3, optimizer: AdamW | None) -> Progress:
    """Fill this rank's share of model and optimizer from a checkpoint of the same geometry, any layout.

    Of a model with adapters these and their optimizer state; `load_weights` has brought the base.
    """
    check_geometry(manifest, model, folder, setting, partial(kept, peft=model.peft))
    steps = manifest.progress.iteration
    shares = wanted(model, optimizer, manifest.tensors, steps, partial(kept, peft=model.peft))
    if absent := sorted(k for k in shares if k not in manifest.tensors):
        raise UserError(
            f"{setting}: {folder} has weights only ({absent[0]} is missing); start a new run from it with "
            "checkpoint.pretrained_checkpoint"
        )
    read(Container(folder, manifest), shares, model.mesh)
    if optimizer is not None:
        optimizer.resumed()
    return manifest.progress


@torch.no_grad()
def load_weights(path: str, setting: str, model: Nano3, optimizer: AdamW | None) -> None:
    """Start a new run from the weights of one of our checkpoints or of a Hugging Face folder or id.

    Masters have the precision that is there.  A rank reads its share only.  Adapters are left as they are, and so are
    weights in FP8 (`nano3.adapters.load_base`).
    """

    def base(name: str) -> bool:
        return _of_the_base(name) and not in_fp8(name, model.peft)

    if not locate.is_ours(path):
        source = hf.open_model(hf.find_model(path, setting=setting))
        _same_geometry(source.config, model.config, f"{setting}={path}")
        for found in wanted(model, optimizer, (), choose=base).values():
            for piece in found:
                piece.tensor.copy_(source.read(piece.name, piece.index))
        source.close()
        return
    folder, manifest = open_verified(path, setting, model.mesh)
    refuse_adapters(folder, setting)
    check_geometry(manifest, model, folder, setting, _of_the_base)
    # Beside adapters the base is what the checkpoint gives as its weights: a merge, later, will take these too.
    keys = () if model.peft.adapts else manifest.tensors
    read(Container(folder, manifest), wanted(model, optimizer, keys, choose=base), model.mesh)


def _of_the_base(name: str) -> bool:
    return adapted(name) is None


def refuse_adapters(folder: Path, setting: str) -> None:
    """Raise UserError if a checkpoint holds adapters alone."""
    if (folder / RECIPE).is_file():
        raise UserError(
            f"{setting}: {folder} holds adapters, not a model; give the model they were trained on, or make one of "
            f"both: python merge_lora.py --hf-model-path BASE --lora-checkpoint {folder} --output OUT"
        )


def choose_tokenizer(config: Config, source: str | None) -> None:
    """Let tokenizer.tokenizer_model=auto be that of the checkpoint `source`, with what its settings say of its file;
    the new checkpoint then says it too."""
    if config.tokenizer.tokenizer_model == "auto" and is_supervised(config) and source is not None:
        theirs, unset = tokenizer_in(source), TokenizerConfig()
        given = {k: v for k, v in vars(config.tokenizer).items() if v != getattr(unset, k)}
        config.tokenizer = replace(theirs, **given)


def tokenizer_in(path: str) -> TokenizerConfig:
    """The tokenizer that belongs to a checkpoint or a Hugging Face folder or id; `auto` if it has none."""
    if not locate.is_ours(path):
        return TokenizerConfig(tokenizer_model=path)
    folder = locate.find(path, "tokenizer.tokenizer_model=auto")
    if any((folder / "hf" / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return TokenizerConfig(tokenizer_model=str(folder / "hf"))  # it was imported with it
    config = read_config(folder)
    name = tokenizer_name(config)
    return TokenizerConfig() if name == "none" else replace(config.tokenizer, tokenizer_model=name)


def _same_geometry(theirs: ModelConfig, ours: ModelConfig, where: str) -> None:
    """Raise UserError if weights belong to another model, in what no shape shows either: heads, experts per token."""
    if other := [k for k in hf.GEOMETRY if vars(theirs)[k] != vars(ours)[k]]:
        settings = " ".join(f"model.{k}={_typed(vars(theirs)[k])}" for k in other)
        raise UserError(
            f"{where} has another geometry than the model here; use the preset that fits, or add {settings}"
        )


def _typed(value: object) -> str:
    """A value as it is given on the command line."""
    return f"[{','.join(map(_typed, value))}]" if isinstance(value, list) else str(value).replace("inf", ".inf")


def check_geometry(
    manifest: Manifest, model: Nano3, folder: Path, setting: str, choose: Callable[[str], bool] = lambda name: True
) -> None:
    """Raise UserError if the checkpoint's weights are not those of this model, or the chosen ones of them."""
    _same_geometry(read_config(folder).model, model.config, f"{setting}: {folder}")
    here: dict[str, tuple[int, ...]] = {}
    for name, shape in whole_shapes(model.config, model.peft).items():
        if not choose(name):
            continue
        split = split_of(name, model.config, 1)
        for component, size in zip(split.names, split.pieces, strict=True) if split else [("", shape[0])]:
            key = f"model.{name}.{component}" if component else f"model.{name}"
            here[key] = (size, *shape[1:]) if split is not None and split.dim == 0 else tuple(shape)
    there = {k: e.shape for k, e in manifest.tensors.items() if k.startswith("model.")}
    for key in sorted(here.keys() | there.keys()):
        if here.get(key) != there.get(key):
            raise UserError(
                f"{setting}: {folder} does not fit the model: {key.removeprefix('model.')} is "
                f"{there.get(key, 'absent')} there and {here.get(key, 'absent')} here; use the model and "
                "peft settings it was trained with (config.yaml beside it)"
            )


def load_model(path: str, setting: str, device: torch.device, dtype: torch.dtype | None = None) -> tuple[Nano3, Config]:
    """A model in eval mode, built from nothing but a checkpoint; `dtype` None keeps the one it was trained in."""
    folder, manifest = open_verified(path, setting)
    refuse_adapters(folder, setting)
    config = read_config(folder)
    model = build(config.model, mesh=Mesh(device=device))
    allocate(model, device, dtype or manifest.tensors["model.embeddings.weight"].dtype)
    check_geometry(manifest, model, folder, setting)
    with torch.no_grad():
        read(Container(folder, manifest), wanted(model, None, manifest.tensors), model.mesh)
    return model.eval(), config


def build(
    c: ModelConfig,
    recompute: frozenset[str] = frozenset(),
    mesh: Mesh = ALONE,
    parts: list[tuple[int, int]] | None = None,
    peft: PeftConfig | None = None,
) -> Nano3:
    """The model without memory, on the meta device, with its adapters if it has any."""
    with torch.device("meta"):
        model = Nano3(c, recompute, mesh, parts)
        if peft is not None:
            attach(model, peft)
        return model
