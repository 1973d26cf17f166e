"""A pool of ranks that runs one layout after another, and what one process computes, to compare with.

Started once, by the server of `ranks.py`, which has imported torch already.
"""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.fp8 import expanded
from nano3.config import Config
from nano3.data.loader import Batch, Place, micro_batches
from nano3.data.packing import PackedFile, Rows
from nano3.data.row import PADDING
from nano3.model.generate import generate
from nano3.model.init import allocate, generator, initialise, named_tensors
from nano3.model.layout import axis_of, split_of, whole_shapes
from nano3.model.lora import adapted, scales_of
from nano3.model.model import Nano3
from nano3.parallel.layout import check_layout
from nano3.parallel.mesh import ALONE, Mesh, lay_out
from nano3.train import checkpoint
from nano3.train.checkpoint import build
from nano3.train.optim import AdamW
from nano3.train.plan import rank_parts
from nano3.train.step import evaluate, training_step
from nano3.train.storage import Progress
from tests.parallel.ranks import CONTEXT
from tests.train.small import small

CPU = torch.device("cpu")
STEPS = 3

# Every kind of block; 8 heads in 4 groups; 2 KV heads, fewer than tp=4; 8 experts, K=3 of them.
MODEL = [
    "model.hybrid_override_pattern=ME*-EMEM",
    "model.hidden_size=24",
    "model.mamba_num_heads=8",
    "model.mamba_head_dim=4",
    "model.n_groups=4",
    "model.ssm_state_size=4",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.head_dim=8",
    "model.n_routed_experts=8",
    "model.num_experts_per_tok=3",
    "model.moe_intermediate_size=12",
    "model.moe_shared_expert_intermediate_size=16",
    "model.intermediate_size=16",
    "model.vocab_size=64",
    "model.chunk_size=4",
    "model.moe_aux_loss_coeff=0.1",
    "model.moe_router_bias_update_rate=0.01",
    "dataset.seq_length=16",
    "train.global_batch_size=8",
    "train.micro_batch_size=1",
    "optimizer.lr=0.01",
    "optimizer.clip_grad=1.0",
]


@dataclass
class Result:
    """What a run of a few optimizer steps leaves; tensors of the whole model, or one rank's share of them."""

    losses: list[float]
    balance: list[float]
    norms: list[float]
    gradients: list[dict[str, Tensor]]  # per step, summed over all ranks, before clipping
    tensors: dict[str, Tensor]  # parameters and selection biases after the last step
    evaluation: float
    text: list[int]


def config_for(overrides: tuple[str, ...]) -> Config:
    return small(*MODEL, *overrides)


def rows_from(path: str, config: Config) -> Rows:
    """The rows of a file that packing wrote, as both splits."""
    documents = PackedFile(Path(path), config.dataset.seq_length, config.model.vocab_size)
    return Rows({"train": documents, "valid": documents}, config.dataset.seq_length, seed=3)


def one_by_one(rows: Rows, split: str, samples: range) -> list[Batch]:
    """Each document of the rows as a micro-batch of its own: nothing packed, nothing padded."""
    out = []
    for row in (rows.row(split, i) for i in samples):
        for number in range(int(row.seq_idx[row.seq_idx != PADDING].max()) + 1):
            here = torch.from_numpy(row.seq_idx == number)
            out.append(Batch(*(torch.from_numpy(t)[here][None] for t in (row.tokens, row.labels))))
    return out


def batches_of(config: Config, step: int, packed: bool, dp_rank: int, dp_size: int) -> list[Batch]:
    """This rank's micro-batches of random tokens; some are masked, and packed rows have boundaries of their own and
    padding at their end."""
    g = np.random.default_rng(step)
    rows, S, V = config.train.global_batch_size, config.dataset.seq_length, config.model.vocab_size
    tokens = torch.from_numpy(g.integers(0, V, (rows, S)))
    labels = torch.from_numpy(g.integers(0, V, (rows, S))).where(torch.from_numpy(g.random((rows, S)) > 0.2), -100)
    seq_idx = real = None
    if packed:
        real = torch.arange(S) < torch.from_numpy(g.integers(S - 4, S + 1, (rows, 1)))
        seq_idx = torch.from_numpy((g.random((rows, S)) < 0.2).cumsum(1)).where(real, S)
        labels = labels.where(real, -100)
    share = rows // dp_size
    starts = range(dp_rank * share, (dp_rank + 1) * share, config.micro_batch(dp_size))
    cut = [slice(i, i + config.micro_batch(dp_size)) for i in starts]
    return [Batch(tokens[c], labels[c], *((seq_idx[c], real[c]) if packed else ())) for c in cut]


