"""What is in a model folder or checkpoint, whether two hold the same bits, and whether two programs agree on them."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nano3.config import KINDS, ModelConfig, UserError
from nano3.convert import open_checkpoint
from nano3.convert import rounded as rounded_once
from nano3.convert_jobs import Meter
from nano3.hf import GEOMETRY, Source, find_model, is_experts, open_model, released_name
from nano3.hf_files import BITS
from nano3.model.init import allocate, named_tensors
from nano3.train.checkpoint import build
from nano3.train.plan import parameters
from nano3.train.storage import DTYPES, MANIFEST, POINTER

STATE = (
    "exp_avg.",
    "exp_avg_scale.",
    "exp_avg_sq.",
    "exp_avg_sq_scale.",
    "master.",
)  # how the keys of optimizer state begin


def open_any(
    path: str, strict: bool = True, drop_mtp: bool = False, revision: str | None = None, setting: str = ""
) -> Source:
    """A checkpoint of ours (a run, its checkpoints, or one iteration), a Hugging Face folder, or an id of the hub."""
    folder = Path(path)
    marks = [folder / MANIFEST, folder / POINTER, folder / "checkpoints" / POINTER]
    if any(m.exists() for m in marks) or (folder.is_dir() and any(folder.glob("iter_*"))):
        return open_checkpoint(path, setting or path, strict)[0]
    return open_model(find_model(path, revision, setting or "model"), strict, drop_mtp)


@dataclass
class Comparison:
    """The outcome of `verify`.  differences: one line each.  left_out: what there was nothing to compare with."""

    tensors: int = 0  # by our names, in either
    bytes: int = 0  # compared
    differing: int = 0  # tensors
    differences: list[str] = field(default_factory=list)
    left_out: str = ""

    @property
    def identical(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        what = f"{self.tensors:,} tensors, {self.bytes:,} bytes{self.left_out}"
        if self.identical:
            return f"identical to the bit: {what}"
        return f"different: {self.differing:,} of {what}" if self.differing else f"same tensors ({what}), but see above"


def verify(a: Source, b: Source, workers: int = 2, meter: Meter | None = None, rounded: bool = False) -> Comparison:
    """Compare two models tensor by tensor, from disk, bit by bit, in the memory of a few buffers.

    Two training checkpoints are the same only if their optimizer states are.  rounded: where B has a narrower dtype,
    as an export of a trained model has, its numbers are to be A's rounded once.
    """
    out = Comparison()
    for key in GEOMETRY:
        here, there = getattr(a.config, key), getattr(b.config, key)
        if here != there:
            out.differences.append(f"configuration: {key} is {here} in A and {there} in B")
    for letter, source in (("A", a), ("B", b)):
        out.differences += [f"{letter}: {problem}" for problem in source.problems]
    here, there = {**a.tensors}, {**b.tensors}
    if a.state and b.state:
        here, there = here | a.state, there | b.state
    elif a.state or b.state:
        out.left_out = f"; the optimizer state in {'A' if a.state else 'B'} has no counterpart and was not compared"
    both = [n for n in here if n in there]
    for name in sorted(here.keys() ^ there.keys()):
        out.differences.append(f"{_shown(name)} is only in {'A' if name in here else 'B'}")

    found = []
    if meter is not None:
        meter.start(sum(_bytes(a, n) for n in both))
    with ThreadPoolExecutor(workers) as pool:
        for name, line in zip(both, pool.map(lambda n: difference(a, b, n, rounded), both), strict=True):
            found.append(line)
            if meter is not None:
                meter.advance(_bytes(a, name))
    out.tensors, out.bytes = len(here.keys() | there.keys()), sum(_bytes(a, n) for n in both)
    out.differing = sum(map(bool, found)) + len(here.keys() ^ there.keys())
    out.differences += filter(None, found)
    return out


def _bytes(source: Source, name: str) -> int:
    t = source[name]
    return prod(t.shape) * BITS[t.dtype] // 8


def _shown(name: str, expert: int | None = None) -> str:
    """A tensor as in the released files; optimizer state by its key."""
    return name if name.startswith(STATE) else released_name(name, expert)


def difference(a: Source, b: Source, name: str, rounded: bool = False) -> str:
    """What differs between two sources in one tensor: dtype, shape, or the first element and how many; else nothing."""
    here, there = a[name], b[name]
    shown = _shown(name)
    if here.shape != there.shape:
        return f"{shown}: shape {list(here.shape)} in A, {list(there.shape)} in B"
    stream = a.stream(name)
    if here.dtype != there.dtype:
        if not rounded or here.dtype not in DTYPES or BITS[there.dtype] >= BITS[here.dtype]:
            return f"{shown}: dtype {here.dtype} in A, {there.dtype} in B"
        stream = _rounded(stream, DTYPES[here.dtype], DTYPES[there.dtype])
    width = BITS[there.dtype] // 8
    count, first, at = 0, None, 0
    for x, y in _in_step(stream, b.stream(name)):
        if x != y:
            differ = np.flatnonzero(np.frombuffer(x, f"u{width}") != np.frombuffer(y, f"u{width}"))
            first = at + int(differ[0]) if first is None else first
            count += len(differ)
        at += len(x) // width
    if at != prod(here.shape):
        raise UserError(f"{shown}: {at:,} of {prod(here.shape):,} elements could be read; a file is damaged")
    if first is None:
        return ""
    place = tuple(int(i) for i in np.unravel_index(first, here.shape))
    box = tuple(slice(i, i + 1) for i in place)
    values = [source.read(name, box).item() for source in (a, b)]
    bits = [_bits(source.read(name, box)) for source in (a, b)]
    if is_experts(name) and not name.startswith(STATE):
        shown, place = _shown(name, place[0]), place[1:]
    where = ", ".join(map(str, place))
    return (
        f"{shown} ({there.dtype}): {count:,} of {at:,} elements differ, the first at [{where}]: "
        f"{values[0]:.9g} ({bits[0]}) in A, {values[1]:.9g} ({bits[1]}) in B"
    )


def _rounded(stream: Iterator[memoryview], wide: torch.dtype, narrow: torch.dtype) -> Iterator[memoryview]:
    """The bytes of numbers after one rounding."""
    for piece in stream:
        numbers = rounded_once(torch.frombuffer(bytearray(piece), dtype=wide), narrow)
        yield memoryview(numbers.view(torch.uint8).numpy())


def _bits(x: Tensor) -> str:
    return "0x" + x.view(torch.uint8).flip(-1).numpy().tobytes().hex()


def _in_step(a: Iterator[memoryview], b: Iterator[memoryview]) -> Iterator[tuple[bytes, bytes]]:
    """Pieces of equal length of two streams of the same total."""
    x = y = memoryview(b"")
    while True:
        x = x or next(a, memoryview(b""))
        y = y or next(b, memoryview(b""))
        n = min(len(x), len(y))
        if n == 0:
            return
        yield bytes(x[:n]), bytes(y[:n])  # comparing bytes is memcmp, comparing views is not
        x, y = x[n:], y[n:]


def inspect(source: Source) -> str:
    """What it is, geometry, parameters, dtypes, size by kind of block, and what is missing or unexpected."""
    c, p = source.config, parameters(source.config)
    letters = Counter(c.hybrid_override_pattern)
    layers = ", ".join(f"{letters[x]} {KINDS[x]}" for x in KINDS if letters[x])
    lines = [
        f"{source.folder}: {source.about}",
        f"layers        {c.num_hidden_layers}: {c.hybrid_override_pattern} ({layers})",
        f"width         {c.hidden_size}, vocabulary {c.vocab_size:,}",
    ]
    if letters["M"]:
        lines.append(
            f"mamba         {c.mamba_num_heads} heads of {c.mamba_head_dim}, {c.n_groups} groups, "
            f"state {c.ssm_state_size}, convolution {c.conv_kernel}"
        )
    if letters["*"]:
        lines.append(
            f"attention     {c.num_attention_heads} heads of {c.head_dim}, {c.num_key_value_heads} for keys and values"
        )
    if letters["E"]:
        lines.append(
            f"moe           {c.n_routed_experts} experts of {c.moe_intermediate_size}, {c.num_experts_per_tok} per "
            f"token, shared {c.moe_shared_expert_intermediate_size}"
        )
    if letters["-"]:
        lines.append(f"mlp           {c.intermediate_size}")
    lines.append(f"parameters    {p.total:,}, of which a token uses {p.active:,}")
    elements: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name, t in source.tensors.items():
        elements[t.dtype] += prod(t.shape)
        sizes[_kind(name, c)] += _bytes(source, name)
    lines += [f"{dtype:13} {n:,} elements" for dtype, n in elements.most_common()]
    lines += [f"{kind:13} {n:,} bytes ({n / sizes.total():.1%})" for kind, n in sizes.items()]
    lines.append(
        f"{'all weights':13} {sizes.total():,} bytes in {len(source.tensors):,} tensors (the experts of a layer as one)"
    )
    if source.state:
        kinds = Counter(key.split(".", 1)[0] for key in source.state)
        lines.append(f"{'optimizer':13} {sum(_bytes(source, k) for k in source.state):,} bytes: {', '.join(kinds)}")
    lines += [f"problem       {problem}" for problem in source.problems] or ["tensors       all there, none unexpected"]
    return "\n".join(lines)


def _kind(name: str, c: ModelConfig) -> str:
    if not name.startswith("layers."):
        return {"embeddings": "embedding", "lm_head": "head"}.get(name.split(".")[0], "final norm")
    return KINDS[c.hybrid_override_pattern[int(name.split(".")[1])]]


@dataclass(frozen=True)
class Agreement:
    """Two programs on the same tokens."""

    reference: str
    error: float  # largest absolute difference of a logit
    relative: float  # ||ours - theirs|| / ||theirs||
    kl: float  # mean over the tokens of KL(theirs || ours), in nats
    top1: float  # fraction of tokens where both put the same id first

    def __str__(self) -> str:
        return (
            f"{self.reference}: largest logit error {self.error:.3e}, relative {self.relative:.3e}, "
            f"KL {self.kl:.3e} nats a token, same first choice {self.top1:.2%}"
        )


def agreement(reference: str, ours: Tensor, theirs: Tensor) -> Agreement:
    """ours, theirs: logits (tokens, V)."""
    x, y = ours.double(), theirs.double()
    p, q = y.log_softmax(-1), x.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    top1 = (x.argmax(-1) == y.argmax(-1)).double().mean().item()
    return Agreement(reference, (x - y).abs().max().item(), ((x - y).norm() / y.norm()).item(), kl, top1)


@torch.no_grad()
def load_source(source: Source, dtype: torch.dtype, device: torch.device):
    """Our model in eval mode with a source's weights, one tensor at a time."""
    model = allocate(build(source.config), device, dtype)
    for name, tensor in named_tensors(model).items():
        if ".experts." in name:
            for e in range(tensor.shape[0]):
                tensor[e].copy_(source.read(name, (slice(e, e + 1),))[0])
        else:
            tensor.copy_(source.read(name))
    return model.eval()


