"""What one optimizer step means, and one evaluation: the same under every layout.

The loss of a step is the sum over all real tokens of the global batch divided by their number, so neither the loss nor
the gradients depend on how the batch is cut into micro-batches or over ranks.  The pipeline's schedule decides the
order (`nano3/parallel/pipeline_schedule.py`); with one stage it is plain accumulation.

The host runs ahead of a GPU through the whole step, the update included, and reads one tensor at its end.  So whether a
step was finite is decided on the device: one that was not changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cross_entropy import IGNORE, linear_cross_entropy
from kernels.gradient_sink import sink_of
from nano3.config import Config
from nano3.data.loader import Batch
from nano3.model.lora import balances
from nano3.model.model import Nano3
from nano3.model.moe import update_selection_bias
from nano3.parallel.collectives import all_stack, all_sum, gather_sequence
from nano3.parallel.mesh import Mesh
from nano3.parallel.pipeline import Wire, run
from nano3.parallel.pipeline_schedule import Op, forward_only, schedule
from nano3.train.optim import AdamW


class TrainingError(RuntimeError):
    """The run cannot go on, through no fault of the command line."""


@dataclass(frozen=True)
class StepReport:
    loss: float  # nats per token, over the global batch
    aux: float  # balance loss, mean over documents by their tokens, sum over layers, before its coefficient
    grad_norm: float
    tokens: int  # with a loss, over the global batch
    real: int  # that are not padding
    loads: list[float]  # max over mean expert load, per mixture layer
    stop: bool  # some rank was asked to stop


def training_step(
    model: Nano3, optimizer: AdamW, batches: list[Batch], config: Config, mesh: Mesh, lr: float, stop: bool
) -> StepReport:
    """One optimizer step over this rank's micro-batches of a global batch, which lie on the CPU.

    Raises TrainingError if the loss or the gradient norm is not finite; weights, optimizer state and selection biases
    are then what they were before.
    """
    model.train()
    c, device = config.model, mesh.device
    acc = torch.promote_types(model.dtype, torch.float32)
    lengths, counted = _counts(batches, device)
    counted = all_sum(counted, mesh.dp.group)  # tokens with a loss, tokens that are not padding
    per_token, per_real = (1 / counted.clamp_min(1).double()).to(acc)
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, balance loss, ranks asked to stop
    sums[2:].fill_(float(stop))  # an assignment would bring the number over in a copy that waits
    counts: dict[int, Tensor] = {}  # part -> (mixture layers, E)

    def forward(part: int, micro: int, x: Tensor | None) -> tuple[Tensor, Tensor | None]:
        batch = batches[micro].to(device)
        out = model(batch.tokens if x is None else x, batch.seq_idx, part=part, real=batch.real)
        loss = None
        if model.is_end(part):
            labels = batch.labels.flatten()
            loss, _ = head_loss(model, out.hidden, labels, per_token.repeat(labels.shape), config)
            if mesh.tp.rank == 0:  # every tp rank has the same
                sums[0] += loss.detach()
        if out.balance:
            share_B = lengths[micro].to(acc) * per_real  # so a token counts the same, however the rows are cut
            aux = torch.stack([(b.aux_B * share_B).sum() for b in out.balance]).sum()
            sums[1] += aux.detach()
            weighted = c.moe_aux_loss_coeff * aux
            loss = weighted if loss is None else loss + weighted
            counts_LE = torch.stack([b.counts_E for b in out.balance])
            counts[part] = counts[part] + counts_LE if part in counts else counts_LE
        return out.hidden, loss

    def before_backward(op: Op) -> None:
        optimizer.last_micro_batch = op.micro == len(batches) - 1

    ops = schedule(mesh.pp.rank, mesh.pp.size, len(model.parts), len(batches))
    run(ops, wire_for(model, batches), forward, before_backward)
    sums = all_sum(sums, mesh.all.group)
    fine = sums[0].isfinite()
    norm = optimizer.step(lr, fine)
    loads = _balance_experts(model, [counts[part] for part in sorted(counts)], mesh, fine & norm.isfinite())
    numbers = torch.cat([sums, norm.double().view(1), counted.double(), loads]).tolist()  # the step's one wait
    mean_loss, aux, stops, grad_norm, tokens, real, *loads = numbers
    if not math.isfinite(mean_loss):
        raise TrainingError(f"the loss is {mean_loss}")
    if not math.isfinite(grad_norm):
        raise TrainingError(f"the gradient norm is {grad_norm}")
    return StepReport(mean_loss, aux, grad_norm, int(tokens), int(real), loads, stops > 0)


def _counts(batches: list[Batch], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """What has to be known of the batches before the first of them, counted here and brought over in one copy: the
    real tokens of each row of each, and (tokens with a loss, real tokens) of all."""
    lengths = [b.lengths for b in batches]
    mine = torch.stack([sum((b.labels != IGNORE).sum() for b in batches), sum(n.sum() for n in lengths)])
    small = torch.cat([mine, *lengths])
    small = small.pin_memory() if device.type == "cuda" else small
    counted, *there = small.to(device, non_blocking=True).split([2, *(len(n) for n in lengths)])
    return there, counted


def _balance_experts(model: Nano3, counts: list[Tensor], mesh: Mesh, fine: Tensor) -> Tensor:
    """Move the selection biases by the whole step's counts, unless it is not fine or they are frozen.  Returns
    each layer's max over mean load, on every rank."""
    c = model.config
    at = {str(i): n for n, i in enumerate(i for i, x in enumerate(c.hybrid_override_pattern) if x == "E")}
    loads = torch.zeros(len(at), dtype=torch.float64, device=mesh.device)
    if not at:
        return loads
    if counts:
        total = all_sum(torch.cat(counts), mesh.block.group)
        for (layer, router), counts_E in zip(model.routers.items(), total, strict=True):
            if balances(layer, model.peft):
                bias_E = router.e_score_correction_bias
                update_selection_bias(bias_E, counts_E * fine, c.moe_router_bias_update_rate)  # equal counts: no move
            loads[at[layer]] = counts_E.amax() / counts_E.double().mean()
    return all_sum(loads, mesh.pp.group)


