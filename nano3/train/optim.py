"""AdamW with fp32 master weights, sharded over the ranks that hold the same tensors.

A rank keeps masters and moments for its rows of each tensor only (`nano3/parallel/data.py`); with one rank these are
all rows.  Parameters kept in fp32 (or float64) are their own masters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nano3.config import OptimizerConfig
from nano3.parallel.collectives import all_sum
from nano3.train.gradients import Gradients


def decays(parameter: Tensor) -> bool:
    """Weight decay applies to every tensor with more than one dimension: conv1d.weight too, norms and A_log not."""
    return parameter.ndim > 1


class AdamW(Gradients):
    """The gradients of a model, and what is done with them."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, reduce_in_fp32: bool = True) -> None:
        super().__init__(model, reduce_in_fp32)
        self.config = config
        self.masters: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            self.masters[name] = self.shard(name, p.detach()).to(torch.promote_types(p.dtype, torch.float32))
        held = {n: m for n, m in self.masters.items() if m.numel()}
        groups = [
            {
                "params": [m for n, m in held.items() if decays(self.parameters[n]) == wanted],
                "weight_decay": config.weight_decay if wanted else 0.0,
            }
            for wanted in (True, False)
        ]
        nothing = [{"params": [torch.zeros(0, device=self.mesh.device)]}]  # a stage that is frozen; torch wants some
        self.inner = torch.optim.AdamW(
            [g for g in groups if g["params"]] or nothing,
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=True,
        )

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Sum the gradients, clip, update, start to gather.  Returns the norm before clipping (a host sync)."""
        gradients = self.reduced_gradients()
        held = {n: g for n, g in gradients.items() if g.numel()}
        counted = [g for n, g in held.items() if self._counted(n)]
        norm = (
            nn.utils.get_total_norm(counted)
            if counted
            else torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        )
        if self.mesh.world > 1:
            norm = all_sum(norm.square().double(), self.mesh.all.group).sqrt().to(norm.dtype)
        if self.config.clip_grad > 0 and held:
            torch._foreach_mul_(list(held.values()), (self.config.clip_grad / (norm + 1e-6)).clamp_max(1.0))
        for name, g in held.items():
            self.masters[name].grad = g
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.step()
        for master in self.masters.values():
            master.grad = None
        self.publish()
        self.last_micro_batch = False
        return norm.item()

    @torch.no_grad()
    def publish(self) -> None:
        """Write the masters into the parameters, and start to gather the other ranks' rows; forward order."""
        for bucket in reversed(self.buckets):
            for m in bucket.members:
                rows = m.parameter[m.owned(bucket.axis.rank)]
                if rows.dtype != self.masters[m.name].dtype:
                    rows.copy_(self.masters[m.name])
            bucket.gather()
        self._make_room()

    @property
    def steps(self) -> int:
        """Updates done so far."""
        return next((int(s["step"]) for s in self.inner.state.values()), 0)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What a resumed run needs besides the model: this rank's rows of moments and masters, by tensor and kind."""
        out: dict[str, dict[str, Tensor]] = {}
        for name, master in self.masters.items():
            moments = self.inner.state.get(master, {})
            out[name] = {k: moments[k] for k in ("exp_avg", "exp_avg_sq") if k in moments}
            if master.dtype != self.parameters[name].dtype:
                out[name]["master"] = master
        return out

    def resume_state(self, steps: int) -> dict[str, dict[str, Tensor]]:
        """The tensors of `state` of an optimizer that has made `steps` updates, to be filled in place."""
        for master in self.masters.values():
            if steps and master.numel():
                self.inner.state[master] = {
                    "step": torch.tensor(float(steps), device=master.device),
                    "exp_avg": torch.zeros_like(master),
                    "exp_avg_sq": torch.zeros_like(master),
                }
        return self.state()
