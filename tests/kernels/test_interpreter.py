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
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "not gpu",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).parent),
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    passed = int(re.search(r"(\d+) passed", done.stdout).group(1))
    assert passed >= 200, done.stdout[-500:]
