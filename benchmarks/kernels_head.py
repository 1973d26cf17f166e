"""Head and cross entropy at Nano's shapes (V = 131072, D = 2688, bf16), forward and backward together; and the gradient
of the embedding, added to fp32 sums.

python -m benchmarks.kernels_head            table at T = 8192 and 32768, peak memory, one JSON line last
python -m benchmarks.kernels_head --check    errors against float64 over odd shapes, one line a case
python -m benchmarks.kernels_head --sweep    chunks, accumulators, row kernels and the products apart
"""

import argparse
import gc
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import kernels.cross_entropy as module
from benchmarks.measure import Case, gpu_ms, print_json, print_table, run_cases
from kernels import cross_entropy_product as product
from kernels import cross_entropy_softmax as rows
from kernels.cross_entropy import (
    IGNORE,
    combine_statistics,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    vocabulary_gradient,
    vocabulary_statistics,
)
from kernels.embedding import embedding_gradient_

V, D = 131072, 2688


def inputs(T: int, V: int = V, D: int = D, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    torch.manual_seed(T)
    x, weight = torch.randn(T, D, device="cuda", dtype=dtype), torch.randn(V, D, device="cuda", dtype=dtype)
    labels = torch.randint(V, (T,), device="cuda")
    labels[::97] = IGNORE
    if T == 1:
        labels[0] = V - 1
    return [x, weight.mul_(D**-0.5), labels, torch.full((T,), 1.0 / T, device="cuda")]


def step(f: Callable, x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor, **kwargs) -> list[Tensor]:
    """Forward and backward: losses, total, dx, dweight."""
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    total, losses = f(x, weight, labels, token_weight, **kwargs)
    return [losses, total.detach(), *torch.autograd.grad(total, (x, weight))]


def chunked_torch(x: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor, chunk: int = 2048) -> tuple:
    """The peer: the same chunks in plain PyTorch, the weight's gradient accumulated in bf16 by addmm."""
    dx, dw = torch.empty_like(x), torch.zeros_like(weight)
    losses = torch.empty(x.shape[0], device=x.device)
    for start in range(0, x.shape[0], chunk):
        part = slice(start, start + chunk)
        logits = (x[part] @ weight.T).float()
        label, real = labels[part].clamp_min(0).unsqueeze(-1), labels[part] != IGNORE
        lse = logits.logsumexp(-1, keepdim=True)
        losses[part] = (lse - logits.gather(-1, label)).squeeze(-1).where(real, 0)
        p = logits.sub_(lse).exp_()
        p.scatter_add_(-1, label, torch.full_like(lse, -1.0))
        p = p.mul_(token_weight[part].where(real, 0).unsqueeze(-1)).to(x.dtype)
        torch.mm(p, weight, out=dx[part])
        dw.addmm_(p.T, x[part])
    return (losses * token_weight).sum(), losses, dx, dw


def peak_gib(f: Callable[[], object]) -> float:
    """GiB that f holds at its worst beyond what was there before, results included."""
    f()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    f()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def verdict(args: list[Tensor]) -> tuple[bool, str]:
    """Whether ours is as near to float64 as PyTorch in the same dtype (factor 2; 1e-5 in fp32), and twice the same."""
    names = ("losses", "total", "dx", "dweight")
    # The torch backend in float64, in chunks: the reference's formula without its (T, V) matrices in float64.
    x, weight, labels, token_weight = args
    true = step(partial(linear_cross_entropy, chunk=512), x.double(), weight.double(), labels, token_weight.double())

    def errors(got: list[Tensor]) -> list[float]:
        pairs = zip(got, true, strict=True)
        return [((a.double() - t).norm() / t.norm().clamp_min(1e-30)).item() for a, t in pairs]

    eager = errors(step(linear_cross_entropy_reference, *args))
    ours = step(partial(linear_cross_entropy, backend="triton"), *args)
    found = errors(ours)
    again = step(partial(linear_cross_entropy, backend="triton"), *args)
    same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    limits = [1e-5 if x.dtype == torch.float32 else 2 * e + 1e-6 for e in eager]
    right = all(e <= limit for e, limit in zip(found, limits, strict=True))
    shown = "  ".join(f"{n} {e:.1e} ({p:.1e})" for n, e, p in zip(names, found, eager, strict=True))
    return right and same, shown + ("" if same else "  TWO RUNS DIFFER")


def must_be_right(args: list[Tensor]) -> None:
    right, shown = verdict(args)
    assert right, shown


def check_slices(dtype: torch.dtype, slices: int) -> tuple[bool, str]:
    """The vocabulary in slices, as ranks would hold it, against the whole."""
    x, weight, labels, token_weight = inputs(300, 4096, 512, dtype)
    whole = step(
        partial(linear_cross_entropy, backend="torch"), x.double(), weight.double(), labels, token_weight.double()
    )
    parts = weight.chunk(slices)
    starts = [i * parts[0].shape[0] for i in range(slices)]
    logits = [x @ part.T for part in parts]
    stats = [vocabulary_statistics(z, labels, s, "triton") for z, s in zip(logits, starts, strict=True)]
    lse, at_label = combine_statistics(torch.stack(stats))
    losses = (lse - at_label).where(labels != IGNORE, 0)
    dz = [vocabulary_gradient(z, lse, labels, token_weight, s, "triton") for z, s in zip(logits, starts, strict=True)]
    dx = sum((d @ part).double() for d, part in zip(dz, parts, strict=True))
    dw = torch.cat([d.T @ x for d in dz])
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    pairs = zip((losses, dx, dw), (whole[0], *whole[2:]), strict=True)
    found = [((a.double() - t).norm() / t.norm()).item() for a, t in pairs]
    return all(e <= limit for e in found), "losses {:.1e}  dx {:.1e}  dweight {:.1e}".format(*found)


def check() -> bool:
    fine = True
    for T, size, width in ((1, V, D), (63, V, D), (127, 1000, 512), (129, 50257, 512), (4097, 32768, D), (8192, V, D)):
        for dtype in (torch.bfloat16, torch.float32):
            if dtype == torch.float32 and T * size > 1e9:
                continue  # float32 products without tf32 at this size take seconds
            try:
                right, shown = verdict(inputs(T, size, width, dtype))
            except Exception as error:
                right, shown = False, f"{type(error).__name__}: {str(error)[:200]}"
            fine &= right
            print("ok   " if right else "WRONG", f"T={T} V={size} D={width}, {str(dtype)[6:]}:", shown, flush=True)
            torch.cuda.empty_cache()
    for dtype in (torch.bfloat16, torch.float32):
        right, shown = check_slices(dtype, 4)
        fine &= right
        print("ok   " if right else "WRONG", f"4 slices of the vocabulary, {str(dtype)[6:]}:", shown)
    return fine


def cases(T: int) -> Iterator[Case]:
    args = inputs(T)
    ours = partial(step, partial(linear_cross_entropy, backend="triton"), *args)
    peers = {"chunked PyTorch, bf16 addmm": partial(chunked_torch, *args)}
    if T <= 8192:
        peers["naive PyTorch"] = partial(step, linear_cross_entropy_reference, *args)
    judge = partial(must_be_right, args) if T <= 8192 else None
    flops, traffic = 6 * T * V * D, 3 * 2 * V * D + 4 * T * D
    label = f"T={T} V={V} D={D}"
    print(f"{label}: ours holds {peak_gib(ours):.2f} GiB, chunked PyTorch {peak_gib(next(iter(peers.values()))):.2f}")
    aim = "<= 25.5 ms, 1.2 GiB" if T == 8192 else ""
    yield Case("head + cross entropy, both", label, ours, peers, traffic, flops, check=judge, aim=aim)
    del args, ours, peers, judge
    for padding in (False, True):
        yield embedding_case(T, padding)


def embedding_case(T: int, padding: bool, device: str = "cuda", V: int = V, D: int = D) -> Case:
    """padding: all ids are the same; otherwise a few are frequent, as in text."""
    ids = torch.rand(T, device=device).pow(4).mul(V).long() if not padding else torch.full((T,), 11, device=device)
    dy, sums = torch.randn(T, D, device=device).bfloat16(), torch.zeros(V, D, device=device)
    rows = ids.unique()

    def dense() -> None:
        sums.add_(torch.ops.aten.embedding_dense_backward(dy, ids, V, -1, False))

    def judge() -> None:
        found = torch.zeros_like(sums)
        embedding_gradient_(found, ids, dy)
        true = torch.zeros(V, D, dtype=torch.float64, device=device).index_add_(0, ids, dy.double())
        error = ((found - true).norm() / true.norm()).item()
        assert error < 1e-6, f"relative error {error:.1e}"

    label = f"T={T} V={V} D={D}, {'one id' if padding else f'{len(rows)} ids'}"
    peers = {"dense gradient, added": dense}
    traffic = dy.nbytes + 2 * 4 * len(rows) * D
    return Case("embedding, gradient", label, partial(embedding_gradient_, sums, ids, dy), peers, traffic, check=judge)


def sweep(T: int = 8192) -> None:
    """Where the time goes, and what each choice costs."""
    args = inputs(T)
    x, weight, labels, token_weight = args
    losses = torch.empty(T, device="cuda")
    n = 2048
    for chunk in (1024, 2048, 4096, 8192):
        for fp32 in (False, True):
            module.FP32_WEIGHT_GRADIENT = fp32
            f = partial(step, partial(linear_cross_entropy, chunk=chunk, backend="triton"), *args)
            kind, ms = "fp32" if fp32 else "bf16", gpu_ms(f, budget_s=0.5)
            print(f"chunk {chunk}, dW in {kind}: {ms:.2f} ms, {peak_gib(f):.2f} GiB")
    module.FP32_WEIGHT_GRADIENT = False
    for own in ({"logits"}, {"dx"}, {"dw"}, {"logits", "dw"}, {"logits", "dx", "dw"}):
        for chunk in (2048, 4096):
            module.OWN_PRODUCTS = frozenset(own)
            right, shown = verdict([t[:n] if t.shape[0] == T else t for t in args])
            f = partial(step, partial(linear_cross_entropy, chunk=chunk, backend="triton"), *args)
            print(f"our kernel for {sorted(own)}, chunk {chunk}: {gpu_ms(f, budget_s=0.5):.2f} ms; right: {right}")
            if not right:
                print("   ", shown)
    module.OWN_PRODUCTS = frozenset()
    part, dlogits = x[:n], torch.randn(n, V, device="cuda", dtype=x.dtype)
    dw, dx = torch.zeros_like(weight), torch.empty_like(part)
    dw32 = torch.zeros(weight.shape, device="cuda")
    gigaflops = 2 * n * V * D / 1e9
    products = {
        "logits = x W^T": lambda: torch.mm(part, weight.T, out=dlogits),
        "dX = dlogits W": lambda: torch.mm(dlogits, weight, out=dx),
        "dW = dlogits^T x": lambda: torch.mm(dlogits.T, part, out=dw),
        "dW += dlogits^T x, bf16": lambda: torch.addmm(dw, dlogits.T, part, out=dw),
        "logits, our kernel": lambda: product.multiply_(dlogits, part, weight, b_t=True),
        "dX, our kernel": lambda: product.multiply_(dx, dlogits, weight),
        "dW, our kernel": lambda: product.multiply_(dw, dlogits, part, a_t=True),
        "dW +=, our kernel": lambda: product.multiply_(dw, dlogits, part, a_t=True, add=True),
        "dW += dlogits^T x, fp32": lambda: torch.addmm(dw32, dlogits.T, part, out_dtype=torch.float32, out=dw32),
    }
    for name, f in products.items():
        dlogits.normal_()  # `logits` has overwritten it
        ms = gpu_ms(f, budget_s=0.3)
        print(f"{n} tokens, {name}: {ms:.3f} ms, {gigaflops / ms:.0f} TFLOP/s")
    for block, warps in ((16384, 32), (16384, 16), (8192, 16), (8192, 8), (4096, 8)):
        dlogits.normal_()
        f = partial(rows.logits_loss_gradient_, dlogits, labels[:n], token_weight[:n], losses[:n], IGNORE, block, warps)
        ms = gpu_ms(f, budget_s=0.3)
        print(f"{n} rows in place, block {block}, {warps} warps: {ms:.3f} ms, {2 * dlogits.nbytes / ms / 1e6:.0f} GB/s")
    lse = torch.zeros(n, device="cuda")
    ms = gpu_ms(lambda: rows.logits_statistics(dlogits, labels[:n], 0), budget_s=0.3)
    print(f"{n} rows, statistics alone: {ms:.3f} ms, {dlogits.nbytes / ms / 1e6:.0f} GB/s")
    ms = gpu_ms(lambda: rows.logits_gradient_(dlogits, lse, labels[:n], token_weight[:n], 0, IGNORE), budget_s=0.3)
    print(f"{n} rows, gradient alone: {ms:.3f} ms, {2 * dlogits.nbytes / ms / 1e6:.0f} GB/s")


def main() -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare with float64, over odd shapes")
    parser.add_argument("--sweep", action="store_true", help="time chunks, products and row kernels apart")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    if options.check:
        raise SystemExit(not check())
    if options.sweep:
        sweep()
        return []
    records = run_cases(case for T in (8192, 32768) for case in cases(T))
    print_table(records, "head and cross entropy")
    print_json(records)
    return records


if __name__ == "__main__":
    main()
