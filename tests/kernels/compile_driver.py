"""Compile kernels for an NVIDIA architecture on a machine that has none, exactly as their launchers would.

A kernel's code depends on more than its source: on dtypes, on which integers are 1 or multiples of 16, on alignment,
on what the launcher chose for the hardware.  So no signature is written down.  The public operators are called, on
tensors without memory (device "meta") that claim to be on a GPU of the wanted architecture, and Triton is given a
driver that lets it compile and launches nothing.  What a kernel takes in registers, spills and shared memory is what
ptxas says.

A compiler that aborts takes its process along.  Each case therefore has a process of its own, forked after the slow
imports; as many run at a time as there are processors.
"""

import contextlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

CUDA = torch.device("cuda", 0)
DEVICE_OF, IS_CUDA_OF = Tensor.device.__get__, Tensor.is_cuda.__get__
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TENSOR_MEMORY = 512  # columns of Blackwell's memory for accumulators, what one program may take


@dataclass(frozen=True)
class Architecture:
    name: str
    multiprocessors: int
    shared_memory: int  # bytes that one program may take


ARCHITECTURES = {
    80: Architecture("A100", 108, 163 << 10),
    90: Architecture("H100", 132, 227 << 10),
    100: Architecture("B200", 148, 227 << 10),
}


@dataclass
class Built:
    """One kernel as it was compiled, or why it was not."""

    case: str
    arch: int
    dtype: str
    kernel: str = ""  # module.function
    constants: dict[str, int | float | str] = field(default_factory=dict)  # what it was specialised for, by name
    registers: int = 0  # of a thread
    spilled: int = 0  # bytes of a thread that go to memory for want of registers
    shared: int = 0  # bytes of a program
    warps: int = 0
    stages: int = 0
    wgmma: int = 0  # asynchronous products in the PTX text
    mma: int = 0  # synchronous ones
    seconds: float = 0.0
    error: str = ""

    def __str__(self) -> str:
        constants = " ".join(f"{k}={v}" for k, v in self.constants.items())
        if self.error:
            return f"{self.case} sm_{self.arch} {self.dtype}: {self.kernel} {constants}\n{self.error}"
        numbers = f"{self.registers:3d} regs {self.spilled:4d} B spilled {self.shared:6d} B shared"
        return (
            f"{self.case:14s} sm_{self.arch:<3d} {self.dtype} {numbers} w{self.warps:<2d} s{self.stages} "
            f"wgmma {self.wgmma:2d} mma {self.mma:3d} {self.seconds:5.1f} s  {self.kernel} {constants}"
        )


class _PretendCuda(TorchFunctionMode):
    """Tensors are made without memory, say that they are CUDA's, and have addresses aligned as PyTorch aligns them.

    PyTorch's own fake tensors do this too, but have no backward pass where PyTorch was built without CUDA.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function == DEVICE_OF:
            return CUDA
        if function == IS_CUDA_OF:
            return True
        if function is Tensor.data_ptr:
            return (1 << 40) + args[0].storage_offset() * args[0].element_size()
        return function(*map(_on_meta, args), **{k: _on_meta(a) for k, a in (kwargs or {}).items()})


def _on_meta(argument: object) -> object:
    """A device argument that names CUDA, changed to "meta"; anything else as it is."""
    named = isinstance(argument, torch.device | str) and str(argument).split(":")[0] == "cuda"
    return torch.device("meta") if named else argument


class _Driver:
    """As much of a Triton driver as compiling needs.  The architecture doubles as the device's number: Triton keeps
    compiled kernels by device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, _: int | None = None) -> int:
        return 0


def _measure(compiled: object, log: str, built: Built) -> None:
    """Fill in what the compiler reports."""
    metadata, ptx = compiled.metadata, compiled.asm["ptx"]
    built.shared, built.warps, built.stages = metadata.shared, metadata.num_warps, metadata.num_stages
    built.wgmma, built.mma = ptx.count("wgmma.mma_async"), ptx.count("mma.sync")
    built.registers = max(map(int, re.findall(r"Used (\d+) registers", log)))
    built.spilled = max(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))
    if getattr(metadata, "tmem_size", 0) > TENSOR_MEMORY:
        built.error = f"{metadata.tmem_size} columns of tensor memory, of {TENSOR_MEMORY}"


