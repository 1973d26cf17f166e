"""What a rank sends in one optimizer step: every message of every collective, from the configuration alone.

Bytes are what one rank sends, by the ring algorithm: to gather or to scatter a whole of n parts it passes on n - 1 of
them, and a sum on all ranks is a scatter and a gather.  A library may choose another way for small messages.  Rows that
travel to their experts are an expectation; everything else is exact.  Evaluation and checkpoints are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nano3.config import KINDS, Config
from nano3.model.layout import split_of
from nano3.model.lora import trains
from nano3.parallel.layout import Layout
from nano3.parallel.pipeline_schedule import schedule, transfers
from nano3.train.memory import Share, micro_batches, rows_per_token
from nano3.train.reach import Layer, reach


@dataclass(frozen=True)
class Line:
    """Messages of one kind, all of one step."""

    axis: str  # the ranks that take part, as in parallel.mesh
    ranks: int
    call: str  # all_gather, reduce_scatter, all_reduce, all_to_all or send
    what: str
    messages: int
    bytes: float  # that this rank sends, in all of them together
    meanwhile: str = "-"  # what happens while they travel; "-": the rank waits for them


def traffic(config: Config, layout: Layout, share: Share, bf16: bool) -> list[Line]:
    """Every message of one step that a rank of the share's stage takes part in.  Axes of size 1 send nothing."""
    step = _Step(config, layout, share, 2 if bf16 else 4)
    lines = [*step.blocks(), *step.ends(), *step.experts(), *step.pipeline(), *step.optimizer(), *step.small()]
    return [line for line in lines if line.ranks > 1 and line.messages]


