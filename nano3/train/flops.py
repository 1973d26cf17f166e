"""FLOPs of the model, from its geometry."""

from __future__ import annotations

from nano3.config import ModelConfig


def training_flops(c: ModelConfig, seq_length: int, frozen: bool = False) -> dict[str, float]:
    """FLOPs per token of one training step by kind of block, and `head`; a multiply-add counts as 2.

    Forward plus twice that for the backward pass; 2.5 times for the attention core, which recomputes its scores.  Every
    weight matrix that a token passes counts once (the K chosen experts, the shared one, the router), plus the SSD's
    four products at the configured chunk and causal attention at half the square.  Norms and activations are left
    out.  frozen: weights have no gradient, which saves a third of their products; adapters are not counted.
    """
    D, S, L = c.hidden_size, seq_length, min(c.chunk_size, seq_length)
    H, P, G, N = c.mamba_num_heads, c.mamba_head_dim, c.n_groups, c.ssm_state_size
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    routed = 4 * D * c.moe_intermediate_size * c.num_experts_per_tok
    shared = 4 * D * c.moe_shared_expert_intermediate_size
    w = 2 if frozen else 3  # products with each weight matrix
    each = {
        "M": w * (2 * D * (c.d_inner + c.conv_dim + H) + 2 * c.d_inner * D + 2 * c.conv_dim * c.conv_kernel)
        + 3 * (2 * L * N * G + 2 * L * P * H + 4 * N * P * H),
        "*": w * (2 * D * (q + 2 * kv) + 2 * q * D) + 3.5 * 2 * S * q,
        "E": w * (routed + shared + 2 * D * c.n_routed_experts),
        "-": w * 4 * D * c.intermediate_size,
    }
    flops = {letter: each[letter] * c.hybrid_override_pattern.count(letter) for letter in each}
    return {**flops, "head": w * 2.0 * D * c.vocab_size}
