"""What each rank of a layout holds: its part of every tensor, and the bytes of a training step.  Nothing is allocated.

Parameters, gradients and optimizer state are exact: they come from the shapes of the whole model, the table that splits
them, and the optimizer's own buckets.  Activations are counted by the tensors that a block keeps for its backward pass;
the routed rows among them are an expectation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels import fp8
from nano3.config import KINDS, Config, ModelConfig
from nano3.model.init import dtype_of
from nano3.model.layout import split_of, whole_shapes
from nano3.model.lora import adapted, check_freeze, sites_of, trains
from nano3.parallel.data import Bucket, Member, make_buckets
from nano3.parallel.layout import AXES, Layout, kv_copies
from nano3.parallel.mesh import Axis
from nano3.parallel.pipeline_schedule import schedule
from nano3.train.reach import reach
from nano3.train.update import state_bytes

Spans = list[tuple[int, int]]


def place(config: Config, layout: Layout, rank: int) -> dict[str, Axis]:
    """A rank's axes by their names in `parallel.mesh`, without process groups."""
    groups = {"all" if name == "world" else name: layout.groups(name) for name in AXES}
    copies = kv_copies(config, layout.tp)
    groups["kv"] = [g[i : i + copies] for g in groups["tp"] for i in range(0, layout.tp, copies)]
    mine = {name: next(g for g in found if rank in g) for name, found in groups.items()}
    return {name: Axis(len(g), g.index(rank), None, tuple(g)) for name, g in mine.items()}


def micro_batches(config: Config, layout: Layout) -> int:
    """Micro-batches of each rank in one optimizer step."""
    return config.train.global_batch_size // (config.micro_batch(layout.dp) * layout.dp)


