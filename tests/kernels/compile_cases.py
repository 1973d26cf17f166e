"""What the compile-only test builds: the public operators at Nemotron 3 Nano's sizes, forward and backward.

    python -m tests.kernels.compile_cases                                  a table: every case, architecture and dtype
    python -m tests.kernels.compile_cases ssd attention --arch 90 --dtype bf16
    python -m tests.kernels.compile_cases --json                           one line of JSON a kernel
    python -m tests.kernels.compile_cases --probes                         kernels that must fail, to test the test

The first case of an operator is built in bf16 for all architectures and in fp32 for sm_90; what else its kernels can
be specialised for (packed rows, an initial state, a gradient buffer, ...) in bf16 for sm_90.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from kernels import cross_entropy, grouped_gemm, grouped_gemm_configs
from kernels.attention import attention
from kernels.conv1d import causal_conv1d, causal_conv1d_step
from kernels.cross_entropy import linear_cross_entropy, vocabulary_gradient, vocabulary_statistics
from kernels.gated_norm import gated_rms_norm
from kernels.grouped_gemm import experts, grouped_mlp
from kernels.grouped_gemm_configs import Config
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.routing import expert_counts, route
from kernels.ssd import ssd, ssd_step
from tests.kernels import compile_probes
from tests.kernels.compile_only import ARCHITECTURES, DTYPES, Job, build

T, D = 8192, 2688
H, P, G, N = 64, 64, 8, 128  # Mamba-2: heads, head width, groups, state
CONV = H * P + 2 * G * N
PROJECTED = 2 * H * P + 2 * G * N + H  # z | x | B | C | dt
E, F, K = 128, 1856, 6  # experts, their hidden width, chosen a token
HQ, HKV, WIDTH = 32, 2, 128  # attention
V = 131072

CASES: list[tuple[str, Callable[[torch.dtype], object], bool]] = []  # name, call, whether it is the operator's first


def case(f: Callable) -> Callable:
    name = f.__name__.strip("_")
    first = name.split("_")[0] not in {n.split("_")[0] for n, _, _ in CASES}
    CASES.append((name, f, first))
    return f


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


# --- rows ------------------------------------------------------------------------------------------------------------


@case
def norm(dtype: torch.dtype) -> None:
    x, weight = cuda(T, D, dtype=dtype), cuda(D, dtype=dtype)
    backward(rms_norm(x, weight, 1e-5))
    residual = cuda(T, D, dtype=dtype)
    backward(*add_rms_norm(x, residual, weight, 1e-5))
    x, weight = cuda(T, 8192, dtype=dtype), cuda(8192, dtype=dtype)  # the widest row that the kernels take
    backward(rms_norm(x, weight, 1e-5))


@case
def gated(dtype: torch.dtype) -> None:
    z = cuda(T, PROJECTED, dtype=dtype)[:, : H * P]
    y, weight = cuda(T, H * P, dtype=dtype), cuda(H * P, dtype=dtype)
    backward(gated_rms_norm(y, z, weight, G, 1e-5))
    backward(gated_rms_norm(y, z, weight, 1, 1e-5))  # one group as wide as the kernels take


@case
def conv(dtype: torch.dtype) -> None:
    x = cuda(1, T, PROJECTED, dtype=dtype)[..., H * P : H * P + CONV]
    weight, bias = cuda(CONV, 4, dtype=dtype), cuda(CONV, dtype=dtype)
    backward(causal_conv1d(x, weight, bias))
    with torch.no_grad():
        causal_conv1d_step(x[:, 0], cuda(1, 4, CONV, dtype=dtype), weight, bias)


@case
def conv_packed(dtype: torch.dtype) -> None:
    x, weight = cuda(1, T, CONV, dtype=dtype), cuda(CONV, 4, dtype=dtype)
    backward(causal_conv1d(x, weight, None, integers(1, T, dtype=torch.int32)))
    initial = cuda(1, 3, CONV, dtype=dtype)
    backward(causal_conv1d(x, weight, None, integers(1, T), initial))
    weight = cuda(CONV, 2, dtype=dtype)
    backward(causal_conv1d(x, weight, None))


# --- SSD -------------------------------------------------------------------------------------------------------------


def ssd_inputs(dtype: torch.dtype, batch: int = 1, width: int = P, state: int = N) -> list[Tensor]:
    xBC = cuda(batch, T, H * width + 2 * G * state, dtype=dtype)
    x, B, C = xBC.split([H * width, G * state, G * state], dim=-1)
    dt = cuda(batch, T, PROJECTED, dtype=dtype)[..., -H:]
    A, skip, bias = cuda(H), cuda(H), cuda(H)
    return [x.unflatten(-1, (H, width)), dt, A, B.unflatten(-1, (G, state)), C.unflatten(-1, (G, state)), skip, bias]


@case
def ssd_plain(dtype: torch.dtype) -> None:
    inputs = ssd_inputs(dtype)
    y, _ = ssd(*inputs, 128)
    backward(y, None)
    with torch.no_grad():
        x, dt, A, B, C, skip, bias = inputs
        ssd_step(cuda(1, H, P, N), x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], skip, bias)


@case
def ssd_packed(dtype: torch.dtype) -> None:
    """Packed rows, the clamp of HF's configuration, an initial state and a gradient of the final one."""
    inputs, initial = ssd_inputs(dtype), cuda(1, H, P, N)
    idx = integers(1, T, dtype=torch.int32)
    backward(*ssd(*inputs, 128, (0.001, torch.inf), idx, initial))


