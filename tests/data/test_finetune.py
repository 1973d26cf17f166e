"""--mode finetune, from a file to the trained model: defaults, rows, batches, resuming, and what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from nano3.cli import difference, parser, resolve, to_yaml
from nano3.config import Config, UserError
from nano3.data.corpus import load_dataset, open_tokenizer
from nano3.data.loader import Place, micro_batches, stream
from nano3.data.row import IGNORE, PADDING, Windows
from nano3.parallel.mesh import ALONE
from nano3.train.checkpoint import choose_tokenizer
from nano3.train.loop import Trainer
from tests.train.small import SHRINK


def settings(*args: str) -> Config:
    return resolve(parser().parse_args(["--mode", "finetune", *args]))[0]


@pytest.fixture(scope="module")
def squad(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file in SQuAD's own form; answers from 3 to 60 bytes, so rows hold very different numbers of them."""
    draw = np.random.default_rng(0)
    paragraphs = []
    for i in range(24):
        who, where = f"P{i}", "Rome " * int(draw.integers(1, 12))
        context = f"{who} lives in {where}and likes it."
        questions = [(f"Where does {who} live?", where.strip()), ("Who?", who)]
        paragraphs.append(
            {"context": context, "qas": [{"id": q, "question": q, "answers": [{"text": a}]} for q, a in questions]}
        )
    path = tmp_path_factory.mktemp("squad") / "people.json"
    path.write_text(json.dumps({"data": [{"title": "people", "paragraphs": paragraphs}]}))
    return str(path)


# as small as the runs of tests/train, with room for a question
SMALL = [*(s for s in SHRINK if not s.startswith("dataset")), "dataset.seq_length=192", "scheduler.lr_warmup_iters=2"]


def tiny(squad: str, *more: str) -> Config:
    return settings("--preset", "tiny", *SMALL, f"dataset.path={squad}", *more)


def test_nvidias_fine_tuning_defaults() -> None:
    c = settings(
        "train.global_batch_size=128",
        "train.train_iters=100",
        "scheduler.lr_warmup_iters=10",
        "checkpoint.pretrained_checkpoint=DIR",
    )
    assert c.model.num_experts_per_tok == 6  # the released model
    assert (c.parallel.tp, c.parallel.ep, c.parallel.pp, c.parallel.cp) == (1, 8, 1, 1)
    assert (c.dataset.name, c.dataset.seq_length, c.dataset.packed_sequence, c.dataset.seed) == (
        *("squad", 2048, False, 5678),
    )
    assert (c.optimizer.lr, c.optimizer.min_lr, c.optimizer.weight_decay, c.optimizer.clip_grad) == (5e-6, 0, 0.1, 1.0)
    assert (c.optimizer.adam_beta1, c.optimizer.adam_beta2, c.optimizer.adam_eps) == (0.9, 0.95, 1e-8)
    assert (c.scheduler.lr_decay_style, c.scheduler.lr_warmup_tokens, c.scheduler.lr_wsd_decay_fraction) == (
        *("cosine", None, None),
    )
    assert (c.validation.eval_interval, c.validation.eval_iters, c.checkpoint.save_interval) == (500, 32, 200)
    assert (c.dataset.val_proportion, c.recompute, c.train.micro_batch_size) == (0.1, frozenset(), 1)
    plain = settings()
    assert (plain.iterations, plain.train.global_batch_size, plain.scheduler.lr_warmup_iters) == (1000, 128, 50)
    assert difference(c, "nano-30b-a3b") == [
        "train.train_iters=100",
        "scheduler.lr_warmup_iters=10",
        "checkpoint.pretrained_checkpoint=DIR",
    ]


