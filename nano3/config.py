"""Configuration: dataclasses, filled by omegaconf from a preset, a YAML file and `a.b=v` overrides, in that order.

Model fields are spelt as in Hugging Face's config.json, so reading one is a filter; the other sections carry the names
that users of NVIDIA's scripts type today.  A trailing comment gives the letter or the unit.  No torch here.
"""

from __future__ import annotations

import difflib
import functools
import math
import operator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

NANO_PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
KINDS = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}  # a letter of the pattern -> the kind of its block


class UserError(ValueError):
    """What the user asked for cannot be done.  The text names setting, value and remedy; scripts print it alone."""


@dataclass(kw_only=True)
class KernelsConfig:
    """What runs each operator: triton (our kernel), torch (plain PyTorch), or auto, the faster one where it can run."""

    ssd: str = "auto"
    conv1d: str = "auto"
    gated_norm: str = "auto"
    rms_norm: str = "auto"
    relu2: str = "auto"
    routing: str = "auto"
    experts: str = "auto"
    attention: str = "auto"
    cross_entropy: str = "auto"
    embedding: str = "auto"


@dataclass(kw_only=True)
class ModelConfig:
    """The geometry of a Nemotron-H model; the defaults are Nemotron 3 Nano 30B-A3B as released.

    The pattern has one letter per residual block: M Mamba-2, E mixture of experts, * attention, - dense MLP.
    """

    hybrid_override_pattern: str = NANO_PATTERN
    vocab_size: int = 131072  # V
    hidden_size: int = 2688  # D
    layer_norm_epsilon: float = 1e-5
    # attention
    num_attention_heads: int = 32  # Hq
    num_key_value_heads: int = 2  # Hkv
    head_dim: int = 128
    # Mamba-2; the inner width is H * P, whatever `expand` in a config.json may say
    mamba_num_heads: int = 64  # H
    mamba_head_dim: int = 64  # P
    n_groups: int = 8  # G: the heads of a group share B and C
    ssm_state_size: int = 128  # N
    conv_kernel: int = 4
    use_conv_bias: bool = True
    chunk_size: int = 128  # tokens per SSD chunk; a tiling choice, the result does not depend on it
    time_step_limit: list[float] = field(default_factory=lambda: [0.0, math.inf])  # clamp of dt at run time: none
    time_step_min: float = 1e-3  # these three shape the initial dt_bias only
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    # mixture of experts
    n_routed_experts: int = 128  # E
    num_experts_per_tok: int = 6  # K
    moe_intermediate_size: int = 1856  # F
    moe_shared_expert_intermediate_size: int = 3712
    n_group: int = 1  # routing groups, unrelated to n_groups
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    moe_aux_loss_coeff: float = 1e-4  # sequence-wise balance loss, 0 switches it off
    moe_router_bias_update_rate: float = 1e-3  # step of the selection bias, once per optimizer step
    # dense MLP blocks
    intermediate_size: int = 1856
    # initialisation; None means sqrt(0.8 / D), which every published size follows
    init_method_std: float | None = None
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    # fields of the family that this code knows and does not implement: refused below, by name
    moe_latent_size: int | None = None
    num_nextn_predict_layers: int = 0
    tie_word_embeddings: bool = False
    use_bias: bool = False
    mlp_bias: bool = False
    attention_bias: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    mlp_hidden_act: str = "relu2"
    mamba_hidden_act: str = "silu"

    @property
    def num_hidden_layers(self) -> int:
        return len(self.hybrid_override_pattern)

    @property
    def d_inner(self) -> int:
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        return self.d_inner + 2 * self.n_groups * self.ssm_state_size

    @property
    def init_std(self) -> float:
        return math.sqrt(0.8 / self.hidden_size) if self.init_method_std is None else self.init_method_std

    def validate(self) -> None:
        """Raise UserError on a geometry that cannot be built."""
        pattern = self.hybrid_override_pattern
        if not pattern or (unknown := sorted(set(pattern) - set(KINDS))):
            what = "is empty" if not pattern else f"has the unknown letters {' '.join(unknown)}"
            raise UserError(
                f"model.hybrid_override_pattern={pattern!r} {what}; "
                "use M (Mamba-2), E (mixture of experts), * (attention) and - (dense MLP)"
            )
        for name in (f.name for f in fields(self) if f.type in ("int", "float")):
            value = getattr(self, name)
            if value < 0 or (value == 0 and name not in MAY_BE_ZERO):
                raise UserError(f"model.{name}={value} must be positive")
        _multiple("model.mamba_num_heads", self.mamba_num_heads, "model.n_groups", self.n_groups)
        _multiple(
            "model.num_attention_heads", self.num_attention_heads, "model.num_key_value_heads", self.num_key_value_heads
        )
        if not 2 <= self.conv_kernel <= 4:
            raise UserError(
                f"model.conv_kernel={self.conv_kernel} is not supported; use 2, 3 or 4 (released models: 4)"
            )
        limit = self.time_step_limit
        if len(limit) != 2 or not 0 <= limit[0] <= limit[1]:
            raise UserError(
                f"model.time_step_limit={limit} must be two numbers, 0 <= low <= high; [0, .inf] means no clamp"
            )
        if "E" in pattern:
            self._validate_experts()
        for name, supported in UNSUPPORTED.items():
            if (value := getattr(self, name)) != supported:
                raise UserError(f"model.{name}={value}: {REFUSALS.get(name, f'only {supported} is supported')}")

    def _validate_experts(self) -> None:
        if self.num_experts_per_tok > self.n_routed_experts:
            raise UserError(
                f"model.num_experts_per_tok={self.num_experts_per_tok} is more than "
                f"model.n_routed_experts={self.n_routed_experts}; choose at most as many as there are experts"
            )
        if self.n_group == 1:
            return
        _multiple("model.n_routed_experts", self.n_routed_experts, "model.n_group", self.n_group)
        per_group = self.n_routed_experts // self.n_group
        if per_group < 2:
            raise UserError(
                f"model.n_group={self.n_group} leaves {per_group} expert a group; a group's score needs two"
            )
        if not 1 <= self.topk_group <= self.n_group:
            raise UserError(f"model.topk_group={self.topk_group} must lie between 1 and model.n_group={self.n_group}")
        if self.topk_group * per_group < self.num_experts_per_tok:
            raise UserError(
                f"model.topk_group={self.topk_group} groups of {per_group} experts cannot supply "
                f"model.num_experts_per_tok={self.num_experts_per_tok}; raise topk_group"
            )

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        """Geometry from the dictionary of a config.json (the released names, older ones, or transformers' own).

        Raises UserError if the model is of another family or needs what this code does not implement.
        """
        if hf.get("model_type") not in (None, "nemotron_h"):
            raise UserError(
                f"config.json: model_type={hf['model_type']!r} is not a Nemotron-H model (expected 'nemotron_h')"
            )
        hf = dict(hf)
        for old, new in HF_ALIASES.items():
            if hf.get(old) is not None and hf.get(new) is None:
                hf[new] = hf[old]
        kinds = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "moe": "E", "mlp": "-"}
        if (listed := hf.get("layers_block_type")) is not None:
            if unknown := sorted(set(listed) - set(kinds)):
                raise UserError(f"config.json: layers_block_type has unknown entries {unknown}")
            letters = "".join(kinds[kind] for kind in listed)
            pattern = hf.get("hybrid_override_pattern")
            if pattern is not None and pattern != letters:  # readers differ in which of the two they believe
                raise UserError(
                    f"config.json: hybrid_override_pattern={pattern!r} and layers_block_type, which means {letters!r}, "
                    "are two models; delete the one that is wrong"
                )
            hf["hybrid_override_pattern"] = letters
        elif hf.get("hybrid_override_pattern") is None:
            raise UserError("config.json has neither hybrid_override_pattern nor layers_block_type")
        limit = hf.get("time_step_limit")
        if limit is not None:  # transformers writes infinity as {"__float__": "Infinity"}
            hf["time_step_limit"] = [float(v["__float__"]) if isinstance(v, dict) else float(v) for v in limit]
        known = {f.name for f in fields(cls)}
        given = {k: v for k, v in hf.items() if k in known and v is not None}
        layers = hf.get("num_hidden_layers")
        config = fill(cls, given, "config.json")
        config.validate()
        if layers is not None and layers != config.num_hidden_layers:
            raise UserError(
                f"config.json: num_hidden_layers={layers}, but the pattern has {config.num_hidden_layers} letters"
            )
        return config


