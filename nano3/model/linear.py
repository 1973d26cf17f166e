"""The dense products and the embedding as modules.

In training a weight has a sink, which takes its gradient past autograd (`nano3/train/gradients.py`).
"""

from torch import Tensor, nn

from kernels.embedding import embedding
from kernels.gradient_sink import linear, sink_of


class Linear(nn.Linear):
    """y = x W^T, without a bias.  ends_block: y only joins the residual stream."""

    def __init__(self, width_in: int, width_out: int, ends_block: bool = False) -> None:
        super().__init__(width_in, width_out, bias=False)
        self.ends_block = ends_block

    def reset_parameters(self) -> None:
        """Nothing: values come from `initialise` or a checkpoint."""

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return linear(x, self.weight, sink_of(self.weight), self.ends_block)


class Embedding(nn.Embedding):
    def __init__(self, ids: int, width: int, backend: str = "auto") -> None:
        super().__init__(ids, width)
        self.backend = backend

    def reset_parameters(self) -> None:
        """Nothing, as above.  On the meta device PyTorch's own would import its compiler, for a second or two."""

    def forward(self, ids: Tensor) -> Tensor:  # (...) -> (..., D)
        return embedding(ids, self.weight, sink_of(self.weight), self.backend)