def wire_for(model: Nano3, batches: list[Batch]) -> Wire:
    """What carries these micro-batches, which are of one size, between the stages."""
    B, S = batches[0].tokens.shape
    shape = (B, S // model.mesh.tp.size, model.config.hidden_size)
    kinds = ((batch.seq_idx is None, batch.real is None) for batch in batches)
    return Wire(model.mesh, len(model.parts), shape, model.dtype, kinds)


def head_loss(model: Nano3, hidden: Tensor, labels: Tensor, weight: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """The head and its loss on (B, S / tp, D), the same on every tp rank: weighted sum, and losses of all tokens."""
    group = model.mesh.tp.group
    return linear_cross_entropy(
        gather_sequence(hidden, group).flatten(0, 1),
        model.lm_head.weight,
        labels,
        weight,
        config.train.loss_chunk_tokens,
        weight_grad=sink_of(model.lm_head.weight),
        vocab_offset=model.vocab_offset,
        gather=None if group is None else lambda statistics: all_stack(statistics, group),
        backend=config.model.kernels.cross_entropy,
    )


@torch.no_grad()
def evaluate(model: Nano3, batches: Iterable[list[Batch]], config: Config) -> float:
    """Mean loss per token over this and all other ranks' micro-batches, a list of them for each global batch."""
    mesh = model.mesh
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for rows in batches:

        def forward(part: int, micro: int, x: Tensor | None, rows=rows) -> tuple[Tensor, None]:
            batch = rows[micro].to(mesh.device)
            hidden = model(batch.tokens if x is None else x, batch.seq_idx, part=part, real=batch.real).hidden
            if model.is_end(part):
                labels = batch.labels.flatten()
                acc = torch.promote_types(model.dtype, torch.float32)
                weight = torch.ones(labels.shape, dtype=acc, device=mesh.device)
                loss, _ = head_loss(model, hidden, labels, weight, config)
                if mesh.tp.rank == 0:
                    sums.add_(torch.stack([loss.double(), (labels != IGNORE).sum().double()]))
            return hidden, None

        run(forward_only(mesh.pp.size, len(model.parts), len(rows)), wire_for(model, rows), forward)
    total, tokens = all_sum(sums, mesh.all.group).tolist()
    return total / max(1.0, tokens)
