"""Whole tensors from the ranks' shares, and back: what makes a checkpoint independent of the layout.

Gathered one at a time; every rank calls, the first rank keeps: first the rows that the data-parallel ranks own (of
optimizer state), then the cuts of tp or ep, then from the pipeline stage that has the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from nano3.model.init import named_tensors
from nano3.model.layout import axis_of, split_of, whole_shapes
from nano3.model.model import Nano3
from nano3.parallel.collectives import all_stack
from nano3.parallel.mesh import Axis
from nano3.parallel.tensor import Split
from nano3.train.optim import AdamW

STATE = ("exp_avg", "exp_avg_sq", "master")


def whole_model(model: Nano3) -> dict[str, Tensor]:
    """Every tensor of the whole model, on the CPU of the first rank; empty on the others."""
    mine = named_tensors(model)
    return dict(_collect(model, {name: mine.get(name) for name in whole_shapes(model.config)}))


def whole_state(model: Nano3, optimizer: AdamW) -> dict[str, Tensor]:
    """The optimizer's state for the whole model, on the CPU of the first rank; empty on the others."""
    local, names = optimizer.state(), whole_shapes(model.config)
    out = {}
    for kind in STATE:
        mine = {n: kept[kind] for n, kept in local.items() if kind in kept}
        shares = {n: optimizer.unshard(n, mine[n]) if n in mine else None for n in names}
        out |= {f"{name}.{kind}": t for name, t in _collect(model, shares)}
    if model.mesh.is_main:
        step = torch.tensor(float(optimizer.steps))
        out |= {
            f"{name.removesuffix('.exp_avg')}.step": step.clone() for name in list(out) if name.endswith(".exp_avg")
        }
    return out


def _collect(model: Nano3, shares: dict[str, Tensor | None]) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor on the CPU) on the first rank, nothing elsewhere.  A tensor that no stage has is left out."""
    mesh, c = model.mesh, model.config
    has = torch.tensor([t is not None for t in shares.values()], dtype=torch.int64, device=mesh.device)
    stages = all_stack(has, mesh.pp.group)  # (stages, tensors)
    for (name, share), at in zip(shares.items(), stages.unbind(1), strict=True):
        if not at.any():
            continue
        stage = int(at.argmax())
        whole = None
        if share is not None:
            split = split_of(name, c, mesh.tp.size)
            whole = share.detach() if split is None else _join(share.detach(), split, axis_of(split, mesh))
        if stage > 0 and mesh.block.rank == 0:
            whole = _carry(whole, mesh.pp, stage, mesh.device)
        if mesh.is_main:
            yield name, whole.to("cpu", copy=True).contiguous()


def _join(share: Tensor, split: Split, axis: Axis) -> Tensor:
    return split.join(list(all_stack(share, axis.group).unbind(0)))


def _carry(whole: Tensor | None, pp: Axis, stage: int, device: torch.device) -> Tensor | None:
    """From one stage to the first; shape and dtype travel with it."""
    about = [None if whole is None else (tuple(whole.shape), whole.dtype)]
    dist.broadcast_object_list(about, src=pp.ranks[stage], group=pp.group, device=device)
    shape, dtype = about[0]
    tensor = torch.empty(shape, dtype=dtype, device=device) if whole is None else whole.contiguous()
    dist.broadcast(tensor, src=pp.ranks[stage], group=pp.group)
    return tensor


def take_share(model: Nano3, name: str, whole: Tensor) -> Tensor:
    """This rank's part of a whole tensor of the model."""
    split = split_of(name, model.config, model.mesh.tp.size)
    return whole if split is None else split.take(whole, axis_of(split, model.mesh))
