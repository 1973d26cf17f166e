"""What the compile-only test builds: the public operators, forward and backward, at Nemotron 3 Nano's sizes or small.

A case calls operators on tensors of the sizes and the dtype it is given.  `@case(nano=True)` marks what Nano's training
and decoding launch.  The others are what the kernels can be specialised for besides: packed rows, an initial state,
gradient buffers, odd widths, and so on.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from kernels import cross_entropy, fp8, grouped_gemm, grouped_gemm_configs
from kernels.adamw import Moment, Place, Step, adamw
from kernels.adapted_experts import adapted_experts
from kernels.attention import attention
from kernels.balance import balance_sums
from kernels.conv1d import causal_conv1d
from kernels.conv1d_step import causal_conv1d_step
from kernels.cross_entropy import linear_cross_entropy, vocabulary_gradient, vocabulary_statistics
from kernels.dispatch import collect, papers, spread
from kernels.embedding import embedding_gradient_
from kernels.gated_norm import gated_rms_norm
from kernels.gradient_sink import Buffer, GradientSink
from kernels.grouped_gemm import experts, grouped_mlp
from kernels.grouped_gemm_configs import Config
from kernels.mamba_mixer import Sizes as MixerSizes
from kernels.mamba_mixer import mamba_mixer
from kernels.permute import copy_rows, tiles_from_counts, zero_tail
from kernels.relu2 import relu2
from kernels.rms_norm import join_rms_norm, rms_norm
from kernels.routing import expert_counts, route
from kernels.ssd import ssd, ssd_step
from tests.kernels.compile_driver import ARCHITECTURES, DTYPES, Job


class Sizes(NamedTuple):
    T: int = 8192  # tokens
    D: int = 2688
    H: int = 64  # Mamba-2: heads, their width, groups, state
    P: int = 64
    G: int = 8
    N: int = 128
    E: int = 128  # experts, their hidden width, chosen a token
    F: int = 1856
    K: int = 6
    HQ: int = 32  # attention: query heads, key-value heads, their width
    HKV: int = 2
    WIDTH: int = 128
    V: int = 131072  # ids

    @property
    def CONV(self) -> int:
        return self.H * self.P + 2 * self.G * self.N

    @property
    def PROJECTED(self) -> int:  # z | x | B | C | dt
        return self.H * self.P + self.CONV + self.H


NANO = Sizes()
# As small as still launches every kernel: compiling takes a third of the time.
SMALL = Sizes(T=512, D=256, H=4, P=32, G=4, N=32, E=16, F=128, K=2, HQ=4, HKV=2, WIDTH=32, V=16384)

CASES: dict[str, Callable[[Sizes, torch.dtype], object]] = {}
NANOS: list[str] = []  # the cases of the model itself


def case(nano: bool = False) -> Callable:
    def add(f: Callable) -> Callable:
        CASES[f.__name__] = f
        if nano:
            NANOS.append(f.__name__)
        return f

    return add


def cuda(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    """A tensor inside `compiling`: it has no memory."""
    t = torch.empty(*shape, dtype=dtype, device="cuda")
    return t.requires_grad_() if grad and dtype.is_floating_point else t


def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return cuda(*shape, dtype=dtype)


def backward(*outputs: Tensor | None) -> None:
    """The backward pass of one operator, given all its outputs; None for one that has, or gets, no gradient.

    The operator's node is called by hand: inside PyTorch's autograd the pretence that tensors are CUDA's is suspended.
    """
    node = next(y.grad_fn for y in outputs if y is not None)
    node.apply(*(None if y is None else torch.empty_like(y) for y in outputs))


@case(nano=True)
def norm(s: Sizes, dtype: torch.dtype) -> None:
    x, weight = cuda(s.T, s.D, dtype=dtype), cuda(s.D, dtype=dtype)
    backward(rms_norm(x, weight, 1e-5))
    summands = [cuda(s.T, s.D, dtype=dtype) for _ in range(2)]
    backward(*join_rms_norm(x, (), weight, 1e-5))
    backward(*join_rms_norm(x, summands[:1], weight, 1e-5))
    backward(*join_rms_norm(x, summands, weight, 1e-5, 3))


@case()
def gated(s: Sizes, dtype: torch.dtype) -> None:
    z = cuda(s.T, s.PROJECTED, dtype=dtype)[:, : s.H * s.P]
    y, weight = cuda(s.T, s.H * s.P, dtype=dtype), cuda(s.H * s.P, dtype=dtype)
    backward(gated_rms_norm(y, z, weight, s.G, 1e-5))


@case(nano=True)
def adamw_update(s: Sizes, dtype: torch.dtype) -> None:
    """Experts' gradients, and an adapter's: 8 bits, bf16 and fp32 moments, with and without masters."""
    clip, step = cuda(1, grad=False), Step(1e-3, 0.9, 0.95, 1e-8, 0.1, 1)
    for width, block in ((s.D, 128), (32, 32)):
        weight = cuda(s.F, width, dtype=dtype, grad=False)
        scales = [cuda(s.F, -(-width // block), grad=False) for _ in range(2)]
        codes = [
            Moment(integers(s.F, width, dtype=d), x) for d, x in zip((torch.int8, torch.uint8), scales, strict=True)
        ]
        wide = [Moment(cuda(s.F, width, grad=False)) for _ in range(2)]
        narrow = [Moment(cuda(s.F, width, dtype=torch.bfloat16, grad=False)) for _ in range(2)]
        for moments in (codes, wide, narrow) if block == 128 else (codes,):
            adamw(weight, weight, *moments, clip, step, (5, 6), Place(width), block)
        adamw(cuda(s.F, width, grad=False), weight, *codes, clip, step, (5, 6), Place(width), block)


@case(nano=True)
def squared_relu(s: Sizes, dtype: torch.dtype) -> None:
    backward(relu2(cuda(s.T, s.F, dtype=dtype)))


@case(nano=True)
def fp8_weights(s: Sizes, dtype: torch.dtype) -> None:
    shape = (s.E, s.F, s.D)
    codes, scales = cuda(*shape, dtype=fp8.CODE, grad=False), cuda(*fp8.scale_shape(shape), dtype=fp8.SCALE, grad=False)
    fp8.dequantise(codes, scales, dtype)


@case(nano=True)
def embedded(s: Sizes, dtype: torch.dtype) -> None:
    for sums in (torch.float32, dtype):
        embedding_gradient_(
            cuda(s.V, s.D, dtype=sums, grad=False), integers(s.T), cuda(s.T, s.D, dtype=dtype, grad=False)
        )


@case(nano=True)
def balance(s: Sizes, dtype: torch.dtype) -> None:
    _, sums = balance_sums(cuda(1, s.T, s.E), s.K)
    backward(None, sums)


@case()
def norm_wide(s: Sizes, dtype: torch.dtype) -> None:
    """The widest rows and groups that the kernels take."""
    norm(s._replace(D=8192), dtype)
    gated(s._replace(G=1), dtype)


@case()
def conv(s: Sizes, dtype: torch.dtype) -> None:
    x = cuda(1, s.T, s.PROJECTED, dtype=dtype)[..., s.H * s.P : s.H * s.P + s.CONV]
    weight, bias = cuda(s.CONV, 4, dtype=dtype), cuda(s.CONV, dtype=dtype)
    backward(causal_conv1d(x, weight, bias))


@case()
def conv_packed(s: Sizes, dtype: torch.dtype) -> None:
    x, weight = cuda(1, s.T, s.CONV, dtype=dtype), cuda(s.CONV, 4, dtype=dtype)
    backward(causal_conv1d(x, weight, None, integers(1, s.T, dtype=torch.int32)))
    initial = cuda(1, 3, s.CONV, dtype=dtype)
    backward(causal_conv1d(x, weight, None, integers(1, s.T), initial))
    weight = cuda(s.CONV, 2, dtype=dtype)
    backward(causal_conv1d(x, weight, None))


def ssd_inputs(s: Sizes, dtype: torch.dtype) -> list[Tensor]:
    x, B, C = cuda(1, s.T, s.CONV, dtype=dtype).split([s.H * s.P, s.G * s.N, s.G * s.N], dim=-1)
    x, B, C = x.unflatten(-1, (s.H, s.P)), B.unflatten(-1, (s.G, s.N)), C.unflatten(-1, (s.G, s.N))
    dt = cuda(1, s.T, s.PROJECTED, dtype=dtype)[..., -s.H :]
    A, skip, bias = cuda(s.H), cuda(s.H), cuda(s.H)
    return [x, dt, A, B, C, skip, bias]


@case(nano=True)
def ssd_mixer(s: Sizes, dtype: torch.dtype) -> None:
    """Convolution, SSD and gated norm as a Mamba-2 layer trains them."""
    projected, conv_weight = cuda(1, s.T, s.PROJECTED, dtype=dtype), cuda(s.CONV, 4, dtype=dtype)
    conv_bias, norm_weight = cuda(s.CONV, dtype=dtype), cuda(s.H * s.P, dtype=dtype)
    heads, sizes = [cuda(s.H) for _ in range(3)], MixerSizes(s.H, s.P, s.G, s.N)
    backward(mamba_mixer(projected, conv_weight, conv_bias, *heads, norm_weight, sizes, (0.0, torch.inf), 1e-5))


@case(nano=True)
def ssd_decoding(s: Sizes, dtype: torch.dtype) -> None:
    with torch.no_grad():
        window, weight, bias = cuda(1, 4, s.CONV, dtype=dtype), cuda(s.CONV, 4, dtype=dtype), cuda(s.CONV, dtype=dtype)
        causal_conv1d_step(cuda(1, s.PROJECTED, dtype=dtype)[:, s.H * s.P : -s.H], window, weight, bias)
        x, dt, A, B, C, skip, bias = ssd_inputs(s, dtype)
        ssd_step(cuda(1, s.H, s.P, s.N), x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], skip, bias)


@case()
def ssd_plain(s: Sizes, dtype: torch.dtype) -> None:
    backward(ssd(*ssd_inputs(s, dtype), 128)[0], None)


@case()
def ssd_packed(s: Sizes, dtype: torch.dtype) -> None:
    """Packed rows, the clamp of HF's configuration, an initial state and a gradient of the final one."""
    inputs, initial = ssd_inputs(s, dtype), cuda(1, s.H, s.P, s.N)
    idx = integers(1, s.T, dtype=torch.int32)
    backward(*ssd(*inputs, 128, (0.001, torch.inf), idx, initial))