def test_settings_and_flags_in_any_order(tmp_path: Path) -> None:
    c = settings("optimizer.lr=1e-4", "--packed-sequence", "dataset=tulu", "--seq-length", "4096", "dataset.subset=x")
    assert (c.dataset.packed_sequence, c.dataset.name, c.dataset.seq_length) == (True, "tulu", 4096)
    c = settings(
        "dataset.columns={input: q, output: a}", "dataset.chat_template_kwargs.truncate_history_thinking=false"
    )
    assert c.dataset.columns == {"input": "q", "output": "a"}
    assert c.dataset.chat_template_kwargs == {"truncate_history_thinking": False}
    (tmp_path / "c.yaml").write_text(to_yaml(c))
    assert settings("--config-file", str(tmp_path / "c.yaml")) == c


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["dataset.loss_mode=last"], ["dataset.loss_mode='last'", "last_turn"]),
        (["dataset.truncation=middle"], ["'middle'", "left, right"]),
        (["dataset.val_proportion=1"], ["dataset.val_proportion=1.0", "below 1"]),
        (["dataset=mock", "dataset.path=a.json"], ["dataset.path=a.json", "mock", "one of them"]),
        (["mode=pretrain"], ["mode=pretrain", "--mode"]),
        (["dataset.paths=1"], ["'dataset.paths'", "dataset.path?"]),
    ],
    ids=lambda v: " ".join(v),
)
def test_mistakes_are_named(args: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        settings(*args)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize("setting", ["dataset.path=a.jsonl", "dataset.packed_sequence=true", "dataset.subset=x"])
def test_pretraining_has_no_use_for_supervised_data(setting: str) -> None:
    with pytest.raises(UserError, match="use --mode finetune"):
        resolve(parser().parse_args(["--mode", "pretrain", "--preset", "tiny", setting]))


def test_what_only_the_data_can_tell(squad: str) -> None:
    for more, part in (
        (["dataset.reset_attention_mask=false"], "reset_attention_mask=false is for running text"),
        (["dataset.blend=x"], "two kinds of data"),
        (["model.vocab_size=512"], "the checkpoint brings no tokenizer"),
        (["tokenizer.tokenizer_model=none"], "needs a tokenizer"),
        (["dataset.seq_length=3"], "no sample is left for train"),
    ):
        config = tiny(squad, *more)
        with pytest.raises(UserError, match=part):
            load_dataset(config, open_tokenizer(config))


@pytest.mark.parametrize("packed", [False, True])
def test_batches_are_the_same_at_every_layout_with_workers_and_after_a_restart(squad: str, packed: bool) -> None:
    config = tiny(squad, f"dataset.packed_sequence={packed}")
    data = load_dataset(config, open_tokenizer(config))
    whole = [micro_batches(data, "train", 8 * step, Place(8, 8))[0] for step in range(9)]
    assert (data.count("train") == 43) == (not packed)  # so nine steps see more than one epoch
    for dp, micro in ((1, 2), (2, 4), (4, 1)):
        shares = [micro_batches(data, "train", 24, Place(8, micro, rank, dp)) for rank in range(dp)]
        tokens, labels, seq_idx, real = zip(*(b for share in shares for b in share), strict=True)
        assert torch.equal(torch.cat(tokens), whole[3].tokens)
        assert torch.equal(torch.cat(labels), whole[3].labels)
        assert torch.equal(torch.cat(seq_idx), whole[3].seq_idx)
        ones = [torch.ones_like(t, dtype=torch.bool) if r is None else r for t, r in zip(tokens, real, strict=True)]
        assert torch.equal(torch.cat(ones), whole[3].real)
    again = load_dataset(config, open_tokenizer(config))  # another process, which has read nothing
    late = stream(again, "train", 8 * 6, Place(8, 8), workers=2)
    for step in (6, 7, 8):
        (got,) = next(late)
        assert all(torch.equal(a, b) for a, b in zip(got, whole[step], strict=True))
    batch = whole[0]
    assert torch.equal(batch.real, batch.seq_idx != PADDING)
    assert (batch.labels[~batch.real] == IGNORE).all()
    assert torch.equal(batch.lengths, batch.real.sum(1))
    assert (batch.seq_idx.where(batch.real, 0).amax() > 0) == packed


def test_a_run_falls_stops_resumes_and_answers(squad: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def run(name: str, *more: str) -> tuple[list[dict], str]:
        folder = tmp_path / name
        config = tiny(squad, "--packed-sequence", "train.train_iters=12", f"logger.run_dir={folder}", *more)
        assert Trainer(config, "tiny", ALONE).run() == 0
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [r for r in rows if "loss" in r], capsys.readouterr().out

    lr = ("optimizer.lr=0.01", "validation.eval_interval=6", "checkpoint.save_interval=6")
    rows, said = run("whole", *lr)
    steps = [r for r in rows if "grad_norm" in r]
    assert steps[-1]["loss"] < 0.75 * steps[0]["loss"]
    for part in ("48 samples of 48 records", "5 samples held out", "% of them real"):
        assert part in said
    assert "Answer:" in said  # the validation sample is a question and what the model says to it
    assert "weights are random" in said
    assert re.search(r"--prompt '.*likes it. Question: .* Answer:'", said)  # how to ask it, with a question of the data
    assert all(r["tokens"] > 0 for r in steps)
    later, _ = run("later", *lr, f"checkpoint.load={tmp_path / 'whole' / 'checkpoints' / 'iter_0000006'}")
    assert [r["loss"] for r in later if "grad_norm" in r] == [r["loss"] for r in steps[6:]]


def test_the_tokenizer_comes_from_the_checkpoint_and_stays_with_the_new_one(squad: str, tmp_path: Path) -> None:
    pretrain = ["--mode", "pretrain", "--preset", "tiny", *SMALL, "dataset=embedded", "train.train_iters=1"]
    config = resolve(
        parser().parse_args([*pretrain, "scheduler.lr_warmup_iters=0", f"logger.run_dir={tmp_path / 'a'}"])
    )
    Trainer(*config, ALONE).run()
    config = tiny(squad, f"checkpoint.pretrained_checkpoint={tmp_path / 'a'}", f"logger.run_dir={tmp_path / 'b'}")
    trainer = Trainer(config, "tiny", ALONE)
    assert trainer.config.tokenizer.tokenizer_model == "bytes"
    assert trainer.tokenizer.eod == 0


def test_and_what_its_settings_say_of_the_file_comes_along(squad: str, tmp_path: Path) -> None:
    """The same vocabulary with another pattern gives other ids."""
    folder = tmp_path / "iter_0000001"
    folder.mkdir()
    (folder / "manifest.json").touch()
    settings = "tokenizer: {tokenizer_model: v.json, pattern: v1, num_special_tokens: 10}"
    (folder / "config.yaml").write_text(settings)
    config = tiny(squad, "tokenizer.num_special_tokens=20")
    choose_tokenizer(config, str(tmp_path))
    t = config.tokenizer
    assert (t.tokenizer_model, t.pattern, t.num_special_tokens, t.vocab_size) == ("v.json", "v1", 20, 131072)


class Text(Windows):
    def window(self, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        starts = [[0], [0, 3, 5, 6], [0, 1], [0, 6]][index]
        return np.arange(10, 17), np.array(starts)


def test_documents_of_running_text_are_sequences_of_their_own() -> None:
    text = Text()
    assert text.row("train", 0).seq_idx is None
    row = text.row("train", 1)
    assert row.tokens.tolist() == [10, 11, 12, 13, 14, 15]
    assert row.seq_idx.tolist() == [0, 0, 0, 1, 1, 2]
    assert row.labels.tolist() == [11, 12, IGNORE, 14, IGNORE, IGNORE]  # 16 begins the next document, unseen
    assert text.row("train", 2).labels.tolist() == [IGNORE, 12, 13, 14, 15, 16]
    last = text.row("train", 3)
    assert last.seq_idx.tolist() == [0] * 6
    assert last.labels.tolist() == [11, 12, 13, 14, 15, IGNORE]
    text.isolated = False
    assert text.row("train", 1).seq_idx is None
    assert text.row("train", 1).labels.tolist() == [11, 12, 13, 14, 15, 16]
