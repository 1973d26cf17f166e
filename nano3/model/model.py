"""Nemotron 3 Nano: an embedding, one residual block per letter of the pattern, a norm and an untied head.

Parameter names are those of the released checkpoint inside `backbone.` (experts as transformers fuses them), so a
checkpoint's name is the path of an attribute here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels._common import computing_again
from nano3.config import KINDS, ModelConfig, PeftConfig
from nano3.model.attention import Attention
from nano3.model.cache import LayerState, Rows, rows_of
from nano3.model.linear import Embedding, Linear
from nano3.model.mamba import Mamba
from nano3.model.moe import MLP, Balance, MoE
from nano3.model.norm import RMSNorm
from nano3.parallel.collectives import all_stack
from nano3.parallel.expert import remember
from nano3.parallel.mesh import ALONE, Mesh
from nano3.parallel.tensor import leave

Stream = tuple[Tensor, ...]  # summands, each (B, S / tp, D)
MIXERS = {
    "M": Mamba,
    "E": MoE,
    "*": Attention,
    "-": lambda c, mesh: MLP(c.hidden_size, c.intermediate_size, mesh, c.kernels.relu2),
}


class Block(nn.Module):
    """x + mixer(norm(x)).  One mixer per block; there is no separate MLP sub-layer.

    Between blocks the stream is a tuple of summands: what it was before the last block, and what that block gave.  The
    norm of the next block reads all of it anyway, and forms the sum.
    """

    def __init__(self, c: ModelConfig, letter: str, mesh: Mesh) -> None:
        super().__init__()
        self.kind = KINDS[letter]
        self.norm = RMSNorm(c.hidden_size, c.layer_norm_epsilon, c.kernels.rms_norm)
        self.mixer = MIXERS[letter](c, mesh)

    def forward(self, stream: Stream, rows: Rows, cache: LayerState, whole: bool) -> tuple[Stream, Balance | None]:
        if self.kind == "moe":
            x, *u = self.norm.join(*stream, readers=self.mixer.READERS)
            y, balance = self.mixer(u, rows, cache, whole)
            return (x, *y), balance
        x, u = self.norm.join(*stream)
        return (x, self.mixer(u, rows, cache, whole)), None

    def step(self, x: Tensor, cache: LayerState) -> Tensor:  # (B, D) -> (B, D)
        return x + self.mixer.step(self.norm(x), cache)


def _passes() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Around a block's first forward pass, and around its second."""
    first, again = remember()

    @contextmanager
    def second() -> Iterator[None]:
        with again, computing_again():
            yield

    return first, second()


def total(stream: Stream) -> Tensor:
    """The stream, formed."""
    return functools.reduce(torch.add, stream)


class Output(NamedTuple):
    hidden: Tensor  # (B, S / tp, D); after the last norm where the part holds the model's end
    balance: list[Balance]  # one per mixture layer, empty in eval mode