HF_ALIASES = {"attention_head_dim": "head_dim", "rms_norm_eps": "layer_norm_epsilon"}  # older Nemotron-H files
MAY_BE_ZERO = {
    "moe_aux_loss_coeff",
    "moe_router_bias_update_rate",
    "num_nextn_predict_layers",
    "attention_dropout",
    "hidden_dropout",
}
UNSUPPORTED = {
    "moe_latent_size": None,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
    "use_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
}
REFUSALS = {
    "moe_latent_size": "latent experts (Nemotron 3 Super and Ultra) are not implemented; use a Nano model",
    "num_nextn_predict_layers": "multi-token prediction (Lightning, Super) is not implemented; "
    "set it to 0 to use the trunk without its prediction head, or import it with convert.py import --drop-mtp",
}


@dataclass(kw_only=True)
class ParallelConfig:
    """Sizes of the process grid; what the world holds beyond tp * pp * cp ranks is data parallel."""

    tp: int = 1  # tensor parallel, always with the sequence split between the blocks
    ep: int = 1  # expert parallel, folded over the same ranks
    pp: int = 1  # pipeline stages
    cp: int = 1  # context parallel
    virtual_pp: int = 1  # parts a stage is cut into, which shortens the pipeline's idle time (interleaved 1F1B)
    stages: list[int] | None = None  # layers of each of the pp * virtual_pp parts; None: cut by cost
    grad_reduce_in_fp32: bool = True  # False: gradients travel in bf16, and are summed in it
    communication_sms: int = 0  # multiprocessors that NCCL may take and our resident kernels leave; 0: no limits


