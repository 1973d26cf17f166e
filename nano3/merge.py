"""Adapters into the model: W + s B A, added in fp32 and rounded once, streamed; or a folder for Hugging Face's PEFT.

Either way a tensor is read, changed and written in pieces of some rows, by the machinery of `convert.py`: several files
at once, a journal, and no half-written model under a model's name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nano3.adapters import Recipe, check_base, fingerprint, meant, open_base, read_recipe
from nano3.config import ModelConfig, UserError
from nano3.convert import (
    INCOMPLETE,
    Options,
    Stamp,
    cast,
    check_folder,
    components,
    jobs_of,
    new_dtype,
    publish,
    released,
    stamp,
    stream,
    take_back,
    write_model,
)
from nano3.convert_jobs import Meter, check_space, journal_says, journalled
from nano3.hf import Source, config_json, find_model
from nano3.hf_files import Target
from nano3.model.lora import Site
from nano3.train import checkpoint, locate
from nano3.train.storage import DTYPES, NAMES, Container, Manifest

PIECE = 1 << 20  # elements of a weight in fp32 at a time
PEFT_REFUSES = ("out_proj",)  # in peft.tuners.tuners_utils, for any model with Mamba layers


class Adapters:
    """The tensors of an adapter checkpoint, whole, whatever layout wrote them."""

    def __init__(self, path: str, setting: str) -> None:
        self.folder, self.manifest = locate.open_verified(path, setting)
        self.recipe: Recipe = read_recipe(self.folder, setting)
        self.config: ModelConfig = checkpoint.read_config(self.folder).model
        self.container = Container(self.folder, self.manifest)
        shared = self.recipe.experts == "shared"
        sites = [Site(m, shared and Site(m).routed) for m in self.recipe.targets]
        self.sites = {site.weight: site for site in sites}
        mine = tuple(site.adapter for site in sites)
        # what was trained in full beside the adapters: routers
        self.full = [k[6:] for k in self.manifest.tensors if k.startswith("model.") and not k[6:].startswith(mine)]

    def read(self, name: str, rows: int | None = None, expert: int | None = None) -> Tensor:
        """A tensor, or one expert's, in the dtype it is stored in.  rows: of B, which lies by component as in_proj."""
        index = () if expert is None else (slice(expert, expert + 1),)
        keys = [f"model.{name}"] if rows is None else [key for key, *_ in components(name, rows, self.config)]
        parts = [self.container.read(key, index) for key in keys]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole if expert is None else whole[0]

    def pair(self, site: Site, rows: int, expert: int | None = None) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (rows, r) of a weight, or of one expert's."""
        own = None if site.shared else expert
        return self.read(f"{site.adapter}.A", None, own), self.read(f"{site.adapter}.B", rows, own)

    @property
    def stamp(self) -> Stamp:
        paths = [self.folder / file for file in self.manifest.files]
        return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths)


