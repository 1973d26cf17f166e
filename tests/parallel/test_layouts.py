"""Every layout computes what one process computes: losses, gradients, parameters, biases, in float64 to 1e-10."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import convert
from nano3.data.packing import Packed, write_packed
from nano3.data.supervised import Reader, SupervisedOptions, Tally, collect
from nano3.data.tokenizer import load_tokenizer
from nano3.train.storage import read_manifest
from tests.data.chat_cases import CASES, NEMOTRON, trained_tokenizer
from tests.parallel.layouts import Case, Pool

# float64 sums in another order differ by about 1e-15 each; three Adam steps divide by square roots of gradients that
# are themselves small, which loses the most: 1e-12 seen.
BOUND = 1e-10


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


LAYOUTS = [
    (1, "micro=4"),
    (2, "tp=2"),
    (4, "tp=4"),
    (2, "ep=2"),
    (4, "ep=4"),
    (8, "ep=8"),
    (2, "pp=2"),
    (4, "pp=4"),
    (2, "pp=2 virtual_pp=2"),
    (2, "pp=2 virtual_pp=4"),
    (4, "pp=4 virtual_pp=2"),
    (2, "pp=2 stages=[6,2]"),
    (4, "pp=4 stages=[1,4,1,2]"),
    (2, ""),
    (4, "micro=1"),
    (4, "tp=2 ep=2"),
    (4, "tp=2 ep=4"),
    (4, "tp=4 ep=2"),
    (4, "tp=4 ep=4"),
    (8, "tp=4 ep=8"),
    (8, "tp=2 ep=4"),
    (8, "tp=2 ep=8 micro=1"),
    (4, "tp=2 pp=2"),
    (8, "tp=4 pp=2"),
    (8, "tp=2 pp=4"),
    (8, "tp=2 ep=4 pp=2"),
    (8, "tp=2 ep=2 pp=2 micro=4"),
    (8, "tp=2 ep=4 pp=2 virtual_pp=2"),
    (8, "ep=4 pp=2"),
    (8, "ep=2 pp=2"),
    (8, "ep=4"),
]


def case(ranks: int, layout: str, *more: str, **kind: object) -> Case:
    """micro: the micro-batch size, otherwise 2 of the 8 rows, or 1 where a rank has no more."""
    asked = dict(o.split("=") for o in layout.split())
    dp = ranks // int(asked.get("tp", 1)) // int(asked.get("pp", 1))
    micro = asked.pop("micro", 1 if dp == 8 else 2)
    spelt = [f"parallel.{k}={v}" for k, v in asked.items()]
    return Case((*spelt, f"train.micro_batch_size={micro}", *more), ranks, **kind)


def check(pool: Pool, what: Case) -> None:
    worst = pool.run(what)
    assert max(worst.values()) <= BOUND, worst


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS, ids=lambda v: str(v).replace(" ", "-"))
def test_layout_equals_one_process(pool: Pool, ranks: int, layout: str) -> None:
    check(pool, case(ranks, layout))


@pytest.mark.parametrize("layout", ["tp=4 ep=2 pp=2", "tp=2 ep=8", "pp=4 virtual_pp=2 ep=2 micro=1"])
def test_packed_rows_keep_their_boundaries(pool: Pool, layout: str) -> None:
    check(pool, case(8, layout, packed=True))


@pytest.fixture(scope="module")
def packed_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Questions and conversations, read as a user's files would be and packed into rows of 128 tokens."""
    folder = tmp_path_factory.mktemp("packed")
    trained_tokenizer(NEMOTRON).save_pretrained(folder)
    reader = Reader(load_tokenizer(str(folder), 512), 128, SupervisedOptions())
    squad = [
        {"context": f"It is {what} here. ", "question": "How is it?", "answers": {"text": [f"{what} " * (n % 3 + 1)]}}
        for n, what in enumerate(("wet", "cold", "warm", "dry") * 2)
    ]
    chat = [{"messages": m, "tools": tools} for m, tools, _ in CASES.values()]
    paths = {}
    for name, records in (("squad", squad), ("chat", chat)):
        samples = collect(reader.read(((name, {k: v for k, v in r.items() if v}) for r in records), Tally()))
        packed = Packed(samples, 128, seed=1)
        assert len(packed) < len(samples) >= 6
        paths[name] = str(folder / f"{name}.parquet")
        write_packed(Path(paths[name]), packed, 128, "test")
    return paths


@pytest.mark.parametrize("kind", ["squad", "chat"])
@pytest.mark.parametrize(
    ("ranks", "layout"), [(2, "tp=2"), (2, "pp=2"), (2, ""), (8, "tp=2 ep=4 pp=2"), (8, "ep=4 micro=1")]
)
def test_packed_samples_train_as_they_do_one_by_one(
    pool: Pool, packed_files: dict[str, str], ranks: int, layout: str, kind: str
) -> None:
    """Loss, balance loss, every gradient, counts of experts (by the biases that they move), evaluation."""
    more = ("dataset.seq_length=128", "model.vocab_size=512")
    check(pool, case(ranks, layout, *more, data=packed_files[kind]))


@pytest.mark.parametrize("layout", ["ep=8", "tp=2 ep=4 pp=2", "tp=4 ep=4"])
def test_an_expert_without_a_token(pool: Pool, layout: str) -> None:
    check(pool, case(8, layout, starve=True))


