"""What a run costs, from its configuration alone: parameters, FLOPs, the plan of every rank, and whether it fits.

`memory.py` counts what a rank holds and `traffic.py` what it sends; here they become the text of --dry-run.
"""

from __future__ import annotations

import os
import shlex
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nano3.cli import difference, parser, resolve
from nano3.config import Config, ModelConfig, UserError
from nano3.model.layout import split_of, whole_shapes
from nano3.model.lora import adapter_shapes, sites_of
from nano3.parallel.layout import Layout, check_layout, nearest_layout, objections
from nano3.parallel.pipeline_schedule import bubble, cut, peak_in_flight, spans_of
from nano3.presets import PRESETS
from nano3.train.flops import training_flops
from nano3.train.memory import Memory, Share, memory_of, micro_batches, shares
from nano3.train.recompute import choose
from nano3.train.traffic import traffic, traffic_table
from nano3.train.update import check_forms, state_bytes

GiB = 1 << 30
GPUS = {"80 GB (A100, H100)": 80e9, "141 GB (H200)": 141e9, "180 GB (B200)": 180e9}  # bytes, from the data sheets
USABLE = 0.95  # of a rank's memory; the rest is for CUDA, NCCL and the gaps between allocations


@dataclass(frozen=True)
class Parameters:
    """Parameters (buffers not counted) of one block of each kind, and of the whole model."""

    block: dict[str, int]  # letter -> parameters of such a block, its norm included
    experts: int  # routed experts of one mixture block
    embedding: int  # of the embedding; the head has as many
    total: int
    active: int  # what one token passes through, embedding and head counted


def parameters(c: ModelConfig) -> Parameters:
    D = c.hidden_size
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    in_proj = c.d_inner + c.conv_dim + c.mamba_num_heads
    conv = c.conv_dim * (c.conv_kernel + c.use_conv_bias)
    experts = c.n_routed_experts * 2 * D * c.moe_intermediate_size
    block = {
        "M": D + D * in_proj + conv + 3 * c.mamba_num_heads + c.d_inner + c.d_inner * D,
        "*": D + D * (q + 2 * kv) + q * D,
        "E": D + c.n_routed_experts * D + experts + 2 * D * c.moe_shared_expert_intermediate_size,
        "-": D + 2 * D * c.intermediate_size,
    }
    total = sum(block[letter] for letter in c.hybrid_override_pattern) + 2 * c.vocab_size * D + D
    idle = experts * (c.n_routed_experts - c.num_experts_per_tok) // c.n_routed_experts
    active = total - c.hybrid_override_pattern.count("E") * idle
    return Parameters(block, experts, c.vocab_size * D, total, active)


def layer_costs(config: Config) -> tuple[list[float], float]:
    """FLOPs per trained token of each layer, and of the head."""
    pattern = config.model.hybrid_override_pattern
    flops = training_flops(config.model, config.dataset.seq_length, config.peft.adapts)
    return [flops[letter] / pattern.count(letter) for letter in pattern], flops["head"]


def stage_spans(config: Config) -> list[tuple[int, int]]:
    """(start, stop) of the layers of each virtual stage: as asked, or cut so that the costliest costs least."""
    p = config.parallel
    layers, head = layer_costs(config)
    if p.stages is not None:
        return spans_of(p.stages, len(layers), p.pp * p.virtual_pp)
    return cut(layers, p.pp * p.virtual_pp, 0.0, head)


def rank_parts(config: Config, stage: int) -> list[tuple[int, int]]:
    """The spans of layers that the ranks of one pipeline stage hold."""
    return stage_spans(config)[stage :: config.parallel.pp]


def idle_share(config: Config, layout: Layout) -> float:
    """The pipeline's bubble, from 0 to 1, if time goes by FLOPs and messages take none."""
    if layout.pp == 1:
        return 0.0
    layers, head = layer_costs(config)
    costs = [sum(layers[start:stop]) for start, stop in stage_spans(config)]
    costs[-1] += head
    return bubble(layout.pp, config.parallel.virtual_pp, micro_batches(config, layout), costs=costs)


def memories(config: Config, world: int, device_type: str) -> list[Memory]:
    """What a rank of each pipeline stage holds, at the layout of the configuration on `world` ranks, a legal one."""
    layout, bf16 = Layout.of(config, world), uses_bf16(config, device_type)
    found = shares(config, layout, stage_spans(config), bf16)
    return [memory_of(config, layout, share, bf16, device_type == "cuda") for share in found]


def memory(config: Config, world: int, device_type: str) -> Memory:
    """What the fullest rank holds."""
    return max(memories(config, world, device_type), key=lambda m: m.total)