@dataclass(kw_only=True)
class TrainConfig:
    train_iters: int | None = None  # length of the run; exactly one of these three
    train_samples: int | None = None
    train_tokens: int | None = None
    global_batch_size: int = 8  # sequences per optimizer step, over all ranks
    micro_batch_size: int | None = 1  # sequences a rank computes at once; None: its whole share (1 in a pipeline)
    precision: str = "auto"  # bf16 (fp32 masters), fp32, or auto: bf16 on a GPU, fp32 on a CPU
    # none, full, or kinds of block whose activations are recomputed: [moe,mamba,attention,mlp], and conv for the output
    # of the convolutions in Mamba blocks, a fifth of what such a block keeps for a sixtieth of its time; or auto: the
    # cheapest kinds that let a step fit
    recompute: Any = "none"
    loss_chunk_tokens: int = 2048  # logits exist for this many tokens at a time
    device: str = "auto"  # cuda, cpu, or auto
    exit_duration_in_mins: float | None = None  # save and end after this much time


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW.  Tensors with one dimension (norms, A_log, D, dt_bias, biases) never decay; all others do."""

    lr: float = 3e-4
    min_lr: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0  # global L2 norm; 0 switches clipping off
    # what is kept of each number (docs/finetuning.md)
    moments: str = "fp32"  # or bf16, or 8bit: codes, with a scale for each 128
    masters: str = "fp32"  # or none: bf16 weights are updated in place, rounded stochastically
    gradients: str = "fp32"  # or bf16: the sums over micro-batches, of bf16 weights


@dataclass(kw_only=True)
class SchedulerConfig:
    """Learning rate over the run.  A length comes in one unit: iterations, samples, tokens or a fraction."""

    lr_decay_style: str = "cosine"  # WSD, cosine, linear or constant
    lr_warmup_init: float = 0.0
    lr_warmup_iters: int | None = None
    lr_warmup_samples: int | None = None
    lr_warmup_tokens: int | None = None
    lr_warmup_fraction: float | None = None  # of lr_decay_*, so of the run where that is not set
    lr_decay_iters: int | None = None  # where min_lr is reached; default: the end of the run
    lr_decay_samples: int | None = None
    lr_decay_tokens: int | None = None
    lr_wsd_decay_style: str = "minus_sqrt"  # linear, cosine, exponential or minus_sqrt
    lr_wsd_decay_iters: int | None = None  # length of the final decay of WSD
    lr_wsd_decay_samples: int | None = None
    lr_wsd_decay_tokens: int | None = None
    lr_wsd_decay_fraction: float | None = None  # the same as a fraction of the run


BLEND_FORMS = ("blend", "data_paths", "data_args_path", "per_split_data_args_path", "blend_per_split")
BLEND_PATHS = ("train_data_path", "valid_data_path", "test_data_path")


@dataclass(kw_only=True)
class DatasetConfig:
    # embedded, the standard library's source; mock, a pattern in ids; to fine-tune, squad or an id of the datasets
    # package.  A path or a blend goes first.
    name: str = "mock"
    seq_length: int = 8192  # tokens
    num_workers: int = 0  # processes that make batches ahead of time
    reset_attention_mask: bool = True  # False: state and attention run on from document to document, as in Megatron
    # supervised data, for --mode finetune (docs/finetuning_data.md)
    path: str | None = None  # a .jsonl, a .json of SQuAD's, or a folder with a file for each split; None: the hub
    subset: str | None = None  # the configuration of a hub data set that has several
    columns: dict[str, str] = field(default_factory=dict)  # input, output or messages -> the column that holds it
    packed_sequence: bool = False  # several samples a row, or one and padding
    packed_path: str | None = None  # a folder of rows that python -m nano3.data.pack made, in place of samples
    loss_mode: str = "assistant"  # what is learnt of conversations: assistant, last_turn or full
    chat_template: str | None = None  # a Jinja file; None: the tokenizer's own
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    truncation: str = "right"  # the side of a prompt that is cut when it does not fit
    on_error: str = "raise"  # a malformed record ends the run, or skip: is counted and passed over
    val_proportion: float = 0.1  # held out, evaluated on or not, where the data brings no validation split
    seed: int = 5678  # of the order of samples, their packing, and what is held out
    # blends of Megatron .bin/.idx files; a run gives one of these forms (docs/data.md)
    blend: Any = None  # PREFIX, [PREFIX, …], [WEIGHT, PREFIX, …] or [[PREFIX, …], [WEIGHT, …]]
    data_paths: Any = None  # the same
    data_args_path: str | None = None  # a text file of the same, separated by white space
    per_split_data_args_path: str | None = None  # a JSON file with train, valid and test
    blend_per_split: Any = None  # a list of three: train, valid, test
    train_data_path: Any = None  # the same as three settings
    valid_data_path: Any = None
    test_data_path: Any = None
    split: str = "9999,8,2"  # shares of train, valid and test in each file, where the form does not name them
    path_to_cache: str | None = None  # folder for index files; None: nano3_index beside the data
    random_seed: int | None = None  # of the order of samples; None: rng.seed

    @property
    def kind(self) -> str:
        """What the settings mean: blend, embedded, mock, packed (rows packed in advance) or records."""
        if any(getattr(self, name) is not None for name in BLEND_FORMS + BLEND_PATHS):
            return "blend"
        if self.name in ("embedded", "mock"):
            return self.name
        return "records" if self.packed_path is None else "packed"


@dataclass(kw_only=True)
class TokenizerConfig:
    # bytes, none, or a file, folder or hub id; auto: bytes for embedded text, none for mock data and blends, and to
    # fine-tune the one of the pretrained checkpoint
    tokenizer_model: str = "auto"
    # what tiktoken's vocabulary files leave open; None: as NVIDIA's file, or OpenAI's known ones, have it
    pattern: str | None = None  # v1, v2, gpt2, cl100k or o200k
    num_special_tokens: int = 1000
    special_tokens: list[str] | None = None  # the first of them
    vocab_size: int = 131072  # ids of the file from here on are left out


@dataclass(kw_only=True)
class ValidationConfig:
    eval_interval: int = 500  # iterations; 0 evaluates at the end only
    eval_iters: int = 32  # global batches per evaluation; 0 never evaluates
    sample_tokens: int = 200  # length of the continuation printed at each evaluation; 0 prints none
    sample_prompt: str | None = None  # None: a prompt that suits the data
    # questions answered greedily at each evaluation, for exact match and F1, if the data is SQuAD; 0: none
    answer_samples: int = 16


@dataclass(kw_only=True)
class CheckpointConfig:
    save: str | None = None  # folder for checkpoints; None: `checkpoints` in the run folder
    load: str | None = None  # folder to resume from
    pretrained_checkpoint: str | None = None  # weights to start a new run from
    resume_from_last_good: bool = False  # if `load` is damaged, take the newest checkpoint in its folder that is not
    save_interval: int = 200  # iterations; 0 saves at the end only, -1 not even then
    async_save: bool = True  # write while training goes on
    most_recent_k: int = -1  # checkpoints to keep; -1 keeps all
    save_retain_interval: int | None = None  # keep those at multiples of it as well; alone: those and the newest


ADAPTER_SETTINGS = ("target_modules", "exclude_modules", "rank", "alpha", "rslora", "experts", "base_dtype")


def _default_of(f: Any) -> Any:
    return f.default_factory() if callable(f.default_factory) else f.default


@dataclass(kw_only=True)
class PeftConfig:
    """What is trained: everything, everything but what is frozen, or adapters beside frozen weights."""

    scheme: str = "none"  # none, or lora: y = x W^T + scale * x A^T B^T with W frozen
    # names as NVIDIA or Hugging Face spell them, or globs; a prefix such as shared_experts. narrows a name
    target_modules: list[str] = field(
        default_factory=lambda: ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "in_proj", "out_proj"]
    )
    exclude_modules: list[str] = field(default_factory=list)
    rank: int = 32  # r: A is (r, in), B is (out, r)
    alpha: float = 32.0  # scale = alpha / r
    rslora: bool = False  # scale = alpha / sqrt(r)  (arXiv:2312.03732)
    dora: bool = False
    dropout: float = 0.0
    experts: str = "per-expert"  # of routed experts: an adapter for each, one shared by a layer's, or none
    freeze_router: bool | None = None  # weights and selection biases; None: with lora yes, otherwise no
    freeze: list[str] = field(default_factory=list)  # globs of tensors that full training leaves alone
    base_dtype: str = "bf16"  # of frozen weights beside adapters: what the model computes in, or fp8 (kernels/fp8.py)

    @property
    def adapts(self) -> bool:
        return self.scheme != "none"

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def router_frozen(self) -> bool:
        return self.adapts if self.freeze_router is None else self.freeze_router

    def validate(self) -> None:
        """Raise UserError on settings that cannot be, whatever the model."""
        if self.scheme not in ("none", "lora"):
            raise UserError(f"peft.scheme={self.scheme!r} is not available; use lora (--peft lora) or none")
        if self.rank < 1:
            raise UserError(f"peft.rank={self.rank} must be at least 1")
        if self.alpha <= 0:
            raise UserError(f"peft.alpha={self.alpha} must be positive; NVIDIA's default is peft.alpha=32")
        if self.dora:
            raise UserError("peft.dora=true is not available in this version; use plain LoRA, or peft.rslora=true")
        if self.dropout:
            raise UserError(
                f"peft.dropout={self.dropout}: adapters have no dropout here, since training draws no random numbers "
                "(so any layout and any resumed run gives one result); use peft.dropout=0"
            )
        if self.experts not in ("per-expert", "shared", "none"):
            raise UserError(f"peft.experts={self.experts!r} is not known; choose from per-expert, shared, none")
        if self.base_dtype not in ("bf16", "fp8"):
            raise UserError(f"peft.base_dtype={self.base_dtype!r} is not known; choose from bf16, fp8")
        told = [f.name for f in fields(self) if f.name in ADAPTER_SETTINGS and getattr(self, f.name) != _default_of(f)]
        if told and not self.adapts:
            raise UserError(f"peft.{told[0]} is about adapters, and there are none: add --peft lora, or drop it")
        if self.adapts and self.freeze:
            raise UserError("peft.freeze is for full training; --peft lora freezes everything but its adapters")


@dataclass(kw_only=True)
class LoggerConfig:
    run_dir: str | None = None  # None: runs/NAME, numbered if that exists
    log_interval: int = 10  # iterations between printed lines when the output is a terminal; every one otherwise
    tensorboard_dir: str | None = None
    wandb_project: str | None = None
    wandb_entity: str | None = None
    wandb_exp_name: str | None = None


@dataclass(kw_only=True)
class RngConfig:
    seed: int = 1234


@dataclass(kw_only=True)
class Config:
    """A whole run."""

    mode: str = "pretrain"  # or finetune: which defaults and which kinds of data; set by --mode
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    rng: RngConfig = field(default_factory=RngConfig)

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch_size * self.dataset.seq_length

    @property
    def iterations(self) -> int:
        """Optimizer steps of the run; a last partial batch is not run."""
        t = self.train
        samples = t.train_samples if t.train_tokens is None else t.train_tokens // self.dataset.seq_length
        return t.train_iters if samples is None else samples // t.global_batch_size

    def micro_batch(self, dp: int) -> int:
        """Sequences that one of `dp` data-parallel ranks computes at once."""
        if self.train.micro_batch_size is None and self.parallel.pp > 1:
            return 1  # a pipeline lives on many small ones
        return self.train.micro_batch_size or max(1, self.train.global_batch_size // dp)

    @property
    def recompute(self) -> frozenset[str]:
        """Kinds of block whose activations are recomputed in the backward pass; and "conv", a part of mamba's.

        All for auto, as long as `nano3.train.recompute` has not put kinds in its place: a run that fits so will fit.
        """
        asked = self.train.recompute
        if asked in ("none", None, []):
            return frozenset()
        if asked in ("full", "auto"):
            return frozenset(KINDS.values())
        return frozenset([asked] if isinstance(asked, str) else asked)


def _multiple(name: str, value: int, of: str, divisor: int) -> None:
    if value % divisor:
        raise UserError(f"{name}={value} is not a multiple of {of}={divisor}")


def nearest(word: str, known: list[str]) -> str:
    """The end of a sentence about an unknown word: '; did you mean …?', or '.' when nothing is close."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else "."


