"""SSD at Nemotron 3 Nano's sizes: ours, mamba-ssm's Triton kernels where importable, eager PyTorch, and the floor.

python -m benchmarks.kernels_ssd                     T = 8192 and 32768, bf16; ends with one line of JSON
python -m benchmarks.kernels_ssd --check [PART]      errors against float64 only, mamba-ssm's beside ours; status 1
                                                     if ours are wrong, or theirs nearer by more than 10 %; of the
                                                     cases whose name holds PART
python -m benchmarks.kernels_ssd --profile           GPU time of each kernel, T = 8192
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measure import (
    Case,
    Errors,
    Tensors,
    errors,
    judge,
    mamba,
    print_json,
    print_table,
    run_cases,
    run_checks,
    smallest_tiles,
)
from kernels.ssd import ssd, ssd_reference, ssd_step

_peer = mamba("ops.triton.ssd_combined")  # timed without it where there is none
mamba_chunk_scan_combined = None if _peer is None else _peer.mamba_chunk_scan_combined
_peer = mamba("ops.triton.selective_state_update")
selective_state_update = None if _peer is None else _peer.selective_state_update
DEVICE = "cuda"
H, P, G, N = 64, 64, 8, 128
NAMES = ("y", "state", "dx", "ddt", "dA", "dB", "dC", "dD", "dbias", "dinitial")


@dataclass
class Draw:
    """One set of inputs, x, B and C as parts of one tensor and dt of another, as they are in the model."""

    arguments: list[Tensor]  # x, dt, A, B, C, D, dt_bias
    initial: Tensor | None
    idx: Tensor | None
    dy: Tensor
    dlast: Tensor

    def to(self, dtype: torch.dtype) -> Draw:
        """Leaves of `dtype`; the initial state and its gradient at least fp32."""
        wide = torch.promote_types(dtype, torch.float32)
        initial = None if self.initial is None else self.initial.detach().to(wide).requires_grad_()
        x, dt, A, B, C, D, bias = (t.detach() for t in self.arguments)
        same = dtype == x.dtype  # A, D and the bias stay fp32 beside bf16
        leaves = [(t if same else t.to(dtype)).detach().requires_grad_() for t in (x, dt, A, B, C, D, bias)]
        return Draw(leaves, initial, self.idx, self.dy.to(dtype), self.dlast.to(wide))

    def outputs(self, f: Callable) -> tuple[Tensor, Tensor]:
        return f(*self.arguments, 128, (0.0, torch.inf), self.idx, self.initial)

    def run(self, f: Callable) -> list[Tensor]:
        y, last = self.outputs(f)
        wanted = self.arguments + ([] if self.initial is None else [self.initial])
        grads = torch.autograd.grad([y, last], wanted, [self.dy.to(y.dtype), self.dlast.to(last.dtype)])
        return [y.detach(), last.detach(), *grads]


def draw(
    S: int,
    dtype: torch.dtype = torch.bfloat16,
    heads: int = H,
    groups: int = G,
    batch: int = 1,
    packed=False,
    initial=True,
) -> Draw:
    """Steps dt of 0.001 to 0.1 and A of -1 to -16, as Mamba-2 is initialised; B, C and x normal."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE).to(dtype)

    xBC = normal(batch, S, heads * P + 2 * groups * N)
    x, B, C = xBC.split([heads * P, groups * N, groups * N], dim=-1)
    x, B, C = x.unflatten(-1, (heads, P)), B.unflatten(-1, (groups, N)), C.unflatten(-1, (groups, N))
    dt = normal(batch, S, 10240 + heads)[..., -heads:]
    A = -(torch.rand(heads, device=DEVICE) * 15 + 1).to(dtype)
    step = torch.exp(torch.rand(heads, device=DEVICE) * 4.6 - 6.9)  # log-uniform in 0.001 .. 0.1
    bias = (step + torch.log(-torch.expm1(-step))).to(dtype)  # softplus of it is `step`
    idx = None
    if packed:
        starts = torch.rand(batch, S, device=DEVICE) < (1.0 if packed == "every token" else 4 / S)
        starts[:, 0] = False  # documents count from 0: to mamba-ssm that one, not the first, has the initial state
        idx = starts.cumsum(1).int()
    return Draw(
        [t.requires_grad_() for t in (x.detach(), dt.detach(), A, B.detach(), C.detach(), normal(heads), bias)],
        torch.randn(batch, heads, P, N, device=DEVICE) if initial else None,
        idx,
        normal(batch, S, heads, P),
        torch.randn(batch, heads, P, N, device=DEVICE),
    )


def mamba_ssm(x, dt, A, B, C, D, bias, chunk, limit, idx, initial):
    return mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk, D=D, dt_bias=bias, initial_states=initial, seq_idx=idx, dt_softplus=True, dt_limit=limit,
        return_final_states=True,
    )  # fmt: skip


