"""Routing and routed experts at Nano's shapes (128 experts, 6 chosen, 2688 x 1856, bf16): ours, PyTorch's, floor.

python -m benchmarks.kernels_moe            table at T = 8192 and 32768, one JSON line last
python -m benchmarks.kernels_moe --check    errors against float64 over odd shapes, one line a case
python -m benchmarks.kernels_moe --sweep    every tile worth trying for each product, T = 8192 (or --tokens), then the
                                            block with rows gathered, rows copied, and the best of each product
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Case, gpu_ms, print_json, print_table, run_cases
from kernels import grouped_gemm_configs, grouped_gemm_rows, grouped_gemm_weights
from kernels.grouped_gemm import experts, sort_by_expert
from kernels.grouped_gemm_configs import HOPPER_COPY, HOPPER_GATHER, HOPPER_NARROW, Config, choose_configs
from kernels.grouped_gemm_rows import down_rows, down_rows_backward, up_rows, up_rows_backward
from kernels.grouped_gemm_weights import weight_gradient
from kernels.permute import copy_rows, plan_rows, sum_rows
from kernels.routing import expert_counts, route, route_reference

D, HIDDEN, E, K = 2688, 1856, 128, 6
AIMS = {8192: {"up": "0.75", "dW": "0.85", "block": "5.5"}, 32768: {"block": "20"}}


def random_choices(T: int, K: int, E: int, kind: str = "all") -> Tensor:
    """K different experts a token, evenly; few: only even ids; one: always the first K."""
    if kind == "one":
        return torch.arange(K, device="cuda").expand(T, K).contiguous()
    chance = torch.rand(T, E, device="cuda")
    if kind == "few":
        chance[:, 1::2] = -1
    return chance.topk(K, dim=-1).indices


def inputs(T: int, D: int, F_: int, E: int, K: int, dtype: torch.dtype) -> list[Tensor]:
    """x, routing weights, up, down and the gradient of y."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    weights = 2.5 * torch.rand(T, K, device="cuda").add_(0.2).softmax(-1)
    return [normal(T, D), weights, normal(E, F_, D).mul_(D**-0.5), normal(E, D, F_).mul_(F_**-0.5), normal(T, D)]


