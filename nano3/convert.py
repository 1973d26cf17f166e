"""Weights from Hugging Face's form into ours and back, to the bit, in the memory of a few buffers.

A model is a list of tensors, a file a list of those, and a tensor a sequence of byte ranges in the files of the other
side: both directions copy ranges, file by file, several files at once.  What is finished is noted in a journal, and a
run after a kill goes on from there.  Only a change of dtype looks at the numbers.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from nano3.blocks import BLOCK, blocks_in, checksum_of, checksums_of, expected
from nano3.config import ModelConfig, UserError
from nano3.convert_jobs import Job, Meter, Written, check_space, journal_of, journal_says, journalled
from nano3.hf import (
    FLOATS,
    FP32,
    GEOMETRY,
    Part,
    Source,
    Stored,
    config_json,
    is_experts,
    open_model,
    our_name,
    read_config,
    released_name,
    shapes,
    small_files,
)
from nano3.hf_files import INDEX, SINGLE, Files, Span, Target, is_file_of, read_folder, read_header, write_safetensors
from nano3.model.layout import split_of
from nano3.train import checkpoint, locate
from nano3.train.storage import (
    DTYPES,
    MANIFEST,
    NAMES,
    POINTER,
    Entry,
    FileRecord,
    Item,
    Manifest,
    Progress,
    commit,
    flush,
    foreign,
    intact,
    manifest_of,
    read_manifest,
    temporary_folder,
    verify,
    write_file,
)

IMPORT_SHARD = 2_000_000_000  # bytes; a killed run repeats at most one file per worker
EXPORT_SHARD = 5_000_000_000  # as released
INCOMPLETE = ".incomplete"  # where an export lies, in its folder, until it is whole
STALE = (  # of an older model in the folder of an export: would be read together with the new one
    *("*.safetensors", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "chat_template*", "*.tiktoken"),
)
T = TypeVar("T")
Stamp = list[tuple[str, int, int]]  # files with sizes and times


@dataclass(frozen=True)
class Options:
    """What import and export have in common."""

    dtype: str | None = None  # safetensors' name
    max_shard_size: int | None = None  # bytes
    overwrite: bool = False
    dry_run: bool = False
    drop_mtp: bool = False
    workers: int = 2  # files written at once


def components(name: str, rows: int, c: ModelConfig) -> list[tuple[str, int, int]]:
    """A tensor of ours with so many rows -> its keys in a checkpoint, each with its first row and the one after its
    last: in_proj and the convolution lie there by component, so that any tensor-parallel layout can read its part."""
    split = split_of(name, c, 1)
    if split is None or len(split.pieces) == 1:
        return [(f"model.{name}", 0, rows)]
    out, start = [], 0
    for component, size in zip(split.names, split.pieces, strict=True):
        out.append((f"model.{name}.{component}", start, start + size))
        start += size
    return out


def open_checkpoint(path: str | Path, setting: str, strict: bool = True) -> tuple[Source, Manifest]:
    """The weights in a checkpoint of ours as a source, and its manifest.

    Reads the manifest, headers and the small files, no tensor and no checksum of one.  strict: see `open_model`.
    """
    folder = locate.find(path, setting)
    checkpoint.refuse_adapters(folder, setting)
    manifest = read_manifest(folder, setting)
    tensor_files = sorted({chunk.file for entry in manifest.tensors.values() for chunk in entry.chunks})
    small = {name: record for name, record in manifest.files.items() if name not in tensor_files}
    verify(folder, replace(manifest, files=small), setting)
    try:
        config = checkpoint.read_config(folder).model
        config.validate()
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}: {folder / 'config.yaml'} cannot be read: {' '.join(str(error).split())}") from None
    spans = {file: read_header(folder / file) for file in tensor_files}

    def parts_of(entry: Entry, base: int = 0) -> Iterator[Part]:
        """base: the row of the tensor at which the entry begins."""
        for chunk in entry.chunks:
            span = spans[chunk.file].get(chunk.name)
            if span is None or (span.shape, span.dtype) != (chunk.shape, NAMES[entry.dtype]):
                raise UserError(f"{setting}: {folder / chunk.file} does not hold {chunk.name} as {MANIFEST} says")
            yield Part(span, (chunk.offsets[0] + base, *chunk.offsets[1:]), chunk.shape)

    entries = {k: e for k, e in manifest.tensors.items() if k.startswith("model.")}
    state = {
        k: Stored(NAMES[e.dtype], e.shape, list(parts_of(e))) for k, e in manifest.tensors.items() if k not in entries
    }
    tensors, problems = {}, []
    for name, shape in shapes(config).items():
        parts, dtypes = [], set()
        for key, start, stop in components(name, shape[0], config):
            entry = entries.pop(key, None)
            if entry is None or entry.shape != (stop - start, *shape[1:]):
                found = f"has the shape {list(entry.shape)}" if entry else "is missing"
                problems.append(f"{key} {found}, config.yaml makes it {[stop - start, *shape[1:]]}")
                continue
            dtypes.add(NAMES[entry.dtype])
            parts += parts_of(entry, start)
        if len(dtypes) == 1:
            tensors[name] = Stored(dtypes.pop(), shape, parts)
        elif dtypes:
            problems.append(f"the components of {name} differ in dtype")
    if entries:
        problems.append(f"{len(entries)} unexpected tensors: {', '.join(list(entries)[:3])}")
    if strict and problems:
        raise UserError(
            f"{setting}: {folder}: {problems[0]}" + (f" (and {len(problems) - 1} more)" if problems[1:] else "")
        )
    done = manifest.progress.iteration
    about = f"checkpoint of nano3, iteration {done}" + ("" if state else ", weights only")
    return Source(folder, config, tensors, problems, about, state), manifest


def new_dtype(name: str, there: str, asked: str | None) -> str:
    """The dtype of a tensor after a conversion with --dtype: what is in fp32 for its own sake stays so."""
    if asked is None or (there == "F32" and name.rsplit(".", 1)[-1] in FP32):
        return there
    return asked


def cast(blocks: Iterable[memoryview], name: str, old: str, new: str) -> Iterator[memoryview]:
    """The elements in another dtype, rounded to nearest.  Raises UserError if a number does not fit."""
    for block in blocks:
        before = torch.frombuffer(block, dtype=DTYPES[old])
        after = rounded(before, DTYPES[new])
        if (after.isinf() & ~before.isinf()).any():
            asked = str(after.dtype).removeprefix("torch.")
            wider = "float32" if new == "BF16" else "bfloat16 or float32"
            raise UserError(f"--dtype {asked}: {name} has numbers beyond {asked}'s range; use {wider}")
        yield memoryview(after.view(torch.uint8).numpy())


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To another dtype, rounded once to the nearest.  torch goes from float64 to 16 bits through float32, twice."""
    return (_to_odd(x) if x.dtype == torch.float64 and dtype.itemsize == 2 else x).to(dtype)


