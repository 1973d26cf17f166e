"""How each tensor of the model lies over the ranks: one table, read by initialisation, optimizer and checkpoints.

in_proj and the convolution are cut component by component, so that a rank has whole heads of each: its rows of z, of
x, of B, of C and of dt, one after the other.  Every other cut is along one dimension.  What the table does not name is
the same on every rank: norms, routers, selection biases.
"""

from __future__ import annotations

import torch

from nano3.config import ModelConfig
from nano3.model.model import Nano3
from nano3.parallel.mesh import Axis, Mesh
from nano3.parallel.tensor import Split


def split_of(name: str, c: ModelConfig, tp: int) -> Split | None:
    """The rule for the tensor of this name in the whole model; None: replicated."""
    kv_copies = max(1, tp // c.num_key_value_heads)
    bc = c.n_groups * c.ssm_state_size
    table = {
        "embeddings.weight": Split("tp", 0, (c.vocab_size,)),
        "lm_head.weight": Split("tp", 0, (c.vocab_size,)),
        "mixer.in_proj.weight": Split("tp", 0, (c.d_inner, c.d_inner, bc, bc, c.mamba_num_heads)),  # z x B C dt
        "mixer.conv1d.weight": Split("tp", 0, (c.d_inner, bc, bc)),
        "mixer.conv1d.bias": Split("tp", 0, (c.d_inner, bc, bc)),
        "mixer.A_log": Split("tp", 0, (c.mamba_num_heads,)),
        "mixer.D": Split("tp", 0, (c.mamba_num_heads,)),
        "mixer.dt_bias": Split("tp", 0, (c.mamba_num_heads,)),
        "mixer.norm.weight": Split("tp", 0, (c.d_inner,)),
        "mixer.out_proj.weight": Split("tp", 1, (c.d_inner,)),
        "mixer.q_proj.weight": Split("tp", 0, (c.num_attention_heads * c.head_dim,)),
        "mixer.k_proj.weight": Split("tp", 0, (c.num_key_value_heads * c.head_dim,), kv_copies),
        "mixer.v_proj.weight": Split("tp", 0, (c.num_key_value_heads * c.head_dim,), kv_copies),
        "mixer.o_proj.weight": Split("tp", 1, (c.num_attention_heads * c.head_dim,)),
        "mixer.up_proj.weight": Split("tp", 0, (c.intermediate_size,)),
        "mixer.down_proj.weight": Split("tp", 1, (c.intermediate_size,)),
        "mixer.shared_experts.up_proj.weight": Split("tp", 0, (c.moe_shared_expert_intermediate_size,)),
        "mixer.shared_experts.down_proj.weight": Split("tp", 1, (c.moe_shared_expert_intermediate_size,)),
        "mixer.experts.up_proj": Split("ep", 0, (c.n_routed_experts,)),
        "mixer.experts.down_proj": Split("ep", 0, (c.n_routed_experts,)),
    }
    return table.get(name.split(".", 2)[-1] if name.startswith("layers.") else name)


def axis_of(split: Split | None, mesh: Mesh) -> Axis:
    """The axis that a split refers to; an axis of size 1 for a replicated tensor."""
    return Axis() if split is None else {"tp": mesh.tp, "ep": mesh.ep}[split.axis]


def whole_shapes(c: ModelConfig) -> dict[str, torch.Size]:
    """Name and shape of every tensor of the whole model, in its order."""
    with torch.device("meta"):
        model = Nano3(c)
    return {name: t.shape for name, t in [*model.named_parameters(), *model.named_buffers()]}
