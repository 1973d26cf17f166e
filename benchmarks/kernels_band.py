"""RMSNorm, residual add + RMSNorm, gated RMSNorm, squared ReLU and convolution + SiLU: ours, the best peer, the floor.

PYTHONPATH=. python -m benchmarks.kernels_band            T = 8192 and 32768 at Nano's shapes
PYTHONPATH=. python -m benchmarks.kernels_band --check    only errors against float64, mamba-ssm's beside ours; status
                                                          1 if ours are wrong, or theirs nearer by more than 10 %
PYTHONPATH=. python -m benchmarks.kernels_band --sweep    every launch configuration, fastest first
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import (
    Case,
    Errors,
    Tensors,
    copy_bandwidth,
    errors,
    gpu_ms,
    judge,
    mamba,
    print_json,
    print_table,
    run_cases,
    run_checks,
    smallest_tiles,
)
from kernels import conv1d, gated_norm, relu2, rms_norm
from kernels._bandwidth import Launch

DEVICE = "cuda"
D, INNER, CONV, SHARED, HEADS, GROUPS, EPS = 2688, 4096, 6144, 3712, 64, 8, 1e-5
PROJECTED = INNER + CONV + HEADS  # z | x B C | dt: what z and the convolution's input are slices of


@dataclass
class Problem:
    """One operator on one set of inputs.  Every function here takes the tensors of `inputs`, in order."""

    op: str
    shape: str
    inputs: list[Tensor]
    grads: list[Tensor]  # of the outputs
    ours: Callable
    reference: Callable
    peers: dict[str, Callable] = field(default_factory=dict)
    elements: int = 0  # of one large tensor; how many of them move at least:
    moved: tuple[int, int] = (0, 0)  # forward, backward
    aim: str = ""

    def run(self, f: Callable, dtype: torch.dtype) -> Tensors:
        """Outputs and gradients of all inputs, computed in `dtype`."""
        leaves = [t.detach().to(dtype).requires_grad_() for t in self.inputs]
        out = f(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        grads = torch.autograd.grad(out, leaves, [g.to(dtype) for g in self.grads])
        named = {f"out{i}": t.detach() for i, t in enumerate(out)}
        return named | {f"grad{i}": t for i, t in enumerate(grads)}

    def results(self, beside_peer: bool = False) -> tuple[Tensors, Tensors, Tensors, Tensors | None]:
        """ours, eager, truth, and mamba-ssm's if wanted and able.  AssertionError if two runs of ours differ."""
        dtype = self.inputs[0].dtype
        ours, again = self.run(self.ours, dtype), self.run(self.ours, dtype)
        differs = [name for name in ours if not torch.equal(ours[name], again[name])]
        assert not differs, f"two runs differ in {differs}"
        peer = None
        if beside_peer and "mamba-ssm" in self.peers:
            try:
                peer = self.run(self.peers["mamba-ssm"], dtype)
            except Exception as error:  # theirs does not run at this shape: nothing to compare with
                self.shape += f" [mamba-ssm: {type(error).__name__} {str(error)[:60]}]"
        return ours, self.run(self.reference, dtype), self.run(self.reference, torch.float64), peer

    def check(self) -> None:
        """AssertionError if ours is wrong."""
        dtype = self.inputs[0].dtype
        right, text = judge(errors([self.results()], dtype), limit_of(dtype))
        assert right, text

    def forward(self, f: Callable) -> Callable[[], object]:
        leaves = [t.detach().requires_grad_() for t in self.inputs]
        return lambda: f(*leaves)

    def backward(self, f: Callable) -> Callable[[], object]:
        """The backward pass of f, whose forward runs at the first call: what cannot run fails when timed."""
        leaves = [t.detach().requires_grad_() for t in self.inputs]
        out = []

        def call() -> object:
            if not out:
                result = f(*leaves)
                out.extend(result if isinstance(result, tuple) else (result,))
            return torch.autograd.grad(out, leaves, self.grads, retain_graph=True)

        return call


