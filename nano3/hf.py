"""Names, shapes and dtypes of Hugging Face's Nemotron-H models, and any part of their tensors by our names.

Three forms are read, and mixtures of them:

    released             backbone.layers.1.mixer.experts.7.up_proj.weight   one tensor per expert
    transformers 5       model.layers.1.mixer.experts.up_proj               all experts in one
    between the two      model.layers.1.mixer.experts.7.up_proj.weight

One form is written, the released one.  Ours is what is left without the prefix, with the experts in one tensor.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nano3.config import HF_ALIASES, ModelConfig, UserError
from nano3.hf_files import INDEX, LARGEST_CONFIG, Files, Span, locate, quote, read_folder, read_json, reason
from nano3.train.storage import DTYPES

FP32 = ("A_log", "D", "e_score_correction_bias")  # stay in fp32 in a file that has them so, whatever --dtype says
FLOATS = ("BF16", "F16", "F32", "F64")
EXPERT = re.compile(r"(layers\.\d+\.mixer\.experts)\.(0|[1-9]\d{0,8})\.(up_proj|down_proj)\.weight", re.ASCII)
GEOMETRY = (  # what makes another model of it; the rest of config.json does not reach the weights or the results
    *("hybrid_override_pattern", "vocab_size", "hidden_size", "layer_norm_epsilon", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size"),
    *("conv_kernel", "use_conv_bias", "time_step_limit", "n_routed_experts", "num_experts_per_tok"),
    *("moe_intermediate_size", "moe_shared_expert_intermediate_size", "n_group", "topk_group", "norm_topk_prob"),
    *("routed_scaling_factor", "intermediate_size"),
)


def shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our name and the shape of every tensor of a model, in the order of the layers."""
    D, H, F = c.hidden_size, c.mamba_num_heads, c.moe_shared_expert_intermediate_size
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    E, Fe = c.n_routed_experts, c.moe_intermediate_size
    mixers = {
        "M": {
            "in_proj.weight": (c.d_inner + c.conv_dim + H, D),
            "conv1d.weight": (c.conv_dim, 1, c.conv_kernel),
            **({"conv1d.bias": (c.conv_dim,)} if c.use_conv_bias else {}),
            **{"A_log": (H,), "D": (H,), "dt_bias": (H,), "norm.weight": (c.d_inner,)},
            "out_proj.weight": (D, c.d_inner),
        },
        "*": {"q_proj.weight": (q, D), "k_proj.weight": (kv, D), "v_proj.weight": (kv, D), "o_proj.weight": (D, q)},
        "E": {
            **{"gate.weight": (E, D), "gate.e_score_correction_bias": (E,)},
            **{"experts.up_proj": (E, Fe, D), "experts.down_proj": (E, D, Fe)},
            **{"shared_experts.up_proj.weight": (F, D), "shared_experts.down_proj.weight": (D, F)},
        },
        "-": {"up_proj.weight": (c.intermediate_size, D), "down_proj.weight": (D, c.intermediate_size)},
    }
    out: dict[str, tuple[int, ...]] = {"embeddings.weight": (c.vocab_size, D)}
    for i, letter in enumerate(c.hybrid_override_pattern):
        out[f"layers.{i}.norm.weight"] = (D,)
        out |= {f"layers.{i}.mixer.{name}": shape for name, shape in mixers[letter].items()}
    return out | {"norm_f.weight": (D,), "lm_head.weight": (c.vocab_size, D)}


def our_name(name: str) -> tuple[str, int | None]:
    """A name in any of the three forms -> ours, and the expert's number where the tensor is that of one expert.

    A name of no form comes back with a question mark, which none of ours has.
    """
    if name == "lm_head.weight":
        return name, None
    prefix, _, inner = name.partition(".")
    if prefix not in ("backbone", "model") or inner == "lm_head.weight":
        return f"?{name}", None
    match = EXPERT.fullmatch(inner)
    return (f"{match[1]}.{match[3]}", int(match[2])) if match else (inner, None)


def is_experts(name: str) -> bool:
    return name.endswith((".experts.up_proj", ".experts.down_proj"))


def released_name(name: str, expert: int | None = None) -> str:
    """Our name -> the released one."""
    if name.startswith("lm_head."):
        return name
    if expert is not None:
        name = name.replace(".experts.", f".experts.{expert}.") + ".weight"
    return f"backbone.{name}"