def merged(base: Source, adapters: Adapters, name: str, rows: slice, dtype: str) -> Iterator[memoryview]:
    """The bytes of some rows of a tensor of ours with its adapter added, in `dtype`."""
    if name in adapters.full:
        whole = adapters.read(name)[rows].contiguous()
        block = memoryview(whole.flatten().view(torch.uint8).numpy())
        there = NAMES[whole.dtype]
        yield from [block] if there == dtype else cast([block], name, there, dtype)
        return
    site = adapters.sites.get(name)
    if site is None:
        yield from stream(base, name, rows, dtype)
        return
    shape = base.tensors[name].shape
    experts = range(*rows.indices(shape[0])) if site.routed else [None]
    first, last, _ = (slice(None) if site.routed else rows).indices(shape[-2])
    step = max(1, PIECE // shape[-1])
    for e in experts:
        A, B = (t.float() for t in adapters.pair(site, shape[-2], e))
        for start in range(first, last, step):
            piece = slice(start, min(start + step, last))
            W = base.read(name, (piece,) if e is None else (slice(e, e + 1), piece)).flatten(0, -2).float()
            W.addmm_(B[piece], A, alpha=adapters.recipe.scale)
            yield from cast([memoryview(W.flatten().view(torch.uint8).numpy())], name, "F32", dtype)


def merge_model(
    hf_model: str | None, lora: str, pretrained: str | None, out: Path, options: Options, meter: Meter
) -> str:
    """Write a Hugging Face folder of base and adapters, released names.  Returns what was done.

    hf_model: folder or hub id that gives config.json, tokenizer and, unless `pretrained` does, the base weights;
    without both the base is read from where it was in training.  Raises UserError if it is not what the adapters belong
    to.
    """
    adapters, base = _open(hf_model, lora, pretrained)
    folder = None if hf_model is None else find_model(hf_model, setting="--hf-model-path")
    if folder is None and (base.folder / "hf").is_dir():
        folder = base.folder / "hf"
    said = options.dtype  # where the base is another's import, config.json need not say what it is in
    if said is None and (folder is None or folder.resolve() != base.folder.resolve()):
        said = base.tensors["embeddings.weight"].dtype
    config = config_json(base.config, folder, said)
    dtypes = {name: new_dtype(name, t.dtype, options.dtype) for name, t in base.tensors.items()}
    targets = released(base, dtypes, partial(merged, base, adapters))
    stamps = [*stamp(base), *adapters.stamp]
    read = [base.folder, adapters.folder]
    text = write_model(targets, config, folder, out, "--output", stamps, options, meter, read)
    base.close()
    what = f"{base.folder} + {len(adapters.sites)} adapters of {adapters.folder} -> {out}"
    return f"{'would merge' if options.dry_run else 'merged'} {text.format(what)}{_of_which_base(adapters.recipe)}"


def _open(hf_model: str | None, lora: str, pretrained: str | None) -> tuple[Adapters, Source]:
    """The adapters and their base, checked to belong together."""
    adapters = Adapters(lora, "--lora-checkpoint")
    path, setting = pretrained or hf_model, "--pretrained" if pretrained else "--hf-model-path"
    if path is None:
        path, setting = adapters.recipe.base, f"--lora-checkpoint {lora}, whose base is"
    path = locate.fixed(meant(path, adapters.recipe), setting)
    base = open_base(path, setting)
    check_base(adapters.recipe, fingerprint(base), path, setting)
    return adapters, base


def peft_name(site: Site, letter: str, inner: bool) -> str:
    """PEFT's name of an adapter's tensor beside transformers' model.

    PEFT wraps the module of the experts once for each of its parameters: the first wrapper is inside the second.
    """
    owner = site.module.rsplit(".", 1)[0] if site.routed else site.module
    return f"base_model.model.model.{owner}.{'base_layer.' if inner else ''}lora_{letter}.weight"


def peft_tensor(adapters: Adapters, site: Site, letter: str, shape: tuple[int, ...]) -> Tensor:
    """An adapter's tensor as PEFT keeps it beside a weight of this shape.

    Experts: A of all of them one below the other, (E r, in); of B, (out, r E), the expert's number varies fastest.
    PEFT knows no adapter that experts share, so that becomes one for each, with equal numbers.
    """
    t = adapters.read(f"{site.adapter}.{letter}", shape[-2] if letter == "B" and not site.routed else None)
    if not site.routed:
        return t
    if site.shared:
        t = t.expand(shape[0], *t.shape)
    return (t.flatten(0, 1) if letter == "A" else t.permute(1, 2, 0).flatten(1)).contiguous()


def write_peft(
    hf_model: str | None, lora: str, pretrained: str | None, out: Path, options: Options, meter: Meter
) -> str:
    """Write adapter_model.safetensors and adapter_config.json, which PEFT loads beside transformers' NemotronH.

    Raises UserError where PEFT has no place for what was trained, and says what to do instead.
    """
    adapters, base = _open(hf_model, lora, pretrained)
    recipe, again = adapters.recipe, f"python merge_lora.py without --as-peft makes a whole model of {adapters.folder}"
    if refused := [m for m in recipe.targets if m.rsplit(".", 1)[1] in PEFT_REFUSES]:
        raise UserError(
            f"--as-peft: PEFT refuses adapters on {PEFT_REFUSES[0]} of this architecture, and {len(refused)} are there "
            f"({refused[0]}, ...).  {again}; or train with peft.exclude_modules=[out_proj], the set that PEFT takes"
        )
    if adapters.full:
        raise UserError(
            f"--as-peft: {adapters.full[0]} was trained in full (peft.freeze_router=false), which a PEFT folder cannot "
            f"hold.  {again}"
        )
    targets = []
    for site in adapters.sites.values():
        shape = base.tensors[site.weight].shape
        twin = site.module.replace(".up_proj", ".down_proj")
        inner = site.routed and site.module != twin and twin in recipe.targets
        for letter in "AB":
            held = adapters.manifest.tensors[_key(adapters.manifest, f"{site.adapter}.{letter}")]
            out_in = shape[-1] if letter == "A" else shape[-2]
            thin = recipe.rank * (shape[0] if site.routed else 1)
            size = (thin, out_in) if letter == "A" else (out_in, thin)
            dtype = options.dtype or NAMES[held.dtype]
            data = partial(_bytes, adapters, site, letter, shape, dtype)
            targets.append(Target(peft_name(site, letter, inner), dtype, size, data))
    what = f"{len(targets)} tensors, {sum(t.bytes for t in targets):,} bytes: {adapters.folder} -> {out}"
    temporary, file, mark = out / INCOMPLETE, "adapter_model.safetensors", "adapter_config.json"
    plan, jobs = jobs_of({file: targets}, adapters.stamp)
    replacing = options.overwrite or journal_says(temporary, plan).publishing
    check_folder(out, "--output", [base.folder, adapters.folder], replacing, mark)
    if options.dry_run:
        check_space(out, sum(t.bytes for t in targets))
        return f"would write for PEFT {what}"
    back = partial(take_back, temporary, out, [file], [mark])
    with journalled(temporary, plan, jobs, options.workers, meter, back) as done:
        (temporary / mark).write_text(json.dumps(peft_config(recipe, hf_model or recipe.base), indent=2) + "\n")
        publish(temporary, out, [file], [mark], done)
    base.close()
    return f"wrote for PEFT {what}\n{done}{_of_which_base(recipe)}"


def _of_which_base(recipe: Recipe) -> str:
    """What to know of adapters that were not trained beside the numbers that they are added to."""
    if recipe.base_dtype != "fp8":
        return ""
    return "\nthey were trained beside the base in FP8 and belong now to the base as it is (docs/finetuning.md)"


def _key(manifest: Manifest, name: str) -> str:
    """The key of a tensor, or of its first component."""
    return next(k for k in manifest.tensors if k == f"model.{name}" or k.startswith(f"model.{name}."))


def _bytes(adapters: Adapters, site: Site, letter: str, shape: tuple[int, ...], dtype: str) -> Iterator[memoryview]:
    t = peft_tensor(adapters, site, letter, shape).to(DTYPES[dtype])
    yield memoryview(t.flatten().view(torch.uint8).numpy())


def peft_config(recipe: Recipe, base: str) -> dict:
    """adapter_config.json."""
    routed = [m for m in recipe.targets if Site(m).routed]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "use_rslora": recipe.variant == "rslora",
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [m for m in recipe.targets if not Site(m).routed],
        "target_parameters": routed or None,
        "inference_mode": True,
    }