@dataclass(frozen=True)
class Case:
    """packed: rows of several documents.  starve: a selection bias keeps one expert from ever being chosen.
    data: a file of packed samples, which the one process sees one by one.
    save: write a checkpoint here after the second step; load: start from that one instead, and first of all write
    what was read into `copy`."""

    overrides: tuple[str, ...]
    ranks: int
    packed: bool = False
    starve: bool = False
    data: str | None = None
    save: str | None = None
    load: str | None = None
    copy: str | None = None
    dtype: torch.dtype = torch.float64


@torch.no_grad()
def wake_adapters(model: Nano3) -> None:
    """Give B something other than zero, so that the first step has every gradient."""
    shapes = whole_shapes(model.config, model.peft)
    for name, tensor in model.named_parameters():
        if adapted(name) is not None and name.endswith(".B"):
            whole = torch.randn(shapes[name], generator=generator(6, name), dtype=tensor.dtype) / 4
            split = split_of(name, model.config, model.mesh.tp.size)
            tensor.copy_(whole if split is None else split.take(whole, axis_of(split, model.mesh)))


def train(case: Case, config: Config, mesh: Mesh) -> tuple[Result, AdamW]:
    """STEPS optimizer steps, an evaluation, and some greedy tokens."""
    parts = rank_parts(config, mesh.pp.rank)
    model = allocate(build(config.model, config.recompute, mesh, parts, config.peft), CPU, case.dtype)
    initialise(model, config.model, seed=5)
    wake_adapters(model)
    if case.starve:
        for router in model.routers.values():
            router.e_score_correction_bias[1] = -10.0
    optimizer = AdamW(model, config.optimizer)
    batch, place = config.train.global_batch_size, None
    if case.data is not None:
        data, place = (
            rows_from(case.data, config),
            Place(batch, config.micro_batch(mesh.dp.size), mesh.dp.rank, mesh.dp.size),
        )

    def batches(step: int, split: str) -> list[Batch]:
        if place is None:
            return batches_of(config, step, case.packed, mesh.dp.rank, mesh.dp.size)
        first = step * batch
        if mesh.world == 1:
            return one_by_one(data, split, range(first, first + batch))
        return micro_batches(data, split, first, place)

    out = Result([], [], [], [], {}, 0.0, [])
    collect = optimizer.reduced_gradients

    def spy() -> dict[str, Tensor]:
        found = collect()
        out.gradients.append({n: g.clone() for n, g in found.items()})
        return found

    optimizer.reduced_gradients = spy
    first = checkpoint.load(case.load, "test", model, optimizer).iteration if case.load else 0
    if case.copy:
        save(case.copy, config, mesh, model, optimizer)
    for step in range(first, STEPS):
        rows = batches(step, "train")
        report = training_step(model, optimizer, rows, config, mesh, config.optimizer.lr, False)
        out.losses.append(report.loss)
        out.balance.append(report.aux)
        out.norms.append(report.grad_norm)
        if case.save and step + 1 == 2:
            save(case.save, config, mesh, model, optimizer)
    held_out = batches(100, "valid")
    out.evaluation = evaluate(model, [held_out], config)
    optimizer.finish_gather()
    weights = {n: expanded(t, scales_of(t), case.dtype) for n, t in named_tensors(model).items()}
    out.tensors = {n: t.detach().clone() for n, t in weights.items()}
    out.text = list(generate(model, [3, 1, 4, 1, 5], 3, prefill_chunk=3))
    return out, optimizer


def save(folder: str, config: Config, mesh: Mesh, model: Nano3, optimizer: AdamW) -> None:
    saver = checkpoint.Saver(Path(folder), config, mesh)
    saver.save(model, optimizer, Progress(2, 0, 0))
    saver.wait()