class _Step:
    def __init__(self, config: Config, layout: Layout, share: Share, e: int) -> None:
        self.config, self.layout, self.share, self.axes, self.e = config, layout, share, share.axes, e
        self.c, self.micro, self.B = config.model, micro_batches(config, layout), config.micro_batch(layout.dp)
        self.tokens = self.B * config.dataset.seq_length  # of a micro-batch; a tp rank holds 1 / tp of them
        found, self.ends_with_gradient = reach(config, share.parts, share.tensors)
        self.layers = [layer for part in found for layer in part]
        self.mixtures = [layer for layer in self.layers if layer.kind == "E"]

    def again(self, layers: list[Layer]) -> list[Layer]:
        """Those that are computed again."""
        return [layer for layer in layers if layer.runs and KINDS[layer.kind] in self.config.recompute]

    def line(self, axis: str, call: str, what: str, messages: int, each: float, meanwhile: str = "-") -> Line:
        """each: bytes of one message's whole: of all ranks' parts where it gathers or scatters, of one rank's where it
        sums, of what leaves the rank in the other calls."""
        n = self.axes[axis].size
        passed_on = {"all_gather": (n - 1) / n, "reduce_scatter": (n - 1) / n, "all_reduce": 2 * (n - 1) / n}
        return Line(axis, n, call, what, messages, messages * each * passed_on.get(call, 1), meanwhile)

    def blocks(self) -> Iterator[Line]:
        """tp: each block gathers its tokens and scatters its sums; the backward pass does the opposite of both.

        A mixture routes while it gathers, and adds up its experts' results while it scatters; the backward pass of
        both is the same seen in a mirror.  A block that is computed again gathers again; its result is known, and not
        scattered.
        """
        whole = self.tokens * self.c.hidden_size * self.e
        for letter in KINDS:
            layers, name = [layer for layer in self.layers if layer.kind == letter], f"{KINDS[letter]} blocks"
            n = [len(layers), len(self.again(layers)), sum(x.output for x in layers), sum(x.input for x in layers)]
            forward, again, outputs, inputs = (count * self.micro for count in n)
            first, last = ("routing", "sum of results") if letter == "E" else ("-", "-")
            yield self.line("tp", "all_gather", f"{name}, forward", forward, whole, first)
            yield self.line("tp", "reduce_scatter", f"{name}, forward", forward, whole, last)
            yield self.line("tp", "all_gather", f"{name}, again", again, whole, first)
            yield self.line("tp", "all_gather", f"{name}, backward", outputs, whole, last)
            yield self.line("tp", "reduce_scatter", f"{name}, backward", inputs, whole, first)

    def ends(self) -> Iterator[Line]:
        """tp: the embedding sums its slices' rows; the head gathers its tokens, and three statistics of each."""
        whole = self.tokens * self.c.hidden_size * self.e
        if "embeddings.weight" in self.share.tensors:
            yield self.line("tp", "reduce_scatter", "embedding, forward", self.micro, whole)
            backward = self.micro * trains("embeddings.weight", self.config.peft)
            yield self.line("tp", "all_gather", "embedding, backward", backward, whole)
        if "lm_head.weight" in self.share.tensors:
            yield self.line("tp", "all_gather", "head, forward", self.micro, whole)
            chunks = -(-self.tokens // self.config.train.loss_chunk_tokens)
            statistics = 3 * 4 * self.tokens * self.layout.tp / chunks  # fp32, of all ranks
            yield self.line("tp", "all_gather", "head, softmax statistics", self.micro * chunks, statistics)
            yield self.line("tp", "reduce_scatter", "head, backward", self.micro * self.ends_with_gradient, whole)

    def experts(self) -> Iterator[Line]:
        """ep: each way a token's row goes to the ranks that hold at least one of its K experts, and one row returns.

        A rank has T tokens and holds E / ep experts.  With uniform routing it sends
        T (ep - 1) (1 - C(E - E / ep, K) / C(E, K)) rows to others: ep - 1 of every ep that `rows_per_token` counts.
        With each row go K ids and K weights in fp32; before them go numbers of tokens and of rows per expert, int64.
        """
        ep, K = self.layout.ep, self.c.num_experts_per_tok
        n = len(self.mixtures) * self.micro
        again = len(self.again(self.mixtures)) * self.micro
        backward = [sum(getattr(x, what) for x in self.mixtures) * self.micro for what in ("routed", "choice", "input")]
        rows = self.tokens / self.layout.tp * rows_per_token(self.c, ep) * (ep - 1) / ep
        row, ids = rows * self.c.hidden_size * self.e, rows * 2 * K * 4
        counts = (ep - 1) * (1 + self.c.n_routed_experts // ep) * 8
        shared = "shared expert"
        yield self.line("ep", "all_to_all", "row counts, forward", n, counts, "-, the host too")
        for time, messages in (("forward", n), ("again", again)):
            yield self.line("ep", "all_to_all", f"ids and weights, {time}", messages, ids, shared)
            yield self.line("ep", "all_to_all", f"rows to experts, {time}", messages, row, shared)
        yield self.line("ep", "all_to_all", "results back, forward", n, row, shared)
        yield self.line("ep", "all_to_all", "results' gradients, backward", backward[0], row, shared)
        yield self.line("ep", "all_to_all", "weights' gradients, backward", backward[1], ids, shared)
        yield self.line("ep", "all_to_all", "rows' gradients, backward", backward[2], row, shared)

    def pipeline(self) -> Iterator[Line]:
        """pp: each micro-batch's stream climbs the virtual stages, and its gradient comes down again."""
        piece = self.tokens / self.layout.tp * self.c.hidden_size * self.e
        stage, stages, chunks = self.share.stage, self.layout.pp, len(self.share.parts)
        ops = schedule(stage, stages, chunks, self.micro)
        sent = [op.kind for op in ops if transfers(op, stage, stages, chunks).send is not None]
        yield self.line("pp", "send", "stream, forward", sent.count("F"), piece, "next operation")
        yield self.line("pp", "send", "its gradient, backward", sent.count("B"), piece, "next operation")

    def optimizer(self) -> Iterator[Line]:
        """data and edp: each bucket of gradients is reduce-scattered, and its updated rows are gathered back."""
        for axis, what in (("data", "dense"), ("edp", "experts'")):
            n = self.axes[axis].size
            for b in self.share.buckets:
                if (b.axis is self.axes["edp"]) != (axis == "edp"):
                    continue
                gradient, weight = b.wire.itemsize, b.members[0].parameter.dtype.itemsize
                last = "last backward"
                yield self.line(axis, "reduce_scatter", f"{what} gradients", 1, n * b.width * gradient, last)
                yield self.line(axis, "all_gather", f"{what} weights", 1, n * b.width * weight, "next forward")

    def small(self) -> Iterator[Line]:
        """What is a few numbers, or once per step.

        Not counted: rows with padding sum their lengths besides, and rows of several documents the tokens per expert of
        each, in room for as many documents as tokens.
        """
        E, share = self.c.n_routed_experts, self.share
        again = sum(
            x.choice for x in self.again(self.mixtures)
        )  # without, nothing after it is read, and it is left out
        passes = (len(self.mixtures) + again) * self.micro
        yield self.line("tp", "all_reduce", "tokens per expert, for balance loss", passes, self.B * E * 4)
        for axis, what in (("tp", "gradients of replicated tensors"), ("kv", "gradients of shared KV heads")):
            mine = [share.owned(b, m) * b.dtype.itemsize for b, m in share.members if self.summed_over(m.name) == axis]
            yield self.line(axis, "all_reduce", what, min(1, len(mine)), sum(mine))
        here, everywhere = len(self.mixtures), self.c.hybrid_override_pattern.count("E")
        yield self.line("block", "all_reduce", "tokens per expert, for the biases", min(1, here), here * E * 8)
        yield self.line("pp", "all_reduce", "expert loads", min(1, everywhere), everywhere * 8)
        yield self.line("dp", "all_reduce", "numbers of tokens", 1, 2 * 8)
        yield self.line("all", "all_reduce", "losses and signals", 1, 3 * 8)
        yield self.line("all", "all_reduce", "gradient norm", 1, 8)

    def summed_over(self, name: str) -> str | None:
        """The axis whose ranks hold the same tensor but have seen different tokens, or different heads."""
        split = split_of(name, self.c, self.layout.tp)
        return "tp" if split is None else "kv" if split.copies > 1 else None


SHORT = {"all_gather": "gather", "reduce_scatter": "scatter", "all_reduce": "sum", "all_to_all": "exchange"}


def traffic_table(lines: list[Line], stage: int) -> str:
    """The lines as text, those that differ in the call alone put together, and the sum of each axis."""
    merged: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        merged.setdefault((f"{line.axis} {line.ranks}", line.what, line.meanwhile), []).append(line)
    out = [f"{f'a rank of stage {stage} sends in one step':46}{'calls':<15}{'messages':>10}{'bytes':>12}  meanwhile"]
    for (axis, what, meanwhile), same in merged.items():
        calls = "+".join(dict.fromkeys(SHORT.get(line.call, line.call) for line in same))
        messages, sent = sum(line.messages for line in same), sum(line.bytes for line in same)
        out.append(f"{axis:<9}{what:<37}{calls:<15}{messages:>10,}{size(sent):>12}  {meanwhile}")
    axes = dict.fromkeys(line.axis for line in lines)
    sums = {axis: sum(line.bytes for line in lines if line.axis == axis) for axis in axes}
    out.append("-: the rank waits.  Rows to experts: expected, if all choices are equally likely.")
    out.append("in all: " + ", ".join(f"{axis} {size(n)}" for axis, n in sums.items() if n >= 1 << 20))
    return "\n".join(out)


def size(n: float) -> str:
    for unit, one in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= one:
            return f"{n / one:,.2f} {unit}"
    return f"{n:,.0f} B"
