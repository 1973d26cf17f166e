"""LoRA: adapters of low rank beside frozen weights, y = x W^T + s (x A^T) B^T  (arXiv:2106.09685).

A (r, in) is drawn at random and B (out, r) starts at zero, so an adapted model begins as its base.  An adapter is a
small module beside the weight that it adds to, and lies over the ranks as that weight does: of a weight whose outputs
are split, B is split and A is on every rank; of one whose inputs are split, A is split and B is on every rank.  Either
way a rank adds its summand to what the base gives there, so no message is added.  Gradients of what is on every rank
are summed over the ranks like those of norms (`AdamW`).

Routed experts have an adapter each, two tensors with an expert axis as their weights have, or all of a layer share one.

With peft.base_dtype=fp8 every weight that could have an adapter, whether it has one or not, is held as codes of 8 bits
(`kernels/fp8.py`): the parameter is the codes, its attribute `scales` what they are multiplied by.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels import fp8
from kernels.adapted_experts import adapted_experts
from kernels.adapted_linear import adapted_linear
from nano3.config import ModelConfig, PeftConfig, UserError
from nano3.model.linear import Linear
from nano3.model.moe import Experts

BIAS = "e_score_correction_bias"  # of a router: its selection biases
ADAPTABLE = {  # by the letter of a block: what can be adapted in its mixer
    "M": ("in_proj", "out_proj"),
    "*": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "E": ("experts.up_proj", "experts.down_proj", "shared_experts.up_proj", "shared_experts.down_proj"),
    "-": ("up_proj", "down_proj"),
}
NVIDIA = {  # Megatron's name of a layer -> ours, which are Hugging Face's
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("up_proj",),
    "linear_fc2": ("down_proj",),
}
LAST = ("out_proj", "o_proj", "down_proj")  # whose results a block adds to the stream
PREFIXES = ("", "backbone.", "model.", "decoder.")  # what others put before layers.0


class Site(NamedTuple):
    """A weight that has an adapter."""

    module: str  # layers.1.mixer.in_proj, or layers.1.mixer.experts.up_proj, a matrix per expert
    shared: bool = False  # one adapter for all routed experts

    @property
    def routed(self) -> bool:
        return ".experts." in self.module

    @property
    def weight(self) -> str:
        """The tensor that the adapter adds to."""
        return self.module if self.routed else f"{self.module}.weight"

    @property
    def adapter(self) -> str:
        """The adapter's module, which has the tensors A and B."""
        if not self.routed:
            return f"{self.module}.lora"
        owner, leaf = self.module.rsplit(".", 1)
        return f"{owner}.{'shared_lora' if self.shared else 'lora'}.{leaf}"


def adapted(name: str) -> tuple[Site, str] | None:
    """The name of an adapter's tensor -> where it is, and A or B; None for any other tensor."""
    parts = name.split(".")
    for mark in ("lora", "shared_lora"):
        if mark in parts and parts[-1] in ("A", "B"):
            at = parts.index(mark)
            return Site(".".join(parts[:at] + parts[at + 1 : -1]), mark == "shared_lora"), parts[-1]
    return None


def adaptable(c: ModelConfig) -> list[str]:
    """Every module of the model that can have an adapter, in its order."""
    return [f"layers.{i}.mixer.{m}" for i, x in enumerate(c.hybrid_override_pattern) for m in ADAPTABLE[x]]


def spellings(pattern: str) -> list[str]:
    """A target as asked for -> what it may be called here."""
    head, dot, leaf = pattern.removesuffix(".weight").rpartition(".")
    ours = [name for theirs, names in NVIDIA.items() if fnmatchcase(theirs, leaf) for name in names]
    return [f"{head}{dot}{name}" for name in (leaf, *ours)]


def matches(module: str, pattern: str) -> bool:
    """Whether a target means a module: its name, the end of it, or a glob of either, in anyone's spelling."""
    for spelt in spellings(pattern):
        for prefix in PREFIXES:
            full = prefix + module
            if full == spelt or full.endswith(f".{spelt}") or fnmatchcase(full, spelt):
                return True
    return False