def _to_odd(x: Tensor) -> Tensor:
    """float64 -> float32, cut off towards zero and with the last bit set if anything was lost, so that rounding to 16
    bits after it is rounding once."""
    y = x.float()
    bits = y.view(torch.int32)
    bits -= (y.double().abs() > x.abs()).int()
    bits |= (y.double() != x).int()
    return y


def stream(source: Source, name: str, rows: slice, dtype: str) -> Iterator[memoryview]:
    """The bytes of some rows of a tensor, in `dtype`."""
    there = source.tensors[name].dtype
    blocks = source.stream(name, rows)
    return blocks if there == dtype else cast(blocks, name, there, dtype)


def in_files(things: list[T], size: Callable[[T], int], limit: int) -> list[list[T]]:
    """Consecutive things in groups of at most `limit` bytes; a larger thing is a group of its own."""
    groups: list[list[T]] = []
    room = 0
    for thing in things:
        if not groups or size(thing) > room:
            groups.append([])
            room = limit
        groups[-1].append(thing)
        room -= size(thing)
    return groups


def import_model(model: Path, out: Path, options: Options, meter: Meter) -> str:
    """Write DIR/iter_0000000 from a Hugging Face folder; `hf/` in it keeps the small files.  Returns what was done."""
    source = open_model(model, drop_mtp=options.drop_mtp)
    items = []
    for name, stored in source.tensors.items():
        dtype = new_dtype(name, stored.dtype, options.dtype)
        for key, start, stop in components(name, stored.shape[0], source.config):
            shape = (stop - start, *stored.shape[1:])
            data = partial(stream, source, name, slice(start, stop), dtype)
            items.append(Item(key, DTYPES[dtype], shape, (0,) * len(shape), shape, data))
    groups = in_files(items, lambda item: item.bytes, options.max_shard_size or IMPORT_SHARD)
    written = {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}
    final = out / "iter_0000000"
    total = sum(item.bytes for item in items)
    what = f"{len(items):,} tensors, {total:,} bytes in {len(groups)} files: {model} -> {final}"
    temporary = temporary_folder(final)
    plan = {"source": stamp(source), "files": {f: [(i.key, NAMES[i.dtype]) for i in g] for f, g in written.items()}}
    if final.is_dir() and not temporary.exists() and not options.overwrite and journal_says(temporary, plan).publishing:
        if not options.dry_run:  # a kill between the last rename and the end
            journal_of(temporary).unlink()
        return f"imported already: {what}"
    _check_import_folder(model, out, final, options.overwrite)
    if options.dry_run:
        check_space(out, total)
        return f"would import {what}"
    jobs = [
        Job(
            file,
            sum(item.bytes for item in group),
            write=lambda path, progress, group=group: list(write_file(path, group, progress)),
            check=lambda path, record: list(FileRecord(path.stat().st_size, checksums_of(path))) == record,
        )
        for file, group in written.items()
    ]
    with journalled(temporary, plan, jobs, options.workers, meter) as done:
        shutil.rmtree(temporary / "hf", ignore_errors=True)
        (temporary / "hf").mkdir()
        for path in small_files(model):
            shutil.copyfile(path, temporary / "hf" / path.name)
        (temporary / "config.yaml").write_text(OmegaConf.to_yaml({"model": OmegaConf.structured(source.config)}))
        pairs = {file: (FileRecord(*done.records[file]), group) for file, group in written.items()}
        done.publishing()
        commit(temporary, final, manifest_of(Progress(), pairs))
    source.close()
    return f"imported {what}\n{done}"