def differences(case: Case, config: Config, mesh: Mesh, truth: Result) -> tuple[dict[str, float], tuple[float, float]]:
    """The largest relative difference of each kind between this rank's share and one process; and the loss of the last
    step and of the evaluation."""
    mine, optimizer = train(case, config, mesh)
    steps = len(mine.losses)  # fewer than the truth's if the run began at a checkpoint

    def share(name: str, whole: Tensor) -> Tensor:
        split = split_of(name, config.model, mesh.tp.size)
        return whole if split is None else split.take(whole, axis_of(split, mesh))

    def distance(name: str, got: Tensor, expected: Tensor, scale: Tensor) -> float:
        assert got.shape == expected.shape, f"{name}: {got.shape} is not {expected.shape}"
        return ((got - expected).norm() / scale.norm().clamp_min(1e-12)).item() if got.numel() else 0.0

    def far(a: list[float], b: list[float]) -> float:
        return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))

    found = {
        "losses": far(mine.losses, truth.losses[-steps:]),
        "balance": far(mine.balance, truth.balance[-steps:]),
        "norms": far(mine.norms, truth.norms[-steps:]),
        "evaluation": far([mine.evaluation], [truth.evaluation]),
        "text": float(mine.text != truth.text),
        "gradients": max(
            (
                distance(n, g, optimizer.shard(n, share(n, theirs[n])), theirs[n])
                for ours, theirs in zip(mine.gradients, truth.gradients[-steps:], strict=True)
                for n, g in ours.items()
            ),
            default=0.0,  # a stage with nothing but frozen tensors
        ),
        "tensors": max(distance(n, t, share(n, truth.tensors[n]), truth.tensors[n]) for n, t in mine.tensors.items()),
    }
    return found, (mine.losses[-1], mine.evaluation)


class Groups:
    """`dist.new_group` for many meshes, one after the other: a group made for one serves the next.

    A gloo group's threads stay for good, and a few hundred of them slow a small machine to a crawl.  Within one mesh,
    groups of the same ranks stay apart, as they are in a real run.
    """

    def __init__(self) -> None:
        self.make, self.made, self.seen = dist.new_group, {}, Counter()

    def __call__(self, ranks: list[int], **options: object) -> object:
        self.seen[tuple(ranks)] += 1
        key = (*ranks, self.seen[tuple(ranks)])
        if key not in self.made:
            self.made[key] = self.make(ranks, **options)
        return self.made[key]


def _work(rank: int, world: int, port: int, inbox, outbox) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    dist.new_group = groups = Groups()
    while (task := inbox.get()) is not None:
        case, truth = task
        groups.seen.clear()
        try:
            config = config_for(case.overrides)
            mesh = lay_out(config, check_layout(config, case.ranks), rank, CPU)
            found = None
            if rank < case.ranks:
                found = differences(case, config, mesh, pickle.loads(Path(truth).read_bytes()))
            outbox.put((rank, found, None))
        except Exception:
            outbox.put((rank, None, traceback.format_exc()))
    os._exit(0)  # without finalisation, as train.py does


class Pool:
    """`world` processes that wait for layouts."""

    def __init__(self, world: int = 8) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.outbox = CONTEXT.Queue()
        self.inboxes = [CONTEXT.Queue() for _ in range(world)]
        self.folder = tempfile.TemporaryDirectory()
        self.truths: dict[Case, str] = {}
        self.last = (0.0, 0.0)  # the losses of the last step and of the evaluation of the last case
        self.processes = [
            CONTEXT.Process(target=_work, args=(r, world, port, box, self.outbox), daemon=True)
            for r, box in enumerate(self.inboxes)
        ]
        for p in self.processes:
            p.start()

    def truth(self, case: Case) -> str:
        """The file with what the same run gives in one process, which is the same for all layouts of a model."""
        alone = tuple(o for o in case.overrides if not o.startswith(("parallel.", "train.")))
        key = Case(alone, 1, case.packed, case.starve, case.data, dtype=case.dtype)
        if key not in self.truths:
            result, _ = train(key, config_for(alone), ALONE)
            path = Path(self.folder.name) / str(len(self.truths))
            path.write_bytes(pickle.dumps(result))
            self.truths[key] = str(path)
        return self.truths[key]

    def run(self, case: Case) -> dict[str, float]:
        """The worst differences over all ranks.  Raises RuntimeError with a rank's traceback."""
        truth = self.truth(case)
        for box in self.inboxes:
            box.put((case, truth))
        worst: dict[str, float] = {}
        for _ in self.processes:
            rank, found, error = self.outbox.get(timeout=120)
            if error is not None:
                raise RuntimeError(f"rank {rank}:\n{error}")
            if found is not None:
                self.last = found[1]
            for kind, value in (found[0] if found else {}).items():
                worst[kind] = max(worst.get(kind, 0.0), value if value == value else float("inf"))
        return worst

    def close(self) -> None:
        for box in self.inboxes:
            box.put(None)
        for p in self.processes:
            p.join(timeout=10)
            p.kill()
