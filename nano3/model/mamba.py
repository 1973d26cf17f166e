"""The Mamba-2 mixer (arXiv:2405.21060): project, convolve, scan, gate, normalise, project."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.conv1d import causal_conv1d
from kernels.conv1d_step import causal_conv1d_step
from kernels.gated_norm import gated_rms_norm
from kernels.mamba_mixer import Sizes, fits, mamba_mixer
from kernels.ssd import ssd, ssd_step
from nano3.config import ModelConfig
from nano3.model.cache import MambaState, Rows
from nano3.model.linear import Linear
from nano3.model.norm import RMSNorm
from nano3.parallel.mesh import ALONE, Mesh
from nano3.parallel.tensor import enter, leave


class Conv(nn.Module):
    """Weights of the depthwise convolution over x, B and C; (channels, 1, width) as in the released checkpoint."""

    def __init__(self, channels: int, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None


class Mamba(nn.Module):
    """With tensor parallelism a rank has H / tp heads and G / tp groups, and its cut of each of z, x, B, C and dt.
    Heads and norm groups stay whole, so nothing is exchanged between the two projections."""

    def __init__(self, c: ModelConfig, mesh: Mesh = ALONE) -> None:
        super().__init__()
        self.tp = mesh.tp
        self.H, self.G = c.mamba_num_heads // self.tp.size, c.n_groups // self.tp.size
        self.P, self.N = c.mamba_head_dim, c.ssm_state_size
        self.d_inner, self.conv_dim = c.d_inner // self.tp.size, c.conv_dim // self.tp.size
        self.chunk, self.eps = c.chunk_size, c.layer_norm_epsilon
        self.dt_limit = (c.time_step_limit[0], c.time_step_limit[1])
        self.kernels = c.kernels
        self.keep_conv = True  # for the backward pass; `Nano3` says otherwise
        self.sizes = Sizes(self.H, self.P, self.G, self.N)
        self.backends = (c.kernels.conv1d, c.kernels.ssd, c.kernels.gated_norm)
        self.in_proj = Linear(c.hidden_size, self.d_inner + self.conv_dim + self.H)  # z | x | B | C | dt
        self.conv1d = Conv(self.conv_dim, c.conv_kernel, c.use_conv_bias)
        self.A_log = nn.Parameter(torch.empty(self.H))
        self.D = nn.Parameter(torch.empty(self.H))
        self.dt_bias = nn.Parameter(torch.empty(self.H))
        self.norm = RMSNorm(self.d_inner, self.eps)
        self.out_proj = Linear(self.d_inner, c.hidden_size, ends_block=True)

    def forward(
        self, u: Tensor, rows: Rows, cache: MambaState | None, whole: bool
    ) -> Tensor:  # (B, S / tp, D) -> (B, S / tp, D)
        projected = self.in_proj(enter(u, self.tp, whole))
        if cache is None and fits(projected, self.sizes, self.backends):  # training on a GPU: the lines below, as one
            return leave(self.out_proj(self._fused(projected, rows.seq_idx)), self.tp, whole)
        z, xBC, dt = projected.split([self.d_inner, self.conv_dim, self.H], dim=-1)
        W = self.conv1d.weight.shape[-1]
        before = None if cache is None else cache.window[:, 1:]
        if cache is not None:
            cache.window = torch.cat([cache.window, xBC], dim=1)[:, -W:]
        xBC = causal_conv1d(
            xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias, rows.seq_idx, before, self.kernels.conv1d
        )
        x, B, C = self._heads(xBC)
        state = None if cache is None else cache.state
        options = (self.dt_bias, self.chunk, self.dt_limit, rows.seq_idx, state, self.kernels.ssd)
        y, state = ssd(x, dt, self._A(), B, C, self.D, *options)
        if cache is not None:
            cache.state = state
        return leave(self._out(y, z), self.tp, whole)

    def step(self, u: Tensor, cache: MambaState) -> Tensor:
        """One token of decoding: (B, D) -> (B, D).  Moves `cache` on by one token."""
        z, xBC, dt = self.in_proj(u).split([self.d_inner, self.conv_dim, self.H], dim=-1)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        xBC, cache.window = causal_conv1d_step(xBC, cache.window, weight, bias, self.kernels.conv1d)
        x, B, C = self._heads(xBC)
        options = (self.dt_bias, self.dt_limit, self.kernels.ssd)
        y, cache.state = ssd_step(cache.state, x, dt, self._A(), B, C, self.D, *options)
        return leave(self._out(y, z), self.tp, whole=True)

    def _fused(self, projected: Tensor, seq_idx: Tensor | None) -> Tensor:
        conv, options = self.conv1d, (self.sizes, self.dt_limit, self.eps, seq_idx, self.keep_conv)
        parameters = (self.A_log, self.D, self.dt_bias, self.norm.weight)
        return mamba_mixer(projected, conv.weight.squeeze(1), conv.bias, *parameters, *options)

    def _A(self) -> Tensor:
        return -self.A_log.exp()

    def _heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (..., H, P), (..., G, N), (..., G, N)
        x, B, C = xBC.split([self.d_inner, self.G * self.N, self.G * self.N], dim=-1)
        return x.unflatten(-1, (self.H, self.P)), B.unflatten(-1, (self.G, self.N)), C.unflatten(-1, (self.G, self.N))

    def _out(self, y: Tensor, z: Tensor) -> Tensor:
        y = gated_rms_norm(y.flatten(-2), z, self.norm.weight, self.G, self.eps, self.kernels.gated_norm)
        return self.out_proj(y)
