"""The process grid as arithmetic: who sits where, which layouts are legal, and which legal one lies nearest.

    dense grid   (pp, dp, cp, tp)    tp varies fastest, so the ranks that talk most share a node
    expert grid  (pp, edp, ep)       the same ranks: a stage's dp * cp * tp of them are cut anew, ep in a row to a group

With tp=4 and ep=8 on 8 ranks two tensor-parallel groups form one expert-parallel group.  No process, no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from nano3.config import Config, UserError

AXES = ("tp", "cp", "dp", "pp", "ep", "edp", "data", "block", "world")


@dataclass(frozen=True)
class Layout:
    """Sizes of the grid.  dp and edp are what the world leaves over."""

    world: int = 1
    tp: int = 1
    ep: int = 1
    pp: int = 1
    cp: int = 1

    @property
    def block(self) -> int:
        """Ranks of one pipeline stage."""
        return self.world // self.pp

    @property
    def dp(self) -> int:
        return self.block // (self.tp * self.cp)

    @property
    def edp(self) -> int:
        return self.block // self.ep

    @classmethod
    def of(cls, config: Config, world: int) -> Layout:
        p = config.parallel
        return cls(world, p.tp, p.ep, p.pp, p.cp)

    def __str__(self) -> str:
        return f"tp={self.tp} ep={self.ep} pp={self.pp}" + (f" cp={self.cp}" if self.cp > 1 else "")

    def groups(self, axis: str) -> list[list[int]]:
        """All groups of ranks along an axis, each in the order of the axis.

        data: the ranks that hold the same part of a dense tensor (dp and cp together); block: one pipeline stage.
        """
        dense = np.arange(self.world).reshape(self.pp, self.dp, self.cp, self.tp)
        expert = np.arange(self.world).reshape(self.pp, self.edp, self.ep)
        rows = {  # the axis last: a row is a group
            "tp": dense,
            "cp": dense.transpose(0, 1, 3, 2),
            "dp": dense.transpose(0, 2, 3, 1),
            "pp": dense.transpose(1, 2, 3, 0),
            "ep": expert,
            "edp": expert.transpose(0, 2, 1),
            "data": dense.transpose(0, 3, 1, 2).reshape(self.pp, self.tp, -1),
            "block": dense.reshape(self.pp, -1),
            "world": dense.reshape(1, -1),
        }[axis]
        return rows.reshape(-1, rows.shape[-1]).tolist()


def kv_copies(config: Config, tp: int) -> int:
    """Consecutive tp ranks that hold the same KV head: 1 unless there are more ranks than heads."""
    return max(1, tp // config.model.num_key_value_heads)


def objections(config: Config, layout: Layout) -> list[str]:
    """What stands against a layout, each with its arithmetic; empty if it is legal."""
    c, t, out = config.model, config.train, []
    pattern = c.hybrid_override_pattern
    world, tp, ep, pp, cp = layout.world, layout.tp, layout.ep, layout.pp, layout.cp

    def divides(divisor: int, of: str, number: int, what: str) -> None:
        if number % divisor:
            out.append(f"{what} needs {of}={number} to be a multiple of {divisor}")

    if world % (tp * cp * pp):
        out.append(
            f"parallel.tp={tp} x parallel.pp={pp}{f' x parallel.cp={cp}' * (cp > 1)} ranks do not divide {world}"
        )
    if world % pp or (world // pp) % ep:
        out.append(f"parallel.ep={ep} x parallel.pp={pp} ranks do not divide {world}")
    if out:
        return out
    divides(tp, "model.vocab_size", c.vocab_size, f"parallel.tp={tp}")
    divides(tp, "dataset.seq_length", config.dataset.seq_length, f"parallel.tp={tp}")
    if "M" in pattern:
        divides(tp, "model.n_groups", c.n_groups, f"parallel.tp={tp}")
    if "*" in pattern:
        divides(tp, "model.num_attention_heads", c.num_attention_heads, f"parallel.tp={tp}")
        if c.num_key_value_heads % tp and tp % c.num_key_value_heads:
            heads = f"model.num_key_value_heads={c.num_key_value_heads}"
            out.append(f"parallel.tp={tp} needs {heads} to divide it or be its multiple")
    if "-" in pattern:
        divides(tp, "model.intermediate_size", c.intermediate_size, f"parallel.tp={tp}")
    if "E" in pattern:
        width = c.moe_shared_expert_intermediate_size
        divides(tp, "model.moe_shared_expert_intermediate_size", width, f"parallel.tp={tp}")
        divides(ep, "model.n_routed_experts", c.n_routed_experts, f"parallel.ep={ep}")
    elif ep > 1:
        out.append(f"parallel.ep={ep} has no experts to spread: the pattern {pattern} holds no E")
    parts = pp * config.parallel.virtual_pp
    if parts > len(pattern):
        out.append(f"{parts} pipeline parts are more than the {len(pattern)} layers")
    share = config.micro_batch(layout.dp) * layout.dp
    if t.global_batch_size % share:
        near = max(share, round(t.global_batch_size / share) * share)
        out.append(
            f"train.global_batch_size={t.global_batch_size} is not a multiple of train.micro_batch_size="
            f"{config.micro_batch(layout.dp)} x {layout.dp} data-parallel rank{'s' * (layout.dp > 1)}; "
            f"use train.global_batch_size={near}, or another train.micro_batch_size"
        )
    elif config.parallel.virtual_pp > 1 and (n := t.global_batch_size // share) % pp:
        out.append(
            f"parallel.virtual_pp={config.parallel.virtual_pp} needs the {n} micro-batches of a step to be a multiple "
            f"of parallel.pp={pp}; change train.global_batch_size or train.micro_batch_size"
        )
    return out


def check_layout(config: Config, world: int) -> Layout:
    """The layout that `world` ranks form.  Raises UserError with the arithmetic and the nearest legal layout."""
    p = config.parallel
    if p.cp > 1:
        raise UserError(
            f"parallel.cp={p.cp}: context parallelism is not available in this version; use parallel.cp=1 and, for "
            "memory at long sequences, parallel.tp or train.recompute=full"
        )
    if p.virtual_pp > 1 and p.pp == 1:
        raise UserError(
            f"parallel.virtual_pp={p.virtual_pp} cuts pipeline stages into parts, and parallel.pp=1 has none; "
            "set parallel.pp above 1 or parallel.virtual_pp=1"
        )
    if not 0 <= p.communication_sms <= 64:
        raise UserError(
            f"parallel.communication_sms={p.communication_sms} is not a number of multiprocessors between 0 and 64; "
            "0 sets no limit"
        )
    layout = Layout.of(config, world)
    against = objections(config, layout)
    if not against:
        return layout
    here = f"{world} rank{'s' * (world > 1)}"
    text = f"the layout {layout} does not work on {here}: {'; '.join(against)}"
    near = nearest_layout(config, layout)
    if near is not None and near != layout:
        changed = [f"parallel.{a}={getattr(near, a)}" for a in ("tp", "ep", "pp")]
        text += f".  The nearest layout that does: {' '.join(changed)}"
    raise UserError(text)


def nearest_layout(config: Config, wanted: Layout) -> Layout | None:
    """The legal layout of as many ranks whose sizes differ least from those wanted, in factors of two; None if none."""

    def distance(layout: Layout) -> tuple[float, int]:
        steps = [abs(math.log2(getattr(layout, a) / getattr(wanted, a))) for a in ("tp", "ep", "pp")]
        return sum(steps), sum(s > 0 for s in steps)

    sizes = [n for n in range(1, wanted.world + 1) if wanted.world % n == 0]
    legal = [
        layout
        for tp in sizes
        for ep in sizes
        for pp in sizes
        if not objections(config, layout := replace(wanted, tp=tp, ep=ep, pp=pp))
    ]
    return min(legal, key=distance, default=None)