class Nano3(nn.Module):
    """The model, or one rank's share of it.

    recompute: kinds of block whose activations are computed again in the backward pass instead of being kept; "conv" is
    the output of the Mamba blocks' convolutions alone.
    parts: the spans of layers that this rank holds, in order; None: all of them, in one span.  The span that starts at
    layer 0 brings the embedding, the one that ends at the last layer the final norm and the head.  Names are those of
    the whole model.
    """

    def __init__(
        self,
        c: ModelConfig,
        recompute: frozenset[str] = frozenset(),
        mesh: Mesh = ALONE,
        parts: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        super().__init__()
        L = c.num_hidden_layers
        self.config, self.recompute, self.mesh = c, recompute, mesh
        self.peft = PeftConfig()  # what of it is trained; `nano3.model.lora.attach` says otherwise
        self.parts = list(parts or [(0, L)])
        self.has_start, self.has_end = self.parts[0][0] == 0, self.parts[-1][1] == L
        local_vocab = c.vocab_size // mesh.tp.size
        if self.has_start:
            self.embeddings = Embedding(local_vocab, c.hidden_size, c.kernels.embedding)
        mine = [i for start, stop in self.parts for i in range(start, stop)]
        self.layers = nn.ModuleDict({str(i): Block(c, c.hybrid_override_pattern[i], mesh) for i in mine})
        for block in self.layers.values():
            if block.kind == "mamba":
                block.mixer.keep_conv = "conv" not in recompute
        if self.has_end:
            self.norm_f = RMSNorm(c.hidden_size, c.layer_norm_epsilon, c.kernels.rms_norm)
            self.lm_head = Linear(c.hidden_size, local_vocab)

    def forward(
        self,
        x: Tensor,
        seq_idx: Tensor | None = None,
        cache: list[LayerState] | None = None,
        part: int = 0,
        real: Tensor | None = None,
    ) -> Output:
        """x: (B, S) ids, or for a part that does not hold the start what the part before it gave, (B, S / tp, D).

        seq_idx: (B, S), the document of each token of a packed row, non-decreasing.  real: (B, S), False for padding,
        which is counted nowhere; as a document of its own it reaches no token either.  With a cache the row continues
        what the cache has seen, and the cache moves on by S tokens; all tp ranks then hold all S tokens.
        """
        if cache is not None and seq_idx is not None:
            raise ValueError("a cached row holds one document: pass either cache or seq_idx")
        whole = cache is not None
        start, stop = self.parts[part]
        if start == 0:
            x = self.embed(x, whole)
        rows = rows_of(seq_idx, real, self.mesh.tp)
        stream, balance = (x,), []
        for i in range(start, stop):
            block, state = self.layers[str(i)], None if cache is None else cache[i]
            if self.training and block.kind in self.recompute:
                stream = (total(stream),)  # its summands would all be kept
                # Nothing in a block is random.
                options = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": _passes}
                stream, report = checkpoint(block, stream, rows, state, whole, **options)
            else:
                stream, report = block(stream, rows, state, whole)
            if report is not None:
                balance.append(report)
        if not self.is_end(part):
            return Output(total(stream), balance)
        return Output(self.norm_f(*stream), balance)

    def step(self, x: Tensor, cache: list[LayerState], part: int = 0) -> Tensor:
        """One token of decoding per sequence: (B,) ids, or (B, D) -> (B, D).  Moves the cache on by one token."""
        start, stop = self.parts[part]
        if start == 0:
            x = self.embed(x, whole=True)
        for i in range(start, stop):
            x = self.layers[str(i)].step(x, cache[i])
        return self.norm_f(x) if self.is_end(part) else x

    def embed(self, tokens: Tensor, whole: bool) -> Tensor:
        """(B, S) ids -> (B, S / tp, D).  Each tp rank looks up the ids of its rows and adds zero for all others."""
        tp = self.mesh.tp
        if tp.size == 1:
            return self.embeddings(tokens)
        local = tokens - self.vocab_offset
        mine = (local >= 0) & (local < self.embeddings.num_embeddings)
        x = self.embeddings(local.where(mine, 0)) * mine.unsqueeze(-1)
        return leave(x, tp, whole)

    @property
    def vocab_offset(self) -> int:
        """The first id of this tp rank's slice of the vocabulary."""
        return self.config.vocab_size // self.mesh.tp.size * self.mesh.tp.rank

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), in fp32 (float64 for float64).  Training never calls this: its loss works in chunks."""
        y = self.lm_head(hidden)
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        return y if self.mesh.tp.size == 1 else torch.cat(list(all_stack(y, self.mesh.tp.group)), dim=-1)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return next(b.norm.weight for b in self.layers.values()).dtype

    def is_end(self, part: int) -> bool:
        """Whether a part ends with the head."""
        return self.parts[part][1] == self.config.num_hidden_layers

    @property
    def routers(self) -> dict[str, nn.Module]:
        """The routers by layer, in the order of Output.balance."""
        return {i: block.mixer.gate for i, block in self.layers.items() if block.kind == "moe"}