@contextlib.contextmanager
def compiling(case: str, arch: int, dtype: str, once: bool = False) -> Iterator[list[Built]]:
    """Inside, tensors on "cuda" are pretended and a kernel launch compiles for `arch`; yields what was built so far.

    once: a kernel is built the first time it is launched, and not again for other constants.  A kernel that fails is an
    entry with an error, and the code around it goes on.
    """
    found: list[Built] = []
    seen: set[int] = set()
    run = JITFunction.run

    def compile_only(self: JITFunction, *args, grid, warmup, **kwargs) -> None:
        kernel = f"{self.fn.__module__}.{self.fn.__name__}"
        if once and any(b.kernel == kernel for b in found):
            return
        names = dict(zip(self.arg_names, args, strict=False)) | kwargs
        constants = {k: v for k, v in names.items() if k.isupper() and isinstance(v, bool | int | float | str)}
        built = Built(case, arch, dtype, kernel, constants)
        log, start = io.StringIO(), time.perf_counter()
        try:
            with contextlib.redirect_stdout(log):
                compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
                compiled = compiled.result() if hasattr(compiled, "result") else compiled
            if id(compiled) in seen:  # Triton keeps what it compiled, so the object stays and so does its id
                return
            seen.add(id(compiled))
            built.seconds = time.perf_counter() - start
            _measure(compiled, log.getvalue(), built)
        except Exception as error:
            built.error = f"{type(error).__name__}: {error}"[:2000]
        found.append(built)

    a = ARCHITECTURES[arch]
    properties = types.SimpleNamespace(
        name=a.name, multi_processor_count=a.multiprocessors, shared_memory_per_block_optin=a.shared_memory,
        major=arch // 10, minor=arch % 10,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_properties", return_value=properties))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", return_value=divmod(arch, 10)))
        stack.enter_context(mock.patch.object(torch.cuda, "mem_get_info", return_value=(0, 0)))
        stack.enter_context(mock.patch.object(triton.knobs.nvidia, "dump_ptxas_log", True))
        stack.enter_context(mock.patch.object(triton.knobs.compilation, "always_compile", True))
        triton.runtime.driver.set_active(_Driver(arch))
        stack.callback(setattr, triton.runtime.driver, "_active", None)
        stack.enter_context(_PretendCuda())
        yield found


@dataclass(frozen=True)
class Job:
    """One call for one architecture and dtype; `call` takes the dtype of its tensors, `once` as for `compiling`."""

    case: str
    call: Callable[[torch.dtype], object]
    arch: int
    dtype: str
    once: bool = False

    def run(self, out: Path) -> None:
        """Build, and leave the entries in `out` as lines of JSON."""
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as cache, mock.patch.object(triton.knobs.cache, "dir", cache):
            with compiling(self.case, self.arch, self.dtype, self.once) as built:
                try:
                    self.call(DTYPES[self.dtype])
                except Exception as error:
                    built.append(self.failed(f"{type(error).__name__}: {error}"))
            out.write_text("".join(json.dumps(asdict(b)) + "\n" for b in built))

    def failed(self, why: str) -> Built:
        return Built(self.case, self.arch, self.dtype, error=why)


def build(jobs: list[Job], processes: int = 0) -> list[Built]:
    """Every kernel that the jobs launch; an error entry for a job that raised, or whose compiler died."""
    processes = processes or len(os.sched_getaffinity(0))
    fork = multiprocessing.get_context("fork")
    running: dict[BaseProcess, tuple[Job, Path]] = {}
    waiting, found = list(reversed(jobs)), []
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < processes:
                job = waiting.pop()
                out = Path(folder) / str(len(waiting))
                child = fork.Process(target=job.run, args=(out,))
                child.start()
                running[child] = job, out
            multiprocessing.connection.wait([child.sentinel for child in running])
            for child in [child for child in running if not child.is_alive()]:
                job, out = running.pop(child)
                child.join()
                if child.exitcode == 0:
                    found += [Built(**json.loads(line)) for line in out.read_text().splitlines()]
                else:
                    found.append(job.failed(f"the compiler ended its process: exit code {child.exitcode}"))
    return found
