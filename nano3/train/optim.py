"""AdamW, sharded over the ranks that hold the same tensors.

A rank keeps masters and moments for its rows of each tensor only (`nano3/parallel/data.py`); with one rank these are
all rows.  Parameters kept in fp32 (or float64) are their own masters.  `update.py` says how the rest is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nano3.config import OptimizerConfig
from nano3.model.layout import pieces
from nano3.parallel.collectives import all_sum
from nano3.train.gradients import Gradients
from nano3.train.update import State, Tensors, decays, update_for

__all__ = ["AdamW", "decays"]


class AdamW(Gradients):
    """The gradients of a model, and what is done with them.

    seed: of the random bits where anything is kept in fewer bits than fp32 (`update.py`).
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, reduce_in_fp32: bool = True, seed: int = 0) -> None:
        super().__init__(model, reduce_in_fp32, config.gradients == "bf16")
        self.config = config
        tensors = {}
        for name, p in self.parameters.items():
            rows = self.shard(name, p.detach())
            found = pieces(name, rows, self.first_row(name), p.shape, model)
            tensors[name] = Tensors(p, rows, self.splits[name], [x for x in found if x.tensor.numel()])
        self.update = update_for(tensors, config, seed)

    @property
    def masters(self) -> dict[str, Tensor]:
        """What is updated, by name: fp32 copies of this rank's rows, or the rows themselves."""
        return self.update.masters

    @torch.no_grad()
    def step(self, lr: float, fine: Tensor | None = None) -> Tensor:
        """Sum the gradients, clip, update, start to gather.  Returns the norm before clipping.

        Nothing waits for the GPU.  Where the norm is not finite, or fine, a bool on the device, is False, weights,
        masters and moments stay as they were.
        """
        gradients = self.reduced_gradients()
        held = {n: g for n, g in gradients.items() if g.numel()}
        counted = [g for n, g in held.items() if self._counted(n)]
        # 0 where other ranks count all: in the dtype of their norm, so that all clip by the same bits.
        norm = _total_norm(counted) if counted else torch.zeros((), dtype=self.wide, device=self.mesh.device)
        if self.mesh.world > 1:
            norm = all_sum(norm.square().double(), self.mesh.all.group).sqrt().to(norm.dtype)
        clip = (self.config.clip_grad / (norm + 1e-6)).clamp_max(1.0) if self.config.clip_grad > 0 else None
        finite = norm.isfinite()
        self.update.apply(held, clip, lr, finite if fine is None else finite & fine)
        self.publish()
        self.last_micro_batch = False
        return norm

    @torch.no_grad()
    def publish(self) -> None:
        """Write the masters into the parameters, and start to gather the other ranks' rows; forward order."""
        for bucket in reversed(self.buckets):
            rows = {m.name: m.parameter[m.owned(bucket.axis.rank)] for m in bucket.members}
            narrow = [n for n, r in rows.items() if r.dtype != self.masters[n].dtype]
            if narrow:  # one launch, where there are hundreds of adapters in a bucket
                torch._foreach_copy_([rows[n] for n in narrow], [self.masters[n] for n in narrow])
            bucket.gather()
        self._make_room()

    @property
    def steps(self) -> int:
        """Updates done so far."""
        return self.update.steps

    def state(self) -> State:
        """What a resumed run needs besides the model: this rank's rows of moments and masters, by tensor and kind."""
        return self.update.state()

    def resume_state(self, steps: int, stored: str | None = None) -> State:
        """The tensors of `state` of an optimizer that has made `steps` updates, to be filled in place; then call
        `resumed`.  stored: 8bit or wide, the form in which the moments come; None: the same as here."""
        return self.update.resume_state(steps, stored)

    def resumed(self) -> None:
        """What `resume_state` gave is filled."""
        self.update.resumed()


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """The L2 norm of all together, summed in fp32 at least."""
    if all(g.dtype.itemsize >= 4 for g in gradients):
        return nn.utils.get_total_norm(gradients)
    return torch.stack(torch._foreach_norm(gradients, 2, torch.float32)).norm()