def run(f: Callable[..., Tensor], args: list[Tensor]) -> list[Tensor]:
    """y, dx, dweights, dup, ddown."""
    *leaves, dy = args
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = f(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def errors(got: list[Tensor], args: list[Tensor], experts_TK: Tensor) -> list[float]:
    """Relative errors (Euclidean) against float64, expert by expert, so that only one expert's matrices are float64."""
    x, weights, up, down, dy = args
    x, weights, dy = x.double(), weights.double(), dy.double()
    y, dx, dweights = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(weights)
    wrong, size = torch.zeros(2, 5, dtype=torch.float64, device="cuda")
    for e in range(up.shape[0]):
        t, k = (experts_TK == e).nonzero(as_tuple=True)
        u, d, w = up[e].double(), down[e].double(), weights[t, k][:, None]
        r = (x[t] @ u.T).relu()
        hs = w * r * r
        g = dy[t] @ d
        dz = 2 * w * r * g
        y.index_add_(0, t, hs @ d.T)
        dx.index_add_(0, t, dz @ u)
        dweights[t, k] = (g * r * r).sum(-1)
        for i, true in ((3, dz.T @ x[t]), (4, dy[t].T @ hs)):
            wrong[i] += (got[i][e].double() - true).square().sum()
            size[i] += true.square().sum()
    for i, true in enumerate((y, dx, dweights)):
        wrong[i] = (got[i].double() - true).square().sum()
        size[i] = true.square().sum()
    return (wrong / size).sqrt().tolist()


NAMES = ("y", "dx", "dweights", "dup", "ddown")


def verdict(args: list[Tensor], experts_TK: Tensor) -> tuple[bool, str]:
    """Whether ours is as near to float64 as eager PyTorch (factor 2; 1e-5 in fp32), and twice the same."""
    counts = torch.bincount(experts_TK.flatten(), minlength=args[2].shape[0])

    def block(backend: str) -> list[Tensor]:
        return run(lambda x, w, up, down: experts(x, w, experts_TK, counts, up, down, backend), args)

    got, again = block("triton"), block("triton")
    same = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    del again
    found = errors(got, args, experts_TK)
    del got
    eager = errors(block("torch"), args, experts_TK)
    limits = [1e-5 if args[0].dtype == torch.float32 else 2 * e + 1e-6 for e in eager]
    right = all(e <= limit for e, limit in zip(found, limits, strict=True))  # NaN is not <=
    shown = "  ".join(f"{n} {e:.1e} ({p:.1e})" for n, e, p in zip(NAMES, found, eager, strict=True))
    return right and same, shown + ("" if same else "  TWO RUNS DIFFER")


def experts_verdict(T: int, d: int, f: int, e: int, k: int, dtype: torch.dtype, kind: str) -> tuple[bool, str]:
    return verdict(inputs(T, d, f, e, k, dtype), random_choices(T, k, e, kind))


def route_verdict(T: int, K: int, E: int, groups: tuple[int, int], x_dtype: torch.dtype, w_dtype: torch.dtype) -> tuple:
    torch.manual_seed(T)
    x = torch.randn(T, D, device="cuda", dtype=x_dtype)
    w = torch.randn(E, D, device="cuda").mul_(D**-0.5).to(w_dtype)
    bias = 0.05 * torch.randn(E, device="cuda")
    dscores, dweights = 0.1 * torch.randn(T, E, device="cuda"), torch.randn(T, K, device="cuda")

    def gradients(dtype: torch.dtype | None, experts_TK: Tensor | None) -> list[Tensor]:
        leaves = [(t if dtype != torch.float64 else t.double()).detach().requires_grad_() for t in (x, w)]
        if experts_TK is None:
            scores, weights, chosen = route(*leaves, bias, K, *groups, True, 2.5)
        else:
            scores = F.linear(*(t.to(dtype) for t in leaves)).sigmoid()
            weights, chosen = scores.gather(-1, experts_TK), experts_TK
            weights = 2.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20)
        loss = (scores * dscores).sum() + (weights * dweights).sum()
        return [scores.detach(), weights.detach(), *torch.autograd.grad(loss, leaves), chosen]

    *got, chosen = gradients(None, None)
    *again, chosen2 = gradients(None, None)
    same = all(torch.equal(a, b) for a, b in zip([*got, chosen], [*again, chosen2], strict=True))
    true, eager = gradients(torch.float64, chosen)[:4], gradients(torch.float32, chosen)[:4]
    found, theirs = (
        [((a.double() - t).norm() / t.norm()).item() for a, t in zip(values, true, strict=True)]
        for values in (got, eager)
    )
    limits = [1e-5 if a.dtype == torch.float32 else 2 * e + 1e-6 for a, e in zip(got, theirs, strict=True)]
    best = route_reference(x.double(), w.double(), bias.double(), K, *groups).experts_TK
    rate = (best.sort(-1).values == chosen.sort(-1).values).all(-1).double().mean().item()
    counted = torch.equal(expert_counts(chosen, E), torch.bincount(chosen.flatten(), minlength=E))
    plan, (order, place) = plan_rows(chosen, E, 128), sort_by_expert(chosen)
    sorted_ = torch.equal(plan.order_R.long(), order) and torch.equal(plan.place_TK.long(), place)
    right = all(e <= limit for e, limit in zip(found, limits, strict=True)) and rate > 0.98 and counted and sorted_
    shown = "  ".join(
        f"{n} {e:.1e} ({p:.1e})" for n, e, p in zip(("scores", "weights", "dx", "dw"), found, theirs, strict=True)
    )
    notes = ["TWO RUNS DIFFER"] * (not same) + ["COUNTS"] * (not counted) + ["ORDER"] * (not sorted_)
    return right and same, f"{shown}  same choice {rate:.4%} {' '.join(notes)}"


