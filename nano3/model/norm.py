"""RMSNorm as a module."""

import torch
from torch import Tensor, nn

from kernels.rms_norm import fork_rms_norm, rms_norm


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float, backend: str = "auto") -> None:
        super().__init__()
        self.eps, self.backend = eps, backend
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        return rms_norm(x, self.weight, self.eps, self.backend)

    def fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x, and x for the way past it: their gradients are then added in the norm's backward kernel."""
        return fork_rms_norm(x, self.weight, self.eps, self.backend)
