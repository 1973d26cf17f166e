"""Presets: named starting points, each a nested dictionary laid over the defaults of config.py.

`tiny` trains on two CPU cores in under two minutes.  `ladder-*` are smaller models of Nano's shape with the published
learning rates and token budgets.  `nano-30b-a3b` is the released model and the report's schedule; `-top5` is the
variant with 5 active experts that the first description of this system names.
"""

from __future__ import annotations

from typing import Any

Preset = dict[str, dict[str, Any]]

DEFAULT = {"pretrain": "nano-30b-a3b-top5", "finetune": "nano-30b-a3b"}  # the preset of a mode when none is given

TINY: Preset = {
    "model": {
        "hybrid_override_pattern": "MEM*EME",
        "vocab_size": 256,  # bytes
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "mamba_num_heads": 8,
        "mamba_head_dim": 32,
        "n_groups": 2,
        "ssm_state_size": 32,
        "chunk_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "moe_shared_expert_intermediate_size": 256,
        "intermediate_size": 256,
    },
    "train": {"train_iters": 440, "global_batch_size": 4, "micro_batch_size": None},
    "dataset": {"name": "embedded", "seq_length": 512},
    "optimizer": {"lr": 4e-3, "min_lr": 0.0},
    "scheduler": {
        "lr_decay_style": "WSD",
        "lr_warmup_fraction": 0.08,
        "lr_wsd_decay_style": "linear",
        "lr_wsd_decay_fraction": 0.9,
    },
    "validation": {"eval_interval": 110, "eval_iters": 16},
}


def _nano(experts_per_token: int) -> Preset:
    """The released geometry, the report's run (arXiv:2512.20848: 25T tokens, WSD, 1e-3), NVIDIA's layout."""
    return {
        "model": {"num_experts_per_tok": experts_per_token, "init_method_std": 0.0173},
        "parallel": {"tp": 4, "ep": 8},
        "train": {
            "train_tokens": 25_000_000_000_000,
            "global_batch_size": 3072,
            "micro_batch_size": 1,
            "recompute": ["moe"],
            "loss_chunk_tokens": 4096,  # a chunk reads and writes 2.8 GB of the head's sums: 0.5 % of time for 0.5 GiB
        },
        "optimizer": {"lr": 1e-3, "min_lr": 1e-5},
        "scheduler": {
            "lr_decay_style": "WSD",
            "lr_warmup_tokens": 8_400_000_000,
            "lr_wsd_decay_style": "minus_sqrt",
            "lr_wsd_decay_fraction": 0.2,
        },
    }


def _ladder(
    hidden: int,
    q_heads: int,
    mamba_heads: int,
    expert: int,
    shared: int,
    pattern: str,
    std: float,
    lr: float,
    tokens: int,
) -> Preset:
    """One rung of the scaling ladder: Nano's head sizes, groups and expert count at a smaller width and depth."""
    return {
        "model": {
            "hybrid_override_pattern": pattern,
            "hidden_size": hidden,
            "num_attention_heads": q_heads,
            "mamba_num_heads": mamba_heads,
            "moe_intermediate_size": expert,
            "moe_shared_expert_intermediate_size": shared,
            "init_method_std": std,
        },
        "train": {"train_tokens": tokens, "global_batch_size": 768, "micro_batch_size": 1},
        "optimizer": {"lr": lr, "min_lr": lr / 100},
        "scheduler": {
            "lr_decay_style": "WSD",
            "lr_warmup_samples": 1_024_000,
            "lr_wsd_decay_style": "minus_sqrt",
            "lr_wsd_decay_fraction": 0.15,
        },
    }


B = 1_000_000_000
PRESETS: dict[str, Preset] = {
    "tiny": TINY,
    "ladder-1b": _ladder(768, 6, 24, 512, 960, "MEMEM*EMEME*EMEM*EMEME", 0.0325, 2.2e-3, 88 * B),
    "ladder-2b": _ladder(1024, 8, 32, 640, 1280, "MEMEM*EMEMEM*EMEMEM*EMEMEME", 0.028, 2.0e-3, 140 * B),
    "ladder-4b": _ladder(1280, 12, 40, 768, 1536, "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEME", 0.025, 1.8e-3, 215 * B),
    "ladder-7b": _ladder(1536, 12, 48, 1024, 2048, "MEMEM*EMEMEM*EMEMEMEM*EMEMEM*EMEMEME", 0.0229, 1.6e-3, 310 * B),
    "ladder-15b": _ladder(
        2048, 16, 64, 1280, 2560, "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEME", 0.0198, 1.4e-3, 560 * B
    ),
    "nano-4b": {  # Nemotron 3 Nano 4B: dense MLP blocks, no experts
        "model": {
            "hybrid_override_pattern": "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-",
            "hidden_size": 3136,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "mamba_num_heads": 96,
            "mamba_head_dim": 80,
            "chunk_size": 256,
            "intermediate_size": 12544,
        },
        "train": {"train_tokens": 1000 * B, "global_batch_size": 768, "micro_batch_size": 1},
        "optimizer": {"lr": 1.0e-3, "min_lr": 1e-5},
        "scheduler": {"lr_decay_style": "WSD", "lr_warmup_samples": 1_024_000, "lr_wsd_decay_fraction": 0.15},
    },
    "nano-30b-a3b": _nano(6),
    "nano-30b-a3b-top5": _nano(5),
}

# What `--mode finetune` lays over a preset: the defaults of NVIDIA's fine-tuning script.
FINETUNE: Preset = {
    "train": {
        "train_iters": 1000,
        "global_batch_size": 128,
        "micro_batch_size": 1,
        "recompute": "none",
        "loss_chunk_tokens": 2048,
    },
    "dataset": {"name": "squad", "seq_length": 2048},
    "optimizer": {"lr": 5e-6, "min_lr": 0.0},
    "scheduler": {"lr_decay_style": "cosine", "lr_warmup_iters": 50, "lr_wsd_decay_fraction": None},
    "validation": {"eval_interval": 500, "eval_iters": 32},
}
FINETUNE_OF: dict[str, Preset] = {  # and over that, for some
    "tiny": {  # bytes, so a paragraph is about 900 tokens; a small model moves by larger steps
        "train": {"train_iters": 100, "global_batch_size": 8, "micro_batch_size": None},
        "dataset": {"seq_length": 1024},
        "optimizer": {"lr": 1e-3},
        "scheduler": {"lr_warmup_iters": 10},
        "validation": {"eval_interval": 50, "eval_iters": 4},
    },
    "nano-30b-a3b": {"parallel": {"tp": 1, "ep": 8}},  # NVIDIA's layout: 16 GPUs
    "nano-30b-a3b-top5": {"parallel": {"tp": 1, "ep": 8}},
}

LORA: Preset = {"optimizer": {"lr": 1e-4}}  # what `--peft lora` lays over that: NVIDIA's rate
LORA_OF: dict[str, Preset] = {"tiny": {"optimizer": {"lr": 1e-2}}}


def layers(name: str, mode: str, adapts: bool) -> list[Preset]:
    """What a preset means in a mode, with adapters or without, each layer over the one before."""
    if mode != "finetune":
        return [PRESETS[name]]
    return [PRESETS[name], FINETUNE, FINETUNE_OF.get(name, {})] + ([LORA, LORA_OF.get(name, {})] if adapts else [])