@case
def ssd_wide(dtype: torch.dtype) -> None:
    """The largest state that the kernels take."""
    inputs = ssd_inputs(dtype, width=128, state=256)
    backward(ssd(*inputs, 128)[0], None)


# --- routing and experts ---------------------------------------------------------------------------------------------


@case
def routing(dtype: torch.dtype) -> None:
    x, weight, bias = cuda(T, D, dtype=dtype), cuda(E, D, dtype=dtype), cuda(E, grad=False)
    scores, weights, ids = route(x, weight, bias, K, scale=2.5)
    backward(None, weights, None)
    backward(scores, weights, None)
    expert_counts(ids, E)


@case
def routing_groups(dtype: torch.dtype) -> None:
    """Group limits, an fp32 router beside bf16 tokens, many experts, and 22 of them chosen."""
    for experts_, chosen, groups, kept in ((E, K, 8, 4), (512, 22, 1, 1)):
        x, weight, bias = cuda(T, D, dtype=dtype), cuda(experts_, D), cuda(experts_, grad=False)
        scores, weights, _ = route(x, weight, bias, chosen, groups, kept, scale=2.5)
        backward(scores, weights, None)


def experts_block(dtype: torch.dtype, width: int = F, grads: torch.dtype | None = None) -> None:
    x, weights, ids = cuda(T, D, dtype=dtype), cuda(T, K), integers(T, K)
    up, down = cuda(E, width, D, dtype=dtype), cuda(E, D, width, dtype=dtype)
    buffers = {}
    if grads is not None:
        buffers = {f"{n}_grad": cuda(*t.shape, dtype=grads, grad=False) for n, t in (("up", up), ("down", down))}
    backward(experts(x, weights, ids, integers(E), up, down, **buffers))


@case
def experts_plain(dtype: torch.dtype) -> None:
    experts_block(dtype)


@case
def ordered_experts(dtype: torch.dtype) -> None:
    """Rows that another rank has sent, in expert order already: 16 experts here."""
    rows, weights = cuda(T, D, dtype=dtype), cuda(T)
    up, down = cuda(16, F, D, dtype=dtype), cuda(16, D, F, dtype=dtype)
    backward(grouped_mlp(rows, weights, integers(16), up, down))


@case
def experts_buffers(dtype: torch.dtype) -> None:
    """Weight gradients added to buffers of either dtype."""
    experts_block(dtype, grads=torch.float32)
    experts_block(dtype, grads=dtype)


@case
def experts_odd(dtype: torch.dtype) -> None:
    """A hidden width whose rows are no multiple of 16 bytes."""
    experts_block(dtype, width=F + 1)


def expert_tables() -> dict[str, list[dict[str, Config]]]:
    """The tables in `grouped_gemm_configs`, name -> rows.  A table has a tile for each product, and so has each row; or
    lists of alternatives, which become rows of their own."""
    found = {}
    for name, table in vars(grouped_gemm_configs).items():
        if not name.isupper() or name == "INTERPRETED" or not isinstance(table, dict):
            continue
        lists = {product: [c] if isinstance(c, Config) else list(c) for product, c in table.items()}
        rows = range(max(map(len, lists.values())))
        found[name] = [{product: cs[min(i, len(cs) - 1)] for product, cs in lists.items()} for i in rows]
    return found


