"""AdamW with fp32 master weights.

Parameters kept in fp32 (or float64) are their own masters.  For bf16 parameters the fp32 master, both moments and an
fp32 gradient live here: each micro-batch's bf16 gradient is added to it as soon as autograd has it, and freed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nano3.config import OptimizerConfig
from nano3.parallel.data import sum_gradients


def decays(parameter: Tensor) -> bool:
    """Weight decay applies to every tensor with more than one dimension: conv1d.weight too, norms and A_log not."""
    return parameter.ndim > 1


class AdamW:
    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        self.parameters = dict(model.named_parameters())
        self.masters: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            narrow = torch.finfo(p.dtype).bits < 32
            self.masters[name] = p.detach().float().requires_grad_() if narrow else p
            if narrow:
                p.register_post_accumulate_grad_hook(self._accumulate(self.masters[name]))
        groups = [
            {
                "params": [m for m in self.masters.values() if decays(m) == wanted],
                "weight_decay": config.weight_decay if wanted else 0.0,
            }
            for wanted in (True, False)
        ]
        self.inner = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=True,
        )

    @staticmethod
    def _accumulate(master: Tensor):
        @torch.no_grad()
        def hook(p: Tensor) -> None:
            master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
            p.grad = None

        return hook

    def gradients(self) -> list[Tensor]:
        """The gradient of every master, in the model's order; zeros where a parameter took no part."""
        for m in self.masters.values():
            if m.grad is None:
                m.grad = torch.zeros_like(m)
        return [m.grad for m in self.masters.values()]

    @torch.no_grad()
    def step(self, lr: float, group: torch.distributed.ProcessGroup | None = None) -> float:
        """Sum the gradients over the group, clip, update, clear.  Returns the norm before clipping (a host sync)."""
        gradients = self.gradients()
        sum_gradients(gradients, group)
        norm = nn.utils.get_total_norm(gradients)
        if self.config.clip_grad > 0:
            torch._foreach_mul_(gradients, (self.config.clip_grad / (norm + 1e-6)).clamp_max(1.0))
        for g in self.inner.param_groups:
            g["lr"] = lr
        self.inner.step()
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                self.parameters[name].copy_(master)
            master.grad = None
        return norm.item()

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs besides the model, by name."""
        out = {}
        for name, master in self.masters.items():
            moments = self.inner.state.get(master)
            if moments:
                out |= {f"{name}.{k}": moments[k] for k in ("exp_avg", "exp_avg_sq", "step")}
            if master is not self.parameters[name]:
                out[f"{name}.master"] = master.detach()
        return out

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, master in self.masters.items():
            if f"{name}.master" in state:
                master.copy_(state[f"{name}.master"])
            elif master is not self.parameters[name]:
                master.copy_(self.parameters[name])
            if f"{name}.exp_avg" in state:
                like = {k: state[f"{name}.{k}"].to(master.device) for k in ("exp_avg", "exp_avg_sq")}
                self.inner.state[master] = {**like, "step": state[f"{name}.step"].to(master.device)}