def limit_of(dtype: torch.dtype) -> Callable[[Errors], float]:
    """The error that ours may have: 1e-5 in fp32; narrower, twice eager's and 16 fp32 roundings."""
    if dtype == torch.float32:
        return lambda e: 1e-5
    return lambda e: 2 * e.eager + 16 * torch.finfo(torch.float32).eps


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def weights(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.rand(*shape, device=DEVICE) + 0.5).to(dtype)


def norm_problem(T: int, dtype: torch.dtype, width: int = D) -> Problem:
    peers = {"eager": lambda x, w: F.rms_norm(x, (width,), w, EPS), "compiled": lambda x, w: compiled_norm(x, w, EPS)}
    if (theirs := mamba("ops.triton.layer_norm")) is not None:
        peers["mamba-ssm"] = lambda x, w: theirs.rms_norm_fn(x, w, None, eps=EPS)
    return Problem(
        "rms_norm",
        f"T={T} D={width}",
        [randn(T, width, dtype=dtype), weights(width, dtype=dtype)],
        [randn(T, width, dtype=dtype)],
        lambda x, w: rms_norm.rms_norm(x, w, EPS),
        lambda x, w: rms_norm.rms_norm_reference(x, w, EPS),
        peers,
        T * width,
        (2, 3),
        "90 % at T=32768",
    )


def relu2_problem(T: int, dtype: torch.dtype, width: int = SHARED) -> Problem:
    return Problem(
        "relu2",
        f"T={T} F={width}",
        [randn(T, width, dtype=dtype)],
        [randn(T, width, dtype=dtype)],
        relu2.relu2,
        relu2.relu2_reference,
        {"eager": relu2.relu2_reference, "compiled": compiled_relu2},
        T * width,
        (2, 3),
        "90 % at T=32768",
    )


