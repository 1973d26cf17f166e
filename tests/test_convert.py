"""Import, export, verify, inspect, compare: exact to the bit, whatever the names, the shards, the layout, the kill."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import convert
from nano3.compare import load_source, open_any, verify
from nano3.config import UserError
from nano3.hf import open_model, our_name, released_name, shapes
from nano3.model.layout import whole_shapes
from tests.hf_folders import FORMS, random_geometry, random_weights, write_folder
from tests.oracles import CPU, GOLDEN


def run(*args: str | Path) -> None:
    assert convert.main([str(a) for a in args]) == 0


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


@pytest.mark.parametrize("seed", range(20))
def test_shapes_are_those_of_the_model(seed: int) -> None:
    c = random_geometry(seed)
    assert shapes(c) == {name: tuple(shape) for name, shape in whole_shapes(c).items()}


@pytest.mark.parametrize("seed", range(20))
def test_there_and_back(seed: int, tmp_path: Path) -> None:
    """Random geometry, every form of names, odd shards: the same bits, a second export of the same bytes, and
    transformers opens what was written and computes what we compute."""
    from transformers import NemotronHForCausalLM

    c = random_geometry(seed)
    weights = random_weights(c, seed)
    source = write_folder(tmp_path / "hf", c, weights, FORMS[seed % 4], seed, shards=1 + seed % 5)
    ckpt, out, again = tmp_path / "ckpt", tmp_path / "out", tmp_path / "again"
    run("import", "--hf-model", source, "--megatron-path", ckpt, "--max-shard-size", "40KB")
    run("export", "--hf-model", source, "--megatron-path", ckpt, "--hf-path", out, "--max-shard-size", "30KB")
    for a, b in [(source, ckpt), (ckpt, out), (source, out)]:
        run("verify", a, b)
    run("export", "--hf-model", source, "--checkpoint", ckpt, "--hf-path", again, "--max-shard-size", "30KB")
    assert files_of(out) == files_of(again)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not (out / "README.md").exists()

    theirs, info = NemotronHForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    for layer in theirs.model.layers:
        if layer.block_type == "linear_attention":
            layer.mixer.time_step_limit = (0.0, math.inf)
    theirs.config._experts_implementation = "eager"
    ids = torch.randint(0, c.vocab_size, (2, 37))
    ours = load_source(open_any(str(ckpt)), torch.float32, CPU)
    with torch.no_grad():
        x, y = ours.logits(ours(ids).hidden), theirs.eval()(ids, use_cache=False).logits
    assert (x - y).abs().max() <= 2e-5
