"""What the kernel tests share: seeds, where kernels can run here, poisoned allocations, and the measures of error.

    TRITON_INTERPRET=1 pytest tests/kernels        every kernel on the CPU, fp32, small shapes
    pytest tests/kernels                           with a GPU: the same compiled, and the cases marked `gpu`
    python -m tests.kernels.compile_only --all     every kernel compiled, no GPU needed: what spills, what is refused

Helpers are imported by name: `from tests.kernels.conftest import relative_error`.
"""

import math
import sys

import pytest
import torch
from torch import Tensor

from kernels._common import INTERPRET

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA and not INTERPRET else "cpu"  # interpreted kernels want CPU tensors
CAN_RUN_TRITON = INTERPRET or CUDA
needs_triton = pytest.mark.skipif(not CAN_RUN_TRITON, reason="Triton kernels need CUDA or TRITON_INTERPRET=1")


def _patch_the_language_once() -> None:
    """Triton's interpreter replaces the functions of `tl` at a launch, and once more at each call of a function within
    the kernel, which takes a quarter of its time.  The first call in a launch will do."""
    from triton.runtime import interpreter

    patch, language = interpreter._patch_lang, (interpreter.tl, interpreter.tl.core)
    done: set[str] = set()  # modules that the launch in progress has patched

    def once(fn):
        modules = {m.__name__ for m in language if any(v is m for v in fn.__globals__.values())}
        if done and modules <= done:
            return None  # for a call within a kernel; a launch begins with none done, and restores what it is given
        scope = patch(fn)
        if not done:
            restore = scope.restore
            scope.restore = lambda: (done.clear(), restore())
        done.update(modules)
        return scope

    interpreter._patch_lang = once


if INTERPRET:
    _patch_the_language_once()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = "needs a compiled kernel: TRITON_INTERPRET=1 is set" if INTERPRET else "needs a CUDA device"
    for item in items:
        if "gpu" in item.keywords and (INTERPRET or not CUDA):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    """The same random numbers in every test, and no tf32 in what kernels are compared with."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def device() -> str:
    """Where a Triton kernel runs here: "cuda", or "cpu" when interpreted.  Skips the test where none can."""
    if not CAN_RUN_TRITON:
        pytest.skip("Triton kernels need CUDA or TRITON_INTERPRET=1")
    return DEVICE


def _poison(t: Tensor) -> Tensor:
    if t.dtype.is_floating_point or t.dtype.is_complex:
        return t.fill_(math.nan)
    return t if t.dtype == torch.bool else t.fill_(torch.iinfo(t.dtype).max // 3)  # an index this large is noticed


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty, torch.empty_like, torch.empty_strided and Tensor.new_empty give NaN to callers inside `kernels`.

    An element that a kernel forgets to write then shows in the result instead of holding whatever was there before.
    Callers elsewhere (PyTorch itself) get what they always got.
    """

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            t = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            return _poison(t) if caller.split(".")[0] == "kernels" else t

        return wrapper

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))


def relative_error(got: Tensor, truth: Tensor) -> float:
    """|got - truth| / |truth| in the Euclidean norm, in float64.  NaN or infinity in `got` gives infinity."""
    assert got.shape == truth.shape, f"shape {tuple(got.shape)} instead of {tuple(truth.shape)}"
    got, truth = got.detach().double(), truth.detach().double().to(got.device)
    if not torch.isfinite(got).all():
        return math.inf
    error, size = (got - truth).norm().item(), truth.norm().item()
    return error if size == 0 else error / size


def assert_as_accurate(ours: Tensor, eager: Tensor, truth: Tensor, factor: float = 2.0, what: str = "") -> None:
    """`ours` may be at most `factor` times as far from the float64 `truth` as eager PyTorch in the same dtype is.

    So the bound follows dtype and shape by itself.  2: a kernel sums in another order, which moves an error, not its
    size.  Plus 16 fp32 roundings, because both compute in fp32 inside and eager is sometimes exact by luck.
    """
    assert ours.dtype == eager.dtype, f"{what}: dtype {ours.dtype} instead of {eager.dtype}"
    error, budget = relative_error(ours, truth), relative_error(eager, truth)
    limit = factor * budget + 16 * torch.finfo(torch.float32).eps
    assert error <= limit, f"{what}: relative error {error:.1e} > {limit:.1e} (eager {budget:.1e})"
