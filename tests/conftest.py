"""Seeds, the skip of GPU tests, and a runner for several ranks.

An unrelated PyPI package called `kernels` would shadow ours: do not install it beside this project.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels import long

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)  # the tensors are small; threads that wait for each other make a busy machine crawl


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish(session: pytest.Session) -> None:
    # One forks, which nothing may do that has used a GPU.
    session.items.sort(key=lambda item: item.path.name != "test_checkpoint.py")
    if not session.config.option.collectonly and not hasattr(session.config, "workerinput"):  # pytest-xdist's: many
        long.begin_with(session.items)


def pytest_sessionfinish() -> None:
    long.end()


@pytest.fixture
def run_script():
    """Run `python ARGS…` from the project's root; returns the finished process with its text."""

    def run(*args: str, ranks: int = 1, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        command = [sys.executable]
        if ranks > 1:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = s.getsockname()[1]
            command += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
        path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*command, *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False
        )

    return run