def choose_kinds(config: Config, world: int, device_type: str, have: int) -> Config:
    """The configuration with kinds in place of train.recompute=auto, for ranks that may use so many bytes each."""
    if config.train.recompute != "auto":
        return config
    gpu = device_type == "cuda"
    return choose(
        config,
        Layout.of(config, world),
        uses_bf16(config, device_type),
        lambda c: not gpu or memory(c, world, device_type).total <= USABLE * have,
    )


def machine_memory(device_type: str) -> int:
    """Bytes that one rank may use: the GPU's memory, or what the system has available (a container's limit counted)."""
    if device_type == "cuda":
        return torch.cuda.mem_get_info()[0]
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(lines.get("MemAvailable", f"{available >> 10} kB").split()[0]) << 10
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and limit.read_text().strip().isdecimal():
        available = min(available, int(limit.read_text()))
    return available


def memory_here(device_type: str, ranks_here: int) -> int:
    """Bytes that each rank of this machine may use.  A GPU belongs to one rank, the system's memory to all."""
    return machine_memory(device_type) // (ranks_here if device_type == "cpu" else 1)


def layout_ranks(config: Config) -> int:
    """Ranks of the smallest world that the layout divides, or NVIDIA's 32 for its default tp=4 ep=8."""
    p = config.parallel
    dense = p.tp * p.pp * p.cp
    least = max(dense, p.ep * p.pp) if p.tp * p.ep * p.pp * p.cp > 1 else 1
    return 4 * least if (p.tp, p.ep) == (4, 8) else least


def uses_bf16(config: Config, device_type: str) -> bool:
    return config.train.precision == "bf16" or (config.train.precision == "auto" and device_type == "cuda")


def summary(config: Config, name: str, world: int, device_type: str) -> str:
    """Parameters, length of the run and layout, a line each."""
    n, layout = parameters(config.model), Layout.of(config, world)
    flops = sum(training_flops(config.model, config.dataset.seq_length, config.peft.adapts).values())
    tokens = config.iterations * config.tokens_per_step
    left = f"dp={layout.dp}" + (f", edp={layout.edp}" if "E" in config.model.hybrid_override_pattern else "")
    devices = "GPUs" if device_type == "cuda" else "CPUs"
    o = config.optimizer
    masters = "fp32 masters" if o.masters == "fp32" else "no masters"
    precision = f"bf16 with {masters}" if uses_bf16(config, device_type) else "fp32"
    if o.moments != "fp32":
        precision += f", {o.moments.replace('8bit', '8-bit')} moments"
    return (
        f"{name}: {n.total:,} parameters, {n.active:,} active per token\n"
        f"run: {config.iterations:,} steps of {config.tokens_per_step:,} tokens = {tokens:,} tokens, "
        f"{flops / 1e9:.3g} GFLOP per trained token\n"
        f"layout: {layout} on {counted(world, 'rank')} ({left}), {devices}, {precision}"
    )


def report(config: Config, name: str, world: int, device_type: str, have: int | None) -> str:
    """The whole plan, within 100 columns.  have: bytes that a rank may use here; None: the run is for elsewhere."""
    layout, bf16 = Layout.of(config, world), uses_bf16(config, device_type)
    micro, B, S = micro_batches(config, layout), config.micro_batch(layout.dp), config.dataset.seq_length
    each = f"{counted(micro, 'micro-batch', 'es')} of {B} x {S:,} tokens"
    lines = [
        summary(config, name, world, device_type),
        f"step: {each} = {micro * B * S:,} tokens on each of {counted(layout.dp, 'replica')} (dp)",
    ]
    if config.recompute:
        lines.append(f"computed again in the backward pass: blocks of kind {', '.join(sorted(config.recompute))}")
    if layout.tp > 1:
        lines.append(f"between blocks a rank holds {B * S // layout.tp:,} tokens of a micro-batch")
    if layout.pp > 1:
        lines.append(f"pipeline: {layout.pp} stages, idle {idle_share(config, layout):.1%} of the time")
    found, held = shares(config, layout, stage_spans(config), bf16), memories(config, world, device_type)
    if config.peft.adapts:
        lines += ["", *adapter_table(config, bf16)]
    lines += ["", *stage_table(config, layout, found, held), verdict(max(m.total for m in held), have), ""]
    sent = [traffic(config, layout, share, bf16) for share in found]
    most = max(range(layout.pp), key=lambda i: sum(line.bytes for line in sent[i]))
    if not sent[most]:
        return "\n".join(lines[:-1])
    lines.append(traffic_table(sent[most], most))
    return "\n".join(lines)


