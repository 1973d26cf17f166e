"""Runs small enough for a test."""

from nano3.cli import parser, resolve
from nano3.config import Config
from nano3.parallel.mesh import ALONE
from nano3.train.loop import Trainer

SHRINK = [
    "model.hybrid_override_pattern=ME*-",
    "model.hidden_size=32",
    "model.mamba_num_heads=4",
    "model.mamba_head_dim=8",
    "model.ssm_state_size=8",
    "model.head_dim=8",
    "model.moe_intermediate_size=24",
    "model.moe_shared_expert_intermediate_size=32",
    "model.intermediate_size=32",
    "model.chunk_size=16",
    "dataset=mock",
    "dataset.seq_length=24",
    "train.train_iters=6",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "validation.eval_iters=2",
    "validation.eval_interval=3",
    "validation.sample_tokens=4",
    "validation.answer_samples=2",
    "checkpoint.save_interval=0",
]


def small(*overrides: str) -> Config:
    lengths = any(o.startswith("train.train_") for o in overrides)
    base = [s for s in SHRINK if not (lengths and s.startswith("train.train_"))]
    return resolve(parser().parse_args(["--mode", "pretrain", "--preset", "tiny", *base, *overrides]))[0]


def trainer(*overrides: str) -> Trainer:
    return Trainer(small(*overrides), "tiny", ALONE)