def check() -> bool:
    """One line a case; the number in brackets is PyTorch's own error."""
    bf16, fp32 = torch.bfloat16, torch.float32
    fine = True

    def report(name: str, f: Callable[[], tuple[bool, str]]) -> None:
        nonlocal fine
        try:
            right, shown = f()
        except Exception as error:
            right, shown = False, f"{type(error).__name__}: {str(error)[:200]}"
        fine &= right
        print("ok   " if right else "WRONG", f"{name}:", shown, flush=True)
        torch.cuda.empty_cache()

    for T, k, e, groups in [(1, 6, 128, (1, 1)), (63, 1, 128, (1, 1)), (127, 5, 72, (1, 1)), (129, 22, 512, (1, 1)),
                            (4097, 6, 128, (8, 4)), (4097, 22, 128, (1, 1)), (8192, 6, 128, (1, 1))]:  # fmt: skip
        for dtypes in ((bf16, bf16), (bf16, fp32), (fp32, fp32)):
            label = "/".join(str(d)[6:] for d in dtypes)
            report(f"route T={T} K={k} E={e} groups={groups} {label}", partial(route_verdict, T, k, e, groups, *dtypes))
    shapes = [  # T, D, F, E, K, kind
        (1, D, HIDDEN, 16, 6, "all"), (63, D, HIDDEN, 16, 1, "all"), (127, D, HIDDEN, 16, 5, "all"),
        (129, D, HIDDEN, 16, 6, "few"), (129, 264, 136, 16, 22 // 4, "all"), (257, 100, 90, 40, 22, "all"),
        (300, 256, 192, 5, 1, "one"), (4097, 512, 320, 32, 22, "all"), (4097, D, HIDDEN, 16, 6, "one"),
    ]  # fmt: skip
    default = grouped_gemm_configs.HOPPER
    for way, dtype in ((HOPPER_GATHER, bf16), (HOPPER_COPY, bf16), (default, fp32)):  # fp32 has one way
        grouped_gemm_configs.HOPPER = way
        note = str(dtype)[6:] + (" copied" if way is HOPPER_COPY else "")
        for T, d, f, e, k, kind in shapes:
            name = f"experts T={T} D={d} F={f} E={e} K={k} {kind} {note}"
            report(name, partial(experts_verdict, T, d, f, e, k, dtype, kind))
        if dtype == bf16:
            report(f"experts T=8192 Nano {note}", partial(experts_verdict, 8192, D, HIDDEN, E, K, bf16, "all"))
    grouped_gemm_configs.HOPPER = default
    return fine


def grouped_mm_block(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, experts_TK: Tensor) -> Tensor:
    """What one writes with torch._grouped_mm: sort, gather, product, relu^2, product, weigh, gather back, sum."""
    order, place = sort_by_expert(experts_TK)
    counts = torch.zeros(E, dtype=torch.int64, device=x.device)
    ends = counts.scatter_add_(0, experts_TK.flatten(), torch.ones_like(experts_TK.flatten())).cumsum(0).int()
    h = torch._grouped_mm(x[order // K], up.mT, offs=ends).relu().square()
    h = (h * weights.flatten()[order, None]).to(x.dtype)
    y = torch._grouped_mm(h, down.mT, offs=ends)
    return y[place.flatten()].unflatten(0, place.shape).sum(1)


def backward_of(f: Callable, *args: Tensor, dy: Tensor | tuple[Tensor, ...]) -> Callable[[], object]:
    state = []

    def step() -> object:
        if not state:
            leaves = [t.detach().requires_grad_() for t in args]
            state.extend([f(*leaves), leaves])
        return torch.autograd.grad(*state, dy, retain_graph=True)

    return step


def routing_cases(T: int) -> Iterator[Case]:
    x, w, bias = (torch.randn(s, device="cuda") for s in ((T, D), (E, D), (E,)))
    x, w, bias = x.bfloat16(), (w * D**-0.5).bfloat16(), 0.05 * bias
    grads = torch.randn(T, E, device="cuda"), torch.randn(T, K, device="cuda")
    shape = f"T={T} D={D} E={E} K={K}"

    def ours(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return route(x, w, bias, K, scale=2.5)[:2]

    def eager(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return route_reference(x, w, bias, K, scale=2.5)[:2]

    def must_be_right() -> None:
        right, shown = route_verdict(T, K, E, (1, 1), torch.bfloat16, torch.bfloat16)
        assert right, shown

    flops, moved = 2.0 * T * D * E, 2.0 * D * (T + E) + T * (4 * E + 12 * K)
    yield Case(
        "route forward", shape, lambda: ours(x, w), {"eager": lambda: eager(x, w)}, moved, flops, check=must_be_right
    )
    yield Case(
        "route backward", shape, backward_of(ours, x, w, dy=grads), {"eager": backward_of(eager, x, w, dy=grads)},
        4.0 * T * D + 8.0 * T * E + 6.0 * E * D, 2 * flops,
    )  # fmt: skip
    ids = random_choices(T, K, E)
    torch_sort = {"sort": lambda: sort_by_expert(ids)}
    yield Case("order, inverse, tiles", shape, lambda: plan_rows(ids, E, 128), torch_sort, 24.0 * T * K)
    torch_bins = {"bincount": lambda: torch.bincount(ids.flatten(), minlength=E)}
    yield Case("counts", shape, lambda: expert_counts(ids, E), torch_bins, 8.0 * T * K)


class Products:
    """Operands of the six grouped products at T tokens, and each product as a function of its tiles.

    With Config.copy a product reads rows that lie in expert order already: the copy is timed by itself.
    """

    def __init__(self, T: int) -> None:
        x, weights, up, down, dy = inputs(T, D, HIDDEN, E, K, torch.bfloat16)
        self.x, ids = x, random_choices(T, K, E)
        self.configs = configs = choose_configs(x, up, down)
        order, place, tiles = plan_rows(ids, E, configs["up"].block_m)
        self.place, self.token = place, order // K
        weights_R = weights.flatten()[order.long()]
        rows, dy_rows = self.rows, _ = copy_rows(x, place, T * K), copy_rows(dy, place, T * K)
        gather, in_place = (order, K), (None, 0)

        def up_(c: Config) -> Tensor:
            return up_rows(rows if c.copy else x, weights_R, up, tiles, *(in_place if c.copy else gather), c)

        hs = up_(configs["up"])

        def dH(c: Config) -> Tensor:
            where = in_place if c.copy else gather
            return down_rows_backward(dy_rows if c.copy else dy, weights_R, hs, down, tiles, *where, c)[0]

        dz = dH(configs["dH"])
        ends = tiles.offsets_E1[1:].contiguous()
        self.ours: dict[str, Callable[[Config], Tensor]] = {
            "up": up_,
            "down": lambda c: down_rows(hs, down, tiles, c),
            "dH": dH,
            "dX": lambda c: up_rows_backward(dz, up, tiles, c),
            "dup": lambda c: weight_gradient(
                rows if c.copy else x, dz, tiles, *(in_place if c.copy else gather), False, c
            ),
            "ddown": lambda c: weight_gradient(
                dy_rows if c.copy else dy, hs, tiles, *(in_place if c.copy else gather), True, c
            ),
        }
        operands = {  # of the bare product: torch has rows gathered, and gets no epilogue to do
            "up": (rows, up.mT),
            "down": (hs, down.mT),
            "dH": (rows, down),
            "dX": (dz, up),
            "dup": (dz.t(), rows),
            "ddown": (rows.t(), hs),
        }
        self.torch = {name: partial(torch._grouped_mm, a, b, offs=ends) for name, (a, b) in operands.items()}


def product_cases(T: int) -> Iterator[Case]:
    p = Products(T)
    R, W = T * K, 2.0 * E * D * HIDDEN
    few, many_f, many_d = 2.0 * T * D, 2.0 * R * HIDDEN, 2.0 * R * D
    moved = {"up": few + many_f, "down": many_f + many_d, "dH": few + 2 * many_f, "dX": many_f + many_d}
    for name, f in p.ours.items():
        aim = AIMS.get(T, {}).get("dW" if name in WEIGHTS else name, "")
        yield Case(
            name, f"T={T} E={E} K={K}", partial(f, p.configs[name]), {"grouped_mm": p.torch[name]},
            moved.get(name, few + many_f) + W, 2.0 * R * D * HIDDEN, aim=aim,
        )  # fmt: skip
    gather = {"gather + sum": lambda: p.rows[p.place.flatten()].unflatten(0, p.place.shape).sum(1)}
    index = {"index_select": lambda: p.x.index_select(0, p.token)}
    yield Case("copy of rows", f"T={T} K={K}", lambda: copy_rows(p.x, p.place, R), index, many_d + few)
    yield Case("sum of K rows", f"T={T} K={K}", lambda: sum_rows(p.rows, p.place), gather, many_d + few)


def block_cases(T: int) -> Iterator[Case]:
    args = inputs(T, D, HIDDEN, E, K, torch.bfloat16)
    *leaves, dy = args
    leaves = [t.requires_grad_() for t in leaves]
    ids = random_choices(T, K, E)
    shape, aims = f"T={T} E={E} K={K}", AIMS.get(T, {})
    flops, moved = 4.0 * T * K * D * HIDDEN, 4.0 * E * D * HIDDEN + 4.0 * T * K * (2 * HIDDEN + 2 * D)

    def ours() -> Tensor:
        return experts(leaves[0], leaves[1], ids, expert_counts(ids, E), *leaves[2:])

    def peer() -> Tensor:
        return grouped_mm_block(*leaves, ids)

    def both(f: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(f(), leaves, dy)

    def must_be_right() -> None:
        if T <= 8192:  # the loop of float64 products over 128 experts; longer inputs are the same code
            right, shown = verdict([t.detach() for t in args], ids)
            assert right, shown

    yield Case("experts forward", shape, ours, {"grouped_mm": peer}, moved, flops, check=must_be_right)
    yield Case("experts fwd + bwd", shape, both(ours), {"grouped_mm": both(peer)}, 3 * moved, 3 * flops,
               aim=aims.get("block", ""))  # fmt: skip


def cases(T: int) -> Iterator[Case]:
    yield from block_cases(T)
    yield from product_cases(T)
    yield from routing_cases(T)


# Beside the tables of the kernels.  Tiles are M, N, K, warps, stages, programs per multiprocessor, one loop over
# tiles and steps.  All rows are cut into 128, so that any choice for the products makes one whole block.
ROW_CONFIGS = [
    Config(128, 256, 64, 8, 4, copy=True),
    Config(128, 256, 64, 8, 3, copy=True, store=True),
    Config(128, 256, 64, 8, 3, copy=True, store=True, split=2),
    Config(128, 256, 64, 8, 4, 1, False, copy=True, store=True, split=2),
    Config(128, 256, 64, 8, 3, 1, False, copy=True, store=True, split=2),
    Config(128, 128, 64, 4, 3, 2, False, copy=True, store=True, split=2),
    Config(128, 256, 64, 8, 4, store=True, split=2),
    Config(128, 256, 64, 8, 3, store=True, split=2),
    Config(128, 256, 64, 8, 3, 1, False),
]
WEIGHTS = ("dup", "ddown")
WEIGHT_CONFIGS = [
    Config(128, 256, 64, 8, 3, copy=True),
    Config(128, 256, 64, 8, 3, copy=True, store=True),
    Config(256, 128, 64, 8, 4, copy=True, store=True, split=2),
    Config(256, 128, 64, 8, 3, copy=True, store=True),
    Config(128, 256, 32, 8, 8, copy=True, store=True, split=2),
    Config(128, 128, 64, 4, 3, 2, copy=True, store=True, split=2),
    Config(128, 256, 64, 8, 5, store=True, split=2),
    Config(256, 128, 64, 8, 5, store=True, split=2),
]


def compiled(kernel: object, f: Callable[[], Tensor]) -> tuple[Tensor, str]:
    """f's result, and the registers, spills and shared memory of what `kernel` was compiled to for it."""
    launched, run = [], kernel.run
    kernel.run = lambda *args, **options: launched.append(run(*args, **options))
    try:
        result = f()
    finally:
        del kernel.run  # the class has it
    used = launched[-1]
    return result, f"{used.n_regs} registers, {used.n_spills} spilled, {used.metadata.shared} B shared"


def distance(got: Tensor, true: Tensor) -> float:
    """Relative error (Euclidean), piece by piece: a copy of all weight gradients in fp32 would be large."""
    wrong = size = 0.0
    for g, t in zip(got.flatten(0, -2).split(1 << 14), true.flatten(0, -2).split(1 << 14), strict=True):
        wrong += (g.float() - t.float()).square().sum().item()
        size += t.float().square().sum().item()
    return (wrong / size) ** 0.5


def trial(name: str, f: Callable[[Config], Tensor], config: Config, true: Tensor, flops: float) -> tuple[float, str]:
    """Milliseconds (infinite where it fails or is wrong), and a line that says so.  Raises nothing."""
    tile, options = config[:5], list(config._asdict().items())[5:]
    shown = " ".join([*map(str, tile), *(f"{k}={v}" for k, v in options if v != Config._field_defaults[k])])
    try:
        kernel = grouped_gemm_weights._weights_kernel if name in WEIGHTS else grouped_gemm_rows._rows_kernel
        got, used = compiled(kernel, partial(f, config))
        error = distance(got, true)
        del got
        ms = gpu_ms(partial(f, config), budget_s=0.1)
        wrong = "" if error < 0.01 else "WRONG "  # NaN is not <
        line = f"{name:5} {ms:.3f} ms {flops / ms / 1e9:5.0f} TFLOP/s  {wrong}{error:.1e}  {shown}  ({used})"
        return float("inf") if wrong else ms, line
    except Exception as reason:
        return float("inf"), f"{name:5} {shown}: {type(reason).__name__} {str(reason)[:120]}"


def gpu_is_lost() -> bool:
    """Whether an earlier kernel did what no later call in this process recovers from (an illegal address)."""
    try:
        torch.cuda.synchronize()
        return False
    except RuntimeError:
        return True


def sweep(T: int, after: int = 0) -> None:
    """Times every configuration of every product, best first; each must give what HOPPER_GATHER gives, to rounding.

    after: how many to leave out, since a lost GPU starts the program anew behind the configuration that lost it.
    """
    p = Products(T)
    best, number = dict(HOPPER_GATHER), 0
    for name, f in p.ours.items():
        true, found = f(HOPPER_GATHER[name]), []
        tables = HOPPER_GATHER, HOPPER_COPY, HOPPER_NARROW
        configs = [*(t[name] for t in tables), *(WEIGHT_CONFIGS if name in WEIGHTS else ROW_CONFIGS)]
        if name in ("down", "dX"):  # which gather nothing
            configs = [c._replace(copy=False) for c in configs]
        for config in dict.fromkeys(configs):
            number += 1
            if number <= after:
                continue
            ms, line = trial(name, f, config, true, 2.0 * T * K * D * HIDDEN)
            found.append((ms, line, config))
            if gpu_is_lost():
                print(line, "THE GPU WAS LOST", *(line for _, line, _ in found[:-1]), sep="\n", flush=True)
                again = ["-m", "benchmarks.kernels_moe", "--sweep", "--tokens", str(T), "--after", str(number)]
                os.execv(sys.executable, [sys.executable, *again])
        found.sort(key=lambda r: r[0])
        print(*(line for _, line, _ in found), sep="\n", flush=True)
        if found and found[0][0] < float("inf"):
            best[name] = found[0][2]
        del true
    print(f"copy  {gpu_ms(partial(copy_rows, p.x, p.place, T * K), budget_s=0.1):.3f} ms, of x or of dy")
    del p, f
    for label, chosen in (("gathered", HOPPER_GATHER), ("copied", HOPPER_COPY), ("best of each", best)):
        grouped_gemm_configs.HOPPER = chosen
        try:
            forward, both = (gpu_ms(case.ours, budget_s=0.2) for case in block_cases(T))
            print(f"block {label}: forward {forward:.3f} ms, forward + backward {both:.3f} ms", flush=True)
        except Exception as reason:
            print(f"block {label}: {type(reason).__name__} {str(reason)[:120]}", flush=True)
    print(*(f"best  {name}: {tuple(config)}" for name, config in best.items()), sep="\n")


def main() -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare with float64")
    parser.add_argument("--sweep", action="store_true", help="only time every configuration")
    parser.add_argument("--tokens", type=int, nargs="+", default=None)
    parser.add_argument("--after", type=int, default=0, help="leave out the first configurations of the sweep")
    args = parser.parse_args()
    if args.check:
        raise SystemExit(0 if check() else 1)
    if args.sweep:
        for T in args.tokens or [8192]:
            sweep(T, args.after)
        return []
    records = []
    for T in args.tokens or [8192, 32768]:
        found = run_cases(cases(T))
        print_table(found, f"Routing and experts, T = {T}")
        records += found
    print_json(records)
    return records


if __name__ == "__main__":
    main()