@dataclass(frozen=True)
class Share:
    """What the first rank of a pipeline stage holds.  The others hold as much, or a few rows of optimizer state less:
    rows that do not divide evenly go to the first ranks of an axis."""

    stage: int
    parts: Spans  # of layers
    letters: str  # of these layers, a | between the parts
    axes: dict[str, Axis]
    tensors: dict[str, torch.Tensor]  # parameters and buffers by name, on the meta device, in the model's order
    buckets: list[Bucket]  # of the optimizer

    @property
    def members(self) -> list[tuple[Bucket, Member]]:
        return [(b, m) for b in self.buckets for m in b.members]

    @property
    def parameters(self) -> dict[str, int]:
        """Numbers of parameters by kind, frozen ones too, buffers not counted."""
        out = dict.fromkeys(("dense", "experts", "embedding", "head"), 0)
        ends = {"embeddings.weight": "embedding", "lm_head.weight": "head"}
        for name, t in self.tensors.items():
            if adapted(name) is not None:
                out["adapters"] = out.get("adapters", 0) + t.numel()
            elif not name.endswith("e_score_correction_bias"):
                out["experts" if ".experts." in name else ends.get(name, "dense")] += t.numel()
        return out

    def owned(self, bucket: Bucket, member: Member) -> int:
        """Elements of a tensor whose gradient, master and moments this rank keeps."""
        rows = member.owned(bucket.axis.rank)
        return (rows.stop - rows.start) * (member.parameter.numel() // member.parameter.shape[0])


def shares(config: Config, layout: Layout, spans: Spans, bf16: bool) -> list[Share]:
    """The share of every pipeline stage, in order.  spans: the layers of each virtual stage."""
    c, compute = config.model, torch.bfloat16 if bf16 else torch.float32
    splits = {name: (shape, split_of(name, c, layout.tp)) for name, shape in whole_shapes(c, config.peft).items()}
    check_freeze(list(splits), config.peft)
    out = []
    for stage in range(layout.pp):
        axes, parts = place(config, layout, stage * layout.block), spans[stage :: layout.pp]
        layers = {f"layers.{i}" for start, stop in parts for i in range(start, stop)}
        ends = {"embeddings": 0, "norm_f": layout.pp - 1, "lm_head": layout.pp - 1}
        tensors = {}
        for name, (whole, split) in splits.items():
            owner = name.rsplit(".", 1)[0]
            if ".".join(owner.split(".")[:2]) in layers or ends.get(owner) == stage:
                shape = whole if split is None else split.shape(whole, axes[split.axis])
                tensors[name] = torch.empty(shape, dtype=dtype_of(name, compute, config.peft), device="meta")
        named = {n: t for n, t in tensors.items() if not n.endswith("e_score_correction_bias")}
        parameters = {n: t for n, t in named.items() if trains(n, config.peft)}

        def spread(name: str, axes: dict[str, Axis] = axes) -> Axis:  # the same rule as AdamW's
            split = splits[name][1]
            return axes["edp" if split is not None and split.axis == "ep" else "data"]

        wire = None if config.parallel.grad_reduce_in_fp32 else torch.bfloat16
        narrow = config.optimizer.gradients == "bf16"
        letters = "|".join(c.hybrid_override_pattern[start:stop] for start, stop in parts)
        out.append(Share(stage, parts, letters, axes, tensors, make_buckets(parameters, spread, wire, sum_bf16=narrow)))
    return out


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank holds."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def memory_of(config: Config, layout: Layout, share: Share, bf16: bool, gpu: bool) -> Memory:
    """The bytes of one share.

    Weights in the dtype each is kept in, buffers included.  Gradients in the sums' dtype, in buckets padded to whole
    rows.  Optimizer: two moments for the rows that the rank owns, and a master where the weight is narrower, in the
    forms that the settings ask for (`update.py`).  After a step the gathered weights travel in the place of the
    gradients, which are gone by then.
    """
    optimizer = 0
    for bucket, m in share.members:
        rows = m.owned(bucket.axis.rank)
        split = split_of(m.name, config.model, layout.tp)
        optimizer += state_bytes(config.optimizer, rows.stop - rows.start, m.parameter, split)
    return Memory(
        weights=sum(bytes_of(t) for t in share.tensors.values()),
        gradients=sum(b.axis.size * b.width * b.dtype.itemsize for b in share.buckets),
        optimizer=optimizer,
        activations=int(activations(config, layout, share, bf16, gpu)),
    )


def bytes_of(t: torch.Tensor) -> int:
    """What a tensor takes, the scales of codes included."""
    scales = fp8.scale_shape(t.shape).numel() * fp8.SCALE.itemsize if t.dtype == fp8.CODE else 0
    return t.numel() * t.dtype.itemsize + scales


def activations(config: Config, layout: Layout, share: Share, bf16: bool, gpu: bool) -> float:
    """Bytes of activations at the fullest moment of a step.

    What the micro-batches in flight keep, by the schedule, and on top of it the larger of two passing needs: the head's
    (its gradients exist before its backward pass), or one whole block's while it is computed again.  Blocks before the
    first trained weight keep nothing.
    """
    c, e = config.model, 2 if bf16 else 4
    B = config.micro_batch(layout.dp)
    tokens = B * config.dataset.seq_length

    def whole(letter: str) -> float:
        base = activation_bytes(c, letter, config.dataset.seq_length, layout.tp, layout.ep, e, gpu)
        if gpu and letter == "M" and "conv" in config.recompute:
            base -= e * c.conv_dim / layout.tp
        return tokens * (base + adapter_bytes(config, letter, layout.tp, e, gpu))

    piece = tokens * e * c.hidden_size / layout.tp  # of the stream between two blocks
    found, _ = reach(config, share.parts, share.tensors)
    kinds = {layer.kind: whole(layer.kind) for part in found for layer in part if layer.runs}
    kept = {x: piece if KINDS[x] in config.recompute else n for x, n in kinds.items()}
    of_part = [sum(kept[layer.kind] for layer in part if layer.runs) + piece for part in found]  # and its output
    held = most = 0.0
    for op in schedule(share.stage, layout.pp, len(share.parts), micro_batches(config, layout)):
        held += of_part[op.chunk] if op.kind == "F" else -of_part[op.chunk]
        most = max(most, held)
    again = max((n for x, n in kinds.items() if KINDS[x] in config.recompute), default=0.0)
    again += max((t.numel() * e for t in share.tensors.values() if t.dtype == fp8.CODE), default=0)  # expanded
    head = 0.0
    if "lm_head.weight" in share.tensors:
        rows = -(-tokens // -(-tokens // config.train.loss_chunk_tokens))  # chunks of one size
        logits = rows * c.vocab_size / layout.tp
        hidden = tokens * c.hidden_size
        # logits, the gathered tokens and their gradients; PyTorch's softmax takes two copies more
        head = e * (logits + 2 * hidden) if gpu else 4 * (3 * logits + 2 * hidden)
    return most + max(again, head)


def adapter_bytes(config: Config, letter: str, tp: int, e: int, gpu: bool) -> float:
    """Bytes per token that the adapters of a block keep for its backward pass beside what the block keeps.

    Each r numbers per row, between A and B.  Without the kernels, routed experts on a GPU keep, besides, their gathered
    rows and the squares before and after the routing weight, of which the kernels keep one.
    """
    c, peft = config.model, config.peft
    layer = c.hybrid_override_pattern.find(letter)
    sites = [s for s in sites_of(c, peft) if s.module.startswith(f"layers.{layer}.")]
    K, routed = c.num_experts_per_tok / tp, [s for s in sites if s.routed]
    thin = peft.rank * (len(sites) - len(routed) + len(routed) * K)
    eager = routed and gpu and c.kernels.experts == "torch"
    rows = K * (c.hidden_size + 2 * c.moe_intermediate_size) if eager else 0.0
    return e * (thin + rows)


def rows_per_token(c: ModelConfig, ep: int) -> float:
    """Ranks of an ep axis, its own included, that a token's K experts live on, if all choices are equally likely.

    A rank holds E / ep experts and is missed by C(E - E / ep, K) of the C(E, K) choices:
    ep (1 - C(E - E / ep, K) / C(E, K)).  Limits on routing groups (model.n_group) are not considered.
    """
    missed = 1.0
    for i in range(c.num_experts_per_tok):
        missed *= max(0, c.n_routed_experts - c.n_routed_experts // ep - i) / (c.n_routed_experts - i)
    return ep * (1 - missed)


def activation_bytes(c: ModelConfig, letter: str, seq_length: int, tp: int, ep: int, e: int, gpu: bool) -> float:
    """Bytes per token of a micro-batch that one block keeps for its backward pass, on each of its tp ranks.

    e: bytes per element of what the model computes in.  gpu: what the kernels keep; otherwise what PyTorch's operators
    do, whose intermediate results are fp32.  The stream between blocks is split over tp; a block's input is gathered,
    so its projections keep it whole; everything between them is split by channels.  Routed rows are the expectation.
    """
    D, K, E, N = c.hidden_size, c.num_experts_per_tok, c.n_routed_experts, c.ssm_state_size
    inner, conv, H, GN = c.d_inner / tp, c.conv_dim / tp, c.mamba_num_heads / tp, c.n_groups * N / tp
    Hq, kv = c.num_attention_heads / tp, max(1, c.num_key_value_heads / tp) * c.head_dim
    heads = Hq * c.head_dim
    shared, dense = c.moe_shared_expert_intermediate_size / tp, c.intermediate_size / tp
    hidden = K * c.moe_intermediate_size / tp  # of all experts' rows
    arrived = rows_per_token(c, ep) / tp if ep > 1 else 0.0
    routing = (4 * E + 24 * K + 4) / tp + arrived * (8 * K + 8)  # scores; ids, weights and places; what travelled
    own = D / tp if tp > 1 else 0.0  # the router reads the rank's own tokens, next to the gathered ones
    if gpu:
        kept = {
            "M": inner + conv + H + conv + 2 * inner,  # z x B C dt; after the convolution; before and after the norm
            "*": 2 * heads + 2 * kv + Hq * 4 / e,  # q and result, k and v, log sum exp in fp32
            "E": own + shared + hidden + arrived * D + routing / e,
            "-": dense,  # relu squared
        }
        return e * (D / tp + D + kept[letter])
    L = min(c.chunk_size, seq_length)
    states = 2 * inner * N / L  # what enters and what is added, one for each chunk
    kept = {
        "M": 9 * inner + 4 * conv + states + H * (6 + 2 * N + 2 * L) + GN * (2 + L / N),
        "*": 4 * heads + Hq,  # k and v repeated for every query head
        "E": own + 2 * shared + 3 * hidden + K * D / tp + (routing + 8 * K / tp) / 4,
        "-": 2 * dense,  # relu and its square
    }
    return 4 * (2 * D / tp + D + kept[letter])