@torch.no_grad()
def compare(
    source: Source, model: Path, prompts: list[list[int]], dtype: torch.dtype, device: torch.device
) -> list[Agreement]:
    """Our model with the weights of `source` against transformers with those of the folder `model`, on token ids.

    Twice: transformers keeps the time step of a Mamba layer at or above time_step_min, 1e-3 as released, in its
    prefill; no program that trained a Nemotron has such a floor (github.com/huggingface/transformers/issues/48989).
    One model is in memory at a time.  Raises UserError if transformers is not there or cannot load the folder.
    """
    try:
        from transformers import NemotronHForCausalLM
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise UserError(f"compare needs transformers (pip install 'transformers>=5.17'): {error}") from None
    transformers_logging.set_verbosity_error()  # that slower code than a kernel is in use is what is wanted here
    transformers_logging.disable_progress_bar()
    ids = [torch.tensor([p], device=device) for p in prompts]
    ours_model = load_source(source, dtype, device)
    ours = torch.cat([ours_model.logits(ours_model(x).hidden)[0].cpu() for x in ids])
    del ours_model
    gc.collect()
    try:
        theirs_model = NemotronHForCausalLM.from_pretrained(model, dtype=dtype, local_files_only=True).to(device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--hf-model {model}: transformers could not load it: {' '.join(str(error).split())[:300]}"
        ) from None
    out = []
    for floor in (True, False):
        for layer in theirs_model.model.layers:
            if not floor and hasattr(layer.mixer, "time_step_limit"):
                layer.mixer.time_step_limit = tuple(source.config.time_step_limit)
        theirs = torch.cat([theirs_model(x, use_cache=False).logits[0].float().cpu() for x in ids])
        out.append(agreement(f"transformers, time-step floor {'on' if floor else 'off'}", ours, theirs))
    return out
