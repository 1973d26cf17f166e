"""The command line: layering, aliases, and what each mistake says: setting, value and remedy."""

from pathlib import Path

import pytest
import torch

from nano3.cli import difference, parser, resolve, to_yaml
from nano3.config import Config, ModelConfig, UserError
from nano3.model import generate
from nano3.presets import PRESETS
from nano3.train.loop import check_kernels
from tests.train.small import SHRINK


def settings(*args: str) -> Config:
    return resolve(parser().parse_args(["--mode", "pretrain", *args]))[0]


def test_later_layers_win(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optimizer: {lr: 0.5}\ntrain: {train_iters: 7, micro_batch_size: 4}\ndataset: mock\n")
    config = settings("--preset", "tiny", "--config-file", str(file), "train.train_iters=9", "--seq-length", "64")
    assert (config.optimizer.lr, config.train.train_iters, config.train.micro_batch_size) == (0.5, 9, 4)
    assert (config.dataset.name, config.dataset.seq_length) == ("mock", 64)
    assert config.model.hidden_size == PRESETS["tiny"]["model"]["hidden_size"]


def test_a_saved_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = settings("--preset", "tiny", "train.recompute=[moe,mamba]", "logger.run_dir=x")
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert settings("--preset", "nano-30b-a3b", "--config-file", str(file)) == config


def test_nvidias_names_are_accepted() -> None:
    config = settings(
        *("model.tensor_model_parallel_size=2", "model.expert_model_parallel_size=4"),
        *("train.global_batch_size=128", "train.train_iters=100", "scheduler.lr_warmup_iters=10"),
        *("logger.wandb_project=a", "logger.wandb_entity=b", "logger.wandb_exp_name=c", "model.seq_length=4096"),
    )
    assert (config.parallel.tp, config.parallel.ep, config.dataset.seq_length) == (2, 4, 4096)
    assert config.scheduler.lr_warmup_tokens is None  # the preset's unit gives way to the one typed
    assert config.iterations == 100


def test_default_preset_has_five_active_experts_and_the_released_six() -> None:
    assert settings().model.num_experts_per_tok == 5
    assert settings("--preset", "nano-30b-a3b").model.num_experts_per_tok == 6


def test_difference_from_the_preset() -> None:
    config = settings("--preset", "tiny", "optimizer.lr=0.125", "dataset=mock")
    assert difference(config, "tiny") == ["optimizer.lr=0.125", "dataset.name=mock"]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["optimizer.lrr=1"], ["'optimizer.lrr'", "did you mean optimizer.lr?"]),
        (["train_iters=5"], ["'train_iters'", "did you mean train.train_iters?"]),
        (["model.lr=5"], ["'model.lr'", "did you mean optimizer.lr?"]),
        (["train.train_iters=many"], ["train.train_iters", "many", "Integer"]),
        (["train.train_iters=1.5"], ["train.train_iters", "1.5"]),
        (["train=5"], ["'train'", "section"]),
        (["optimizer.lr"], ["optimizer.lr", "section.key=value"]),
        (["optimizer.lr=nan"], ["optimizer.lr=nan", "finite"]),
        (["optimizer.lr=-1"], ["optimizer.lr=-1", "at least 0"]),
        (["--preset", "tini"], ["tini", "did you mean tiny?", "nano-30b-a3b"]),
        (["model.hybrid_override_pattern=MEX"], ["'MEX'", "X", "M (Mamba-2)"]),
        (["model.hybrid_override_pattern="], ["hybrid_override_pattern", "empty"]),
        (["--seq-length", "0"], ["dataset.seq_length=0", "at least 2"]),
        (["--config-file", "missing.yaml"], ["missing.yaml", "no such file"]),
        (["train.global_batch_size=0"], ["train.global_batch_size=0", "at least 1"]),
        (["train.train_iters=0"], ["less than a step"]),
        (["train.train_iters=5", "train.train_tokens=5"], ["train.train_iters", "train.train_tokens", "give one"]),
        (["scheduler.lr_decay_style=cosin"], ["'cosin'", "did you mean cosine?"]),
        (["train.recompute=[moo]"], ["'moo'", "did you mean moe?"]),
        (["train.recompute=[mamba,conv]"], ["train.recompute", "drop conv"]),
        (["train.recompute=[full]"], ["'full'", "mamba, moe"]),
        (["train.recompute=[moe,auto]"], ["'auto'", "mamba, moe, attention, mlp"]),
        (["train.recompute=ful"], ["'ful'", "did you mean full?"]),
        (["model.n_groups=7"], ["model.mamba_num_heads", "model.n_groups=7"]),
        (["model.moe_latent_size=64"], ["moe_latent_size", "latent experts"]),
        (["model.num_nextn_predict_layers=1"], ["num_nextn_predict_layers", "multi-token"]),
        (["model.tie_word_embeddings=true"], ["tie_word_embeddings"]),
        (["model.num_experts_per_tok=129"], ["num_experts_per_tok=129", "n_routed_experts=128"]),
        (["model.n_group=4", "model.topk_group=9"], ["topk_group=9", "n_group=4"]),
        (["logger.wandb_entity=me"], ["logger.wandb_project"]),
        (["optimizer.min_lr=1"], ["optimizer.min_lr=1", "optimizer.lr"]),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_mistakes_are_named(args: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        settings(*args)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("device", "args", "part"),
    [
        ("cpu", ["train.recompute=conv"], "train.recompute=conv needs a CUDA device"),
        ("cuda", ["train.recompute=[moe,conv]", "model.kernels.ssd=torch"], "model.kernels.ssd=torch"),
        ("cpu", ["model.kernels.ssd=triton"], "model.kernels.ssd=triton needs a CUDA device"),
    ],
)
def test_kernels_that_cannot_run_are_named(device: str, args: list[str], part: str) -> None:
    config = settings("--preset", "tiny", *args)
    with pytest.raises(UserError) as caught:
        check_kernels(config, torch.device(device))
    assert part in str(caught.value)