def sites_of(c: ModelConfig, peft: PeftConfig) -> list[Site]:
    """Where the adapters are.  Raises UserError naming a target that means nothing, and what there is."""
    if not peft.adapts:
        return []
    known = adaptable(c)
    open_to = [m for m in known if peft.experts != "none" or not Site(m).routed]
    for key, patterns in (("target_modules", peft.target_modules), ("exclude_modules", peft.exclude_modules)):
        for pattern in patterns:
            if any(matches(m, pattern) for m in open_to) or (key == "target_modules" and pattern in _default(peft)):
                continue
            off = " (peft.experts=none leaves routed experts out)" if any(matches(m, pattern) for m in known) else ""
            raise UserError(f"peft.{key}: {pattern!r} matches nothing{off}; {_what_there_is(c)}")
    chosen = [m for m in open_to if any(matches(m, p) for p in peft.target_modules)]
    sites = [m for m in chosen if not any(matches(m, p) for p in peft.exclude_modules)]
    if not sites:
        raise UserError(f"peft.target_modules and peft.exclude_modules leave nothing to adapt; {_what_there_is(c)}")
    return [Site(m, Site(m).routed and peft.experts == "shared") for m in sites]


def _default(peft: PeftConfig) -> list[str]:
    """All six of NVIDIA's names stand for "everything", also in a model that lacks a kind of block; fewer do not."""
    everything = PeftConfig().target_modules
    return everything if set(peft.target_modules) == set(everything) else []


def _what_there_is(c: ModelConfig) -> str:
    letters = [x for x in ADAPTABLE if x in c.hybrid_override_pattern]
    names = [name for x in letters for name in ADAPTABLE[x]]
    first = next(iter(adaptable(c)), "none")
    nvidia = [n for n, ours in NVIDIA.items() if any(name.endswith(ours) for name in names)]
    return (
        f"there are {', '.join(names)} (NVIDIA's names: "
        f"{', '.join([*nvidia, *(n for n in ('in_proj', 'out_proj') if n in names)])}), in full for example {first}"
    )


def adapter_shapes(site: Site, weight: torch.Size, peft: PeftConfig) -> dict[str, torch.Size]:
    """The tensors of an adapter beside a weight (..., out, in)."""
    *experts, out, into = weight[1:] if site.shared else weight
    shapes = {"A": (*experts, peft.rank, into), "B": (*experts, out, peft.rank)}
    return {f"{site.adapter}.{letter}": torch.Size(shape) for letter, shape in shapes.items()}


def in_fp8(name: str, peft: PeftConfig) -> bool:
    """Whether the tensor of this name is held in FP8: a matrix of the frozen base, router, head and embedding not."""
    if not peft.adapts or peft.base_dtype != "fp8" or ".mixer." not in name:
        return False
    return name.split(".mixer.", 1)[1].removesuffix(".weight") in {m for found in ADAPTABLE.values() for m in found}


class CodedLinear(nn.Linear):
    """y = x W^T with W in FP8."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device=base.weight.device)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return fp8.linear(x, self.weight, scales_of(self.weight))


def scales_of(weight: Tensor) -> Tensor | None:
    """The scales of a weight that is held in FP8; None if it is held as it is."""
    return getattr(weight, "scales", None)


class Adapter(nn.Module):
    """A (..., r, in) and B (..., out, r) of one weight, or with an expert axis in front of a layer's experts."""

    def __init__(self, A: torch.Size, B: torch.Size) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.empty(A)), nn.Parameter(torch.empty(B))


class AdaptedLinear(nn.Linear):
    """y = x W^T + s (x A^T) B^T.  ends_block: y only joins the stream."""

    def __init__(self, base: nn.Linear, adapter: Adapter, scale: float, ends_block: bool) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device=base.weight.device)
        self.lora, self.scale, self.ends_block = adapter, scale, ends_block

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        options = {"scales": scales_of(self.weight), "ends_block": self.ends_block}
        return adapted_linear(x, self.weight, self.lora.A, self.lora.B, self.scale, **options)