def stage_table(config: Config, layout: Layout, found: list[Share], held: list[Memory]) -> list[str]:
    """What the ranks of each stage hold: layers, parameters by kind, bytes."""
    lines = []
    for share in found:
        flying = peak_in_flight(share.stage, layout.pp, len(share.parts), micro_batches(config, layout))
        what = counted(flying, "micro-batch", "es") if len(share.parts) == 1 else f"{flying} parts of micro-batches"
        title = f"stage {share.stage}: {counted(layout.block, 'rank')}, {what} in flight, layers "
        lines += textwrap.wrap(title + share.letters, 100, subsequent_indent=" " * 9, break_on_hyphens=False)
    one, unit = unit_for(max(m.total for m in held))
    kinds, sizes = ["dense", "experts", "embed.", "head"], ("weights", "grads", "optim.", "activ.", "total")
    kinds += ["adapters", "total"] if config.peft.adapts else ["total"]
    wide = 8 if config.peft.adapts else 9  # within 100 columns
    lines += [
        "",
        f"{'':8}{'million parameters of a rank':>{wide * len(kinds)}}  |{f'{unit} of a rank':>40}",
        f"{'stage':<8}" + "".join(f"{k:>{wide}}" for k in kinds) + "  |" + "".join(f"{k:>8}" for k in sizes),
    ]
    for share, m in zip(found, held, strict=True):
        held_here = share.parameters
        if config.peft.adapts:
            held_here.setdefault("adapters", 0)
        numbers = [*held_here.values(), sum(held_here.values())]
        digits = 1 if config.peft.adapts or max(numbers) >= 1e10 else 2
        row = f"{share.stage:<8}" + "".join(f"{x / 1e6:{wide},.{digits}f}" for x in numbers) + "  |"
        lines.append(row + "".join(f"{x / one:8.2f}" for x in [*vars(m).values(), m.total]))
    return lines


def adapter_table(config: Config, bf16: bool) -> list[str]:
    """Where the rank of adapters goes: by kind of weight how many, their trained parameters, and bytes in training.

    A trained number costs itself, its gradient's sum, two moments, and where it is bf16 a master, as optimizer.* says.
    """
    c, peft = config.model, config.peft
    shapes = whole_shapes(c)
    kinds: dict[str, list[int]] = {}  # number, parameters, bytes
    dtype = torch.bfloat16 if bf16 else torch.float32
    each = dtype.itemsize + (2 if config.optimizer.gradients == "bf16" else 4)
    for site in sites_of(c, peft):
        kind = site.module.split(".mixer.")[1] + (" (shared)" if site.shared else "")
        found = kinds.setdefault(kind, [0, 0, 0])
        experts = c.n_routed_experts if site.routed and not site.shared else 1
        found[0] += experts
        for name, shape in adapter_shapes(site, shapes[site.weight], peft).items():
            t = torch.empty(shape, dtype=dtype, device="meta")
            found[1] += t.numel()
            found[2] += t.numel() * each + state_bytes(config.optimizer, shape[0], t, split_of(name, c, 1))
    total = parameters(c).total
    whole = [sum(column) for column in zip(*kinds.values(), strict=True)]
    lines = [f"{'adapters of rank ' + str(peft.rank):32}{'number':>9}{'parameters':>15}{'MiB in training':>17}"]
    for kind, (number, n, size) in [*kinds.items(), ("all", whole)]:
        lines.append(f"  {kind:30}{number:>9,}{n:>15,}{size / (1 << 20):>17,.1f}")
    router = "frozen" if peft.router_frozen else "trained in full"
    share = f"{whole[1] / total:.2%} of {total:,}"
    held = "frozen weights are in FP8" if peft.base_dtype == "fp8" else "nothing is kept for frozen weights"
    return [*lines, f"trained: {share}; routers {router}; scale {peft.scale:g}; {held}"]


def counted(n: int, what: str, plural: str = "s") -> str:
    return f"{n:,} {what}{plural if n != 1 else ''}"


def unit_for(most: float) -> tuple[int, str]:
    return (GiB, "GiB") if most >= GiB else (1 << 20, "MiB")


def verdict(need: int, have: int | None) -> str:
    """Whether so many bytes fit: into what a rank has here, or into which GPU."""
    one, unit = unit_for(need)
    needs = f"the fullest rank needs {need / one:.1f} {unit}"
    if have is not None:
        return f"{needs}, {have / GiB:.1f} GiB are free: it {'fits' if need <= USABLE * have else 'does not fit'} here"
    for gpu, size in GPUS.items():
        if need <= USABLE * size:
            return f"{needs}: it fits GPUs of {gpu}, which is {size / GiB:.1f} GiB"
    return f"{needs}, more than any GPU known here has: raise parallel.ep, tp or pp"


