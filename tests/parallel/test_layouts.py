"""Every layout computes what one process computes: losses, gradients, parameters, biases, in float64 to 1e-10."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import convert
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


@pytest.mark.parametrize("layout", ["ep=8", "tp=2 ep=4 pp=2", "tp=4 ep=4"])
def test_an_expert_without_a_token(pool: Pool, layout: str) -> None:
    check(pool, case(8, layout, starve=True))


@pytest.mark.parametrize("kinds", ["full", "[moe]", "[mamba,attention]"])
def test_recompute_repeats_the_collectives(pool: Pool, kinds: str) -> None:
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
