"""The gradients of a step: added up over micro-batches and over the ranks that hold the same tensor.

Gradients of bf16 parameters are added up in fp32, or in bf16 if asked to.  Those of matrices never pass through
autograd: the products that compute them add them to the sums, or for a step's first micro-batch store them there, so
nothing rounds them before.  All others are added as soon as autograd has them, and freed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels._common import leave_free
from nano3.model.layout import split_of
from nano3.parallel.collectives import all_sum
from nano3.parallel.data import Bucket, Member, make_buckets
from nano3.parallel.mesh import Axis


class _Sink:
    """Where a product leaves a weight's gradient (`kernels/gradient_sink.py`): every trained parameter has one."""

    def __init__(self, gradients: Gradients, bucket: Bucket, member: Member) -> None:
        self.gradients, self.bucket, self.member = gradients, bucket, member

    def open(self) -> tuple[Tensor, bool]:
        return self.bucket.open(self.member)

    def close(self) -> None:
        self.bucket.close(self.member)
        self.gradients._arrived(self.bucket, self.member)


class Gradients:
    """model: a Nano3 with memory; its mesh says over which ranks a tensor's rows are spread.

    A parameter that requires no gradient is frozen: nothing is kept for it, and no message carries it.

    communication_sms: multiprocessors of a GPU that resident kernels leave free while buckets are under way.
    """

    communication_sms = 0

    def __init__(self, model: nn.Module, reduce_in_fp32: bool = True, sum_in_bf16: bool = False) -> None:
        self.mesh = model.mesh
        self.wide = torch.promote_types(model.dtype, torch.float32)  # the dtype of norms over gradients
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.splits = {n: split_of(n, model.config, self.mesh.tp.size) for n, _ in model.named_parameters()}
        self.buckets = make_buckets(
            self.parameters, self.axis, None if reduce_in_fp32 else torch.bfloat16, sum_bf16=sum_in_bf16
        )
        self.members = {m.name: (b, m) for b in self.buckets for m in b.members}
        self.last_micro_batch = False  # set by the loop: gradients that come now are the last of the step
        for name, p in self.parameters.items():
            p.register_post_accumulate_grad_hook(_hook(weakref.ref(self), name))
            p.sink = _Sink(self, *self.members[name])
        self._wait_before_use(model)

    def axis(self, name: str) -> Axis:
        """The ranks that hold the same part of a tensor."""
        split = self.splits.get(name)  # buffers have none
        return self.mesh.edp if split is not None and split.axis == "ep" else self.mesh.data

    def _accumulate(self, name: str, gradient: Tensor) -> None:
        bucket, member = self.members[name]
        bucket.accumulate(member, gradient)
        self._arrived(bucket, member)

    def _arrived(self, bucket: Bucket, member: Member) -> None:
        if self.last_micro_batch:
            bucket.arrived.add(member.name)
            self._reduce_complete()

    def _reduce_complete(self) -> None:
        """Send off the buckets that are complete, in the fixed order that all ranks share."""
        for bucket in self.buckets:
            if bucket.row is None:
                if len(bucket.arrived) < len(bucket.members):
                    return
                bucket.reduce()
                self._make_room()

    def _make_room(self) -> None:
        """Let kernels leave room for messages if any are under way."""
        if self.communication_sms:
            leave_free(self.communication_sms if any(b.work is not None for b in self.buckets) else 0)

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
                module.register_forward_pre_hook(lambda *_, mine=mine: self._finish(mine))

    def _finish(self, buckets: list[Bucket]) -> None:
        for bucket in buckets:
            bucket.finish_gather()
        self._make_room()

    def finish_gather(self) -> None:
        """Wait until all parameters are what the last step made them."""
        self._finish(self.buckets)

    def reduced_gradients(self) -> dict[str, Tensor]:
        """This rank's rows of every gradient, summed over all ranks that add to it; clears what was collected."""
        for bucket in self.buckets:
            if bucket.row is None:
                bucket.reduce()
        found = {name: g for bucket in self.buckets for name, g in bucket.finish_reduce().items()}
        self._make_room()
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

    def first_row(self, name: str) -> int:
        """Where this rank's rows of a tensor begin."""
        bucket, member = self.members[name]
        return member.owned(bucket.axis.rank).start

    def shard(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's rows of a tensor like the parameter of that name."""
        bucket, member = self.members[name]
        return tensor[member.owned(bucket.axis.rank)]


def _hook(owner: weakref.ref[Gradients], name: str) -> Callable[[Tensor], None]:
    """What autograd does with a gradient that it has.

    Autograd keeps its hooks where Python's garbage collector does not look.  One that held the sums, which hold the
    parameter, would keep all of them for good.
    """

    def hook(p: Tensor) -> None:
        gradients = owner()
        if gradients is not None and p.grad is not None:  # None: it went into the sink
            gradients._accumulate(name, p.grad)
            p.grad = None

    return hook


def _sum_together(tensors: list[Tensor], axis: Axis) -> None:
    """Replace each tensor by its sum over the axis, in one message per dtype."""
    if axis.group is None:
        return
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        mine = [t for t in tensors if t.dtype == dtype]
        total = all_sum(torch.cat([t.flatten() for t in mine]), axis.group)
        for t, s in zip(mine, total.split([t.numel() for t in mine]), strict=True):
            t.copy_(s.view_as(t))
