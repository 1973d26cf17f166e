"""What a model costs, from its configuration alone: parameters, FLOPs, and memory per GPU for any layout."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from nano3.config import KINDS, Config, ModelConfig, UserError
from nano3.parallel.pipeline_schedule import cut, spans_of
from nano3.presets import PRESETS

GiB = 1 << 30


@dataclass(frozen=True)
class Parameters:
    """Parameters (buffers not counted) of one block of each kind, and of the whole model."""

    block: dict[str, int]  # letter -> parameters of such a block, its norm included
    experts: int  # routed experts of one mixture block
    embedding: int  # of the embedding; the head has as many
    total: int
    active: int  # what one token passes through, embedding and head counted


def parameters(c: ModelConfig) -> Parameters:
    D = c.hidden_size
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    in_proj = c.d_inner + c.conv_dim + c.mamba_num_heads
    conv = c.conv_dim * (c.conv_kernel + c.use_conv_bias)
    experts = c.n_routed_experts * 2 * D * c.moe_intermediate_size
    block = {
        "M": D + D * in_proj + conv + 3 * c.mamba_num_heads + c.d_inner + c.d_inner * D,
        "*": D + D * (q + 2 * kv) + q * D,
        "E": D + c.n_routed_experts * D + experts + 2 * D * c.moe_shared_expert_intermediate_size,
        "-": D + 2 * D * c.intermediate_size,
    }
    total = sum(block[letter] for letter in c.hybrid_override_pattern) + 2 * c.vocab_size * D + D
    idle = experts * (c.n_routed_experts - c.num_experts_per_tok) // c.n_routed_experts
    active = total - c.hybrid_override_pattern.count("E") * idle
    return Parameters(block, experts, c.vocab_size * D, total, active)


def training_flops(c: ModelConfig, seq_length: int) -> dict[str, float]:
    """FLOPs per token of one training step by kind of block, and `head`; a multiply-add counts as 2.

    Forward plus twice that for the backward pass; 2.5 times for the attention core, which recomputes its scores.  Every
    weight matrix that a token passes counts once (the K chosen experts, the shared one, the router), plus the SSD's
    four products at the configured chunk and causal attention at half the square.  Norms and activations are left
    out.
    """
    D, S, L = c.hidden_size, seq_length, min(c.chunk_size, seq_length)
    H, P, G, N = c.mamba_num_heads, c.mamba_head_dim, c.n_groups, c.ssm_state_size
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    routed = 4 * D * c.moe_intermediate_size * c.num_experts_per_tok
    shared = 4 * D * c.moe_shared_expert_intermediate_size
    each = {
        "M": 3 * (2 * D * (c.d_inner + c.conv_dim + H) + 2 * c.d_inner * D + 2 * c.conv_dim * c.conv_kernel)
        + 3 * (2 * L * N * G + 2 * L * P * H + 4 * N * P * H),
        "*": 3 * (2 * D * (q + 2 * kv) + 2 * q * D) + 3.5 * 2 * S * q,
        "E": 3 * (routed + shared + 2 * D * c.n_routed_experts),
        "-": 3 * 4 * D * c.intermediate_size,
    }
    flops = {letter: each[letter] * c.hybrid_override_pattern.count(letter) for letter in each}
    return {**flops, "head": 3.0 * 2 * D * c.vocab_size}


@dataclass(frozen=True)
class Memory:
    """Bytes that the fullest rank holds."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def memory(config: Config, world: int, bf16: bool) -> Memory:
    """The estimate for one rank of `world`, at the layout of the configuration.

    Dense tensors are split over tp, experts over ep, layers over pp; a pipeline's first and last stage carry
    embedding and head.  bf16: 2 bytes of weight, 4 of fp32 gradient, 12 of master and moments, these last split over
    the ranks that hold the same tensor where there is a tp, ep or pp layout.  fp32: 4 + 4 + 8.  Activations as the
    PyTorch path keeps them.
    """
    c, p = config.model, config.parallel
    n = parameters(c)
    mixtures = c.hybrid_override_pattern.count("E")
    experts = n.experts * mixtures / p.ep / p.pp
    ends = n.embedding * (2 if p.pp == 1 else 1) / p.tp
    dense = (n.total - n.experts * mixtures - 2 * n.embedding) / p.tp / p.pp + ends
    weight, grad, state = (2, 4, 12) if bf16 else (4, 4, 8)
    sharded = p.tp * p.ep * p.pp > 1
    dp = max(1, world // (p.tp * p.pp * p.cp)) if sharded else 1
    edp = max(1, world // (p.ep * p.pp)) if sharded else 1
    tokens = config.micro_batch(max(1, world // (p.tp * p.pp * p.cp))) * config.dataset.seq_length / p.tp / p.cp
    kept = sum(
        activation_bytes(c, kind, config.dataset.seq_length, bf16, kind_name in config.recompute)
        for kind, kind_name in (
            (x, {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}[x]) for x in c.hybrid_override_pattern
        )
    )
    logits = config.train.loss_chunk_tokens * c.vocab_size * 8 / p.tp
    return Memory(
        weights=int(weight * (dense + experts)),
        gradients=int(grad * (dense + experts)),
        optimizer=int(state * (dense / dp + experts / edp)),
        activations=int(tokens * kept / p.pp + logits),
    )


def activation_bytes(c: ModelConfig, letter: str, seq_length: int, bf16: bool, recomputed: bool) -> float:
    """Bytes per token that one block keeps for its backward pass."""
    e, D = 2 if bf16 else 4, c.hidden_size
    if recomputed:
        return e * D
    L = min(c.chunk_size, seq_length)
    mixing = 4 * 3 * L * c.mamba_num_heads  # scores, decay and their product, one row of L per token and head
    inner = e * (2 * (c.d_inner + c.conv_dim) + c.mamba_num_heads) + 4 * (3 * c.d_inner + 4 * c.conv_dim) + mixing
    heads = c.num_attention_heads * c.head_dim
    rows = c.num_experts_per_tok * (2 * D + 3 * c.moe_intermediate_size)
    kept = {
        "M": inner,
        "*": e * (2 * heads + 2 * c.num_key_value_heads * c.head_dim),
        "E": e * (rows + 3 * c.moe_shared_expert_intermediate_size) + 12 * c.n_routed_experts,
        "-": e * 3 * c.intermediate_size,
    }
    return 3 * e * D + kept[letter]


def stage_spans(config: Config) -> list[tuple[int, int]]:
    """(start, stop) of the layers of each virtual stage: as asked, or cut so that the costliest costs least."""
    c, p = config.model, config.parallel
    parts, pattern = p.pp * p.virtual_pp, c.hybrid_override_pattern
    if p.stages is not None:
        return spans_of(p.stages, len(pattern), parts)
    flops = training_flops(c, config.dataset.seq_length)
    each = {letter: flops[letter] / max(1, pattern.count(letter)) for letter in KINDS}
    return cut([each[letter] for letter in pattern], parts, 0.0, flops["head"])


def rank_parts(config: Config, stage: int) -> list[tuple[int, int]]:
    """The spans of layers that the ranks of one pipeline stage hold."""
    return stage_spans(config)[stage :: config.parallel.pp]


def machine_memory(device_type: str) -> int:
    """Bytes that one rank may use: the GPU's memory, or what the system has available (a container's limit counted)."""
    if device_type == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(lines.get("MemAvailable", f"{available >> 10} kB").split()[0]) << 10
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and limit.read_text().strip().isdecimal():
        available = min(available, int(limit.read_text()))
    return available


def layout_ranks(config: Config) -> int:
    """Ranks of the smallest world that the layout divides, or NVIDIA's 32 for its default tp=4 ep=8."""
    p = config.parallel
    dense = p.tp * p.pp * p.cp
    least = max(dense, p.ep * p.pp) if p.tp * p.ep * p.pp * p.cp > 1 else 1
    return 4 * least if (p.tp, p.ep) == (4, 8) else least


def report(config: Config, name: str, world: int, bf16: bool) -> str:
    """The plan in words: parameters, FLOPs, length of the run, memory per rank."""
    c, p = config.model, config.parallel
    n, m = parameters(c), memory(config, world, bf16)
    flops = sum(training_flops(c, config.dataset.seq_length).values())
    tokens = config.iterations * config.tokens_per_step
    layout = f"tp={p.tp} ep={p.ep} pp={p.pp} cp={p.cp} on {world} rank{'s' * (world > 1)}"
    rows = [f"{k} {v / GiB:.1f}" for k, v in vars(m).items()]
    return (
        f"{name}: {n.total:,} parameters, {n.active:,} active per token, {flops / 1e9:.3g} GFLOP per trained token\n"
        f"run: {config.iterations:,} steps of {config.tokens_per_step:,} tokens = {tokens:,} tokens\n"
        f"memory per rank at {layout}, {'bf16 with fp32 masters' if bf16 else 'fp32'}: "
        f"{m.total / GiB:.1f} GiB ({', '.join(rows)})"
    )


def check_fits(config: Config, name: str, world: int, device_type: str, ranks_here: int) -> None:
    """Raise UserError, with the arithmetic and what to run instead, if a rank cannot hold its share.  No allocation."""
    bf16 = uses_bf16(config, device_type)
    have = machine_memory(device_type) // (ranks_here if device_type == "cpu" else 1)
    p = config.parallel
    laid_out = p.tp * p.ep * p.pp * p.cp > 1
    ranks = max(world, layout_ranks(config)) if laid_out else world
    need = memory(config, ranks, bf16 or laid_out)
    if need.total <= 0.95 * have:
        return
    what = f"{world} GPU{'s' * (world > 1)}" if device_type == "cuda" else "no GPU"
    lines = [
        f"{name} does not fit this machine ({what}, {have / GiB:.1f} GiB for each rank).",
        report(config, name, ranks, bf16 or laid_out),
        f"run instead: {instead(device_type, have)}",
    ]
    if laid_out:
        nodes = -(-ranks // 8)
        lines.append(
            f"where it fits: torchrun --nnodes={nodes} --nproc-per-node={min(8, ranks)} train.py --mode pretrain "
            f"--preset {name}, on {ranks} GPUs with {need.total / 0.95 / GiB:.0f} GiB free each "
            "(this version is data parallel only and does not run that layout yet)"
        )
    raise UserError("\n  ".join(lines))


def instead(device_type: str, have: int) -> str:
    """The command for the largest preset that one rank of this machine can train."""
    from nano3.cli import parser, resolve

    fits = []
    for name in PRESETS:
        config, _ = resolve(parser().parse_args(["--mode", "pretrain", "--preset", name]))
        config.parallel = replace(config.parallel, tp=1, ep=1, pp=1, cp=1)
        if memory(config, 1, uses_bf16(config, device_type)).total <= 0.95 * have:
            fits.append((parameters(config.model).total, name))
    if not fits:
        return "a smaller model; no preset fits here"
    total, name = max(fits)
    return f"python train.py --mode pretrain --preset {name}    ({total / 1e6:,.1f} M parameters)"


def uses_bf16(config: Config, device_type: str) -> bool:
    return config.train.precision == "bf16" or (config.train.precision == "auto" and device_type == "cuda")
