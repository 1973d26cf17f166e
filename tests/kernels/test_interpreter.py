"""Run this folder's tests once more with TRITON_INTERPRET=1, so that a plain `pytest` executes every kernel on the CPU.

The switch must be set before triton is imported, hence another process.
"""

import re

import pytest

from kernels._common import INTERPRET, triton
from tests.kernels import long


@pytest.mark.skipif(INTERPRET, reason="this is the run under the interpreter")
@pytest.mark.skipif(triton is None, reason="triton is not installed")
def test_every_kernel_runs_under_the_interpreter() -> None:
    """In two processes at a time, each with every other file."""
    for status, printed in long.results("test_interpreter.py"):
        assert status == 0, printed[-4000:]
        assert int(re.search(r"(\d+) passed", printed).group(1)) >= 150, printed[-500:]