LORA = ("peft.scheme=lora", "peft.rank=4")


@pytest.mark.parametrize(
    ("ranks", "layout", "more"),
    [
        (2, "tp=2", ()),
        (4, "ep=4", ()),
        (2, "pp=2", ()),
        (2, "", ()),
        (8, "tp=4 ep=2 pp=2", ()),
        (4, "tp=2 ep=4", ("peft.experts=shared", "peft.rslora=true")),
        (4, "ep=2 pp=2", ("peft.base_dtype=fp8",)),  # the same codes: neither cuts a row
        (4, "pp=4", ("peft.target_modules=[q_proj]",)),  # three stages without a trained tensor
        (4, "tp=2 ep=2", ("peft.target_modules=[up_proj]", "peft.freeze_router=false", "train.recompute=full")),
    ],
    ids=lambda v: str(v).replace(" ", "-") if isinstance(v, str) else None,
)
def test_adapters_are_the_same_in_every_layout(pool: Pool, ranks: int, layout: str, more: tuple[str, ...]) -> None:
    check(pool, case(ranks, layout, *LORA, *more))


def test_adapters_of_one_layout_go_on_in_another(pool: Pool, tmp_path: Path) -> None:
    check(pool, case(4, "tp=2 ep=4", *LORA, save=str(tmp_path)))
    check(pool, case(2, "pp=2", *LORA, load=str(tmp_path)))


def test_full_training_leaves_frozen_tensors_alone(pool: Pool, tmp_path: Path) -> None:
    freeze = ("peft.freeze=[embeddings.weight,layers.1.*,'*.in_proj.weight']", "peft.freeze_router=true")
    check(pool, case(4, "tp=2 pp=2", *freeze, save=str(tmp_path)))
    check(pool, case(2, "ep=2", *freeze, load=str(tmp_path)))


# Sizes at which most tensors have 8-bit moments, those that tp cuts by columns among them.
EIGHT = [
    *("optimizer.moments=8bit", "model.hidden_size=32", "model.mamba_head_dim=16", "model.head_dim=32"),
    *("model.moe_intermediate_size=16", "model.moe_shared_expert_intermediate_size=128", "model.intermediate_size=128"),
]


def test_moments_in_8_bits_are_the_same_in_any_layout(pool: Pool, tmp_path: Path) -> None:
    """Blocks and random bits belong to the whole tensor; codes and scales are read back to the bit."""
    check(pool, case(8, "tp=2 ep=4 pp=2", *EIGHT, save=str(tmp_path / "saved")))
    check(pool, case(4, "tp=4 ep=4", *EIGHT, load=str(tmp_path / "saved"), copy=str(tmp_path / "again")))
    assert convert.main(["verify", str(tmp_path / "saved"), str(tmp_path / "again")]) == 0
    manifest = read_manifest(tmp_path / "saved" / "iter_0000002", "test").tensors
    for name in ("embeddings.weight", "layers.0.mixer.in_proj.weight.x", "layers.0.mixer.out_proj.weight"):
        assert manifest[f"exp_avg.{name}"].dtype == torch.int8
        assert manifest[f"exp_avg_sq.{name}"].dtype == torch.uint8
    whole, block = manifest["model.layers.0.mixer.out_proj.weight"].shape, 16  # 128 columns, at tp=8 so many a rank
    assert manifest["exp_avg_scale.layers.0.mixer.out_proj.weight"].shape == (whole[0], whole[1] // block)


@pytest.mark.parametrize("kinds", ["full", "[moe]", "[mamba,attention]"])
def test_recompute_changes_nothing(pool: Pool, kinds: str) -> None:
    check(pool, case(8, "tp=2 ep=4 pp=2", f"train.recompute={kinds}"))


@pytest.mark.parametrize(
    ("ranks", "layout", "then", "other"),
    [
        (8, "tp=2 ep=4 pp=2", 2, "ep=2"),
        (8, "tp=4 ep=8", 4, "tp=2 pp=2"),
        (1, "", 8, "ep=8"),
        (8, "pp=4 virtual_pp=2 ep=2 micro=1", 1, ""),
        (4, "ep=2", 8, ""),
        (2, "tp=2", 4, "tp=4 ep=4"),
    ],
)
def test_a_checkpoint_of_one_layout_goes_on_in_another(
    pool: Pool, tmp_path: Path, ranks: int, layout: str, then: int, other: str
) -> None:
    """In float64 as one process does; in fp32 the losses of the next step and of the evaluation are those of the run
    that kept its layout, to 1e-6.  What was read, optimizer and all, and written again is the same to the bit."""
    check(pool, case(ranks, layout, save=str(tmp_path / "64")))
    check(pool, case(then, other, load=str(tmp_path / "64"), copy=str(tmp_path / "64again")))
    single = {"dtype": torch.float32}
    pool.run(case(ranks, layout, save=str(tmp_path / "32"), **single))
    straight = pool.last
    pool.run(case(then, other, load=str(tmp_path / "32"), copy=str(tmp_path / "32again"), **single))
    assert pool.last == pytest.approx(straight, rel=1e-6)
    for bits in ("64", "32"):
        assert convert.main(["verify", str(tmp_path / bits), str(tmp_path / f"{bits}again")]) == 0
