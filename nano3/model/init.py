"""Initialisation as NVIDIA trains (Megatron's rules), independent of the layout.

Every tensor is drawn whole from a generator seeded by (seed, its name, the expert's number), by default on the CPU: any
rank can draw its slice of any tensor alone, a GPU gets the numbers a CPU gets, and adding a layer changes no other.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from kernels import fp8
from nano3.config import ModelConfig, PeftConfig
from nano3.model.layout import axis_of, split_of, whole_shapes
from nano3.model.lora import adapted, in_fp8

FP32 = ("A_log", "D", "dt_bias", "e_score_correction_bias")  # kept in fp32 in every mode
OUTPUTS = ("out_proj.weight", "o_proj.weight", "down_proj.weight", "down_proj")  # write into the residual stream


def dtype_of(name: str, compute: torch.dtype, peft: PeftConfig | None = None) -> torch.dtype:
    """The dtype a tensor is kept in when the model computes in `compute`.  peft: of a model with adapters."""
    if peft is not None and in_fp8(name, peft):
        return fp8.CODE
    return torch.promote_types(compute, torch.float32) if name.rsplit(".", 1)[-1] in FP32 else compute


def generator(seed: int, *key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that is a pure function of (seed, key), and of the kind of device: GPUs count differently."""
    digest = hashlib.sha256("/".join(map(str, (seed, *key))).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def draw(
    name: str,
    shape: torch.Size,
    c: ModelConfig,
    seed: int,
    expert: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The initial value of one tensor (of one expert, for the fused expert tensors), in fp32, drawn on `device`.

    Embedding and head N(0, s); matrices N(0, s), s = c.init_std; those that write into the residual stream
    N(0, s / sqrt(layers)); convolution U(-1/sqrt(width), 1/sqrt(width)), weight and bias; A_log = log U(1, 16); D = 1;
    dt_bias the inverse softplus of a log-uniform step; norms 1; selection bias 0.  Of an adapter, A is Xavier's normal,
    N(0, sqrt(2 / (in + r))), and B zero.
    """
    g = generator(seed, name, device=device) if expert is None else generator(seed, name, expert, device=device)
    leaf, parent = name.rsplit(".", 1)[-1], name.rsplit(".", 2)[-2] if "." in name else ""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(shape, generator=g, device=device) * (high - low) + low

    if adapted(name) is not None:
        std = math.sqrt(2 / sum(shape)) if leaf == "A" else 0.0
        return torch.randn(shape, generator=g, device=device) * std if std else torch.zeros(shape, device=device)
    if leaf == "A_log":
        return uniform(1.0, 16.0).log()
    if leaf == "dt_bias":
        step = uniform(math.log(c.time_step_min), math.log(c.time_step_max)).exp().clamp_min(c.time_step_floor)
        return step + (-torch.expm1(-step)).log()  # softplus of this is the step
    if leaf == "D" or parent in ("norm", "norm_f"):
        return torch.ones(shape, device=device)
    if leaf == "e_score_correction_bias":
        return torch.zeros(shape, device=device)
    if parent == "conv1d":
        return uniform(-(c.conv_kernel**-0.5), c.conv_kernel**-0.5)
    std = c.init_std / math.sqrt(c.num_hidden_layers) if name.endswith(OUTPUTS) else c.init_std
    return torch.randn(shape, generator=g, device=device) * std


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name: everything a checkpoint of the model holds."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def allocate(model: nn.Module, device: torch.device, compute: torch.dtype) -> nn.Module:
    """Give a model built on the meta device its memory, uninitialised, each tensor in the dtype it is kept in; codes of
    a frozen base have their scales beside them."""
    for name, tensor in named_tensors(model).items():
        *path, leaf = name.split(".")
        owner = model.get_submodule(".".join(path))
        new = torch.empty(tensor.shape, device=device, dtype=dtype_of(name, compute, model.peft))
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(new, requires_grad=tensor.requires_grad)
            if new.dtype == fp8.CODE:
                scales = torch.empty(fp8.scale_shape(new.shape), device=device, dtype=fp8.SCALE)
                owner._parameters[leaf].scales = scales
        else:
            owner._buffers[leaf] = new
    return model


@torch.no_grad()
def store(tensor: Tensor, values: Tensor, rows: int | slice = slice(None)) -> None:
    """Write `values` into a tensor of an allocated model, or into some of its rows, as they are kept there."""
    held = tensor[rows] if tensor.ndim else tensor
    if tensor.dtype != fp8.CODE:
        held.copy_(values)
        return
    codes, scales = fp8.quantise(values.to(tensor.device))
    held.view(torch.uint8).copy_(codes.view(torch.uint8))
    tensor.scales[rows] = scales


def decoded(tensor: Tensor, rows: int | slice) -> Tensor:
    """Some rows of a tensor of codes as the numbers that they stand for, in fp32."""
    return fp8.dequantise(tensor[rows], tensor.scales[rows], torch.float32)


@torch.no_grad()
def initialise(
    model: nn.Module, c: ModelConfig, seed: int, device: torch.device | str = "cpu", adapters_only: bool = False
) -> nn.Module:
    """Draw every tensor of an allocated model, one at a time (one expert at a time), and keep this rank's part.

    device: where the numbers are drawn.  On a GPU it takes seconds, not minutes, for a large model, and gives others.
    """
    shapes = whole_shapes(c, model.peft)
    for name, tensor in named_tensors(model).items():
        if adapters_only and adapted(name) is None:
            continue
        split = split_of(name, c, model.mesh.tp.size)
        axis = axis_of(split, model.mesh)
        if split is not None and split.axis == "ep":
            for e in range(tensor.shape[0]):
                store(tensor, draw(name, tensor.shape[1:], c, seed, axis.rank * tensor.shape[0] + e, device), e)
        else:
            whole = draw(name, shapes[name], c, seed, device=device)
            store(tensor, whole if split is None else split.take(whole, axis))
    return model
