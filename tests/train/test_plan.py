"""Counts against the published model, the code's own tensors, and hand arithmetic."""

import re
import shlex
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels._common import INTERPRET
from nano3.cli import parser, resolve
from nano3.config import KINDS, Config, ModelConfig, UserError
from nano3.model.cache import Rows
from nano3.model.init import allocate, initialise, named_tensors
from nano3.model.lora import scales_of
from nano3.parallel.data import make_buckets
from nano3.parallel.layout import Layout, check_layout
from nano3.parallel.pipeline_schedule import peak_in_flight
from nano3.presets import PRESETS
from nano3.train import memory as memory_module
from nano3.train import plan
from nano3.train.checkpoint import build
from nano3.train.memory import activation_bytes, activations, adapter_bytes, memory_of, micro_batches, shares
from nano3.train.optim import AdamW
from nano3.train.plan import check_fits, dry_run, memory, parameters, rank_parts, stage_spans, training_flops
from nano3.train.recompute import forward_seconds
from tests.parallel.layouts import CPU, config_for
from tests.train.mirror import Mirror, mirror_mesh
from tests.train.small import trainer


def preset(name: str, *overrides: str) -> Config:
    return resolve(parser().parse_args(["--mode", "pretrain", "--preset", name, *overrides]))[0]