def dry_run(config: Config, name: str, asked: int | None, device_type: str, ranks_here: int) -> str:
    """The report for `asked` ranks, or those of torchrun, or those that the layout is for.

    A run on ranks that are not here is planned for GPUs, unless train.device=cpu.  Raises UserError on a layout that
    does not work.
    """
    started = os.environ.get("WORLD_SIZE")
    world = asked or int(started or layout_ranks(config))
    check_layout(config, world)
    elsewhere = (asked is not None or started is None) and world > 1
    on_gpus = config.train.device == "cuda" or (elsewhere and config.train.device == "auto")
    planned = "cuda" if on_gpus else device_type
    check_forms(config.optimizer, uses_bf16(config, planned), config.parallel.grad_reduce_in_fp32)
    have = memory_here(planned, ranks_here) if planned == device_type else None
    config = choose_kinds(config, world, planned, int(min(GPUS.values())) if have is None else have)
    return report(config, name, world, planned, have)


def check_fits(config: Config, name: str, world: int, device_type: str, ranks_here: int) -> None:
    """Raise UserError, with the arithmetic and what to run instead, if a rank cannot hold its share.  No allocation.

    On GPUs it is the current one that counts.

    A layout that does not work on these ranks is check_layout's business, unless what it would propose does not fit.
    """
    wanted = Layout.of(config, world)
    here = nearest_layout(config, wanted)  # itself where it works
    if here is None:
        return
    have = memory_here(device_type, ranks_here)
    need = memory(at(config, here), world, device_type).total
    if need <= USABLE * have:
        return
    what = counted(world, "GPU") if device_type == "cuda" else "no GPU"
    lines = [
        f"{name} does not fit this machine ({what}, {have / GiB:.1f} GiB for each rank)",
        f"on {counted(world, 'rank')} at {here} the fullest rank needs {need / GiB:.1f} GiB",
        f"run instead: {instead(config.mode, device_type, have)}",
    ]
    size = have if device_type == "cuda" else int(min(GPUS.values()))
    found = where_it_fits(config, size)
    if found is None:
        lines.append(
            f"no number of GPUs with {size / GiB:.1f} GiB holds it at {wanted}, nor at tp=4 ep=8: raise parallel.ep, "
            "parallel.tp or parallel.pp, or set train.recompute=full; --dry-run --world-size N shows a plan"
        )
    else:
        there, ranks = found
        nodes = f"--nnodes={-(-ranks // 8)} --rdzv-backend=c10d --rdzv-endpoint=HEAD:29400" if ranks > 8 else ""
        changed = [setting for setting in difference(there, name) if setting != "train.device=cpu"]
        command = shlex.join(["train.py", "--mode", config.mode, "--preset", name, *changed])
        m = memory(there, ranks, "cuda")
        rows = ", ".join(f"{kind} {n / GiB:.1f}" for kind, n in vars(m).items())
        lines += [
            f"where it fits: torchrun {nodes or '--standalone'} --nproc-per-node={min(8, ranks)} {command}",
            *(f"    {line}" for line in summary(there, name, ranks, "cuda").splitlines()),
            f"    memory of the fullest rank: {m.total / GiB:.1f} GiB ({rows})",
        ]
    raise UserError("\n  ".join(lines))


def where_it_fits(config: Config, have: int, most: int = 1024) -> tuple[Config, int] | None:
    """A layout and the fewest GPUs, in steps of two, that hold it with so many bytes each: that of the configuration,
    or else the first of the usual ones for a node of 8 (docs/multi_gpu.md)."""
    p = config.parallel
    for tp, ep in ((p.tp, p.ep), (1, 8), (2, 8), (4, 8)):
        there = at(config, Layout(1, tp, ep, p.pp))
        ranks = layout_ranks(there)
        while ranks <= most:
            works = not objections(there, Layout.of(there, ranks))
            if works and memory(there, ranks, "cuda").total <= USABLE * have:
                return there, ranks
            ranks *= 2
    return None


def at(config: Config, layout: Layout) -> Config:
    """The configuration with another layout; stages of another number of them are cut by cost."""
    sizes = {axis: getattr(layout, axis) for axis in ("tp", "ep", "pp")}
    if all(getattr(config.parallel, axis) == n for axis, n in sizes.items()):
        return config
    return replace(config, parallel=replace(config.parallel, **sizes, virtual_pp=1, stages=None))


def instead(mode: str, device_type: str, have: int) -> str:
    """The command for the largest preset that one rank of this machine can train."""
    fits = []
    for name in PRESETS:
        config, _ = resolve(parser().parse_args(["--mode", mode, "--preset", name]))
        config.parallel = replace(config.parallel, tp=1, ep=1, pp=1, cp=1)
        if memory(config, 1, device_type).total <= USABLE * have:
            fits.append((parameters(config.model).total, name))
    if not fits:
        return "a smaller model; no preset fits here"
    total, name = max(fits)
    return f"python train.py --mode {mode} --preset {name}    ({total / 1e6:,.1f} M parameters)"