def limit_of(dtype: torch.dtype) -> Callable[[Errors], float]:
    """The error that ours may have: fp32, 1e-5 or eager's.  Else twice the worse of eager's and of rounding the truth
    once (eager returns the final state, computed in fp32 throughout, unrounded)."""
    if dtype == torch.float32:
        return lambda e: max(1e-5, e.eager)
    return lambda e: 2 * max(e.eager, e.rounded)


def named(results: list[Tensor] | tuple[Tensor, ...]) -> Tensors:
    return dict(zip(NAMES, results, strict=False))


def results(d: Draw, beside_peer: bool, notes: list[str]) -> tuple[Tensors, Tensors, Tensors, Tensors | None]:
    """ours, eager PyTorch in the same dtype, float64 truth and mamba-ssm: outputs and every gradient."""
    dtype = d.arguments[0].dtype
    ours, eager, peer = named(d.to(dtype).run(ssd)), named(d.to(dtype).run(ssd_reference)), None
    if beside_peer and mamba_chunk_scan_combined is not None:
        try:
            peer = named(d.to(dtype).run(mamba_ssm))
        except Exception as e:  # theirs does not run at this shape: nothing to compare with
            notes[:] = [f"[mamba-ssm: {type(e).__name__} {str(e)[:60]}]"]
    return ours, eager, named(d.to(torch.float64).run(ssd_reference)), peer


def step_inputs(rows: int, dtype: torch.dtype) -> list[Tensor]:
    """state, x, dt, A, B, C, D and dt_bias of one token of decoding for each of `rows` sequences."""
    x, dt, A, B, C, D, bias = (t.detach() for t in draw(rows, dtype, initial=False).to(dtype).arguments)
    state = torch.randn(rows, H, P, N, device=DEVICE)
    return [state, *(t[0] for t in (x, dt)), A, *(t[0] for t in (B, C)), D, bias]


def step_results(rows: int, dtype: torch.dtype, notes: list[str]) -> tuple[Tensors, Tensors, Tensors, Tensors | None]:
    inputs = step_inputs(rows, dtype)
    ours, eager, peer = ssd_step(*inputs), ssd_step(*inputs, backend="torch"), None
    if selective_state_update is not None:
        state, x, dt, A, B, C, D, bias = inputs
        state = state.clone()  # theirs writes into it
        wide = [t[..., None].expand(*t.shape, P) for t in (dt, D, bias)]
        A = A[:, None, None].expand(-1, P, N)
        try:
            y = selective_state_update(state, x, wide[0], A, B, C, wide[1], None, wide[2], dt_softplus=True)
            peer = named((y, state))
        except Exception as e:
            notes[:] = [f"[mamba-ssm: {type(e).__name__} {str(e)[:60]}]"]
    truth = ssd_step(*(t.double() for t in inputs), backend="torch")
    return named(ours), named(eager), named(truth), peer