class Part(NamedTuple):
    """A box of a tensor, in a file."""

    span: Span
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass
class Stored:
    """A tensor: its parts tile it."""

    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    parts: list[Part]


@dataclass
class Source:
    """The tensors of a model by our names, whatever files they lie in.

    problems: what is missing, unexpected or of another shape; empty unless it was opened to be inspected.
    """

    folder: Path
    config: ModelConfig
    tensors: dict[str, Stored]
    problems: list[str] = field(default_factory=list)
    about: str = ""  # what kind of thing was opened, for people
    state: dict[str, Stored] = field(default_factory=dict)  # a training checkpoint's optimizer state, by its keys
    files: Files = field(default_factory=Files)

    def __getitem__(self, name: str) -> Stored:
        return self.tensors[name] if name in self.tensors else self.state[name]

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: DTYPES[t.dtype] for name, t in self.tensors.items()}

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """A box of a tensor (a slice with a step of 1 per leading dimension), from the map of the files: a new tensor
        on the CPU, in the dtype of the files, equal to them to the bit."""
        t = self[name]
        spans = [s.indices(n)[:2] for s, n in zip(index, t.shape, strict=False)]
        spans += [(0, n) for n in t.shape[len(spans) :]]
        dtype = DTYPES[t.dtype]
        out = np.empty([max(0, b - a) for a, b in spans], f"i{dtype.itemsize}")
        for part in t.parts:
            box = [
                (max(a, o), min(b, o + n)) for (a, b), o, n in zip(spans, part.offsets, part.shape, strict=True)
            ]  # in common
            if all(a < b for a, b in box):
                target = tuple(slice(a - s, b - s) for (a, b), (s, _) in zip(box, spans, strict=True))
                held = tuple(slice(a - o, b - o) for (a, b), o in zip(box, part.offsets, strict=True))
                out[target] = self.files.array(part.span).reshape(part.shape)[held]
        return torch.from_numpy(out).view(dtype)

    def stream(self, name: str, rows: slice = slice(None)) -> Iterator[memoryview]:
        """The bytes of some rows of a tensor, in order and in pieces; each is valid until the thread asks for the next
        one of this source."""
        t = self[name]
        width = DTYPES[t.dtype].itemsize
        start, stop, _ = rows.indices(t.shape[0]) if t.shape else (0, 1, 1)
        row = prod(t.shape[1:])
        runs = _runs(t)
        if runs is None:  # cut along another dimension than the first: put together some rows at a time
            step = max(1, (4 << 20) // max(1, row * width))
            for a in range(start, stop, step):
                block = self.read(name, (slice(a, min(a + step, stop)),))
                yield memoryview(block.view(-1).view(torch.uint8).numpy())
            return
        low, high = start * row, stop * row
        for first, part in runs:
            a, b = max(low, first), min(high, first + prod(part.shape))
            if a < b:
                base = part.span.start - first * width
                yield from self.files.blocks(part.span.path, base + a * width, base + b * width)

    def close(self) -> None:
        self.files.close()


def _runs(t: Stored) -> list[tuple[int, Part]] | None:
    """The parts in order, each with the number of its first element, if each is one run of the tensor's elements."""
    strides = [prod(t.shape[d + 1 :]) for d in range(len(t.shape))]
    out = []
    for part in t.parts:
        cut = max((d for d, (n, whole) in enumerate(zip(part.shape, t.shape, strict=True)) if n < whole), default=0)
        if any(n > 1 for n in part.shape[:cut]):
            return None
        out.append((sum(o * s for o, s in zip(part.offsets, strides, strict=True)), part))
    return sorted(out, key=lambda run: run[0])


def find_model(name: str, revision: str | None = None, setting: str = "--hf-model") -> Path:
    """The folder meant by a path or by an id of the Hugging Face hub; a local folder wins.

    huggingface_hub downloads, with its cache and its variables (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN).
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise UserError(f"{setting} {quote(name)}: no such folder, and not an id of the hub such as nvidia/NAME")
    try:
        from huggingface_hub import constants, snapshot_download

        kept = ["*.safetensors", INDEX, *(f"*{end}" for end in SMALL_FILES), *SMALL_NAMES]
        offline = constants.HF_HUB_OFFLINE  # said again: releases before 2 ask the network about a commit's files
        return Path(snapshot_download(name, revision=revision, allow_patterns=kept, local_files_only=offline))
    except Exception as error:  # the hub's client has dozens of kinds; each means that there is no model
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"{setting} {name}{at}: not a folder here, and the hub did not give it ({reason(error)}); "
            "check the id and the network, or download it and give the folder"
        ) from None


def read_config(folder: Path, drop_mtp: bool = False) -> tuple[ModelConfig, dict[str, Any]]:
    """The geometry in a folder's config.json, and all of it as it is there.

    drop_mtp: overlook the head that predicts further tokens.  Raises UserError.
    """
    path = folder / "config.json"
    raw = read_json(locate(folder, "config.json"), limit=LARGEST_CONFIG)
    given = {**raw, "num_nextn_predict_layers": 0} if drop_mtp else raw
    if "${" in json.dumps({f.name: raw.get(f.name) for f in fields(ModelConfig)}):
        raise UserError(f"{path}: '${{' has no meaning there")  # it has one for omegaconf, which is asked next
    try:
        return ModelConfig.from_hf(given), raw
    except UserError as error:
        raise UserError(f"{folder}: {reason(error)}") from None
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__}: {reason(error)}") from None


def open_model(folder: Path | str, strict: bool = True, drop_mtp: bool = False) -> Source:
    """A Hugging Face folder as a source of our tensors.  Reads config.json and headers, no tensor.

    strict: raise UserError if a tensor is missing, unexpected or of another shape; else list that in `problems`.
    drop_mtp: leave `mtp.*` aside, the head that predicts further tokens, which nano3 does not have.
    """
    folder = Path(folder)
    found = read_folder(folder)
    config, _ = read_config(folder, drop_mtp)
    problems, tensors = [], {}
    held: dict[str, list[tuple[int | None, str]]] = {}  # our name -> expert's number, and name in the files
    for name in found:
        ours, expert = our_name(name)
        held.setdefault(ours, []).append((expert, name))
    if config.num_hidden_layers > len(found):  # so that what is built below is no larger than what is on the disk
        raise UserError(f"{folder}: config.json has {config.num_hidden_layers} layers, the files {len(found)} tensors")
    for name, shape in shapes(config).items():
        try:
            tensors[name] = _gather(name, shape, held.pop(name, []), found)
        except UserError as error:
            problems.append(str(error))
    others = [raw for entries in held.values() for _, raw in entries]
    mtp = [name for name in others if name.startswith("mtp.")]
    unexpected = [name for name in others if name not in set(mtp)]
    if mtp and not drop_mtp:
        problems.append(
            f"{len(mtp)} tensors mtp.*: multi-token prediction is not implemented; convert.py import --drop-mtp leaves "
            "them out"
        )
    if unexpected:
        scaled = any("scale" in n for n in others)
        hint = f"; quantised weights? Only models in {', '.join(FLOATS)} are read" if scaled else ""
        problems.append(f"{len(unexpected)} unexpected tensors: {_some(unexpected)}{hint}")
    source = Source(folder, config, tensors, problems, _form(found))
    if strict and problems:
        more = f" (and {len(problems) - 1} more: `convert.py inspect` lists them)" if len(problems) > 1 else ""
        raise UserError(f"{folder}: {problems[0]}{more}")
    return source


def _gather(name: str, shape: tuple[int, ...], held: list[tuple[int | None, str]], found: dict[str, Span]) -> Stored:
    """One of our tensors from what the files have of it.  Raises UserError saying what is wrong with it."""
    if not held:
        raise UserError(f"missing: {released_name(name)}")
    by_expert = dict(held)
    if len(by_expert) < len(held) or (None in by_expert and len(held) > 1):
        raise UserError(f"one tensor under several names: {_some([raw for _, raw in held])}")
    spans = {expert: found[raw] for expert, raw in held}
    if None in by_expert:
        parts = [Part(spans[None], (0,) * len(shape), shape)]
        want = shape
    else:
        gap = next(e for e in range(len(spans) + 1) if e not in spans)
        if gap < shape[0]:
            raise UserError(f"missing: {released_name(name, gap)} ({len(spans)} experts found, {shape[0]} expected)")
        if len(spans) > shape[0]:
            raise UserError(f"unexpected: {released_name(name, shape[0])} ({shape[0]} experts expected)")
        parts = [Part(spans[e], (e, *(0 for _ in shape[1:])), (1, *shape[1:])) for e in range(shape[0])]
        want = shape[1:]
    for expert, span in spans.items():
        if span.shape != want:
            raise UserError(f"{by_expert[expert]} has the shape {list(span.shape)}, config.json makes it {list(want)}")
    dtypes = {span.dtype for span in spans.values()}
    if len(dtypes) > 1:
        raise UserError(f"the experts of {name} differ in dtype: {', '.join(sorted(dtypes))}")
    dtype = dtypes.pop()
    if dtype not in FLOATS:
        raise UserError(
            f"{by_expert[min(spans, key=str)]} has dtype {dtype}; only models in {', '.join(FLOATS)} are read"
        )
    return Stored(dtype, shape, parts)


def _some(names: list[str]) -> str:
    return ", ".join(quote(n) for n in names[:3]) + (", …" if len(names) > 3 else "")


def _form(found: dict[str, Span]) -> str:
    """Which of the forms of names the files have."""
    prefixes = {name.split(".", 1)[0] for name in found} & {"backbone", "model"}
    kinds = {
        "one tensor per expert" if our_name(n)[1] is not None else "experts in one" for n in found if ".experts." in n
    }
    names = " and ".join(f"{p}." for p in sorted(prefixes)) or "no known"
    return f"Hugging Face folder, {names} names" + (f", {' and '.join(sorted(kinds))}" if kinds else "")


SMALL_FILES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")  # everything beside the weights, as it is
SMALL_NAMES = [f"{w}*" for name in ("license", "licence", "notice") for w in (name, name.upper(), name.capitalize())]
LARGEST_SMALL = 256 << 20


def small_files(folder: Path) -> list[Path]:
    """What else a model's folder has: configurations, tokenizer, chat template, code for others to run, licence.

    A model card is not among them: it speaks of the weights it came with.
    """
    out = []
    for path in sorted(folder.iterdir()):
        fits = path.name.endswith(SMALL_FILES) or any(path.match(n) for n in SMALL_NAMES)
        if fits and not path.name.endswith(".index.json") and not path.name.startswith(".") and not path.is_dir():
            real = locate(folder, path.name)
            if real.stat().st_size > LARGEST_SMALL:
                raise UserError(f"{path} has {real.stat().st_size:,} bytes; that is no tokenizer or configuration")
            out.append(path)
    return out


def config_json(c: ModelConfig, folder: Path | None, dtype: str | None = None) -> bytes:
    """The config.json of a model of geometry `c`.

    That of `folder` byte for byte if it says the same, else with what differs replaced; without a folder
    a new one.  dtype: safetensors' name of what the weights are in, None for what the folder says.  A head that
    predicts further tokens is never among our weights, so it is not in the new file.
    """
    theirs, raw = (None, NEW) if folder is None else read_config(folder, drop_mtp=True)
    changed = {f: getattr(c, f) for f in GEOMETRY if theirs is None or getattr(c, f) != getattr(theirs, f)}
    if raw.get("num_nextn_predict_layers"):
        changed["num_nextn_predict_layers"] = 0
    key = "dtype" if "dtype" in raw else "torch_dtype"
    name = str(DTYPES[dtype]).removeprefix("torch.") if dtype else raw.get(key)
    if not changed and name == raw.get(key):
        return (folder / "config.json").read_bytes()
    new = {**raw, **changed, key: name} if name else {**raw, **changed}
    if changed:
        new["hybrid_override_pattern"] = c.hybrid_override_pattern
        new.pop("layers_block_type", None)  # the pattern is what every reader takes: see docs/convert.md
        new["num_hidden_layers"] = c.num_hidden_layers
        for old, ours in HF_ALIASES.items():
            if old in new:
                new[old] = getattr(c, ours)
        if list(c.time_step_limit) == [0.0, math.inf]:
            new.pop("time_step_limit", None)  # what every reader takes it to be; JSON has no infinity
        elif math.isinf(c.time_step_limit[1]):
            new["time_step_limit"] = [c.time_step_limit[0], {"__float__": "Infinity"}]
    return (json.dumps(new, indent=2) + "\n").encode()


NEW = {"architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "tie_word_embeddings": False}
