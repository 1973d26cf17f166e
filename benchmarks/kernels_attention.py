"""Attention at Nano's shapes (32 query, 2 key-value heads, width 128, bf16): ours, cuDNN, FlashAttention-2, floor.

python -m benchmarks.kernels_attention            table at T = 8192 and 32768, one JSON line last
python -m benchmarks.kernels_attention --check    errors against float64 over odd shapes, one line a case
python -m benchmarks.kernels_attention --sweep    every tile worth trying, forward, dq and dk/dv apart
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import FLOOR_COMPUTE, Case, gpu_ms, print_json, print_table, run_cases
from kernels import attention_backward as backward
from kernels import attention_forward as forward
from kernels.attention import attention, document_starts, document_stops

HQ, HKV, D = 32, 2, 128
AIM = ">= 0.9 x cuDNN"
# A packed row of 8192 tokens: long and short documents, seeded, so that every run has the same.
LENGTHS = [1, 3000, 63, 700, 129, 127, 1500, 12, 900, 256, 1504]


def inputs(B: int, Sq: int, Skv: int, dtype: torch.dtype = torch.bfloat16, heads: int = HQ, kv_heads: int = HKV,
           width: int = D) -> list[Tensor]:  # fmt: skip
    """q, k, v as views of one projection where the lengths agree, as in the model, and the output's gradient."""
    torch.manual_seed(Sq + Skv + B)
    kv = torch.randn(B, Skv, 2 * kv_heads * width, device="cuda", dtype=dtype)
    q = torch.randn(B, Sq, heads, width, device="cuda", dtype=dtype)
    k, v = kv.unflatten(-1, (2 * kv_heads, width)).chunk(2, dim=2)
    return [q, k, v, torch.randn_like(q)]


def documents(lengths: list[int], B: int = 1) -> Tensor:
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return ids.expand(B, -1).to("cuda", torch.int32).contiguous()


def with_gradients(f: Callable, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    y = f(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, do)]


def truth(q: Tensor, k: Tensor, v: Tensor, do: Tensor, seq_idx: Tensor | None) -> list[Tensor]:
    """Output and gradients in float64, one head of one sequence at a time, so that long rows fit."""
    y, dq, dk, dv = (torch.zeros(t.shape, dtype=torch.float64, device=t.device) for t in (q, q, k, v))
    Sq, Skv, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    hidden = torch.arange(Skv - Sq, Skv, device=q.device)[:, None] < torch.arange(Skv, device=q.device)
    for b in range(q.shape[0]):
        mask = hidden if seq_idx is None else hidden | (seq_idx[b, :, None] != seq_idx[b])
        for h in range(q.shape[2]):
            g = h // group
            q_, k_, v_, do_ = (t.double() for t in (q[b, :, h], k[b, :, g], v[b, :, g], do[b, :, h]))
            p = (q_ @ k_.T).mul_(q.shape[-1] ** -0.5).masked_fill_(mask, -torch.inf).softmax(-1)
            y[b, :, h] = p @ v_
            dv[b, :, g] += p.T @ do_
            ds = (do_ @ v_.T).sub_((do_ * y[b, :, h]).sum(-1, keepdim=True)).mul_(p).mul_(q.shape[-1] ** -0.5)
            dq[b, :, h] = ds @ k_
            dk[b, :, g] += ds.T @ q_
    return [y, dq, dk, dv]


def errors(got: list[Tensor], true: list[Tensor]) -> list[float]:
    """Relative errors in the Euclidean norm; of gradients that are 0, on dv's scale.

    dq and dk are 0 where each query sees one key.  In float64 too that is a difference of two sums of dv's size, dP and
    delta, so their roundings are left: 1e-16 of dv, and nothing that an error could be relative to.
    """
    scale = true[-1].norm()
    sizes = [t.norm() if t.norm() > 1e-12 * scale else scale for t in true]
    return [((a.double() - t).norm() / size).item() for a, t, size in zip(got, true, sizes, strict=True)]


def verdict(args: list[Tensor], seq_idx: Tensor | None = None) -> tuple[bool, str]:
    """Whether ours is as near to float64 as PyTorch's (factor 2; 1e-5 in fp32), and twice the same."""
    true = truth(*args, seq_idx)
    ours = partial(attention, seq_idx=seq_idx, backend="triton")
    got, again = (with_gradients(ours, *args) for _ in range(2))
    same = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    eager = errors(with_gradients(partial(attention, seq_idx=seq_idx, backend="torch"), *args), true)
    found = errors(got, true)
    limits = [1e-5 if args[0].dtype == torch.float32 else 2 * e + 1e-6 for e in eager]
    right = all(e <= limit for e, limit in zip(found, limits, strict=True))  # NaN is not <=
    shown = "  ".join(f"{n} {e:.1e} ({p:.1e})" for n, e, p in zip(("y", "dq", "dk", "dv"), found, eager, strict=True))
    return right and same, shown + ("" if same else "  TWO RUNS DIFFER")


