"""The messages of a step as planned, against those that a training step really sends."""

from collections import defaultdict
from itertools import combinations

import pytest
import torch

from nano3.config import ModelConfig
from nano3.model.init import allocate, initialise
from nano3.parallel.layout import check_layout
from nano3.train import gradients
from nano3.train import traffic as module
from nano3.train.checkpoint import build
from nano3.train.memory import rows_per_token, shares
from nano3.train.optim import AdamW
from nano3.train.plan import rank_parts, stage_spans
from nano3.train.step import training_step
from nano3.train.traffic import traffic, traffic_table
from tests.parallel.layouts import CPU, batches_of, config_for
from tests.train.mirror import Mirror, mirror_mesh

LAYOUTS = [
    (2, "parallel.tp=2"),
    (4, "parallel.tp=4 train.recompute=full"),  # 2 KV heads: two ranks share one
    (4, "parallel.tp=2 train.recompute=[mamba,moe] train.loss_chunk_tokens=5"),
    (2, "parallel.ep=2"),
    (8, "parallel.ep=4 train.recompute=full"),
    (4, "parallel.pp=4"),
    (2, "parallel.pp=2 parallel.virtual_pp=4 train.recompute=[attention,mlp]"),
    (4, "parallel.pp=2 parallel.virtual_pp=2 parallel.tp=2"),
    (2, "train.micro_batch_size=2"),
    (4, "train.micro_batch_size=2 parallel.grad_reduce_in_fp32=false train.precision=bf16"),
    (8, "parallel.tp=2 parallel.ep=4 parallel.pp=2 train.recompute=[moe]"),
    (32, "parallel.tp=4 parallel.ep=8 train.recompute=[moe] train.precision=bf16"),
    (32, "parallel.tp=2 parallel.ep=4 parallel.pp=4 parallel.stages=[1,4,2,1] train.micro_batch_size=2"),
]
LORA = "parallel.tp=2 parallel.ep=4 train.recompute=full peft.scheme=lora"
FROZEN = [  # what lies before the first trained weight has no backward pass; in its own block, a part has none
    (4, "parallel.tp=2 parallel.ep=4 peft.freeze=[embeddings.weight]"),
    (4, "parallel.tp=2 parallel.ep=4 train.recompute=full peft.freeze=[embeddings.weight,'*norm.weight']"),
    (4, "parallel.tp=2 parallel.ep=4 peft.freeze=[embeddings.weight,'layers.[0-2].*']"),
    (4, "parallel.tp=2 peft.freeze=[embeddings.weight,'layers.*']"),
    (4, "parallel.tp=2 peft.freeze=[embeddings.weight,'layers.*',norm_f.weight]"),
    (4, "parallel.tp=2 parallel.ep=4 train.recompute=full peft.freeze=[embeddings.weight,'layers.[0-3].*'] "
        "peft.freeze_router=true"),
    (4, "parallel.tp=2 peft.freeze=[embeddings.weight,'layers.[0-3].*','*norm.weight','*.shared_experts.*']"),
    (8, "parallel.tp=2 parallel.ep=4 parallel.pp=2 peft.freeze=[embeddings.weight,'layers.[0-4].*']"),
    (4, "parallel.tp=2 parallel.pp=2 parallel.virtual_pp=2 train.recompute=full peft.freeze=[embeddings.weight]"),
    (4, LORA),
    (4, f"{LORA} peft.target_modules=[o_proj]"),
    (4, f"{LORA} peft.target_modules=[up_proj]"),
    (4, f"{LORA} peft.target_modules=[up_proj,down_proj] peft.experts=none"),
    (4, f"{LORA} peft.target_modules=[experts.down_proj]"),
    (4, f"{LORA} peft.target_modules=[o_proj] peft.freeze_router=false"),
]  # fmt: skip


