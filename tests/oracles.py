"""Other people's truth: transformers' NemotronH in fp32, and weights that any framework can rebuild from integers."""

import math

import numpy as np
import torch
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

from nano3.config import ModelConfig
from nano3.model.init import allocate, named_tensors
from nano3.model.model import Nano3
from nano3.train.checkpoint import build

CPU = torch.device("cpu")

GOLDEN = ModelConfig(
    hybrid_override_pattern="MEM*E",
    vocab_size=128,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    mamba_num_heads=8,
    mamba_head_dim=16,
    n_groups=2,
    ssm_state_size=16,
    chunk_size=16,
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=48,
    moe_shared_expert_intermediate_size=96,
    intermediate_size=48,
)


def relative(got: Tensor, truth: Tensor) -> float:
    """||got - truth|| / ||truth||; infinite if either is not finite."""
    error = (got.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-300)
    return error.item() if torch.isfinite(error) else math.inf


def hf_name(name: str) -> str:
    """Our name of a tensor -> transformers'."""
    return name if name.startswith("lm_head") else f"model.{name}"


def hf_model(c: ModelConfig) -> NemotronHForCausalLM:
    """transformers' model of the same geometry, without its floor under the time step (which no trained model has)."""
    names = (
        "hybrid_override_pattern vocab_size hidden_size num_attention_heads num_key_value_heads head_dim "
        "mamba_num_heads mamba_head_dim n_groups ssm_state_size conv_kernel use_conv_bias chunk_size n_routed_experts "
        "num_experts_per_tok moe_intermediate_size moe_shared_expert_intermediate_size n_group topk_group "
        "norm_topk_prob routed_scaling_factor intermediate_size layer_norm_epsilon"
    )
    names = names.split(" ")
    config = NemotronHConfig(**{n: getattr(c, n) for n in names}, expand=2, max_position_embeddings=4096)
    model = NemotronHForCausalLM(config).eval()
    model.config._experts_implementation = "eager"
    for layer in model.model.layers:
        if layer.block_type == "linear_attention":
            layer.mixer.time_step_limit = (0.0, math.inf)
    return model


def our_model(c: ModelConfig, dtype: torch.dtype = torch.float32, recompute: frozenset[str] = frozenset()) -> Nano3:
    """Ours, with memory but no values."""
    c.validate()
    return allocate(build(c, recompute), CPU, dtype)


@torch.no_grad()
def copy_from_hf(model: Nano3, hf: NemotronHForCausalLM) -> Nano3:
    theirs = hf.state_dict()
    assert set(theirs) == {hf_name(n) for n in named_tensors(model)}
    for name, tensor in named_tensors(model).items():
        assert tensor.shape == theirs[hf_name(name)].shape, name
        tensor.copy_(theirs[hf_name(name)])
    return model


def hash_uniform(count: int, stream: int) -> np.ndarray:
    """`count` float64 in [0, 1): the splitmix64 finaliser of a counter, 53 bits of it."""
    with np.errstate(over="ignore"):
        counter = np.arange(1, count + 1, dtype=np.uint64) + (np.uint64(stream) << np.uint64(32))
        z = counter * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)) / 2.0**53


@torch.no_grad()
def fill_by_hash(model: Nano3) -> Nano3:
    """The golden weights: a function of each tensor's place among the sorted names, and of its elements' order."""
    tensors = named_tensors(model)
    for stream, name in enumerate(sorted(tensors, key=hf_name)):
        u = hash_uniform(tensors[name].numel(), stream)
        c = 2 * u - 1
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "A_log":
            values = np.log(1 + 15 * u)
        elif leaf == "dt_bias":
            step = np.exp(math.log(1e-3) + u * math.log(100))
            values = step + np.log(-np.expm1(-step))
        elif leaf == "D" or name.endswith(("norm.weight", "norm_f.weight")):
            values = 1 + 0.2 * c
        elif "conv1d" in name:
            values = 0.5 * c
        elif leaf == "e_score_correction_bias":
            values = 0.1 * c
        else:
            scale = 1.0 if "embeddings" in name else 0.3 if name.endswith("gate.weight") else 0.15
            values = math.sqrt(3) * scale * c
        tensors[name].copy_(torch.from_numpy(values.astype(np.float32)).view(tensors[name].shape))
    return model


def golden_ids() -> Tensor:
    """(2, 40) token ids."""
    i = torch.arange(80).view(2, 40)
    return (7 * i * i + 3 * i + 1) % 128