@case()
def ssd_wide(s: Sizes, dtype: torch.dtype) -> None:
    """The largest state that the kernels take."""
    backward(ssd(*ssd_inputs(s._replace(P=128, N=256), dtype), 128)[0], None)


@case(nano=True)
def routing(s: Sizes, dtype: torch.dtype) -> None:
    x, weight, bias = cuda(s.T, s.D, dtype=dtype), cuda(s.E, s.D, dtype=dtype), cuda(s.E, grad=False)
    scores, weights, ids = route(x, weight, bias, s.K, scale=2.5)
    backward(None, weights, None)
    backward(scores, weights, None)
    expert_counts(ids, s.E)
    _, weights, _ = route(x, cuda(s.E, s.D), bias, s.K, scale=2.5)  # fp32, whose dx is no single product of bf16
    backward(None, weights, None)


@case()
def routing_groups(s: Sizes, dtype: torch.dtype) -> None:
    """Group limits, an fp32 router beside bf16 tokens, many experts, and 22 of them chosen."""
    for experts_, chosen, groups, kept in ((s.E, s.K, 8, 4), (512, 22, 1, 1)):
        x, weight, bias = cuda(s.T, s.D, dtype=dtype), cuda(experts_, s.D), cuda(experts_, grad=False)
        scores, weights, _ = route(x, weight, bias, chosen, groups, kept, scale=2.5)
        backward(scores, weights, None)


