"""Two tests that take minutes are processes of their own: they begin with the session and are asked for at its end.

Most other tests keep one core busy; these, of lower priority, have what is left.
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).parent.parent.parent
TIMEOUT = 800  # seconds, once the other tests are done
_begun: dict[str, list[tuple[subprocess.Popen, IO[str]]]] = {}


def commands(file: str) -> list[list[str]]:
    """What the test in this file of the folder waits for."""
    if file == "test_compile.py":  # a process of its own: the tests' may hold a real driver
        return [[sys.executable, "-W", "ignore", "-m", "tests.kernels.compile_only", "--json", "--probes"]]
    if file == "test_interpreter.py":  # two, each with every other file
        files = sorted(map(str, Path(__file__).parent.glob("test_*.py")), key=os.path.getsize)
        pytest_ = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider"]
        return [[*pytest_, *files[i::2]] for i in range(2)]
    return []


def begin(file: str) -> None:
    interpret = {"TRITON_INTERPRET": "1"} if file == "test_interpreter.py" else {}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **interpret}
    for command in commands(file) if file not in _begun else ():
        printed = tempfile.TemporaryFile("w+")  # noqa: SIM115  (a pipe would fill up: nobody reads for a while)
        options = {"stdout": printed, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        niced = ["nice", "-n", "10", *command]
        process = subprocess.Popen(niced, cwd=ROOT, env=env, **options)
        _begun.setdefault(file, []).append((process, printed))


def results(file: str) -> list[tuple[int, str]]:
    """Exit status and text of each process."""
    begin(file)
    out = []
    for process, printed in _begun[file]:
        status = process.wait(timeout=TIMEOUT)
        printed.seek(0)
        out.append((status, printed.read()))
    return out


def begin_with(items: list[pytest.Item]) -> None:
    """Begin what the session will ask for, and let it ask last."""
    waits = [item for item in items if commands(item.path.name) and item.path.parent == Path(__file__).parent]
    runs = [item for item in waits if not any(mark.args[0] for mark in item.iter_markers("skipif"))]
    for name in sorted({item.path.name for item in runs}):
        begin(name)
    items.sort(key=waits.__contains__)


def end() -> None:
    """The session is over, perhaps before they are."""
    for process, printed in (pair for pairs in _begun.values() for pair in pairs):
        if process.poll() is None:  # its number may be another's afterwards
            os.killpg(process.pid, signal.SIGKILL)  # what it has forked, too
            process.wait()
        printed.close()
