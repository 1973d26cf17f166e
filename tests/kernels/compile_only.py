"""Compile the kernels for sm_80, sm_90a and sm_100 on a machine without a GPU; say which spill or do not compile.

    python -m tests.kernels.compile_only              what pytest builds: Nano's kernels for sm_90a, each once elsewhere
    python -m tests.kernels.compile_only --all        every case, dtype, architecture and table of tiles (minutes)
    python -m tests.kernels.compile_only --all ssd attention --arch 90 --dtype bf16

Prints a line a kernel and ends with what is wrong; the exit status is 1 if anything is.  `compile_driver` says how it
is done, `compile_cases` what is built.
"""

import argparse
import ast
import json
import sys
from dataclasses import asdict
from pathlib import Path

import kernels
from tests.kernels import compile_probes
from tests.kernels.compile_cases import all_jobs, default_jobs
from tests.kernels.compile_driver import ARCHITECTURES, DTYPES, Built, build

# On sm_80 the head's products stay with cuBLAS: ours is made of what only later architectures have.
NOT_BUILT = {80: {"kernels.cross_entropy_product._product_kernel", "kernels.cross_entropy_product._add_pieces_kernel"}}

# On sm_90a in bf16 no thread may spill, but for these: kernel, its constants, bytes at most.
KNOWN_SPILLS = [
    ("kernels.ssd_backward._dx_kernel", {}, 256),  # none with Triton 3.6
    ("kernels.grouped_gemm_rows._rows_kernel", {"BLOCK_N": 128, "EXTRA_N": 64}, 8),  # dH; none with Triton 3.6
    ("kernels.grouped_gemm_rows._rows_kernel", {"BLOCK_N": 256, "EXTRA_N": 128}, 4),  # dH; none with Triton 3.6
    ("kernels.permute._place_kernel", {"E": 128}, 12),  # none with Triton 3.6
]
# Elsewhere a spill costs time only, and fp32 is there to check with.  But 40 KB a thread were seen once at Nano's
# sizes, and that was a mistake in a tile.
TOLERATED = {"bf16": 2 << 10, "fp32": 8 << 10}
# The largest state that the SSD kernels take, which no Nemotron has: 128 x 256 in fp32 lives in memory.
TOLERATED_WIDE = {"bf16": 2 << 10, "fp32": 36 << 10}


def spill_limit(b: Built) -> int:
    """Bytes that a thread of this kernel may spill."""
    if b.case == "ssd_wide":
        return TOLERATED_WIDE[b.dtype]
    if (b.arch, b.dtype) != (90, "bf16"):
        return TOLERATED[b.dtype]
    return max((size for k, c, size in KNOWN_SPILLS if k == b.kernel and c.items() <= b.constants.items()), default=0)


def faults(b: Built) -> list[str]:
    """What is wrong with one kernel, in words."""
    if b.error:
        return ["does not compile"]
    found, room, limit = [], ARCHITECTURES[b.arch].shared_memory, spill_limit(b)
    if b.shared > room:
        found.append(f"wants {b.shared} bytes of shared memory, of {room}")
    if b.spilled > limit:
        found.append(f"spills {b.spilled} bytes a thread, {limit} allowed")
    return found


def kernels_in_source() -> set[str]:
    """module.function of every kernel that a launcher can start: by the house's rule its name ends in _kernel."""
    return {
        f"kernels.{path.stem}.{node.name}"
        for path in Path(kernels.__file__).parent.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list
    }


def not_launched(built: list[Built], arch: int) -> set[str]:
    """Kernels that no case has built for `arch`, though they run there."""
    return kernels_in_source() - NOT_BUILT.get(arch, set()) - {b.kernel for b in built if b.arch == arch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="beginnings of names, such as `ssd`; all if none is given")
    parser.add_argument("--all", action="store_true", help="every case, dtype, architecture and table of tiles")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--json", action="store_true", help="one line of JSON a kernel, and no verdict")
    parser.add_argument("--probes", action="store_true", help="also kernels with a fault, which must be found")
    options = parser.parse_args()
    some = tuple(options.cases) or ""
    jobs = all_jobs() if options.all else default_jobs()
    jobs = [j for j in jobs if j.arch in options.arch and j.dtype in options.dtype and j.case.startswith(some)]
    built = build(jobs + compile_probes.jobs() * options.probes)
    if options.json:
        print(*(json.dumps(asdict(b)) for b in built), sep="\n")
        return
    print(*built, sep="\n")
    wrong = [f"{b}\n    {' and '.join(faults(b))}" for b in built if faults(b)]
    if not options.cases and "bf16" in options.dtype:
        wrong += [f"sm_{a}: no case launches {kernel}" for a in options.arch for kernel in not_launched(built, a)]
    print(f"\n{len(built)} kernels built, {len(wrong)} faults", *wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