def with_tiles(tiles: dict[str, Config], dtype: torch.dtype) -> None:
    with mock.patch.object(grouped_gemm, "choose_configs", return_value=grouped_gemm_configs.HOPPER | tiles):
        experts_block(dtype)


def tuned_experts() -> list[Job]:
    """The tables that the cases above do not choose by themselves: those waiting to be measured, for sm_90."""
    chosen = ("HOPPER", "BLACKWELL", "SMALL_SHARED", "UNALIGNED", "FULL_PRECISION")
    return [
        Job(f"experts_{name.lower()}_{i}", partial(with_tiles, tiles), 90, "bf16")
        for name, rows in expert_tables().items()
        if name not in chosen
        for i, tiles in enumerate(rows)
    ]


# --- attention -------------------------------------------------------------------------------------------------------


def qkv(dtype: torch.dtype, queries: int = T, keys: int = T, heads: int = HQ, width: int = WIDTH) -> list[Tensor]:
    kv = cuda(1, keys, 2 * HKV * width, dtype=dtype)
    k, v = kv.unflatten(-1, (2 * HKV, width)).chunk(2, dim=2)
    return [cuda(1, queries, heads, width, dtype=dtype), k, v]


@case
def attention_plain(dtype: torch.dtype) -> None:
    inputs = qkv(dtype)
    backward(attention(*inputs, backend="triton"))
    with torch.no_grad():
        attention(*qkv(dtype, queries=1), backend="triton")


@case
def attention_packed(dtype: torch.dtype) -> None:
    inputs = qkv(dtype)
    backward(attention(*inputs, integers(1, T, dtype=torch.int32), backend="triton"))


@case
def attention_other(dtype: torch.dtype) -> None:
    """A cached prefill, and heads of another width and number."""
    inputs = qkv(dtype, queries=1000)
    backward(attention(*inputs, backend="triton"))
    inputs = qkv(dtype, heads=8, width=64)
    backward(attention(*inputs, backend="triton"))


# --- head ------------------------------------------------------------------------------------------------------------


def head_call(dtype: torch.dtype, vocabulary: int, **options: object) -> None:
    x, weight = cuda(T, D, dtype=dtype), cuda(vocabulary, D, dtype=dtype)
    loss, _ = linear_cross_entropy(x, weight, integers(T), cuda(T, grad=False), **options)
    backward(loss, None)


@case
def head(dtype: torch.dtype) -> None:
    head_call(dtype, V)
    logits, labels = cuda(2048, V // 8, dtype=dtype, grad=False), integers(2048)  # a rank's slice of the vocabulary
    vocabulary_statistics(logits, labels, V // 8)
    vocabulary_gradient(logits, cuda(2048), labels, cuda(2048, grad=False), V // 8)


@case
def head_products(dtype: torch.dtype) -> None:
    """All three products in our kernel, chosen or not; a number of tokens that leaves tiles to be cut."""
    with mock.patch.object(cross_entropy, "OWN_PRODUCTS", frozenset({"logits", "dx", "dw"})):
        head_call(dtype, V, chunk=1024)


def jobs() -> list[Job]:
    """The long ones first, so that no processor is left waiting for the last."""
    found = []
    for name, call, first in CASES:
        wanted = [(90, "bf16")]
        if first:
            wanted += [(90, "fp32"), (80, "bf16"), (100, "bf16")]
        found += [Job(name, call, arch, dtype) for arch, dtype in wanted]
    found += tuned_experts()
    return sorted(found, key=lambda job: (not job.case.startswith("ssd"), job.dtype != "fp32"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="beginnings of names, such as `ssd`; all if none is given")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--probes", action="store_true")
    options = parser.parse_args()
    some = tuple(options.cases) or ""
    jobs_ = compile_probes.jobs() if options.probes else jobs()
    wanted = [j for j in jobs_ if j.arch in options.arch and j.dtype in options.dtype and j.case.startswith(some)]
    for built in build(wanted):
        print(json.dumps(asdict(built)) if options.json else built, flush=True)


if __name__ == "__main__":
    main()