def _check_import_folder(model: Path, out: Path, final: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--megatron-path {out} is a file; give a folder")
    others = [p.name for p in out.glob("iter_*") if p != final]
    if others or (out / "checkpoints" / POINTER).exists():
        held = f"a run's checkpoints ({max(others)})" if others else "a run"
        raise UserError(f"--megatron-path {out} holds {held}; import into a new folder")
    if out.resolve() == model.resolve():
        raise UserError(f"--megatron-path {out} is the model's own folder; import into a new one")
    if foreign(final):
        raise UserError(f"--megatron-path {out}: {final} is there and is not nano3's; import into a new folder")
    if final.exists() and not overwrite:
        raise UserError(f"--megatron-path {out} holds an import already; add --overwrite to replace it")


def export_model(model: Path | None, path: str, out: Path, options: Options, meter: Meter) -> str:
    """Write a Hugging Face folder from a checkpoint: released names, dtypes of `model`, its small files.

    model: the folder that the weights came from once, or one with config.json and tokenizer only; None: what the
    import kept of it, and for a model trained from nothing a new config.json alone.  Returns what was done.
    """
    source, manifest = open_checkpoint(path, "--megatron-path")
    if model is None and (source.folder / "hf").is_dir():
        model = source.folder / "hf"
    weights = model is not None and any((model / n).exists() for n in (INDEX, SINGLE))
    dtypes = _export_dtypes(source, model if weights else None, model, manifest, options.dtype)
    said = None if weights and options.dtype is None else dtypes["embeddings.weight"]
    config = config_json(source.config, model, said)
    source.files = Checked(source.folder, manifest)
    targets = released(source, dtypes, partial(stream, source))
    what = f"{source.folder} -> {out}"
    if model is None:
        what += "\nno --hf-model: its config.json is new, tokenizer and licence are not there"
    elif changed := [f for f in GEOMETRY if getattr(read_config(model, True)[0], f) != getattr(source.config, f)]:
        what += f"\nconfig.json is not the one in {model}: other {', '.join(changed)}"
    text = write_model(targets, config, model, out, "--hf-path", stamp(source), options, meter, [source.folder])
    source.close()
    return f"{'would export' if options.dry_run else 'exported'} {text.format(what)}"


def released(
    source: Source, dtypes: dict[str, str], data: Callable[[str, slice, str], Iterable[memoryview]]
) -> list[Target]:
    """A model's tensors under their released names.  data: the bytes of some rows of one of ours, in a dtype."""
    targets = []
    for name, stored in source.tensors.items():
        for i in range(stored.shape[0]) if is_experts(name) else [None]:
            rows = slice(None) if i is None else slice(i, i + 1)
            shape = stored.shape if i is None else stored.shape[1:]
            read = partial(data, name, rows, dtypes[name])
            targets.append(Target(released_name(name, i), dtypes[name], shape, read))
    return targets


def write_model(
    targets: list[Target],
    config: bytes,
    model: Path | None,
    out: Path,
    setting: str,
    stamps: Stamp,
    options: Options,
    meter: Meter,
    read: list[Path],
) -> str:
    """Write a model's folder: its tensors in shards, config.json, and the small files of the folder `model`.

    stamps: what the tensors are made of; if it has changed, files of an earlier run are not used.  read: folders that
    must not be written over.  Returns what was done, with {} where source and target belong.
    """
    groups = in_files(targets, lambda t: t.bytes, options.max_shard_size or EXPORT_SHARD)
    n = len(groups)
    written = (
        {f"model-{i:05d}-of-{n:05d}.safetensors": g for i, g in enumerate(groups, 1)} if n > 1 else {SINGLE: groups[0]}
    )
    total = sum(t.bytes for t in targets)
    what = f"{len(targets):,} tensors, {total:,} bytes in {n} files: {{}}"
    temporary = out / INCOMPLETE
    plan, jobs = jobs_of(written, stamps)
    replacing = options.overwrite or journal_says(temporary, plan).publishing
    check_folder(out, setting, [*read, *([model] if model else [])], replacing, "config.json")
    if options.dry_run:
        check_space(out, total)
        return what
    back = partial(take_back, temporary, out, list(written), ["config.json", INDEX])
    with journalled(temporary, plan, jobs, options.workers, meter, back) as done:
        last = []  # a folder without these two is not taken for a model
        if n > 1:
            index = {t.name: file for file, group in written.items() for t in group}
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}, indent=2)
            (temporary / INDEX).write_text(text + "\n")
            last.append(INDEX)
        (temporary / "config.json").write_bytes(config)
        last.append("config.json")
        others = [p for p in small_files(model) if p.name not in last] if model else []
        for p in others:
            shutil.copyfile(p, temporary / p.name)
        publish(temporary, out, [*written, *(p.name for p in others)], last, done)
    return f"{what}\n{done}"


