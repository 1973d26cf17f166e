"""AdamW with fp32 master weights, sharded over the ranks that hold the same tensors.

A rank keeps masters and moments for its rows of each tensor only (`nano3/parallel/data.py`); with one rank these are
all rows.  Parameters kept in fp32 (or float64) are their own masters.  Gradients of bf16 parameters are added up in
fp32: each micro-batch's is added as soon as autograd has it, and freed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nano3.config import OptimizerConfig
from nano3.model.layout import split_of
from nano3.parallel.collectives import all_sum
from nano3.parallel.data import Bucket, Member, make_buckets
from nano3.parallel.mesh import Axis


def decays(parameter: Tensor) -> bool:
    """Weight decay applies to every tensor with more than one dimension: conv1d.weight too, norms and A_log not."""
    return parameter.ndim > 1


class AdamW:
    """model: a Nano3 with memory; its mesh says over which ranks a tensor's rows are spread.

    A parameter that requires no gradient is frozen: nothing is kept for it, and no message carries it.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, reduce_in_fp32: bool = True) -> None:
        self.config, self.mesh = config, model.mesh
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.splits = {n: split_of(n, model.config, self.mesh.tp.size) for n, _ in model.named_parameters()}
        self.buckets = make_buckets(self.parameters, self.axis, None if reduce_in_fp32 else torch.bfloat16)
        self.last_micro_batch = False  # set by the loop: gradients that come now are the last of the step
        self.masters: dict[str, Tensor] = {}
        self.members = {m.name: (b, m) for b in self.buckets for m in b.members}
        for name, p in self.parameters.items():
            self.masters[name] = self.shard(name, p.detach()).to(torch.promote_types(p.dtype, torch.float32))
            p.register_post_accumulate_grad_hook(self._accumulate(*self.members[name]))
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
        self._wait_before_use(model)

    def axis(self, name: str) -> Axis:
        """The ranks that hold the same part of a tensor."""
        split = self.splits.get(name)  # buffers have none
        return self.mesh.edp if split is not None and split.axis == "ep" else self.mesh.data

    def _accumulate(self, bucket: Bucket, member: Member):
        def hook(p: Tensor) -> None:
            bucket.accumulate(member, p.grad)
            p.grad = None
            if self.last_micro_batch:
                bucket.arrived.add(member.name)
                self._reduce_complete()

        return hook

    def _reduce_complete(self) -> None:
        """Send off the buckets that are complete, in the fixed order that all ranks share."""
        for bucket in self.buckets:
            if bucket.row is None:
                if len(bucket.arrived) < len(bucket.members):
                    return
                bucket.reduce()

    def _wait_before_use(self, model: nn.Module) -> None:
        """Let each block wait for its own parameters; what the head needs arrives before the last norm."""
        if self.mesh.world == 1:
            return
        users: dict[str, nn.Module] = {f"layers.{i}.": block for i, block in model.layers.items()}
        if model.has_start:
            users["embeddings."] = model.embeddings
        if model.has_end:
            users |= {"norm_f.": model.norm_f, "lm_head.": model.norm_f}
        for prefix, module in users.items():
            mine = [b for b in self.buckets if any(m.name.startswith(prefix) for m in b.members)]
            if mine:  # not frozen
                module.register_forward_pre_hook(lambda *_, mine=mine: [b.finish_gather() for b in mine] and None)

    def finish_gather(self) -> None:
        """Wait until all parameters are what the last step made them."""
        for bucket in self.buckets:
            bucket.finish_gather()

    def reduced_gradients(self) -> dict[str, Tensor]:
        """This rank's rows of every gradient, summed over all ranks that add to it; clears what was collected."""
        for bucket in self.buckets:
            if bucket.row is None:
                bucket.reduce()
        found = {name: g for bucket in self.buckets for name, g in bucket.finish_reduce().items()}
        dense = {n: s for n in found if (s := self.splits[n]) is None or s.axis == "tp"}
        # With the sequence split, a replicated tensor has seen this rank's tokens only; so has a KV head's copy.
        _sum_together([found[n] for n, s in dense.items() if s is None], self.mesh.tp)
        _sum_together([found[n] for n, s in dense.items() if s is not None and s.copies > 1], self.mesh.kv)
        return {n: found[n] for n in self.parameters}

    def _counted(self, name: str) -> bool:
        """Whether this rank's copy is the one that the global norm counts."""
        split = self.splits[name]
        if split is None:
            return self.mesh.tp.rank == 0
        return split.copies == 1 or self.mesh.kv.rank == 0

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

    def first_row(self, name: str) -> int:
        """Where this rank's rows of a tensor begin."""
        bucket, member = self.members[name]
        return member.owned(bucket.axis.rank).start

    def shard(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's rows of a tensor like the parameter of that name."""
        bucket, member = self.members[name]
        return tensor[member.owned(bucket.axis.rank)]


def _sum_together(tensors: list[Tensor], axis: Axis) -> None:
    """Replace each tensor by its sum over the axis, in one message per dtype."""
    if axis.group is None:
        return
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        mine = [t for t in tensors if t.dtype == dtype]
        total = all_sum(torch.cat([t.flatten() for t in mine]), axis.group)
        for t, s in zip(mine, total.split([t.numel() for t in mine]), strict=True):
            t.copy_(s.view_as(t))