def check_one(label: str, dtype: torch.dtype, options: dict) -> tuple[bool, str]:
    """One case, mean of several draws; whether it is right, and the line that says so.  options: `draw`'s, or `rows`.

    dA is one number per head, and the error of sixteen roundings is off by a fifth half of the time: as many draws as
    make a thousand numbers of it.
    """
    torch.manual_seed(0)
    smallest_tiles()
    notes: list[str] = []

    def draws() -> Iterator[tuple[Tensors, Tensors, Tensors, Tensors | None]]:
        for _ in range(max(4, 1024 // options.get("heads", H))):
            if "rows" in options:
                yield step_results(options["rows"], dtype, notes)
            else:
                yield results(draw(**options, dtype=dtype), True, notes)

    right, text = judge(errors(draws(), dtype), limit_of(dtype))
    return right, " ".join([f"{str(dtype)[6:]:9s} {label:24s} {text}", *notes])


def check_twice(S: int) -> tuple[bool, str]:
    d = draw(S).to(torch.bfloat16)
    same = all(torch.equal(a, b) for a, b in zip(d.run(ssd), d.run(ssd), strict=True))
    return same, f"two runs at S={S} are {'' if same else 'not '}bit-identical"


def check_case(label: str, dtype: torch.dtype | None, options: dict) -> tuple[bool, str]:
    return check_twice(**options) if dtype is None else check_one(label, dtype, options)


def check(part: str) -> bool:
    """Lengths, packing, groups and dtypes of the project's list; two runs bit by bit.  One line per case."""
    print("relative errors against float64: ours / eager / mamba-ssm")
    if mamba_chunk_scan_combined is None:
        print("mamba-ssm is not importable: nothing is compared with it (name its source folder in $MAMBA_SSM)")
    shapes = {
        "S=4097 H=16 G=1": {"S": 4097, "heads": 16, "groups": 1},
        "S=4097 H=16 G=8": {"S": 4097, "heads": 16, "groups": 8},
        "2 rows, S=777, packed": {"S": 777, "batch": 2, "packed": True, "heads": 16},
        "one document per token": {"S": 257, "packed": "every token", "heads": 16},
    }
    shapes |= {f"S={S}": {"S": S} for S in (1024, 129, 127, 63, 1)}
    shapes |= {f"step, {rows} sequences": {"rows": rows} for rows in (1, 3, 128)}
    cases = [
        {"label": label, "dtype": dtype, "options": options}
        for dtype in (torch.float32, torch.bfloat16)  # long ones first, so that no process is left with one
        for label, options in shapes.items()
    ]
    cases.append({"label": "two runs", "dtype": None, "options": {"S": 8192}})
    return run_checks(check_case, [case for case in cases if part in case["label"]])


def _verified() -> None:
    torch.manual_seed(0)
    drawn = results(draw(2048, heads=16, groups=2), False, [])
    right, text = judge(errors([drawn], torch.bfloat16), limit_of(torch.bfloat16))
    assert right, text


def cases(T: int) -> Iterator[Case]:
    """Forward, backward and the decode step.  Bytes: every input and output once."""
    shape = f"T={T} H={H} P={P} G={G} N={N}"
    tokens = 2 * (2 * H * P + 2 * G * N + H)  # x, y, B, C, dt
    flops = 2 * 128 * N * G + 2 * 128 * P * H + 4 * N * P * H
    d = draw(T, initial=False)
    functions = {"ours": ssd, "eager": ssd_reference}
    if T > 16384:
        del functions["eager"]  # its decays alone are T * 128 * H numbers several times over
    if mamba_chunk_scan_combined is not None:
        functions["mamba-ssm"] = mamba_ssm

    def forward(f: Callable) -> Callable[[], object]:
        def call() -> None:
            with torch.no_grad():
                d.outputs(f)

        return call

    def backward(f: Callable) -> Callable[[], object]:
        made: list = []

        def call() -> object:
            if not made:
                made.append(d.outputs(f)[0])
            return torch.autograd.grad(made[0], d.arguments, d.dy, retain_graph=True)

        return call

    aim_forward, aim_backward = (f"<= {ms * T / 8192:.2f} ms" for ms in (0.20, 0.60))
    calls = {name: forward(f) for name, f in functions.items()}
    yield Case("ssd forward", shape, calls.pop("ours"), calls, tokens * T, flops * T, check=_verified, aim=aim_forward)
    calls = {name: backward(f) for name, f in functions.items()}
    read_and_written = 2 * (3 * H * P + 4 * G * N + 2 * H)  # x, dy, dx, B, C, dB, dC, dt, ddt
    yield Case("ssd backward", shape, calls.pop("ours"), calls, read_and_written * T, 2.4 * flops * T, aim=aim_backward)
    if T > 8192:
        return
    rows = 128
    inputs = step_inputs(rows, torch.bfloat16)
    yield Case(
        "ssd_step",
        f"{rows} sequences",
        lambda: ssd_step(*inputs),
        {"eager": lambda: ssd_step(*inputs, backend="torch")},
        bytes=2 * inputs[0].nbytes,
    )


def profile() -> None:
    """GPU time of every kernel of one forward and backward at T = 8192, mean of 10, L2 not flushed."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    peers = {"ours": ssd} | ({"mamba-ssm": mamba_ssm} if mamba_chunk_scan_combined is not None else {})
    d = draw(8192, initial=False)
    for name, f in peers.items():
        for _ in range(3):
            torch.autograd.grad(d.outputs(f)[0], d.arguments, d.dy)
        torch.cuda.synchronize()
        with record(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in range(10):
                torch.autograd.grad(d.outputs(f)[0], d.arguments, d.dy)
            torch.cuda.synchronize()
        print(f"{name}: kernel, calls and microseconds per forward + backward")
        rows = [(e.self_device_time_total / 10, e.count / 10, e.key) for e in recorded.key_averages()]
        for us, calls, key in sorted(rows, reverse=True)[:24]:
            print(f"  {us:9.1f} us {calls:5.1f} x  {key[:90]}")
        print(f"  {sum(us for us, _, _ in rows):9.1f} us in all")


def main() -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", nargs="?", const="", metavar="PART", help="errors against float64 only, beside mamba-ssm's"
    )
    parser.add_argument("--profile", action="store_true", help="GPU time of each kernel only")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    if args.check is not None:
        raise SystemExit(0 if check(args.check) else 1)
    if args.profile:
        profile()
        return []
    records = [r for T in args.tokens for r in run_cases(cases(T))]
    print_table(records, "SSD")
    print_json(records)
    return records


if __name__ == "__main__":
    main()
