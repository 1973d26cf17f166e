"""Run this folder's tests once more with TRITON_INTERPRET=1, so that a plain `pytest` executes every kernel on the CPU.

The switch must be set before triton is imported, hence another process.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernels._common import INTERPRET, triton
from tests.conftest import ROOT


@pytest.mark.skipif(INTERPRET, reason="this is the run under the interpreter")
@pytest.mark.skipif(triton is None, reason="triton is not installed")
def test_every_kernel_runs_under_the_interpreter() -> None:
    """In two processes at a time, each with every other file."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider"]
    files = sorted(map(str, Path(__file__).parent.glob("test_*.py")), key=os.path.getsize)
    options = {"cwd": ROOT, "env": env, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [subprocess.Popen([*command, *files[i::2]], **options) for i in range(2)]
    try:
        printed = [process.communicate(timeout=800)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, text in zip(running, printed, strict=True):
        assert process.returncode == 0, text[-4000:]
        assert int(re.search(r"(\d+) passed", text).group(1)) >= 150, text[-500:]