def must_be_right(args: list[Tensor], seq_idx: Tensor | None = None) -> None:
    right, shown = verdict(args, seq_idx)
    assert right, shown


def check() -> bool:
    """One line a case; the number in brackets is PyTorch's own error."""
    shapes = {f"S={S}": ((1, S, S), None, {}) for S in (1, 63, 127, 129, 1000, 4097)}
    shapes |= {
        "B=3 S=300": ((3, 300, 300), None, {}),
        "width 64": ((1, 513, 513), None, {"heads": 8, "width": 64}),
        "width 80": ((1, 200, 200), None, {"heads": 4, "kv_heads": 4, "width": 80}),
        "3 heads a group": ((2, 130, 130), None, {"heads": 6}),
        "cached prefill 1 of 700": ((1, 1, 700), None, {}),
        "cached prefill 129 of 1000": ((2, 129, 1000), None, {}),
        "cached prefill 1000 of 1001": ((1, 1000, 1001), None, {}),
        "packed": ((1, sum(LENGTHS[2:8]), sum(LENGTHS[2:8])), LENGTHS[2:8], {}),
        "one token a document": ((2, 300, 300), [1] * 300, {}),
        "packed, whole blocks": ((1, 512, 512), [128, 256, 128], {}),
    }
    fine = True
    for name, (sizes, lengths, extra) in shapes.items():
        for dtype in (torch.bfloat16, torch.float32):
            seq_idx = None if lengths is None else documents(lengths, sizes[0])
            try:
                right, shown = verdict(inputs(*sizes, dtype, **extra), seq_idx)
            except Exception as error:
                right, shown = False, f"{type(error).__name__}: {str(error)[:200]}"
            fine &= right
            print("ok   " if right else "WRONG", f"{name}, {str(dtype)[6:]}:", shown, flush=True)
    for B, Skv in ((1, 1), (1, 63), (3, 4097), (8, 32768)):
        for dtype in (torch.bfloat16, torch.float32):
            q, k, v, _ = inputs(B, 1, Skv + 5, dtype)
            k, v = k[:, :Skv], v[:, :Skv]
            true = truth(q, k, v, q, None)[:1] if Skv < 5000 else [attention(*(t.double() for t in (q, k, v)))]
            (e,), (p,) = (errors([attention(q, k, v, backend=b)], true) for b in ("triton", "torch"))
            right = e <= (1e-5 if dtype == torch.float32 else 2 * p + 1e-6)
            fine &= right
            print("ok   " if right else "WRONG", f"decode B={B} Skv={Skv}, {str(dtype)[6:]}: y {e:.1e} ({p:.1e})")
    return fine


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2)