@case()
def experts_plain(
    s: Sizes, dtype: torch.dtype, buffers: torch.dtype | None = None, sink: Callable[[Tensor], GradientSink] = Buffer
) -> None:
    x, weights, ids = cuda(s.T, s.D, dtype=dtype), cuda(s.T, s.K), integers(s.T, s.K)
    up, down = cuda(s.E, s.F, s.D, dtype=dtype), cuda(s.E, s.D, s.F, dtype=dtype)
    grads = {}
    if buffers is not None:
        sums = {"up_grad": up, "down_grad": down}
        grads = {name: sink(cuda(*t.shape, dtype=buffers, grad=False)) for name, t in sums.items()}
    backward(experts(x, weights, ids, integers(s.E), up, down, **grads))


class First(Buffer):
    """A buffer whose content means nothing."""

    def open(self) -> tuple[Tensor, bool]:
        return self.sums, False


@case(nano=True)
def experts_summed(s: Sizes, dtype: torch.dtype) -> None:
    """As in training: the first gradients of a step are stored in fp32 sums, and the next are added to them."""
    experts_plain(s, dtype, torch.float32, First)
    experts_plain(s, dtype, torch.float32)


@case(nano=True)
def experts_adapted(s: Sizes, dtype: torch.dtype, lead: tuple[int, ...] | None = None, rank: int = 32) -> None:
    """LoRA: an adapter for each frozen expert."""
    lead = (s.E,) if lead is None else lead
    x, weights, ids = cuda(s.T, s.D, dtype=dtype), cuda(s.T, s.K), integers(s.T, s.K)
    up, down = cuda(s.E, s.F, s.D, dtype=dtype, grad=False), cuda(s.E, s.D, s.F, dtype=dtype, grad=False)
    pairs = [
        (cuda(*lead, rank, into, dtype=dtype), cuda(*lead, out, rank, dtype=dtype))
        for out, into in (up.shape[1:], down.shape[1:])
    ]
    backward(adapted_experts(x, weights, ids, integers(s.E), up, down, *pairs, 0.5))