def jobs_of(written: dict[str, list[Target]], stamps: Stamp) -> tuple[dict, list[Job]]:
    """The plan and the jobs of `journalled` for these files."""
    jobs = [
        Job(
            file,
            sum(t.bytes for t in group),
            write=lambda path, progress, group=group: [write_safetensors(path, group, progress)],
            check=lambda path, record, group=group: is_file_of(path, group),
        )
        for file, group in written.items()
    ]
    return {"source": stamps, "files": {f: [(t.name, t.dtype) for t in g] for f, g in written.items()}}, jobs


def _export_dtypes(
    source: Source, weights: Path | None, model: Path | None, manifest: Manifest, asked: str | None
) -> dict[str, str]:
    """The dtype of each tensor in an export.

    That of the reference's weights; where it has none, what an import has brought, and for trained weights what its
    config.json says (fp32 for A_log, D and the selection bias, as released).  --dtype goes over that.
    """
    there: dict[str, str] = {}
    if weights is not None:
        there = {our_name(name)[0]: span.dtype for name, span in read_folder(weights).items()}
    if model is None:
        usual = source.tensors["embeddings.weight"].dtype
    else:
        _, raw = read_config(model, drop_mtp=True)
        names = {str(DTYPES[n]).removeprefix("torch."): n for n in FLOATS}
        usual = names.get(str(raw.get("dtype") or raw.get("torch_dtype")))
    out = {}
    for name, stored in source.tensors.items():
        dtype = there.get(name)
        if dtype not in FLOATS:
            keep = usual is None or manifest.progress.iteration == 0
            dtype = stored.dtype if keep else "F32" if name.rsplit(".", 1)[-1] in FP32 else usual
        out[name] = new_dtype(name, dtype, asked)
    return out


