"""transformers' NemotronHForCausalLM as a peer of the training step, as fast as its users can have it in one process.

Experts by torch's grouped products; the SSD, gated norm and their gradients by mamba-ssm's Triton kernels where
$MAMBA_SSM names them.  mamba-ssm wants the package causal-conv1d, which has to be compiled: our convolution stands in.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from functools import partial

import torch
from torch import Tensor

from benchmarks.cuts import in_turns, steady
from benchmarks.measure import mamba
from kernels import conv1d
from kernels.conv1d import causal_conv1d
from nano3.cli import parser, resolve
from nano3.hf import config_json


def offer_convolution() -> None:
    """Put a module under the name causal_conv1d.  Its tensors are (B, C, S), channels last in memory."""

    def whole(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx=None, activation: str = "silu") -> Tensor:
        return causal_conv1d(x.transpose(1, 2), weight, bias, seq_idx).transpose(1, 2)

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx, initial, final, silu: bool) -> Tensor:
        return conv1d.forward(x.transpose(1, 2), weight, bias, seq_idx).transpose(1, 2)

    def backward(x, weight, bias, dy, seq_idx, initial, dfinal, dx, dinitial, silu):
        dx = torch.empty_like(x) if dx is None else dx
        x, dy = x.transpose(1, 2), dy.transpose(1, 2)
        dweight, dbias, _ = conv1d.backward(x, weight, bias, seq_idx, None, dy, dx.transpose(1, 2))
        return dx, dweight, dbias

    package, functions = types.ModuleType("causal_conv1d"), types.ModuleType("causal_conv1d.cpp_functions")
    package.causal_conv1d_fn, package.cpp_functions, package.__path__ = whole, functions, []
    functions.causal_conv1d_fwd_function, functions.causal_conv1d_bwd_function = forward, backward
    functions.causal_conv1d_update_function = None
    sys.modules |= {"causal_conv1d": package, "causal_conv1d.cpp_functions": functions}


def peer_ms(patterns: list[str], args: argparse.Namespace) -> tuple[dict[str, dict] | None, str]:
    """Milliseconds of forward and backward of one micro-batch, gradients added to those that are there, of models of
    these patterns in turns and round by round (`{pattern: {"ms": [...]}}`); and how, or why not."""
    offer_convolution()
    kernels = mamba("ops.triton.ssd_combined") is not None
    try:
        from transformers import AutoModelForCausalLM, NemotronHConfig, __version__
    except ImportError as error:
        return None, str(error)
    how = f"transformers {__version__}, {'mamba-ssm' if kernels else 'its own SSD'}, grouped_mm, sdpa"

    def made(pattern: str) -> torch.nn.Module:
        settings = ["--mode", "pretrain", "--preset", "nano-30b-a3b", f"model.hybrid_override_pattern={pattern}"]
        config = resolve(parser().parse_args([*settings, *args.set]))[0].model
        theirs = NemotronHConfig(**json.loads(config_json(config, None, "BF16")))
        with torch.device(args.device):
            model = AutoModelForCausalLM.from_config(
                theirs, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation="grouped_mm"
            )
        return model.train()

    def step(model: torch.nn.Module, n: int) -> None:
        for _ in range(n):
            ids = torch.randint(model.config.vocab_size, (args.rows[0], args.seq_length), device=args.device)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    try:
        n, models = args.micro_batches, [made(pattern) for pattern in patterns]
        times = in_turns([partial(step, m, k) for m in models for k in (1, n)], args.warm_up, args.rounds)
        each = zip(patterns, times[::2], times[1::2], strict=True)
        return {pattern: {"ms": steady(one, several, n)} for pattern, one, several in each}, how
    except Exception as error:  # a peer that fails is a result too
        return None, f"{how}: {type(error).__name__}: {str(error)[:300]}"