def backward_of(f: Callable, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Callable[[], object]:
    """The backward pass of f alone, to be timed; the forward runs at the first call."""
    state = []

    def step() -> object:
        if not state:
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            state.extend([f(*leaves), leaves])
        return torch.autograd.grad(*state, do, retain_graph=True)

    return step


def varlen(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> tuple:
    """FlashAttention-2's packed form as PyTorch carries it."""
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    longest = max(lengths)
    out = torch.ops.aten._flash_attention_forward(*flat, ends, ends, longest, longest, 0.0, True, False)
    return flat, out, ends, longest


def varlen_backward(q: Tensor, k: Tensor, v: Tensor, do: Tensor, lengths: list[int]) -> Callable[[], object]:
    state = []

    def step() -> object:
        if not state:
            state.extend(varlen(q, k, v, lengths))
        flat, (o, lse, seed, unused, *_), ends, longest = state
        return torch.ops.aten._flash_attention_backward(
            do.flatten(0, 1), *flat, o, lse, ends, ends, longest, longest, 0.0, True, seed, unused
        )

    return step


def cases(T: int) -> Iterator[Case]:
    B, S = max(1, T // 8192), min(T, 8192)
    args = inputs(B, S, S)
    q, k, v, _ = args
    ours = partial(attention, backend="triton")
    peers = {
        "cuDNN": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
        "FlashAttention-2": partial(sdpa, SDPBackend.FLASH_ATTENTION),
    }
    flops = 2 * B * HQ * S * (S + 1) * D  # two products over the causal half
    traffic = 2 * (q.nbytes + k.nbytes)
    label = f"B={B} S={S} {HQ}/{HKV}x{D}"
    judge = partial(must_be_right, [t[:1] for t in args])
    forward_peers = {n: partial(f, q, k, v) for n, f in peers.items()}
    yield Case("attention forward", label, partial(ours, q, k, v), forward_peers, traffic, flops, check=judge, aim=AIM)
    backward_peers = {n: backward_of(f, *args) for n, f in peers.items()}
    mine = backward_of(ours, *args)
    yield Case("attention backward", label, mine, backward_peers, 2 * traffic, 2.5 * flops, check=judge, aim=AIM)
    del backward_peers, mine
    if B == 1:
        seq_idx = documents(LENGTHS)
        ours = partial(attention, seq_idx=seq_idx, backend="triton")
        masked = partial(attention, seq_idx=seq_idx, backend="torch")
        flops = sum(2 * HQ * n * (n + 1) * D for n in LENGTHS)
        label = f"{len(LENGTHS)} documents in {sum(LENGTHS)}"
        judge = partial(must_be_right, args, seq_idx)
        some = {"SDPA, dense mask": partial(masked, q, k, v), "FA-2 varlen": lambda: varlen(q, k, v, LENGTHS)}
        yield Case("packed forward", label, partial(ours, q, k, v), some, traffic, flops, check=judge)
        some = {"SDPA, dense mask": backward_of(masked, *args), "FA-2 varlen": varlen_backward(*args, LENGTHS)}
        yield Case("packed backward", label, backward_of(ours, *args), some, 2 * traffic, 2.5 * flops, check=judge)
    for B, Skv in ((1, 32768), (32, 8192)):
        q, k, v, _ = inputs(B, 1, Skv)
        other = {"SDPA": partial(attention, q, k, v, backend="torch")}
        step = partial(attention, q, k, v, backend="triton")
        yield Case("decode", f"B={B} Skv={Skv}", step, other, k.nbytes + v.nbytes, 4 * B * Skv * HQ * D)


def sweep() -> None:
    """Times of every tile worth trying, in ms and TFLOP/s of the products needed; the best goes into the tables."""
    Tile = forward.Tile
    q, k, v, do = inputs(1, 8192, 8192)
    flops = 2 * HQ * 8192 * 8193 * D
    o, lse = forward.launch_forward(q, k, v, None)
    _, delta = backward.launch_query(q, k, v, o, do, lse, None)
    seq_idx = documents(LENGTHS)
    start, stop = document_starts(seq_idx), document_stops(seq_idx)

    def show(what: str, tile: object, f: Callable[[], object], share: float) -> None:
        try:
            ms = gpu_ms(f, budget_s=0.3)
            print(f"{what} {tile}: {ms:.3f} ms, {share * flops / ms / 1e9:.0f} TFLOP/s", flush=True)
        except Exception as error:
            print(f"{what} {tile}: {type(error).__name__} {str(error)[:100]}", flush=True)

    for defer in (True, False):
        for M, N, warps, stages in ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2),
                                    (64, 128, 4, 2)):  # fmt: skip
            tile = Tile(M, N, warps, stages, defer)
            show("forward", tile, partial(forward.launch_forward, q, k, v, None, tile), 1)
    for tile in (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3)):
        show("dq", tile, partial(backward.launch_query, q, k, v, o, do, lse, None, tile), 1.5)
    for tile in (Tile(64, 128, 8, 2), Tile(64, 128, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(32, 128, 8, 3)):
        for parts in (2, 4, 8, 16):
            f = partial(backward.launch_key, q, k, v, do, lse, delta, None, tile, parts)
            show(f"dk/dv in {parts} parts", tile, f, 2)
    for tile in (Tile(128, 128, 8, 2, True), Tile(128, 64, 8, 3, True), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3, True)):
        show("packed forward", tile, partial(forward.launch_forward, q, k, v, start, tile), 0)
    for tile in (Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)):
        show("packed dq", tile, partial(backward.launch_query, q, k, v, o, do, lse, start, tile), 0)
    for tile in (Tile(64, 128, 8, 2), Tile(64, 64, 4, 2)):
        show("packed dk/dv", tile, partial(backward.launch_key, q, k, v, do, lse, delta, stop, tile), 0)


def main() -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare with float64, over odd shapes")
    parser.add_argument("--sweep", action="store_true", help="time every tile worth trying")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    if options.check:
        raise SystemExit(not check())
    if options.sweep:
        sweep()
        return []
    records = run_cases(case for T in (8192, 32768) for case in cases(T))
    print_table(records, f"attention; floor at {FLOOR_COMPUTE / 1e12:.0f} TFLOP/s")
    print_json(records)
    return records


if __name__ == "__main__":
    main()