def test_broken_yaml_is_named(tmp_path: Path) -> None:
    for text in ("train: [", "- 1\n", "train: {iterations: 5}"):
        file = tmp_path / "bad.yaml"
        file.write_text(text)
        with pytest.raises(UserError, match=r"bad\.yaml"):
            settings("--config-file", str(file))


SCRIPT = ["train.py", "--mode", "pretrain"]


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--preset", "tiny", "optimizer.lrr=1"], "did you mean optimizer.lr?"),
        (["--preset", "tiny", *SHRINK, "train.global_batch_size=5"], "train.global_batch_size=4"),
        (["--preset", "tiny", *SHRINK, "--tokenizer-model", "/dev/null"], "tokenizer.tokenizer_model=/dev/null"),
        (["--preset", "tiny", *SHRINK, "checkpoint.load=nowhere"], "checkpoint.load=nowhere"),
        (["--preset", "tiny", *SHRINK, "parallel.tp=2"], "parallel.tp=2"),
        (["--preset", "tiny", *SHRINK, "train.device=cuda"], "train.device=c"),
        ([], "31,577,937,344 parameters"),
    ],
    ids=["unknown key", "batch", "tokenizer", "no checkpoint", "layout", "no GPU", "30B"],
)
def test_the_script_ends_with_status_2_and_no_traceback(run_script, args: list[str], part: str) -> None:
    if "train.device=cuda" in args and __import__("torch").cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run_script(*SCRIPT, *args)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.startswith("train.py: error: ")
    assert part in done.stderr


def test_generating_names_its_own_flag(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["generate", "--checkpoint", "x", "--prompt", "x", "--device", "cuda"])
    assert generate.main() == 2
    assert capsys.readouterr().err == "generate: error: --device cuda: PyTorch sees no GPU here; use --device cpu\n"


def test_dry_run_prints_the_plan_and_stops(run_script) -> None:
    done = run_script(*SCRIPT, "--preset", "nano-30b-a3b", "--dry-run")
    assert done.returncode == 0
    for part in ("31,577,937,344 parameters", "GFLOP per trained token", "GiB"):
        assert part in done.stdout


def test_reading_a_released_config_json() -> None:
    released = {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "MEM*E-",
        "num_hidden_layers": 6,
        "hidden_size": 64,
        "rope_theta": 10000,
        "expand": 2,
        "mamba_num_heads": 8,
        "n_groups": 2,
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
        "num_nextn_predict_layers": 0,
        "moe_latent_size": None,
    }
    config = ModelConfig.from_hf(released)
    assert (config.hidden_size, config.mamba_num_heads, config.time_step_limit) == (64, 8, [0.0, float("inf")])
    listed = {**released, "layers_block_type": ["linear_attention", "moe", "mamba", "attention", "moe", "mlp"]}
    del listed["hybrid_override_pattern"]
    assert ModelConfig.from_hf(listed).hybrid_override_pattern == "MEM*E-"
    assert ModelConfig.from_hf({**released, "attention_head_dim": 96}).head_dim == 96
    for change, part in [
        ({"model_type": "llama"}, "llama"),
        ({"moe_latent_size": 1024}, "moe_latent_size"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers"),
        ({"num_hidden_layers": 52}, "num_hidden_layers=52"),
        ({"layers_block_type": ["mamba", "moe", "mamba", "attention", "moe", "moe"]}, "two models"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ]:
        with pytest.raises(UserError, match=part):
            ModelConfig.from_hf({**released, **change})
