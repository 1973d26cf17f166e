"""Kernels with one fault each, which the compile-only test must notice: a test that cannot fail is none."""

import os

import torch
import triton
import triton.language as tl

from tests.kernels.compile_driver import Job


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    """c (M, N) = a (M, K) b (K, N) in one program."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    acc = tl.zeros([M, N], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + m[:, None] * K + (k0 + k)[None, :])
        b = tl.load(b_ptr + (k0 + k)[:, None] * N + n[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + m[:, None] * N + n[None, :], acc)


@triton.jit
def refused_kernel(x_ptr, SIZE: tl.constexpr):
    tl.static_assert(SIZE == 0, "refused on purpose")
    tl.store(x_ptr, 0.0)


def product(M: int, N: int, stages: int, warps: int, dtype: torch.dtype) -> None:
    a, b, c = (torch.empty(*shape, dtype=dtype, device="cuda") for shape in ((M, 512), (512, N), (M, N)))
    product_kernel[(1,)](a, b, c, 512, M, N, BLOCK_K=64, num_stages=stages, num_warps=warps)


def spills(dtype: torch.dtype) -> None:
    product(128, 256, 2, 4, dtype)  # 256 fp32 numbers a thread in the accumulator alone


def too_large(dtype: torch.dtype) -> None:
    product(128, 128, 10, 8, dtype)  # 9 stages in flight, 32 KiB each


def refused(dtype: torch.dtype) -> None:
    refused_kernel[(1,)](torch.empty(1, dtype=dtype, device="cuda"), SIZE=1)


def raises(dtype: torch.dtype) -> None:
    raise ValueError("raised on purpose")


def aborts(dtype: torch.dtype) -> None:
    os.abort()  # what a failed assertion inside LLVM does


def fine(dtype: torch.dtype) -> None:
    product(128, 128, 3, 8, dtype)


def jobs() -> list[Job]:
    return [Job(f.__name__, f, 90, "bf16") for f in (spills, too_large, refused, raises, aborts, fine)]
