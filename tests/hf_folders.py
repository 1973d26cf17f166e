"""Hugging Face folders of random small models, in every form of names that is found in the wild."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from nano3.config import ModelConfig
from nano3.convert import components
from nano3.hf import FP32, GEOMETRY, shapes
from nano3.model.init import draw
from nano3.train.storage import Item, Progress, commit, manifest_of, temporary_folder, write_file
from tests.oracles import GOLDEN

FORMS = ("released", "fused", "between", "mixed")
HF_FIELDS = [*(f for f in GEOMETRY if f != "time_step_limit"), "chunk_size"]


def random_geometry(seed: int) -> ModelConfig:
    """A small model; every third is dense as the 4B is, every third has more than ten experts."""
    r = random.Random(seed)
    letters = "M*-" if seed % 3 == 0 else "ME*" if seed % 3 == 1 else "ME*-"
    pattern = "".join(r.sample(letters, len(letters))) + "".join(r.choices(letters, k=r.randint(0, 4)))
    groups, kv = r.choice([1, 2, 4]), r.choice([1, 2])
    experts = r.randint(11, 24) if seed % 3 == 1 else r.randint(2, 10)
    return replace(
        GOLDEN,
        hybrid_override_pattern=pattern,
        vocab_size=r.choice([40, 64, 101]),
        hidden_size=r.choice([24, 32, 40]),
        num_key_value_heads=kv,
        num_attention_heads=kv * r.choice([1, 2, 3]),
        head_dim=r.choice([8, 16]),
        n_groups=groups,
        mamba_num_heads=groups * r.choice([1, 2, 3]),
        mamba_head_dim=r.choice([4, 8]),
        ssm_state_size=r.choice([8, 16]),
        use_conv_bias=r.random() < 0.8,
        n_routed_experts=experts,
        num_experts_per_tok=r.randint(1, min(experts, 4)),
        moe_intermediate_size=r.choice([12, 20]),
        moe_shared_expert_intermediate_size=r.choice([16, 36]),
        intermediate_size=r.choice([28, 44]),
        norm_topk_prob=r.random() < 0.7,
        routed_scaling_factor=r.choice([1.0, 2.5]),
    )


def random_weights(c: ModelConfig, seed: int, any_bits: bool = False) -> dict[str, Tensor]:
    """By our names, in the released dtypes: bf16, and fp32 for A_log, D and the selection bias.

    any_bits: every pattern of bits is as likely as any other, so NaN payloads, infinities and subnormals are there.
    """
    torch.manual_seed(seed)
    out = {}
    for name, shape in shapes(c).items():
        dtype = torch.float32 if name.endswith(FP32) else torch.bfloat16
        if any_bits:
            ints = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8)
            out[name] = ints.view(dtype)
        else:
            bias = 0.1 * torch.randn(shape) if name.endswith("correction_bias") else 0
            out[name] = (draw(name, torch.Size(shape), c, seed) + bias).to(dtype)
    return out


def write_folder(
    folder: Path, c: ModelConfig, weights: dict[str, Tensor], form: str = "released", seed: int = 0, shards: int = 1
) -> Path:
    """Write a model folder; `shards` files, cut at random places between the tensors, which are in random order."""
    r = random.Random(seed)
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        fused = form == "fused" or (form == "mixed" and r.random() < 0.5)
        prefix = {"released": "backbone.", "fused": "model.", "between": "model."}.get(form)
        prefix = prefix or r.choice(["backbone.", "model."])
        if name == "lm_head.weight":
            tensors[name] = tensor
        elif ".experts." in name and not fused:
            parts = {f"{prefix}{name.replace('experts.', f'experts.{e}.')}.weight": t for e, t in enumerate(tensor)}
            tensors |= {n: t.contiguous() for n, t in parts.items()}
        else:
            tensors[prefix + name] = tensor
    folder.mkdir(parents=True)
    names = list(tensors)
    r.shuffle(names)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        cuts = sorted(r.sample(range(1, len(names)), shards - 1))
        groups = [names[a:b] for a, b in zip([0, *cuts], [*cuts, len(names)], strict=True)]
        index = {}
        for i, group in enumerate(groups, 1):
            file = f"model-{i:05d}-of-{shards:05d}.safetensors"
            save_file({n: tensors[n] for n in group}, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(group, file)
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text(json.dumps(hf_config(c), indent=1))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 11]}')
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("text of a licence\n")
    (folder / "README.md").write_text("the card of these weights\n")
    return folder


def hf_config(c: ModelConfig) -> dict:
    """As released: the pattern in letters, and fields that nobody reads."""
    fields = {name: getattr(c, name) for name in HF_FIELDS}
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        **fields,
        "num_hidden_layers": c.num_hidden_layers,
        "expand": 2,
        "rope_theta": 10000,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }


def write_checkpoint(folder: Path, c: ModelConfig, weights: dict[str, Tensor], seed: int, iteration: int = 10) -> Path:
    """A checkpoint as a run in a random layout leaves it: tensors cut along their rows and columns, over four files,
    and optimizer state beside them."""
    r = random.Random(seed)
    files: dict[str, list[Item]] = {f"rank-{i:05d}.safetensors": [] for i in range(4)}
    for name, tensor in weights.items():
        for key, start, stop in components(name, tensor.shape[0], c):
            whole = tensor[start:stop]
            boxes = [[(0, n) for n in whole.shape]]
            for dim in r.sample(range(whole.dim()), min(2, whole.dim())):
                cut = r.randint(0, whole.shape[dim])
                halves = [(0, cut), (cut, whole.shape[dim])] if 0 < cut < whole.shape[dim] else [(0, whole.shape[dim])]
                boxes = [[*box[:dim], half, *box[dim + 1 :]] for box in boxes for half in halves]
            for box in boxes:
                part = whole[tuple(slice(*side) for side in box)].contiguous()
                offsets = tuple(a for a, _ in box)
                shapes_ = (tuple(whole.shape), offsets, tuple(part.shape))
                r.choice(list(files.values())).append(Item(key, part.dtype, *shapes_, data=lambda part=part: [part]))
                state = Item(key.replace("model.", "exp_avg.", 1), part.dtype, *shapes_, data=lambda part=part: [part])
                r.choice(list(files.values())).append(state)
    final = folder / f"iter_{iteration:07d}"
    temporary = temporary_folder(final)
    temporary.mkdir(parents=True)
    (temporary / "config.yaml").write_text(OmegaConf.to_yaml({"model": OmegaConf.structured(c)}))
    written = {file: (write_file(temporary / file, items), items) for file, items in files.items()}
    commit(temporary, final, manifest_of(Progress(iteration, 8 * iteration, 64 * iteration), written))
    return final