class Checked(Files):
    """A checkpoint's bytes, none of them used before the block in which they lie was compared with its checksum.

    At the time it is copied, not before: a file is read once.  Raises UserError that names the file.
    """

    MARGIN = 8  # bytes of the widest element: an element may begin in one block and end in the next

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__()
        self.records = {folder / file: record for file, record in manifest.files.items()}
        self._locks = {path: threading.Lock() for path in self.records}
        self._begun: set[Path] = set()
        self._sound: set[tuple[Path, int]] = set()  # blocks of the maps

    def blocks(self, path: Path, start: int, end: int) -> Iterator[memoryview]:
        """As in `Files`, a piece for each block."""
        self._begin(path)
        rest = 0  # bytes of an unfinished element: they are moved to where the next block will follow them
        for i in range(start // BLOCK, blocks_in(end)):
            size = len(self._block(path, i))
            first = self.MARGIN + max(0, start - i * BLOCK) - rest
            last = self.MARGIN + min(size, end - i * BLOCK)
            rest = 0 if end <= (i + 1) * BLOCK else (last - first) % self.MARGIN
            if first < last - rest:
                yield self._mine.buffer[first : last - rest]
            self._mine.buffer[self.MARGIN - rest : self.MARGIN] = self._mine.buffer[last - rest : last]

    def array(self, span: Span) -> np.ndarray:
        self._begin(span.path)
        found = super().array(span)
        for i in range(span.start // BLOCK, blocks_in(span.end)) if span.start < span.end else ():
            if (span.path, i) not in self._sound:
                self._compare(span.path, i, memoryview(self._maps[span.path])[i * BLOCK : (i + 1) * BLOCK])
                self._sound.add((span.path, i))
        return found

    def _begin(self, path: Path) -> None:
        """Before the first tensor of a file: compare its header, by which it will be found; in format 3 the file."""
        with self._locks[path]:
            if path in self._begun:
                return
            if self.records[path].sha256 and not intact(path, self.records[path]):
                self._refuse(path)
            header = 8 + int.from_bytes(self._block(path, 0)[:8], "little")
            for i in range(1, blocks_in(header)):
                self._block(path, i)
            self._begun.add(path)

    def _block(self, path: Path, i: int) -> memoryview:
        """A block that was compared.  A thread keeps its last one, in which the next tensor begins as a rule."""
        if not hasattr(self._mine, "buffer"):
            self._mine.buffer, self._mine.held = memoryview(bytearray(self.MARGIN + BLOCK)), None
        block = self._mine.buffer[self.MARGIN :][: self.records[path].bytes - i * BLOCK]
        if self._mine.held != (path, i):
            self._mine.held = None
            self._fill(block, path, i * BLOCK)
            self._compare(path, i, block)
            self._mine.held = path, i
        return block

    def _compare(self, path: Path, i: int, block: memoryview) -> None:
        record = self.records[path]
        if not record.sha256 and checksum_of(block) != expected(record.crc32, i):
            self._refuse(path)

    def _refuse(self, path: Path) -> NoReturn:
        good = locate.remedy(path.parent.parent, path.parent)
        raise UserError(f"--megatron-path: {path} was altered: its checksum is not the manifest's{good}")


def stamp(source: Source) -> Stamp:
    """What tells whether a source is still the same: its files with sizes and times."""
    paths = {part.span.path for t in source.tensors.values() for part in t.parts}
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths)


def check_folder(out: Path, setting: str, read: list[Path], replacing: bool, mark: str) -> None:
    """Raise UserError if a model may not be written here.  mark: the file by which one is known."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{setting} {out} is a file; give a folder")
    if not out.exists():
        return
    for folder in read:
        if folder.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{setting} {out} holds {folder}, which is being read; give another folder")
    if (out / POINTER).exists() or (out / MANIFEST).exists() or any(out.glob("iter_*")):
        raise UserError(f"{setting} {out} holds checkpoints; give a folder of its own")
    theirs = [p for p in out.iterdir() if not p.name.startswith(INCOMPLETE)]
    if theirs and not replacing:
        raise UserError(f"{setting} {out} is not empty ({theirs[0].name}); add --overwrite to replace a model there")
    if theirs and not (out / mark).exists() and not (out / INCOMPLETE).exists():
        raise UserError(
            f"{setting} {out} holds no model to replace ({theirs[0].name} is there); give a folder of its own"
        )


def publish(temporary: Path, out: Path, names: list[str], last: list[str], done: Written) -> None:
    """Move a whole export to its place; an older one goes first, config.json before all: no mixture is ever a model.

    last: without these a folder is not taken for a model.
    """
    for path in temporary.iterdir():
        flush(path)
    flush(temporary)
    done.publishing()
    for name in [*last, "config.json", INDEX, *(p.name for x in STALE for p in out.glob(x) if p.is_file())]:
        (out / name).unlink(missing_ok=True)
    flush(out)
    for name in names:
        (temporary / name).replace(out / name)
    flush(out)
    for name in last:
        (temporary / name).replace(out / name)
        flush(out)
    shutil.rmtree(temporary)


def take_back(temporary: Path, out: Path, files: list[str], last: list[str]) -> None:
    """After a kill in `publish`: what was moved lies in `temporary` again."""
    for name in last:
        (out / name).unlink(missing_ok=True)
    temporary.mkdir(exist_ok=True)
    for name in files:
        if (out / name).exists() and not (temporary / name).exists():
            (out / name).replace(temporary / name)
