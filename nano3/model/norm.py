"""RMSNorm as a module."""

import torch
from torch import Tensor, nn

from kernels.rms_norm import join_rms_norm, rms_norm


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float, backend: str = "auto") -> None:
        super().__init__()
        self.eps, self.backend = eps, backend
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, *summands: Tensor) -> Tensor:  # (..., D) -> (..., D)
        """The norm of the stream x + summands."""
        if not summands:
            return rms_norm(x, self.weight, self.eps, self.backend)
        return self.join(x, *summands)[1]

    def join(self, x: Tensor, *summands: Tensor, readers: int = 1) -> tuple[Tensor, ...]:
        """The stream x + summands, then its norm once for each of its readers, whose gradients are added in the norm's
        backward kernel."""
        return join_rms_norm(x, summands, self.weight, self.eps, readers, self.backend)
