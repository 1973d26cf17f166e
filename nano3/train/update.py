"""What AdamW does with a step's gradients, and what it keeps: torch's fused update in fp32, or ours in fewer bytes.

Bytes of a bf16 parameter besides its own 2, with optimizer.gradients / masters / moments:

    fp32 / fp32 / fp32      4 + 4 + 8
    bf16 / fp32 / 8bit      2 + 4 + 2.1     scales: 4 bytes for each 128 elements and moment
    bf16 / none / 8bit      2 + 0 + 2.1

A rank keeps these for its rows of a tensor.  What is stored in fewer bits is rounded stochastically, by bits that
follow from rng.seed, the tensor, the element's place in the whole tensor and the step (`kernels/adamw.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw as fused_adamw

from kernels.adamw import WIDEST, Moment, Place, Step, adamw, decode, keys_of, store
from nano3.config import OptimizerConfig, UserError
from nano3.model.layout import Piece
from nano3.parallel.tensor import Split

State = dict[str, dict[str, Tensor]]  # by tensor and kind
LEAST = 16  # elements that may share a scale; tensors with shorter rows keep fp32 moments
CPU = torch.device("cpu")  # where moments wait that were stored in another form
TP_POWER = 8  # tp up to this power of two cuts no block


def decays(parameter: Tensor) -> bool:
    """Weight decay applies to every tensor with more than one dimension: conv1d.weight too, norms and A_log not."""
    return parameter.ndim > 1


def is_compact(c: OptimizerConfig) -> bool:
    """Whether anything is kept in fewer bits than fp32."""
    return (c.gradients, c.masters, c.moments) != ("fp32", "fp32", "fp32")


def check_forms(c: OptimizerConfig, bf16: bool, reduce_in_fp32: bool = True) -> None:
    """Raise UserError on settings about bf16 weights where weights are fp32."""
    if not bf16 and not reduce_in_fp32:
        raise UserError(
            "parallel.grad_reduce_in_fp32=false is about bf16 weights, and these are fp32; add train.precision=bf16, "
            "or leave it out"
        )
    for key, plain in (("masters", "fp32"), ("gradients", "fp32")):
        if (value := getattr(c, key)) != plain and not bf16:
            raise UserError(
                f"optimizer.{key}={value} is about bf16 weights, and these are fp32; add train.precision=bf16, or use "
                f"optimizer.{key}={plain}"
            )


def cut_by_columns(local: torch.Size, split: Split | None) -> bool:
    return split is not None and len(local) > 1 and split.dim == len(local) - 1


def block_of(local: torch.Size, split: Split | None) -> int:
    """How many elements of a row share a scale in 8-bit moments; 0: the tensor's moments stay wide.

    local: the shape of a rank's part.  The same for every tp, so that any layout can read what another wrote: where tp
    cuts the rows themselves, a block has to lie within the part of a rank at tp=8.
    """
    if len(local) < 2:
        return 0
    if cut_by_columns(local, split):
        width = sum(split.pieces)
        block = min(WIDEST, (width & -width) // TP_POWER)
    else:
        width = local[-1]
        block = min(WIDEST, 1 << (width - 1).bit_length())
    return block if block >= LEAST and width >= LEAST else 0


def state_bytes(c: OptimizerConfig, rows: int, p: Tensor, split: Split | None) -> int:
    """Bytes of moments and master for so many rows of a parameter, or of a rank's part of it."""
    wide = torch.promote_types(p.dtype, torch.float32).itemsize
    lines = rows * prod(p.shape[1:-1]) if p.ndim > 1 else 1
    width = p.shape[-1] if p.ndim > 1 else rows
    master = wide if p.dtype.itemsize < wide and c.masters == "fp32" else 0
    block = block_of(p.shape, split) if c.moments == "8bit" else 0
    if block:
        return lines * (width * (2 + master) + 8 * -(-width // block))
    return lines * width * (2 * (2 if c.moments == "bf16" else wide) + master)


class Tensors(NamedTuple):
    """One parameter as an update sees it."""

    parameter: Tensor
    rows: Tensor  # this rank's, a view
    split: Split | None
    pieces: list[Piece]  # of the rows, in order: where they lie in the whole


class Update(Protocol):
    """masters: what is updated, by name: fp32 copies of this rank's rows, or the rows themselves."""

    masters: dict[str, Tensor]
    steps: int  # updates done

    def apply(self, gradients: dict[str, Tensor], clip: Tensor | None, lr: float, fine: Tensor) -> None:
        """One update from this rank's rows of the gradients, which it may change, times `clip`.

        fine: a bool on the device; where it is False, no weight, master or moment changes.
        """

    def state(self) -> State:
        """What a resumed run needs besides the model."""

    def resume_state(self, steps: int, stored: str | None) -> State:
        """The tensors of `state` after so many updates, to be filled; then call `resumed`.

        stored: 8bit or wide, the form in which moments come, None: this update's own.
        """

    def resumed(self) -> None:
        """Bring what was filled into this update's form."""


def update_for(tensors: dict[str, Tensors], c: OptimizerConfig, seed: int) -> Update:
    return Compact(tensors, c, seed) if is_compact(c) else Fused(tensors, c)


def _new(t: Tensors, form: str, device: torch.device | None = None) -> tuple[Moment, Moment]:
    """Moments of zero for a rank's rows: 8bit, bf16, or wide; on the weights' device if no other is given."""
    device = device or t.rows.device
    rows, block = t.rows, block_of(t.parameter.shape, t.split) if form == "8bit" else 0
    if not block:
        narrow, full = torch.bfloat16, torch.promote_types(rows.dtype, torch.float32)
        return tuple(
            Moment(torch.zeros_like(rows, dtype=narrow if form == "bf16" else full, device=device)) for _ in range(2)
        )
    if cut_by_columns(rows.shape, t.split) and rows.shape[-1] % block:
        raise UserError(
            f"optimizer.moments=8bit: {t.pieces[0].name if t.pieces else 'a tensor'} has {rows.shape[-1]} columns on a "
            f"rank, which blocks of {block} do not fill; use a smaller parallel.tp, or optimizer.moments=bf16"
        )
    blocks = (*rows.shape[:-1], -(-rows.shape[-1] // block))
    return tuple(
        Moment(torch.zeros_like(rows, dtype=dtype, device=device), torch.zeros(blocks, device=device))
        for dtype in (torch.int8, torch.uint8)
    )


def _named(moments: Iterable[Moment]) -> dict[str, Tensor]:
    out = {}
    for kind, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
        out[kind] = moment.data
        if moment.scale is not None:
            out[f"{kind}_scale"] = moment.scale
    return out


def _matrix(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1]) if t.ndim > 1 else t[None]


def _matrices(moment: Moment) -> Moment:
    return Moment(*(None if t is None else _matrix(t) for t in moment))


def _convert(there: Moment, here: Moment, block: int) -> None:
    """The same numbers in another form, rounded to nearest; some rows at a time, so that it takes little memory."""
    a, b = _matrices(there), _matrices(here)
    R, W = b.data.shape
    for first in range(0, R, n := max(1, (1 << 22) // W)):
        part, to = (Moment(*(None if t is None else t[first : first + n] for t in m)) for m in (a, b))
        part = Moment(*(None if t is None else t.to(b.data.device) for t in part))
        bits = torch.full(to.data.shape, 1 << 15, dtype=torch.int64, device=b.data.device)
        store(to, decode(part, block), block, bits)


class Fused:
    """torch's fused AdamW on fp32 masters.

    Its kernel is called as torch.optim.AdamW does it, without that class, which imports PyTorch's compiler.
    """

    def __init__(self, tensors: dict[str, Tensors], c: OptimizerConfig) -> None:
        self.tensors, self.config = tensors, c
        self.incoming: dict[str, tuple[Moment, Moment]] = {}
        self.masters = {n: t.rows.to(torch.promote_types(t.rows.dtype, torch.float32)) for n, t in tensors.items()}
        self.moments: dict[str, dict[str, Tensor]] = {}  # as torch names them, from a tensor's first update on

    def apply(self, gradients: dict[str, Tensor], clip: Tensor | None, lr: float, fine: Tensor) -> None:
        if clip is not None and gradients:
            torch._foreach_mul_(list(gradients.values()), clip)
        for wanted in (True, False):
            names = [n for n in gradients if decays(self.tensors[n].parameter) == wanted]
            for n in names:
                if n not in self.moments:
                    self.moments[n] = self._zeros(n, 0)
            if names:
                fused_adamw(
                    [self.masters[n] for n in names],
                    [gradients[n] for n in names],
                    *([self.moments[n][kind] for n in names] for kind in ("exp_avg", "exp_avg_sq")),
                    [],
                    [self.moments[n]["step"] for n in names],
                    fused=True,
                    found_inf=(~fine).float(),  # as torch's loss scaling says it to this kernel: 1 changes nothing
                    amsgrad=False,
                    beta1=self.config.adam_beta1,
                    beta2=self.config.adam_beta2,
                    lr=lr,
                    weight_decay=self.config.weight_decay if wanted else 0.0,
                    eps=self.config.adam_eps,
                    maximize=False,
                )

    def _zeros(self, name: str, steps: int) -> dict[str, Tensor]:
        master = self.masters[name]
        step = torch.full((), float(steps), dtype=torch.float32, device=master.device)
        return {"step": step} | {kind: torch.zeros_like(master) for kind in ("exp_avg", "exp_avg_sq")}

    @property
    def steps(self) -> int:
        return next((int(m["step"]) for m in self.moments.values()), 0)

    def state(self) -> State:
        out: State = {}
        for name, master in self.masters.items():
            moments = self.moments.get(name, {})
            out[name] = {k: moments[k] for k in ("exp_avg", "exp_avg_sq") if k in moments}
            if master.dtype != self.tensors[name].rows.dtype:
                out[name]["master"] = master
        return out

    def resume_state(self, steps: int, stored: str | None) -> State:
        for name, master in self.masters.items():
            if not steps or not master.numel():
                continue
            if stored == "8bit" and block_of(self.tensors[name].parameter.shape, self.tensors[name].split):
                self.incoming[name] = _new(self.tensors[name], "8bit", CPU)
            self.moments[name] = self._zeros(name, steps)
        out = self.state()
        for name, moments in self.incoming.items():
            out[name] |= _named(moments)
        return out

    def resumed(self) -> None:
        for name, moments in self.incoming.items():
            block, state = block_of(self.tensors[name].parameter.shape, self.tensors[name].split), self.state()[name]
            for there, kind in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
                _convert(there, Moment(state[kind]), block)
        self.incoming = {}


class Part(NamedTuple):
    """One component of a tensor as the kernel takes it: views of what is updated, but for the gradient."""

    rows: slice  # of the rank's
    weight: Tensor
    first: Moment
    second: Moment
    place: Place
    block: int


class Compact:
    """One kernel for each tensor (`kernels/adamw.py`): moments in any form, with or without masters."""

    def __init__(self, tensors: dict[str, Tensors], c: OptimizerConfig, seed: int) -> None:
        self.tensors, self.config, self.seed, self.steps = tensors, c, seed, 0
        self.masters = {
            n: t.rows if c.masters == "none" else t.rows.to(torch.promote_types(t.rows.dtype, torch.float32))
            for n, t in tensors.items()
        }
        self.moments: dict[str, tuple[Moment, Moment]] = {}
        self.incoming: dict[str, tuple[Moment, Moment]] = {}
        self._parts: dict[str, list[Part]] = {}  # found once: an adapted model has hundreds of tensors

    def _form(self) -> str:
        return "wide" if self.config.moments == "fp32" else self.config.moments

    def apply(self, gradients: dict[str, Tensor], clip: Tensor | None, lr: float, fine: Tensor) -> None:
        c, self.steps = self.config, self.steps + 1
        factor = torch.ones((), device=fine.device) if clip is None else clip
        factor = factor.where(fine, torch.nan)
        decayed = Step(lr, c.adam_beta1, c.adam_beta2, c.adam_eps, c.weight_decay, self.steps)
        steps = {True: decayed, False: decayed._replace(decay=0.0)}
        for name, g in gradients.items():
            if name not in self._parts:
                self._parts[name] = self._parts_of(name)
            step, keys = steps[decays(self.tensors[name].parameter)], keys_of(self.seed, name, self.steps)
            for rows, weight, first, second, place, block in self._parts[name]:
                adamw(weight, _matrix(g[rows]), first, second, factor, step, keys, place, block)

    def _parts_of(self, name: str) -> list[Part]:
        """A tensor's components, each a matrix; its moments are made here if it has none yet."""
        t, master, first, out = self.tensors[name], self.masters[name], 0, []
        if name not in self.moments:
            self.moments[name] = _new(t, self._form())
        block = block_of(t.parameter.shape, t.split) or min(WIDEST, 1 << (master.shape[-1] - 1).bit_length())
        for piece in t.pieces:
            rows = slice(first, first := first + piece.tensor.shape[0])
            moments = (_rows(m, rows) for m in self.moments[name])
            out.append(Part(rows, _matrix(master[rows]), *moments, _place(piece, t), block))
        return out

    def state(self) -> State:
        out: State = {}
        for name, master in self.masters.items():
            out[name] = _named(self.moments[name]) if name in self.moments else {}
            if master.dtype != self.tensors[name].rows.dtype:
                out[name]["master"] = master
        return out

    def resume_state(self, steps: int, stored: str | None) -> State:
        self.steps = steps
        self._parts = {}
        for name, t in self.tensors.items():
            if not steps or not t.rows.numel():
                continue
            self.moments[name] = _new(t, self._form())
            differs = stored is not None and (stored == "8bit") != (self.config.moments == "8bit")
            if differs and block_of(t.parameter.shape, t.split):
                self.incoming[name] = _new(t, stored, CPU)
        out = self.state()
        for name, moments in self.incoming.items():
            kept = {kind: x for kind, x in out[name].items() if kind == "master"}
            out[name] = _named(moments) | kept
        return out

    def resumed(self) -> None:
        for name, moments in self.incoming.items():
            block = block_of(self.tensors[name].parameter.shape, self.tensors[name].split)
            for there, here in zip(moments, self.moments[name], strict=True):
                _convert(there, here, block)
        self.incoming = {}


def _rows(moment: Moment, rows: slice) -> Moment:
    return _matrices(Moment(*(None if t is None else t[rows] for t in moment)))


def _place(piece: Piece, t: Tensors) -> Place:
    """Where a piece lies in the whole tensor as a matrix; a vector is one row of it."""
    local, start = t.parameter.shape, piece.index[0].start
    if len(local) == 1:
        return Place(0, 0, start)
    if cut_by_columns(local, t.split):
        return Place(sum(t.split.pieces), start, piece.index[1].start)
    return Place(local[-1], start * prod(local[1:-1]), 0)