def add_norm_problem(T: int, dtype: torch.dtype, width: int = D) -> Problem:
    def eager(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        s = x + r
        return F.rms_norm(s, (width,), w, EPS), s

    def reference(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """What is normalised is the stream that the next layer reads, so in float64 too the sum is rounded to `dtype`.

        mamba-ssm normalises the sum before it is rounded: nearer to the formula, and not what a norm of the stream is.
        """
        s = x + r
        rounded = s + (s.detach().to(dtype).to(s.dtype) - s.detach())
        return rms_norm.rms_norm_reference(rounded, w, EPS), s

    peers = {"eager": eager, "compiled": lambda x, r, w: compiled_add_norm(x, r, w, EPS)}
    if (theirs := mamba("ops.triton.layer_norm")) is not None:
        peers["mamba-ssm"] = lambda x, r, w: theirs.rms_norm_fn(x, w, None, residual=r, eps=EPS, prenorm=True)
    return Problem(
        "add_rms_norm",
        f"T={T} D={width}",
        [randn(T, width, dtype=dtype), randn(T, width, dtype=dtype), weights(width, dtype=dtype)],
        [randn(T, width, dtype=dtype), randn(T, width, dtype=dtype)],
        lambda x, r, w: rms_norm.join_rms_norm(x, (r,), w, EPS)[::-1],
        reference,
        peers,
        T * width,
        (4, 4),
        "90 % at T=32768",
    )


def gated_problem(T: int, dtype: torch.dtype, width: int = INNER, groups: int = GROUPS) -> Problem:
    peers = {
        "eager": lambda y, z, w: gated_norm.gated_rms_norm_reference(y, z, w, groups, EPS),
        "compiled": lambda y, z, w: compiled_gated_norm(y, z, w, groups, EPS),
    }
    if (theirs := mamba("ops.triton.layernorm_gated")) is not None:
        peers["mamba-ssm"] = lambda y, z, w: theirs.rmsnorm_fn(y, w, None, z, EPS, width // groups, False)
    return Problem(
        "gated_rms_norm",
        f"T={T} d={width} G={groups}",
        [
            randn(T, width, dtype=dtype),
            randn(T, width + CONV + HEADS, dtype=dtype)[:, :width],
            weights(width, dtype=dtype),
        ],
        [randn(T, width, dtype=dtype)],
        lambda y, z, w: gated_norm.gated_rms_norm(y, z, w, groups, EPS),
        lambda y, z, w: gated_norm.gated_rms_norm_reference(y, z, w, groups, EPS),
        peers,
        T * width,
        (3, 5),
        "85 % at T=32768",
    )


def conv_problem(
    T: int, dtype: torch.dtype, B: int = 1, width: int = CONV, W: int = 4, documents: str = "", initial: bool = False
) -> Problem:
    S = T // B
    seq_idx = None
    if documents == "each":
        seq_idx = torch.arange(S, device=DEVICE).expand(B, S)
    elif documents:
        seq_idx = (torch.rand(B, S, device=DEVICE) < 8 / S).cumsum(1)

    def eager(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.silu(F.conv1d(x.mT, w.unsqueeze(1), b, padding=W - 1, groups=width)[..., :S]).mT

    def with_initial(f: Callable) -> Callable:
        return lambda x, w, b, *before: f(x, w, b, seq_idx, *before)

    before = [randn(B, W - 1, width, dtype=dtype)] if initial else []
    plain = seq_idx is None and not initial
    return Problem(
        "conv1d_silu",
        f"B={B} S={S} C={width} W={W}" + f" {documents} documents" * bool(documents) + " initial" * initial,
        [
            randn(B, S, INNER + width + HEADS, dtype=dtype)[..., INNER : INNER + width],
            randn(width, W, dtype=dtype),
            randn(width, dtype=dtype),
            *before,
        ],
        [randn(B, S, width, dtype=dtype)],
        with_initial(conv1d.causal_conv1d),
        with_initial(conv1d.causal_conv1d_reference),
        ({"F.conv1d": eager} if plain else {}) | {"compiled": with_initial(compiled_conv)},
        T * width,
        (2, 3),
        "80 % at T=8192",
    )


compiled_norm = torch.compile(rms_norm.rms_norm_reference, dynamic=False)
compiled_add_norm = torch.compile(
    lambda x, r, w, eps: rms_norm.join_rms_norm_reference(x, (r,), w, eps)[::-1], dynamic=False
)
compiled_gated_norm = torch.compile(gated_norm.gated_rms_norm_reference, dynamic=False)
compiled_relu2 = torch.compile(relu2.relu2_reference, dynamic=False)
compiled_conv = torch.compile(conv1d.causal_conv1d_reference, dynamic=False)


def problems(T: int, only: str = "") -> Iterator[Problem]:
    """The operators at Nano's shapes, one at a time; `only` those whose function is named so."""
    for make in (norm_problem, add_norm_problem, gated_problem, relu2_problem, conv_problem):
        if make.__name__.startswith(only):
            yield make(T, torch.bfloat16)
    if "conv_problem".startswith(only):
        yield conv_problem(T, torch.bfloat16, documents="some")


def cases(T: int, only: str = "") -> Iterator[Case]:
    for p in problems(T, only):
        item = p.inputs[0].element_size()
        for i, direction in enumerate(("forward", "backward")):
            timed = getattr(p, direction)
            yield Case(
                f"{p.op} {direction}",
                p.shape,
                timed(p.ours),
                {name: timed(f) for name, f in p.peers.items()},
                bytes=p.moved[i] * p.elements * item,
                check=p.check,
                aim=p.aim,
            )


def check_one(make: Callable[..., Problem], dtype: torch.dtype, options: dict) -> tuple[bool, str]:
    """One operator at one shape, mean of three draws; whether it is right, and the line that says so."""
    torch.manual_seed(0)
    problems = []

    def draws() -> Iterator[tuple[Tensors, Tensors, Tensors, Tensors | None]]:
        for _ in range(3):
            problems[:] = [make(dtype=dtype, **options)]  # imports its peers
            smallest_tiles()
            yield problems[0].results(beside_peer=True)

    right, text = judge(errors(draws(), dtype), limit_of(dtype))
    return right, f"{problems[0].op:15s} {str(dtype)[6:]:9s} {problems[0].shape:45s} {text}"


def check() -> bool:
    """One line per case over lengths, widths and dtypes; False if one was wrong, or mamba-ssm's kernels nearer."""
    if mamba("ops.triton.layer_norm") is None:
        print("mamba-ssm is not importable: nothing is compared with it (name its source folder in $MAMBA_SSM)")
    lengths = (1, 63, 127, 129, 4097)
    cases = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        made = [
            (make, {"T": T})
            for make, T in product((norm_problem, add_norm_problem, gated_problem, relu2_problem), lengths)
        ]
        made += [
            (make, {"T": 129, "width": w}) for make, w in product((norm_problem, add_norm_problem), (64, 1000, 8192))
        ]
        made += [(gated_problem, {"T": 129, "width": w, "groups": g}) for w, g in ((4096, 1), (1800, 6), (64, 8))]
        made += [(conv_problem, {"T": T}) for T in lengths]
        made += [
            (conv_problem, {"T": T, "B": B, "width": C, "W": W, "documents": d, "initial": True})
            for T, B, C, W, d in (
                (4097, 1, CONV, 4, "some"),
                (387, 3, CONV, 4, "each"),
                (2000, 2, 1000, 3, "some"),
                (635, 5, 67, 2, ""),
                (16384, 2, 96, 4, ""),
            )
        ]
        cases += [{"make": make, "dtype": dtype, "options": options} for make, options in made]
    print("relative errors against float64: ours / eager / mamba-ssm")
    return run_checks(check_one, cases)


def sweep(T: int, only: str) -> None:
    """Times of every launch configuration, best first, with the share of copy bandwidth."""
    walking = [
        Launch(tile, warps, per_sm, stages)
        for tile, (warps, per_sm), stages in product(
            (2048, 4096), ((4, 2), (4, 3), (4, 4), (4, 6), (8, 1), (8, 2), (8, 3), (8, 4)), (1, 2, 3, 4)
        )
    ]
    rows_forward = [Launch(tile, warps) for tile, warps in product((2048, 4096, 8192), (2, 4, 8))] + walking
    conv = [
        conv1d.Launch(block, block // lanes, warps_per_sm * lanes // block, stages)
        for block, lanes, warps_per_sm, stages in product(
            (128, 256, 512, 1024), (128, 256), (8, 12, 16, 20, 24, 32), (2, 3, 4)
        )
        if block >= lanes and warps_per_sm * lanes >= block
    ]
    for p in problems(T, only):
        module = {"conv1d_silu": conv1d, "gated_rms_norm": gated_norm}.get(p.op, rms_norm)
        for i, direction in enumerate(("forward", "backward")):
            name = direction.upper()
            chosen = getattr(module, name)
            tried = {}
            for launch in dict.fromkeys([chosen, *(conv if module is conv1d else (rows_forward, walking)[i])]):
                setattr(module, name, launch)
                try:
                    tried[launch] = gpu_ms(getattr(p, direction)(p.ours), repetitions=9)
                except Exception as error:  # too much shared memory for this tile, say
                    print(f"{launch}: {type(error).__name__}")
            setattr(module, name, chosen)
            ranked = sorted(tried, key=tried.get)
            size = p.moved[i] * p.elements * p.inputs[0].element_size()
            print(f"{p.op} {direction} {p.shape}")
            for launch in dict.fromkeys([*ranked[:6], chosen]):
                share = size / (tried[launch] * 1e-3) / copy_bandwidth()
                print(
                    f"    {tried[launch]:.4f} ms {share:6.1%} {tuple(launch)}" + "  <- chosen" * (launch == chosen),
                    flush=True,
                )


def main() -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("-T", type=int, nargs="+", default=[8192, 32768], help="tokens")
    parser.add_argument("--only", default="", help="one operator: norm, add_norm, gated or conv")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch._functorch.config.donated_buffer = False  # a compiled backward is run again and again on one forward
    if options.check:
        raise SystemExit(0 if check() else 1)
    if options.sweep:
        for T in options.T:
            sweep(T, options.only)
        return []
    records = [r for T in options.T for r in run_cases(cases(T, options.only))]
    print_table(records, f"copy {copy_bandwidth() / 1e12:.2f} TB/s")
    print_json(records)
    return records


if __name__ == "__main__":
    main()