@pytest.mark.parametrize(("ranks", "text"), LAYOUTS + FROZEN, ids=lambda v: str(v).replace(" ", "-"))
def test_every_message_of_a_step(monkeypatch: pytest.MonkeyPatch, ranks: int, text: str) -> None:
    config = config_for(text.split())
    layout, bf16 = check_layout(config, ranks), config.train.precision == "bf16"
    for share in shares(config, layout, stage_spans(config), bf16):
        mesh = mirror_mesh(config, layout, share.stage * layout.block)
        parts = rank_parts(config, share.stage)
        model = build(config.model, config.recompute, mesh, parts, config.peft)
        initialise(allocate(model, CPU, torch.bfloat16 if bf16 else torch.float32), config.model, seed=5)
        optimizer = AdamW(model, config.optimizer, config.parallel.grad_reduce_in_fp32)
        with monkeypatch.context() as patch:
            mirror = Mirror(patch)
            rows = batches_of(config, 0, False, mesh.dp.rank, mesh.dp.size)
            training_step(model, optimizer, rows, config, mesh, 1e-3, False)
            if mirror.rows:  # what was expected becomes what was sent, so that the bytes are exact
                tokens = rows[0].tokens.numel() / layout.tp
                mean = sum(mirror.rows) / len(mirror.rows) / tokens * layout.ep / (layout.ep - 1)
                assert mean == pytest.approx(rows_per_token(config.model, layout.ep), rel=0.3)
                patch.setattr(module, "rows_per_token", lambda *_, mean=mean: mean)
            lines = traffic(config, layout, share, bf16)
        messages, sent = defaultdict(int), defaultdict(float)
        for line in lines:
            messages[line.axis, line.call] += line.messages
            sent[line.axis, line.call] += line.bytes
        assert messages == mirror.messages
        if (ranks, text) in FROZEN:  # a block without a backward pass sends its rows less often, so the mean is another
            rows = ("ep", "all_to_all")
            assert sent.pop(rows, 0) == pytest.approx(mirror.bytes.pop(rows, 0), rel=0.01)
        assert sent == pytest.approx(mirror.bytes, rel=1e-9)


CHOICES = [(8, 3, 4), (8, 2, 2), (12, 5, 3), (6, 4, 6), (8, 1, 8), (8, 8, 4), (8, 3, 1)]


@pytest.mark.parametrize(("E", "K", "ep"), CHOICES)
def test_rows_per_token_by_counting_all_choices(E: int, K: int, ep: int) -> None:
    choices = list(combinations(range(E), K))
    homes = sum(len({expert // (E // ep) for expert in choice}) for choice in choices)
    c = ModelConfig(n_routed_experts=E, num_experts_per_tok=K)
    assert rows_per_token(c, ep) == pytest.approx(homes / len(choices))


def test_one_rank_sends_nothing() -> None:
    config = config_for([])
    layout = check_layout(config, 1)
    assert [traffic(config, layout, s, False) for s in shares(config, layout, stage_spans(config), False)] == [[]]


def test_the_table_loses_nothing() -> None:
    config = config_for(["parallel.tp=2", "parallel.ep=4", "parallel.pp=2"])
    layout = check_layout(config, 8)
    lines = traffic(config, layout, shares(config, layout, stage_spans(config), True)[0], True)
    table = traffic_table(lines, 0)
    assert max(map(len, table.splitlines())) <= 100
    numbers = [int(row[61:71].replace(",", "")) for row in table.splitlines()[1:-2]]
    assert sum(numbers) == sum(line.messages for line in lines)


def test_resident_kernels_leave_room_while_buckets_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first bucket that leaves during the backward pass to the sum, and from the update to the last gathering,
    which the forward pass of the next step waits for."""
    config = config_for(["parallel.tp=1"])
    layout = check_layout(config, 2)
    mesh = mirror_mesh(config, layout, 0)
    model = build(config.model, mesh=mesh)
    initialise(allocate(model, CPU, torch.float32), config.model, seed=5)
    optimizer = AdamW(model, config.optimizer)
    optimizer.communication_sms = 7
    seen: list[int] = []
    monkeypatch.setattr(gradients, "leave_free", seen.append)
    rows = batches_of(config, 0, False, mesh.dp.rank, mesh.dp.size)
    with monkeypatch.context() as patch:
        Mirror(patch)
        training_step(model, optimizer, rows, config, mesh, 1e-3, False)
        while_backward = len(optimizer.buckets)
        assert seen[-while_backward - 2 :] == [7] * while_backward + [0, 7]
        seen.clear()
        optimizer.finish_gather()
    assert seen == [0]