def test_the_released_model() -> None:
    n = parameters(ModelConfig())
    assert n.total == 31_577_937_344
    assert n.active == 3_580_076_352 - 23 * 128  # the published figure counts the bias buffers
    assert (n.block["M"], n.block["*"]) == (38_744_896, 23_399_040)
    assert n.block["E"] == 1_297_468_160 - 128


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("ladder-1b", 1.275e9, 0.315e9),
        ("ladder-2b", 2.424e9, 0.505e9),
        ("ladder-4b", 4.374e9, 0.776e9),
        ("ladder-7b", 7.249e9, 1.109e9),
        ("ladder-15b", 14.80e9, 2.009e9),
    ],
)
def test_the_published_ladder(name: str, total: float, active: float) -> None:
    n = parameters(preset(name).model)
    assert n.total == pytest.approx(total, rel=5e-4)
    assert n.active == pytest.approx(active, rel=2e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_formula_equals_the_model_built(name: str) -> None:
    config = preset(name).model
    assert parameters(config).total == sum(p.numel() for p in build(config).parameters())


def test_flops_of_the_released_model() -> None:
    flops = training_flops(ModelConfig(), 8192)
    assert sum(flops.values()) == pytest.approx(21.05e9, rel=0.01)
    assert flops["head"] == 3 * 2 * 2688 * 131072


def test_memory_by_hand() -> None:
    config = preset("tiny")
    n, biases = parameters(config.model).total, 4 * 3 * 8
    one = memory(config, 1, "cpu")
    assert (one.weights, one.gradients, one.optimizer) == (4 * n + biases, 4 * n, 8 * n)
    nano = preset("nano-30b-a3b", "parallel.tp=1", "parallel.ep=8")
    experts = 23 * 128 * 2 * 2688 * 1856
    dense = parameters(nano.model).total - experts
    scalars = 23 * 3 * 64  # A_log, D and dt_bias, which are fp32 and their own masters
    eight = memory(nano, 8, "cuda")
    assert eight.weights == 2 * (dense + experts // 8) + 2 * scalars + 4 * 23 * 128
    assert eight.gradients == 4 * (dense + experts // 8)
    assert eight.optimizer == 12 * (dense // 8 + experts // 8) - 4 * scalars // 8
    assert eight.optimizer == pytest.approx(12 * (dense / 8 + experts / 8), rel=1e-6)


def test_nvidias_default_by_hand() -> None:
    """tp=4 ep=8 on 32 GPUs: dense tensors over 4, but norms and routers whole and each KV head on two ranks."""
    config = preset("nano-30b-a3b")
    (share,) = shares(config, Layout.of(config, 32), stage_spans(config), bf16=True)
    mamba = (10304 * 2688 + 6144 * 5 + 3 * 64 + 4096 + 4096 * 2688) // 4
    attention = (2 * 32 * 128 * 2688) // 4 + 2 * 128 * 2688
    moe = 128 * 2688 + 2 * 3712 * 2688 // 4
    assert share.parameters == {
        "dense": 23 * mamba + 6 * attention + 23 * moe + 53 * 2688,
        "experts": 23 * 16 * 2 * 2688 * 1856,
        "embedding": 131072 * 2688 // 4,
        "head": 131072 * 2688 // 4,
    }
    held = memory(config, 32, "cuda")
    assert held.optimizer == pytest.approx(12 * (23 * 16 * 2 * 2688 * 1856 / 4 + 558.9e6 / 8), rel=1e-3)
    assert 35 * plan.GiB < held.total < 45 * plan.GiB


SHARED = [
    ("nano-30b-a3b", 32, ""),
    ("nano-30b-a3b", 64, "parallel.tp=8 parallel.ep=16 parallel.pp=4"),
    ("ladder-2b", 16, "parallel.tp=2 parallel.ep=8 parallel.pp=2 parallel.virtual_pp=2"),
    ("nano-4b", 8, "parallel.tp=4 parallel.pp=2 parallel.stages=[20,22]"),
    ("nano-30b-a3b", 8, "parallel.tp=4 parallel.ep=4 parallel.pp=2 peft.scheme=lora"),
]


@pytest.mark.parametrize(("name", "ranks", "text"), SHARED, ids=lambda v: str(v).replace(" ", "-"))
def test_shares_are_the_model_built_for_each_rank(name: str, ranks: int, text: str) -> None:
    config = preset(name, *text.split())
    layout = check_layout(config, ranks)
    found = shares(config, layout, stage_spans(config), bf16=True)
    for rank in range(ranks):
        mesh = mirror_mesh(config, layout, rank)
        model = build(config.model, config.recompute, mesh, rank_parts(config, mesh.pp.rank), config.peft)
        share = found[mesh.pp.rank]
        assert {n: t.shape for n, t in share.tensors.items()} == {n: t.shape for n, t in named_tensors(model).items()}
        assert sum(share.parameters.values()) == sum(p.numel() for p in model.parameters())


REAL = [
    (1, ""),
    (4, "parallel.tp=4"),
    (6, "train.global_batch_size=6"),  # rows do not divide by 6: the last ranks own less
    (8, "parallel.tp=2 parallel.ep=4 train.precision=bf16"),
    (8, "parallel.ep=2 parallel.pp=2 train.precision=bf16 parallel.grad_reduce_in_fp32=false"),
    (4, "parallel.tp=2 parallel.ep=4 train.precision=bf16 peft.scheme=lora peft.rank=8 peft.freeze_router=false"),
    (2, "parallel.ep=2 peft.scheme=lora peft.rank=8 peft.experts=shared"),
    (4, "parallel.tp=2 parallel.ep=2 train.precision=bf16 peft.scheme=lora peft.rank=8 peft.base_dtype=fp8"),
    (6, "train.global_batch_size=6 optimizer.moments=8bit model.hidden_size=32"),
    (4, "parallel.tp=2 train.precision=bf16 optimizer.moments=8bit model.mamba_head_dim=32 optimizer.gradients=bf16"),
    (2, "parallel.ep=2 train.precision=bf16 optimizer.masters=none optimizer.moments=bf16 optimizer.gradients=bf16"),
    (1, "train.precision=bf16 peft.scheme=lora peft.rank=16 optimizer.moments=8bit optimizer.masters=none"),
]


@pytest.mark.parametrize(("ranks", "text"), REAL, ids=lambda v: str(v).replace(" ", "-"))
def test_bytes_are_those_of_the_optimizer(monkeypatch: pytest.MonkeyPatch, ranks: int, text: str) -> None:
    """Buckets, masters and moments that AdamW makes and a step fills; buckets small enough that there are several."""
    monkeypatch.setattr(make_buckets, "__defaults__", (2000,))
    config = config_for(text.split())
    layout, bf16 = check_layout(config, ranks), config.train.precision == "bf16"
    found = shares(config, layout, stage_spans(config), bf16)
    fullest: dict[int, int] = {}
    for rank in range(ranks):
        mesh = mirror_mesh(config, layout, rank)
        model = build(config.model, config.recompute, mesh, rank_parts(config, mesh.pp.rank), config.peft)
        initialise(allocate(model, CPU, torch.bfloat16 if bf16 else torch.float32), config.model, seed=5)
        optimizer = AdamW(model, config.optimizer, config.parallel.grad_reduce_in_fp32)
        with monkeypatch.context() as patch:
            Mirror(patch)
            for p in optimizer.parameters.values():
                (p * 0).sum().backward()
            optimizer.step(1e-3)
        share = found[mesh.pp.rank]
        planned = memory_of(config, layout, share, bf16, gpu=False)
        real = [(b.axis.size, b.width, b.dtype, b.wire, [m.name for m in b.members]) for b in optimizer.buckets]
        assert real == [(b.axis.size, b.width, b.dtype, b.wire, [m.name for m in b.members]) for b in share.buckets]
        assert len(real) > 2
        held = list(named_tensors(model).values())
        held += [scales for t in held if (scales := scales_of(t)) is not None]
        assert planned.weights == sum(t.nbytes for t in held)
        assert planned.gradients == sum(b.axis.size * b.width * b.dtype.itemsize for b in optimizer.buckets)
        state = sum(t.nbytes for kept in optimizer.state().values() for t in kept.values())
        assert state <= planned.optimizer
        fullest[mesh.pp.rank] = max(state, fullest.get(mesh.pp.rank, 0))
    assert fullest == {s.stage: memory_of(config, layout, s, bf16, gpu=False).optimizer for s in found}


def kept_for_backward(compute: Callable[[], object], own: list[Tensor]) -> int:
    """Bytes of what autograd saves while it computes, each storage once, `own` tensors left out."""
    weights = {t.untyped_storage().data_ptr() for t in own}
    storages = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = compute()
    assert kept is not None  # alive until here, so that no address is used twice
    return sum(s.nbytes() for s in storages.values())


@pytest.mark.parametrize("letter", KINDS)
@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        (1, ""),
        (2, "parallel.tp=2"),
        (4, "parallel.tp=2 parallel.ep=4"),
        (2, "parallel.ep=2"),
        (1, "peft.scheme=lora"),
    ],
    ids=lambda v: str(v).replace(" ", "-"),
)
def test_activations_are_what_autograd_saves(
    monkeypatch: pytest.MonkeyPatch, letter: str, ranks: int, text: str
) -> None:
    """PyTorch's operators here; the kernels where they are interpreted (TRITON_INTERPRET=1)."""
    shape = ["dataset.seq_length=96", "model.chunk_size=16", "model.head_dim=16", "model.hidden_size=64"]
    config = config_for([*text.split(), *shape, "model.mamba_head_dim=16", "model.ssm_state_size=16"])
    layout, layer = check_layout(config, ranks), config.model.hybrid_override_pattern.index(letter)
    mesh = mirror_mesh(config, layout, 0)
    model = build(config.model, frozenset(), mesh, None, config.peft)
    initialise(allocate(model, CPU, torch.float32), config.model, seed=5)
    block = model.layers[str(layer)]
    x = torch.randn(1, 96 // layout.tp, 64, requires_grad=True)
    mirror = Mirror(monkeypatch)
    measured = kept_for_backward(lambda: block.train()((x,), Rows(), None, False), list(named_tensors(model).values()))
    if mirror.rows:  # the expectation is another test's business
        arrived = sum(mirror.rows) / len(mirror.rows) * layout.ep / (layout.ep - 1) * layout.tp / 96
        monkeypatch.setattr(memory_module, "rows_per_token", lambda *_: arrived)
    planned = activation_bytes(config.model, letter, 96, layout.tp, layout.ep, 4, gpu=INTERPRET)
    planned += adapter_bytes(config, letter, layout.tp, 4, gpu=INTERPRET)
    if config.peft.adapts:  # frozen weights let go of what only their gradients need; the plan does not count on it
        assert 0.6 * planned * 96 < measured <= planned * 96
    else:
        assert planned * 96 == pytest.approx(measured, rel=0.03)


def test_the_kernels_keep_what_the_plan_says(monkeypatch: pytest.MonkeyPatch, run_script) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    cases = [*(f"1--{letter}" for letter in KINDS), "4-parallel.tp=2-parallel.ep=4-E", "1-peft.scheme=lora-E"]
    test = "tests/train/test_plan.py::test_activations_are_what_autograd_saves"
    done = run_script("-m", "pytest", "-q", *(f"{test}[{case}]" for case in cases))
    assert f"{len(cases)} passed" in done.stdout


@pytest.mark.parametrize("virtual", [1, 2])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_activations_in_flight(virtual: int, recompute: str) -> None:
    """Equal parts: as many of them as the schedule has in flight, each with the stream it hands on; and what passes."""
    stages = f"parallel.stages={[4 // virtual] * 2 * virtual}"
    text = f"parallel.pp=2 parallel.virtual_pp={virtual} model.hybrid_override_pattern=-------- train.precision=bf16"
    config = config_for([*text.split(), stages, f"train.recompute={recompute}", "model.intermediate_size=512"])
    layout = check_layout(config, 2)
    for share in shares(config, layout, stage_spans(config), bf16=True):
        stream, whole = 16 * 24 * 2, 16 * activation_bytes(config.model, "-", 16, 1, 1, 2, gpu=True)
        each = 4 // virtual * (whole if recompute == "none" else stream) + stream
        flying = peak_in_flight(share.stage, 2, virtual, micro_batches(config, layout))
        head = 2 * (16 * 64 + 2 * 16 * 24) if share.stage == 1 else 0
        passing = max(head, whole if recompute == "full" else 0)
        assert activations(config, layout, share, bf16=True, gpu=True) == flying * each + passing


def test_what_training_does_not_reach_keeps_nothing() -> None:
    """Frozen up to layer 4: of eight equal blocks the last three keep what all keep of theirs."""
    text = "model.hybrid_override_pattern=-------- train.precision=bf16 model.intermediate_size=512"
    last = "peft.freeze=[embeddings.weight,'layers.[0-4].*']"
    found = []
    for more in ([], [last], [last, "train.recompute=full"]):
        config = config_for([*text.split(), *more])
        (share,) = shares(config, layout := check_layout(config, 1), stage_spans(config), bf16=True)
        found.append(activations(config, layout, share, bf16=True, gpu=True))
    stream, block = 16 * 24 * 2, 16 * activation_bytes(config.model, "-", 16, 1, 1, 2, gpu=True)
    assert found[0] - found[1] == 5 * block
    head = 2 * (16 * 64 + 2 * 16 * 24)
    assert found[2] == 3 * stream + stream + max(head, block)


def test_recompute_lowers_the_estimate() -> None:
    kept, less = (memory(preset("ladder-1b", f"train.recompute={r}"), 1, "cuda") for r in ("none", "full"))
    assert less.activations < kept.activations / 3


def test_recompute_of_convolutions_frees_their_output() -> None:
    kept, less = (memory(preset("nano-30b-a3b", f"train.recompute={r}"), 32, "cuda") for r in ("[moe]", "[moe,conv]"))
    rank = 23 * 6144 // 4 * 2  # tp=4, bf16
    assert kept.activations - less.activations == rank * preset("nano-30b-a3b").dataset.seq_length


def test_a_model_too_large_is_refused_with_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "machine_memory", lambda device: 16 << 30)
    with pytest.raises(UserError) as caught:
        check_fits(preset("nano-30b-a3b-top5"), "nano-30b-a3b-top5", 1, "cpu", 1)
    text = str(caught.value)
    for part in ("31,577,937,344 parameters", "tp=4 ep=8", "GiB", "16.0 GiB", "--preset tiny", "torchrun --nnodes=4"):
        assert part in text
    check_fits(preset("tiny"), "tiny", 1, "cpu", 1)


def test_the_nearest_preset_is_the_largest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "machine_memory", lambda device: 45 << 30)
    with pytest.raises(UserError, match="--preset ladder-1b"):
        check_fits(preset("nano-30b-a3b"), "nano-30b-a3b", 1, "cuda", 1)


def test_the_layout_asked_for_is_the_one_that_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 32 GPUs each rank of tp=4 ep=8 needs 39 GiB; on 8 they own more rows each, and more GPUs are named."""
    config = preset("nano-30b-a3b")
    eight, thirty_two = memory(config, 8, "cuda").total, memory(config, 32, "cuda").total
    assert eight > thirty_two + 25 * plan.GiB
    monkeypatch.setattr(plan, "machine_memory", lambda device: int(thirty_two / plan.USABLE) + 1)
    check_fits(config, "nano-30b-a3b", 32, "cuda", 8)
    with pytest.raises(UserError, match="on 8 ranks at tp=4 ep=8 pp=1") as caught:
        check_fits(config, "nano-30b-a3b", 8, "cuda", 8)
    assert "--nnodes=4" in str(caught.value)
    monkeypatch.setattr(plan, "machine_memory", lambda device: int(thirty_two / plan.USABLE) - 1)
    with pytest.raises(UserError, match="--nnodes=8 "):
        check_fits(config, "nano-30b-a3b", 32, "cuda", 8)


def test_where_it_fits_is_a_command_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a layout of its own a large mixture is told one, and what was typed is part of the command."""
    monkeypatch.setattr(plan, "machine_memory", lambda device: 16 << 30)
    with pytest.raises(UserError) as caught:
        check_fits(preset("ladder-15b", "train.recompute=[moe,mamba]", "train.device=cpu"), "ladder-15b", 1, "cpu", 1)
    words = next(x for x in str(caught.value).splitlines() if "where it fits" in x).split("train.py")
    assert "--standalone --nproc-per-node=8" in words[0]
    there = resolve(parser().parse_args(shlex.split(words[1])))[0]
    assert (there.parallel.ep, there.train.recompute, there.train.device) == (8, ["moe", "mamba"], "auto")
    check_layout(there, 8)
    assert memory(there, 8, "cuda").total <= plan.USABLE * 80e9


def test_a_layout_that_cannot_work_is_left_to_the_layout_check(monkeypatch: pytest.MonkeyPatch) -> None:
    check_fits(preset("tiny", "parallel.tp=2"), "tiny", 1, "cpu", 1)
    monkeypatch.setattr(plan, "machine_memory", lambda device: 1 << 20)
    with pytest.raises(UserError, match="on 1 rank at tp=1 ep=1 pp=1 the fullest rank needs"):
        check_fits(preset("tiny", "parallel.tp=2"), "tiny", 1, "cpu", 1)


PLANS = [
    ("tiny", None, ""),
    ("nano-30b-a3b-top5", None, ""),
    ("nano-30b-a3b", 32, "parallel.tp=1 parallel.pp=4 parallel.stages=[14,14,14,10]"),
    ("nano-30b-a3b", 1024, "parallel.tp=8 parallel.ep=32 parallel.pp=8 parallel.virtual_pp=3"),
    ("nano-4b", 16, "parallel.tp=4 parallel.pp=2 train.device=cpu"),
    ("ladder-15b", 256, "train.recompute=full train.precision=fp32"),
]


@pytest.mark.parametrize(("name", "ranks", "text"), PLANS, ids=lambda v: str(v).replace(" ", "-"))
def test_the_plan_of_any_layout_can_be_read(
    monkeypatch: pytest.MonkeyPatch, name: str, ranks: int | None, text: str
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = preset(name, *text.split())
    lines = dry_run(config, name, ranks, "cpu", 1).splitlines()
    assert max(map(len, lines)) <= 100
    p, pattern = config.parallel, config.model.hybrid_override_pattern
    stages = {line[:6].split()[0]: line for line in lines if line[:1].isdigit()}
    assert list(stages) == [str(i) for i in range(p.pp)]
    parts = [letters.split("|") for letters in re.findall(r"layers ([ME*|-]+)", " ".join(" ".join(lines).split()))]
    assert "".join(part for chunk in zip(*parts, strict=True) for part in chunk) == pattern
    for part in ("micro-batch", "the fullest rank needs", f"tp={p.tp} ep={p.ep} pp={p.pp}"):
        assert any(part in line for line in lines)
    assert any(line.startswith("in all: ") for line in lines) == (name != "tiny")


def test_the_world_of_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked, what torchrun started, or what the layout is for; and what it is planned for."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    nano, tiny = preset("nano-30b-a3b"), preset("tiny")
    assert "on 32 ranks (dp=8, edp=4), GPUs, bf16" in dry_run(nano, "nano-30b-a3b", None, "cpu", 1)
    assert "on 64 ranks (dp=16, edp=8), GPUs, bf16" in dry_run(nano, "nano-30b-a3b", 64, "cpu", 1)
    assert "on 1 rank (dp=1, edp=1), CPUs, fp32" in dry_run(tiny, "tiny", None, "cpu", 1)
    assert "on 2 ranks (dp=2, edp=2), CPUs, fp32" in dry_run(preset("tiny", "train.device=cpu"), "tiny", 2, "cpu", 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "on 4 ranks (dp=4, edp=4), CPUs, fp32" in dry_run(tiny, "tiny", None, "cpu", 4)
    with pytest.raises(UserError, match=r"The nearest layout that does: parallel\.tp=4 parallel\.ep=4"):
        dry_run(nano, "nano-30b-a3b", 12, "cpu", 1)


def test_a_world_size_is_for_dry_runs() -> None:
    with pytest.raises(UserError, match=r"--world-size 4 .* --dry-run"):
        preset("tiny", "--world-size", "4")
    with pytest.raises(UserError, match="--world-size 0 must be at least 1"):
        preset("tiny", "--world-size", "0", "--dry-run")


def test_the_script_plans_without_a_gpu_and_refuses_with_status_2(run_script) -> None:
    command = ["train.py", "--mode", "pretrain", "--preset", "nano-30b-a3b", "--dry-run", "--world-size"]
    done = run_script(*command, "32", "parallel.tp=4", "parallel.ep=8")
    assert (done.returncode, done.stderr) == (0, "")
    assert "on 32 ranks (dp=8, edp=4)" in done.stdout
    done = run_script(*command, "32", "parallel.tp=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert "The nearest layout that does" in done.stderr


def test_auto_recomputes_the_cheapest_kinds_that_fit() -> None:
    """Nano over 64 GPUs, where activations decide: from all kinds to none as memory grows, never one too many."""
    settings = ["parallel.tp=1", "parallel.ep=8", "train.micro_batch_size=1"]
    config = preset("nano-30b-a3b", "train.recompute=auto", *settings)
    seconds = forward_seconds(config, Layout.of(config, 64), bf16=True)
    costs = []
    for gib in (40, 50, 60, 70):
        may = plan.USABLE * (gib << 30)
        chosen = plan.choose_kinds(config, 64, "cuda", gib << 30)
        costs.append(sum(seconds[kind] for kind in chosen.recompute))
        assert gib == 40 or memory(chosen, 64, "cuda").total <= may
        for kind in chosen.recompute:
            fewer = preset("nano-30b-a3b", f"train.recompute=[{','.join(chosen.recompute - {kind})}]", *settings)
            assert memory(fewer, 64, "cuda").total > may
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == pytest.approx(sum(seconds.values()))
    assert len(set(costs)) == 4
    assert costs[-1] == 0


def test_auto_is_none_on_a_cpu_and_counts_as_all_until_it_is_chosen() -> None:
    assert trainer("train.recompute=auto").config.train.recompute == "none"
    config = preset("tiny", "train.recompute=auto")
    assert config.recompute == set(KINDS.values())
    assert plan.choose_kinds(config, 1, "cpu", 0).train.recompute == "none"
    assert plan.choose_kinds(preset("tiny", "train.recompute=[moe]"), 1, "cuda", 0).train.recompute == ["moe"]