def keys_of(cls: type, prefix: str = "") -> list[str]:
    """Every `section.key` of a dataclass tree."""
    out = []
    for f in fields(cls):
        default = _default_of(f)
        out += keys_of(type(default), f"{prefix}{f.name}.") if is_dataclass(default) else [prefix + f.name]
    return out


@functools.cache
def schema(cls: type) -> Any:
    """What omegaconf makes of a dataclass.  To be merged into, which copies it, and not to be changed."""
    return OmegaConf.structured(cls)


def fill(cls: type, values: dict[str, Any], source: str) -> Any:
    """An instance of the dataclass `cls` from nested `values`, type-checked.  `source` is named in errors."""
    return merge(schema(cls), OmegaConf.create(values), source, to_object=True)


def merge(base: Any, layer: Any, source: str, *, to_object: bool = False) -> Any:
    """omegaconf's merge, its exceptions turned into one sentence that names the source, the key and the remedy."""
    cls = OmegaConf.get_type(base)
    known = keys_of(cls)
    defaults = cls()
    mappings = tuple(f"{k}." for k in known if isinstance(operator.attrgetter(k)(defaults), dict))
    for key in _leaves(layer):
        if key in known or key.startswith(mappings):
            continue
        if not (sub := [k for k in known if k.startswith(key + ".")]):
            tail = {k.rsplit(".", 1)[-1]: k for k in known}  # a right name in the wrong section is the commonest slip
            hint = (
                f"; did you mean {tail[key.rsplit('.', 1)[-1]]}?"
                if key.rsplit(".", 1)[-1] in tail
                else nearest(key, known)
            )
            raise UserError(f"{source}: unknown setting {key!r}{hint}")
        raise UserError(f"{source}: {key!r} is a section, not a setting; set one of its keys, e.g. {sub[0]}=…")
    try:
        merged = OmegaConf.merge(base, layer)
        return OmegaConf.to_object(merged) if to_object else merged
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise UserError(f"{source}: {where}{str(error).splitlines()[0]}") from None


def _leaves(node: Any, prefix: str = "") -> list[str]:
    out = []
    for key in node:
        value = OmegaConf.select(node, key) if isinstance(key, str) else None
        path = f"{prefix}{key}"
        out += _leaves(value, path + ".") if OmegaConf.is_dict(value) else [path]
    return out
