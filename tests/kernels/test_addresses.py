"""Where the parts of a tensor lie further apart than 32 bits count, the results are those of contiguous ones.

A head-major tensor of a long row is such a case.  The tensors here are a few numbers each, far apart in one allocation
of 9.7 GB of which next to nothing is touched.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kernels._common import triton
from kernels.attention import attention
from kernels.conv1d_step import causal_conv1d_step
from kernels.ssd import ssd, ssd_step

if triton is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from kernels import ssd_backward
from kernels._bandwidth import _sum_kernel

FAR = 13 << 26  # 3 FAR > 2^31, and 2^31 back from there is inside the allocation: an overflow reads wrong numbers
H = 4


@pytest.fixture
def storage(device: str) -> Iterator[Tensor]:
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 10 GB of GPU memory")
    try:
        yield torch.empty(9 << 29, dtype=torch.float16, device=device)
    except RuntimeError as error:
        pytest.skip(f"no room for 10 GB of addresses: {error}")
    if device == "cuda":
        torch.cuda.empty_cache()


def spread(t: Tensor, storage: Tensor, dim: int, place: int, stride: int = FAR) -> Tensor:
    """t (B, ...) in fp16, with `stride` elements from one index of `dim` to the next; the rest of it is contiguous."""
    strides = list(torch.empty_like(t.select(dim, 0), device="meta").contiguous().stride())
    strides.insert(dim, stride)
    far = storage.as_strided(t.shape, strides, (1 << 31) + (place << 16))
    return far.copy_(t)


def outputs(f: Callable, *leaves: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in leaves]
    y, *_ = f(*leaves)
    return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize("dim", [1, 2])
def test_scan(storage: Tensor, device: str, dim: int, descriptors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads, or tokens, far apart."""
    monkeypatch.setattr(ssd_backward, "DESCRIPTORS", descriptors)
    parts = [torch.randn(1, 34, H, 16, device=device).half() for _ in "xBC"]
    dt, A, D, bias = (torch.rand(*s, device=device) for s in ((1, 34, H), (H,), (H,), (H,)))
    stride = FAR if dim == 2 else 70 << 20
    far = [spread(t, storage, dim, i, stride) for i, t in enumerate(parts)]

    def f(x: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        return ssd(x, dt, -A, B, C, D, bias, 32, backend="triton")

    assert_same(outputs(f, *far), outputs(f, *parts))


def test_scan_step(storage: Tensor, device: str) -> None:
    x, B, C = (torch.randn(1, H, 16, device=device).half() for _ in "xBC")
    dt, A, D, bias = (torch.rand(*s, device=device) for s in ((1, H), (H,), (H,), (H,)))
    state = torch.randn(1, H, 16, 16, device=device)
    far = [spread(t, storage, 1, i) for i, t in enumerate((x, B, C))]
    results = [ssd_step(state, x, dt, -A, B, C, D, bias, backend="triton") for x, B, C in ((x, B, C), far)]
    assert_same(*results)


def test_decoding(storage: Tensor, device: str) -> None:
    q, k, v = (torch.randn(1, S, H, 16, device=device).half() for S in (1, 70, 70))
    far = [spread(t, storage, 2, i) for i, t in enumerate((q, k, v))]
    assert_same([attention(*far, backend="triton")], [attention(q, k, v, backend="triton")])


def test_attention(storage: Tensor, device: str) -> None:
    parts = [torch.randn(1, 40, H, 16, device=device).half() for _ in "qkv"]
    far = [spread(t, storage, 2, i) for i, t in enumerate(parts)]

    def f(*qkv: Tensor) -> tuple[Tensor]:
        return (attention(*qkv, backend="triton"),)

    assert_same(outputs(f, *far), outputs(f, *parts))


def test_convolution_step(storage: Tensor, device: str) -> None:
    x, window, weight = (torch.randn(*s, device=device).half() for s in ((1, 8), (1, 4, 8), (8, 4)))
    far = spread(window, storage, 1, 0)
    results = [causal_conv1d_step(x, w, weight, None, "triton") for w in (window, far)]
    assert_same(*results)


def test_sum_of_partials(storage: Tensor, device: str) -> None:
    """Of many short rows: 70,000 sequences leave as many partial sums of a convolution's 30,720 numbers."""
    parts = torch.randn(4, 32, device=device).half()
    far, out = spread(parts, storage, 0, 0), torch.empty(32, device=device)
    _sum_kernel[(1,)](far, out, 4, FAR, ROWS=128, BLOCK=32, num_warps=4)
    torch.testing.assert_close(out, parts.float().sum(0))