class AdaptedExperts(Experts):
    """A rank's experts with an adapter each (`lora`), or one for all of the layer's experts (`shared_lora`)."""

    def __init__(self, base: Experts, adapters: dict[str, Adapter], shared: bool, scale: float) -> None:
        nn.Module.__init__(self)
        self.up_proj, self.down_proj, self.backend = base.up_proj, base.down_proj, base.backend
        self.scale, self.adapters = scale, "shared_lora" if shared else "lora"
        self.add_module(self.adapters, nn.ModuleDict(adapters))

    def forward(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, counts_E: Tensor, rows: int) -> Tensor:
        held = getattr(self, self.adapters)
        up, down = ((held[n].A, held[n].B) if n in held else None for n in ("up_proj", "down_proj"))
        base = self.up_proj, self.down_proj
        scales = dict(zip(("up_scales", "down_scales"), map(scales_of, base), strict=True))
        return adapted_experts(
            x_TD, weights_TK, experts_TK, counts_E, *base, up, down, self.scale, self.backend, rows=rows, **scales
        )


def attach(model: nn.Module, peft: PeftConfig) -> None:
    """Give a Nano3 on the meta device its adapters, and say which of its tensors training changes.

    Raises UserError on a target or a glob that matches nothing.
    """
    model.peft = peft
    by_owner: dict[str, list[Site]] = {}
    for site in sites_of(model.config, peft):
        if site.module.split(".")[1] in model.layers:  # of this rank's layers
            by_owner.setdefault(site.module.rsplit(".", 1)[0] if site.routed else site.module, []).append(site)
    tensors = dict(model.named_parameters())
    for owner, sites in by_owner.items():
        made = {
            s.module.rsplit(".", 1)[1]: Adapter(*adapter_shapes(s, tensors[s.weight].shape, peft).values())
            for s in sites
        }
        parent, leaf = owner.rsplit(".", 1)
        base = model.get_submodule(owner)
        if sites[0].routed:
            new = AdaptedExperts(base, made, sites[0].shared, peft.scale)
        else:
            new = AdaptedLinear(base, made[leaf], peft.scale, leaf in LAST)
        setattr(model.get_submodule(parent), leaf, new)
    if peft.adapts and peft.base_dtype == "fp8":
        _replace_bare(model, peft)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name, peft))


def _replace_bare(model: nn.Module, peft: PeftConfig) -> None:
    """Let the modules without an adapter, too, read their weights in FP8."""
    for owner, module in list(model.named_modules()):
        parent, _, leaf = owner.rpartition(".")
        if type(module) is Linear and in_fp8(f"{owner}.weight", peft):
            setattr(model.get_submodule(parent), leaf, CodedLinear(module))
        elif type(module) is Experts:
            setattr(model.get_submodule(parent), leaf, AdaptedExperts(module, {}, False, peft.scale))


def trains(name: str, peft: PeftConfig) -> bool:
    """Whether training changes a parameter."""
    if name.endswith(".gate.weight") and peft.router_frozen:
        return False
    if peft.adapts:
        return adapted(name) is not None or name.endswith(".gate.weight")
    return not any(fnmatchcase(name, glob) for glob in peft.freeze)


def balances(layer: str, peft: PeftConfig) -> bool:
    """Whether training moves the selection biases of a mixture, which no gradient does."""
    return not peft.router_frozen and (peft.adapts or trains(f"layers.{layer}.mixer.gate.{BIAS}", peft))


def kept(name: str, peft: PeftConfig) -> bool:
    """Whether a tensor, parameter or buffer, belongs to a checkpoint: with adapters only what training changes does."""
    if peft.adapts and name.endswith(f".{BIAS}"):
        return not peft.router_frozen
    return not peft.adapts or trains(name, peft)


def check_freeze(names: list[str], peft: PeftConfig) -> None:
    """Raise UserError if a glob of peft.freeze matches no tensor of the whole model, or nothing is left to train."""
    for glob in peft.freeze:
        if not any(fnmatchcase(name, glob) for name in names):
            raise UserError(
                f"peft.freeze: {glob!r} matches no tensor; write for example embeddings.weight, 'layers.0.*' or "
                "'*.norm.weight'"
            )
    if not any(trains(name, peft) for name in names if not name.endswith(f".{BIAS}")):
        raise UserError("peft.freeze leaves nothing to train")
