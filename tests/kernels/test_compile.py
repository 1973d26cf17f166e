"""Every kernel and every tuned configuration compiles, without a GPU: for sm_80, sm_90 and sm_100, in bf16.

At Nano's sizes on sm_90 no thread spills registers.  Elsewhere it may (the kernels are then slower, not wrong), and so
may the fp32 variants that the GPU tests run; but no compiler may refuse or abort, and every kernel must fit into the
shared memory there is.  `tests.kernels.compile_only` says how it is done, `compile_cases` what is built.
"""

import ast
import json
import os
import subprocess
import sys

import pytest

from kernels._common import INTERPRET, triton
from tests.conftest import ROOT

if triton is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if INTERPRET:
    pytest.skip("nothing is compiled under the interpreter", allow_module_level=True)

from kernels import grouped_gemm_configs
from kernels.grouped_gemm_configs import Config
from tests.kernels.compile_cases import expert_tables
from tests.kernels.compile_only import ARCHITECTURES, Built

MAY_SPILL = ("ssd_wide",)  # not Nano's sizes: the largest state that the kernels take
# On sm_80 the head's products stay with cuBLAS: ours is made of what only later architectures have.
NOT_BUILT = {80: {"kernels.cross_entropy_product._product_kernel", "kernels.cross_entropy_product._add_pieces_kernel"}}


def compiled(*options: str) -> list[Built]:
    """In a process of its own: this one may hold a real driver."""
    command = [sys.executable, "-m", "tests.kernels.compile_cases", "--json", *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [Built(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def built() -> list[Built]:
    return compiled()


def listed(wrong: list[Built]) -> str:
    return "\n".join(map(str, wrong))


def kernels_in_source() -> set[str]:
    """module.function of every kernel that a launcher can start: by the house's rule its name ends in _kernel."""
    return {
        f"kernels.{path.stem}.{node.name}"
        for path in (ROOT / "kernels").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list
    }


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles(arch: int, built: list[Built]) -> None:
    wrong = [b for b in built if b.arch == arch and b.error]
    assert wrong == [], listed(wrong)
    missing = kernels_in_source() - NOT_BUILT.get(arch, set()) - {b.kernel for b in built if b.arch == arch}
    assert missing == set(), f"no case launches {sorted(missing)}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_fits_into_shared_memory(arch: int, built: list[Built]) -> None:
    room = ARCHITECTURES[arch].shared_memory
    wrong = [b for b in built if b.arch == arch and b.shared > room]
    assert wrong == [], f"{room} bytes there:\n{listed(wrong)}"


def test_no_kernel_spills_at_nanos_sizes(built: list[Built]) -> None:
    hopper = [b for b in built if (b.arch, b.dtype) == (90, "bf16") and not b.case.startswith(MAY_SPILL)]
    assert {b.kernel for b in hopper} == kernels_in_source()
    wrong = [b for b in hopper if b.spilled or b.stack]
    assert wrong == [], listed(wrong)


def test_every_table_of_tiles_is_known() -> None:
    """Whatever shape the tables take, no configuration may stand outside what `compile_cases` walks through."""

    def inside(value: object) -> set[Config]:
        if isinstance(value, Config):
            return {value}
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        return set().union(*map(inside, parts))

    tables = {name: value for name, value in vars(grouped_gemm_configs).items() if name != "INTERPRETED"}
    assert inside(tables) == inside(expert_tables())


def test_faults_are_noticed() -> None:
    found = {b.case: b for b in compiled("--probes")}
    assert found["spills"].spilled > 0
    assert found["too_large"].shared > ARCHITECTURES[90].shared_memory
    assert "refused on purpose" in found["refused"].error
    assert "raised on purpose" in found["raises"].error
    assert "exit code -6" in found["aborts"].error
    assert (found["fine"].error, found["fine"].spilled, found["fine"].stack) == ("", 0, 0)
    assert found["fine"].wgmma > 0
