"""Kernels compile without a GPU: Nano's, as they run on sm_90a, and each of them once for sm_80 and sm_100.

On sm_90a no thread spills registers, but for what `compile_only.KNOWN_SPILLS` names.  Elsewhere it may (such a kernel
is slower, not wrong); but no compiler may refuse or abort, and every kernel must fit into the shared memory there is.
`python -m tests.kernels.compile_only --all` asks the same of everything else that the kernels can be built for.
"""

import json

import pytest

from kernels._common import INTERPRET, triton

if triton is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if INTERPRET:
    pytest.skip("this is the run under the interpreter, where nothing is compiled", allow_module_level=True)

from kernels import grouped_gemm_configs
from kernels.grouped_gemm_configs import Config
from tests.kernels import compile_probes, long
from tests.kernels.compile_cases import expert_tables
from tests.kernels.compile_driver import ARCHITECTURES, Built
from tests.kernels.compile_only import faults, not_launched

PROBES = {job.case for job in compile_probes.jobs()}


@pytest.fixture(scope="module")
def compiled() -> list[Built]:
    ((status, printed),) = long.results("test_compile.py")
    assert status == 0, printed[-4000:]
    return [Built(**json.loads(line)) for line in printed.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def built(compiled: list[Built]) -> list[Built]:
    return [b for b in compiled if b.case not in PROBES]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles(arch: int, built: list[Built]) -> None:
    wrong = [f"{b}\n    {' and '.join(faults(b))}" for b in built if b.arch == arch and faults(b)]
    assert wrong == [], "\n".join(wrong)
    assert not_launched(built, arch) == set(), "no case launches these"


def test_every_table_of_tiles_is_known() -> None:
    """Whatever shape the tables take, no configuration may stand outside what `compile_cases` walks through."""

    def inside(value: object) -> set[Config]:
        if isinstance(value, Config):
            return {value}
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        return set().union(*map(inside, parts))

    everything = vars(grouped_gemm_configs)
    tables = {name: value for name, value in everything.items() if not name.startswith("INTERPRETED")}
    assert inside(tables) == inside(expert_tables())


def test_faults_are_noticed(compiled: list[Built]) -> None:
    found = {b.case: b for b in compiled if b.case in PROBES}
    assert found["spills"].spilled > 0
    assert found["too_large"].shared > ARCHITECTURES[90].shared_memory
    assert "refused on purpose" in found["refused"].error
    assert "raised on purpose" in found["raises"].error
    assert "exit code -6" in found["aborts"].error
    assert {name for name, b in found.items() if faults(b)} == PROBES - {"fine"}
    assert (found["fine"].error, found["fine"].spilled) == ("", 0)
    assert found["fine"].wgmma > 0
