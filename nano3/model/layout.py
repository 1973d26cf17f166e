"""How each tensor of the model lies over the ranks: one table, read by initialisation, optimizer and checkpoints.

in_proj and the convolution are cut component by component, so that a rank has whole heads of each: its rows of z, of
x, of B, of C and of dt, one after the other.  Every other cut is along one dimension.  What the table does not name is
the same on every rank: norms, routers, selection biases.  Adapters follow from the weights that they add to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nano3.config import ModelConfig, PeftConfig
from nano3.model.lora import adapted, attach
from nano3.model.model import Nano3
from nano3.parallel.mesh import Axis, Mesh
from nano3.parallel.tensor import Split

IN_PROJ = ("z", "x", "B", "C", "dt")  # the components of in_proj, in order
CONV = ("x", "B", "C")


def split_of(name: str, c: ModelConfig, tp: int) -> Split | None:
    """The rule for the tensor of this name in the whole model; None: replicated."""
    if (found := adapted(name)) is not None:
        site, letter = found
        base = split_of(site.weight, c, tp)
        if site.routed:
            return None if site.shared else base
        return base if base is not None and base.dim == "BA".index(letter) else None
    kv_copies = max(1, tp // c.num_key_value_heads)
    bc = c.n_groups * c.ssm_state_size
    table = {
        "embeddings.weight": Split("tp", 0, (c.vocab_size,)),
        "lm_head.weight": Split("tp", 0, (c.vocab_size,)),
        "mixer.in_proj.weight": Split("tp", 0, (c.d_inner, c.d_inner, bc, bc, c.mamba_num_heads), names=IN_PROJ),
        "mixer.conv1d.weight": Split("tp", 0, (c.d_inner, bc, bc), names=CONV),
        "mixer.conv1d.bias": Split("tp", 0, (c.d_inner, bc, bc), names=CONV),
        "mixer.A_log": Split("tp", 0, (c.mamba_num_heads,)),
        "mixer.D": Split("tp", 0, (c.mamba_num_heads,)),
        "mixer.dt_bias": Split("tp", 0, (c.mamba_num_heads,)),
        "mixer.norm.weight": Split("tp", 0, (c.d_inner,)),
        "mixer.out_proj.weight": Split("tp", 1, (c.d_inner,)),
        "mixer.q_proj.weight": Split("tp", 0, (c.num_attention_heads * c.head_dim,)),
        "mixer.k_proj.weight": Split("tp", 0, (c.num_key_value_heads * c.head_dim,), kv_copies),
        "mixer.v_proj.weight": Split("tp", 0, (c.num_key_value_heads * c.head_dim,), kv_copies),
        "mixer.o_proj.weight": Split("tp", 1, (c.num_attention_heads * c.head_dim,)),
        "mixer.up_proj.weight": Split("tp", 0, (c.intermediate_size,)),
        "mixer.down_proj.weight": Split("tp", 1, (c.intermediate_size,)),
        "mixer.shared_experts.up_proj.weight": Split("tp", 0, (c.moe_shared_expert_intermediate_size,)),
        "mixer.shared_experts.down_proj.weight": Split("tp", 1, (c.moe_shared_expert_intermediate_size,)),
        "mixer.experts.up_proj": Split("ep", 0, (c.n_routed_experts,)),
        "mixer.experts.down_proj": Split("ep", 0, (c.n_routed_experts,)),
    }
    return table.get(name.split(".", 2)[-1] if name.startswith("layers.") else name)


def axis_of(split: Split | None, mesh: Mesh) -> Axis:
    """The axis that a split refers to; an axis of size 1 for a replicated tensor."""
    return Axis() if split is None else {"tp": mesh.tp, "ep": mesh.ep}[split.axis]


def whole_shapes(c: ModelConfig, peft: PeftConfig | None = None) -> dict[str, torch.Size]:
    """Name and shape of every tensor of the whole model, its adapters among them if it has any, in its order."""
    with torch.device("meta"):
        model = Nano3(c)
        if peft is not None:
            attach(model, peft)
    return {name: t.shape for name, t in [*model.named_parameters(), *model.named_buffers()]}


class Piece(NamedTuple):
    """Part of a tensor on this rank, as a box of the whole.  A tensor of several components has one per component."""

    key: str  # the tensor's name, and the component's if there are several
    shape: torch.Size  # of the whole component
    offsets: tuple[int, ...]
    tensor: Tensor  # a view
    name: str  # the tensor's
    base: int = 0  # where the component begins in the whole tensor

    @property
    def index(self) -> tuple[slice, ...]:
        """The box in the whole tensor, its components side by side."""
        starts = (self.base + self.offsets[0], *self.offsets[1:])
        return tuple(slice(o, o + n) for o, n in zip(starts, self.tensor.shape, strict=True))


def pieces(name: str, held: Tensor, first: int, local: torch.Size, model: Nano3) -> Iterator[Piece]:
    """What `held` is of the whole: rows first, first + 1, ... of this rank's part of a tensor, of shape `local`."""
    split = split_of(name, model.config, model.mesh.tp.size)
    last, zeros = first + held.shape[0], [0] * (len(local) - 1)
    if split is None:
        yield Piece(name, local, (first, *zeros), held, name)
        return
    axis = axis_of(split, model.mesh)
    parts, index = axis.size // split.copies, axis.rank // split.copies
    if split.dim > 0:
        offsets = [first, *zeros]
        offsets[split.dim] = index * local[split.dim]
        whole = list(local)
        whole[split.dim] *= parts
        yield Piece(name, torch.Size(whole), tuple(offsets), held, name)
        return
    start = base = 0  # of the component's cut in the local tensor, of the component in the whole one
    for component, size in zip(split.names, split.pieces, strict=True):
        width = size // parts
        low, high = max(first, start), min(last, start + width)
        if low < high:
            key = f"{name}.{component}" if component else name
            offsets = (index * width + low - start, *zeros)
            shape, tensor = torch.Size((size, *local[1:])), held[low - first : high - first]
            yield Piece(key, shape, offsets, tensor, name, base)
        start, base = start + width, base + size
