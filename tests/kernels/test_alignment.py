"""Tensors that the copy engine cannot read, or kernels cannot read 16 bytes at a time: results are those of others.

A contiguous tensor that does not begin at a multiple of 16 bytes is a slice of a flat buffer, or a view into a file.
Rows of stride 0 are those of an expanded one, such as the gradient of a sum.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels._common import triton
from kernels.attention import attention
from kernels.grouped_gemm import experts, grouped_mlp
from kernels.ssd import ssd

if triton is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from kernels import _descriptors, cross_entropy_product
from kernels._common import INTERPRET
from kernels._descriptors import describable, descriptor


def shifted(t: Tensor) -> Tensor:
    """The same numbers, contiguous, one element past a multiple of 16 bytes."""
    s = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape).copy_(t)
    assert s.is_contiguous()
    assert s.data_ptr() % 16
    return s


def padded(t: Tensor) -> Tensor:
    """The same numbers in rows that are an odd number of elements apart."""
    wide = torch.zeros(*t.shape[:-1], t.shape[-1] + 1, dtype=t.dtype, device=t.device)[..., :-1]
    return wide.copy_(t)


def outputs(f: Callable, leaves: list[Tensor], dy: Tensor, needed: int | None = None) -> list[Tensor]:
    """needed: of the leaves, the only one that requires a gradient."""
    leaves = [t.detach().requires_grad_(needed in (None, i)) for i, t in enumerate(leaves)]
    y = f(*leaves)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t.requires_grad], dy)]


def attention_case(device: str, dtype: torch.dtype, S: int = 20) -> tuple[Callable, list[Tensor]]:
    q, k, v = (torch.randn(1, n, h, 16, device=device).to(dtype) for n, h in ((20, 4), (S, 2), (S, 2)))
    return lambda q, k, v: attention(q, k, v, backend="triton"), [q, k, v]


def scan_case(device: str, dtype: torch.dtype) -> tuple[Callable, list[Tensor]]:
    x, B, C = (torch.randn(1, 20, h, 16, device=device).to(dtype) for h in (4, 2, 2))
    dt, A, D, bias = (torch.rand(*s, device=device) for s in ((1, 20, 4), (4,), (4,), (4,)))
    return lambda x, B, C: ssd(x, dt, -A, B, C, D, bias, 32, backend="triton")[0], [x, B, C]


def experts_case(device: str, dtype: torch.dtype) -> tuple[Callable, list[Tensor]]:
    x, up, down = (torch.randn(*s, device=device).to(dtype) / 4 for s in ((9, 64), (3, 32, 64), (3, 64, 32)))
    ids, weights = torch.arange(18, device=device).view(9, 2) % 3, torch.rand(9, 2, device=device)
    counts = torch.full((3,), 6, device=device)
    return lambda x, up, down: experts(x, weights, ids, counts, up, down, backend="triton"), [x, up, down]


def ordered_case(device: str, dtype: torch.dtype) -> tuple[Callable, list[Tensor]]:
    x, up, down = (torch.randn(*s, device=device).to(dtype) / 4 for s in ((9, 64), (3, 32, 64), (3, 64, 32)))
    counts, weights = torch.tensor([4, 0, 5], device=device), torch.rand(9, device=device)
    return lambda x, up, down: grouped_mlp(x, weights, counts, up, down, backend="triton"), [x, up, down]


CASES = [attention_case, scan_case, experts_case, ordered_case]
DTYPES = [torch.float32] if INTERPRET else [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [shifted, padded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_any_address_will_do(case: Callable, layout: Callable, dtype: torch.dtype, device: str) -> None:
    """Of each operand, of all of them, and of the gradient of the result."""
    f, leaves = case(device, dtype)
    dy = torch.randn_like(f(*leaves))
    want = outputs(f, leaves, dy)
    for chosen in ([0], [1, 2]):
        other = [layout(t) if i in chosen else t for i, t in enumerate(leaves)]
        for a, b in zip(outputs(f, other, dy), want, strict=True):
            torch.testing.assert_close(a, b)
    for a, b in zip(outputs(f, leaves, layout(dy)), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_expanded_operands(case: Callable, dtype: torch.dtype, device: str) -> None:
    """Rows of stride 0, of the first operand and of the gradient of the result."""
    f, leaves = case(device, dtype)
    x = leaves[0][..., :1, :].expand_as(leaves[0])
    dy = torch.randn_like(f(*leaves))[..., :1, :].expand_as(f(*leaves))
    want = outputs(f, [x.clone(memory_format=torch.contiguous_format), *leaves[1:]], dy.contiguous())
    for a, b in zip(outputs(f, [x, *leaves[1:]], dy), want, strict=True):
        torch.testing.assert_close(a, b)


def test_decoding_at_any_address(device: str) -> None:
    f, (q, k, v) = attention_case(device, torch.float32, 70)
    q = q[:, :1]
    for other in ([shifted(t) for t in (q, k, v)], [padded(t) for t in (q, k, v)]):
        torch.testing.assert_close(f(*other), f(q, k, v))


def test_what_the_copy_engine_reads(device: str) -> None:
    """Strides in multiples of 16 bytes and more than 0; a dimension of length 1 is never stepped along."""
    t = torch.zeros(4, 8, 16, device=device)
    assert describable(t)
    assert not describable(shifted(t))
    assert not describable(padded(t))
    assert not describable(t[:, :1].expand(-1, 8, -1))
    assert not describable(t.transpose(1, 2))
    odd = t.as_strided((1, 8, 16), (5, 16, 1))
    assert describable(odd)
    assert describable(t.as_strided((4, 1, 16), (128, 0, 1)))
    for n in (odd, t.as_strided((4, 1, 16), (128, 0, 1)), t.as_strided((1, 1, 16), (0, 3, 1))):
        strides = descriptor(n, [1, 1, 16]).strides
        assert all(s > 0 and s % 4 == 0 for s in strides[:-1]), strides
        assert strides[-1] == 1


def test_no_descriptor_steps_by_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes what a GPU refuses, so every descriptor that operators make is looked at."""
    made = []

    def noted(*args: object, real: Callable = _descriptors.TensorDescriptor) -> object:
        made.append(real(*args))
        return made[-1]

    monkeypatch.setattr(_descriptors, "TensorDescriptor", noted)
    for case in CASES:
        f, leaves = case(device, torch.float32)
        x = leaves[0][..., :1, :].expand_as(leaves[0])
        outputs(f, [x, *leaves[1:]], torch.randn_like(f(*leaves))[..., :1, :].expand_as(x))
    for d in made:
        size = d.base.element_size()
        assert all(s > 0 and s * size % 16 == 0 for s in d.strides[:-1]), (d.shape, d.strides)
    assert made or not INTERPRET
    rows = torch.randn(1, 64, device=device).half().expand(8, -1)
    assert not cross_entropy_product.multipliable(rows)
    assert cross_entropy_product.multipliable(rows.contiguous())