@case()
def experts_adapted_other(s: Sizes, dtype: torch.dtype) -> None:
    """One adapter for all experts, and ranks of another width."""
    experts_adapted(s, dtype, ())
    for rank in (16, 64, 128):
        experts_adapted(s, dtype, rank=rank)


@case(nano=True)
def permute(s: Sizes, dtype: torch.dtype) -> None:
    """What `experts_plain` does not launch: rows in order already, or copied into it."""
    x, places = cuda(s.T, s.D, dtype=dtype, grad=False), integers(s.T, s.K, dtype=torch.int32)
    zero_tail(x, tiles_from_counts(integers(s.E), s.T, 128))
    copy_rows(x, places, s.T * s.K)


@case(nano=True)
def tokens_dispatched(s: Sizes, dtype: torch.dtype) -> None:
    """To the ranks of ep=8."""
    ids, place = integers(s.T, s.K), integers(s.T, 8, dtype=torch.int32)
    backward(papers(cuda(s.T, s.K), ids, place, s.T, s.E // 8))
    backward(collect(spread(cuda(s.T, s.D, dtype=dtype), place, s.T), place))


@case()
def experts_ordered(s: Sizes, dtype: torch.dtype) -> None:
    """Rows that another rank has sent, in expert order already; a rank has an eighth of the experts."""
    E = s.E // 8
    rows, weights = cuda(s.T, s.D, dtype=dtype), cuda(s.T)
    up, down = cuda(E, s.F, s.D, dtype=dtype), cuda(E, s.D, s.F, dtype=dtype)
    backward(grouped_mlp(rows, weights, integers(E), up, down))


@case()
def experts_buffers(s: Sizes, dtype: torch.dtype) -> None:
    """Weight gradients in buffers of either dtype, stored or added; few rows to an expert, or many."""
    for E in (s.E, s.E // 8):
        for buffers in (torch.float32, dtype):
            experts_plain(s._replace(E=E), dtype, buffers, First)
            experts_plain(s._replace(E=E), dtype, buffers)


@case()
def experts_odd(s: Sizes, dtype: torch.dtype) -> None:
    """A hidden width whose rows are no multiple of 16 bytes."""
    experts_plain(s._replace(F=s.F + 1), dtype)


def expert_tables() -> dict[str, list[dict[str, Config]]]:
    """The tables in `grouped_gemm_configs` that a GPU may use, name -> rows.

    A table has a tile for each product, and so has each row; or lists of alternatives, which become rows of their own.
    """
    found = {}
    for name, table in vars(grouped_gemm_configs).items():
        if not name.isupper() or name.startswith("INTERPRETED") or not isinstance(table, dict):
            continue
        lists = {product: [c] if isinstance(c, Config) else list(c) for product, c in table.items()}
        rows = range(max(map(len, lists.values())))
        found[name] = [{product: cs[min(i, len(cs) - 1)] for product, cs in lists.items()} for i in rows]
    return found


def with_tiles(tiles: dict[str, Config], s: Sizes, dtype: torch.dtype) -> None:
    with mock.patch.object(grouped_gemm, "choose_configs", return_value=grouped_gemm_configs.HOPPER | tiles):
        experts_plain(s, dtype)


def tuned_experts() -> list[Job]:
    """The tables that the cases above do not choose by themselves: those waiting to be measured, for sm_90."""
    chosen = ("HOPPER", "BLACKWELL", "SMALL_SHARED", "UNALIGNED", "FULL_PRECISION")
    return [
        Job(f"experts_{name.lower()}_{i}", partial(with_tiles, tiles, NANO), 90, "bf16")
        for name, rows in expert_tables().items()
        if name not in chosen
        for i, tiles in enumerate(rows)
    ]


def qkv(s: Sizes, dtype: torch.dtype, queries: int) -> list[Tensor]:
    k, v = cuda(1, s.T, 2 * s.HKV * s.WIDTH, dtype=dtype).unflatten(-1, (2 * s.HKV, s.WIDTH)).chunk(2, dim=2)
    return [cuda(1, queries, s.HQ, s.WIDTH, dtype=dtype), k, v]


@case(nano=True)
def attention_plain(s: Sizes, dtype: torch.dtype) -> None:
    backward(attention(*qkv(s, dtype, s.T), backend="triton"))
    with torch.no_grad():
        attention(*qkv(s, dtype, 1), backend="triton")


@case()
def attention_packed(s: Sizes, dtype: torch.dtype) -> None:
    backward(attention(*qkv(s, dtype, s.T), integers(1, s.T, dtype=torch.int32), backend="triton"))


@case()
def attention_other(s: Sizes, dtype: torch.dtype) -> None:
    """A cached prefill, and heads of another width and number."""
    backward(attention(*qkv(s, dtype, 1000), backend="triton"))
    backward(attention(*qkv(s._replace(HQ=8, WIDTH=64), dtype, s.T), backend="triton"))


@case(nano=True)
def head(s: Sizes, dtype: torch.dtype) -> None:
    head_with_loss(s, dtype)
    logits, labels = cuda(2048, s.V // 8, dtype=dtype, grad=False), integers(2048)  # a rank's slice of the vocabulary
    vocabulary_statistics(logits, labels, s.V // 8)
    vocabulary_gradient(logits, cuda(2048), labels, cuda(2048, grad=False), s.V // 8)


def head_with_loss(s: Sizes, dtype: torch.dtype, **options: object) -> None:
    x, weight = cuda(s.T, s.D, dtype=dtype), cuda(s.V, s.D, dtype=dtype)
    loss, _ = linear_cross_entropy(x, weight, integers(s.T), cuda(s.T, grad=False), **options)
    backward(loss, None)


@case()
def head_products(s: Sizes, dtype: torch.dtype) -> None:
    """All three products in our kernel, chosen or not; a number of tokens that leaves tiles to be cut."""
    with mock.patch.object(cross_entropy, "OWN_PRODUCTS", frozenset({"logits", "dx", "dw"})):
        head_with_loss(s, dtype, chunk=1024)


def default_jobs() -> list[Job]:
    """Nano's kernels as they run on sm_90a; every kernel once, at small sizes, for the other architectures."""
    found = [Job(name, partial(CASES[name], NANO), 90, "bf16") for name in NANOS]
    for arch in set(ARCHITECTURES) - {90}:
        found += [Job(name, partial(CASES[name], SMALL), arch, "bf16", once=True) for name in NANOS]
    return long_first(found)


def all_jobs() -> list[Job]:
    """Every case in both dtypes for every architecture, and every table of tiles."""
    found = tuned_experts()
    for name, call in CASES.items():
        found += [Job(name, partial(call, NANO), arch, dtype) for arch in ARCHITECTURES for dtype in DTYPES]
    return long_first(found)


def long_first(jobs: list[Job]) -> list[Job]:
    """So that no processor is left waiting for the last."""
    order = ("ssd", "experts", "attention")
    return sorted(jobs, key=lambda j: (j.arch != 90, *(not j.case.startswith(o) for o in order)))
