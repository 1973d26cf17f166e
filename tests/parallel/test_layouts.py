"""Every layout computes what one process computes: losses, gradients, parameters, biases, in float64 to 1e-10."""

from collections.abc import Iterator

import pytest

from tests.parallel.layouts import Pool

# float64 sums in another order differ by about 1e-15 each; three Adam steps divide by square roots of gradients that are
# themselves small, which loses the most: 1e-12 seen.
BOUND = 1e-10


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


LAYOUTS = [
    (1, "micro_batch_size=2"),
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
    (4, "micro_batch_size=2"),
    (4, "tp=2 ep=2"),
    (4, "tp=2 ep=4"),
    (4, "tp=4 ep=2"),
    (4, "tp=4 ep=4"),
    (8, "tp=4 ep=8"),
    (8, "tp=2 ep=4"),
    (8, "tp=2 ep=8 micro_batch_size=2"),
    (4, "tp=2 pp=2"),
    (8, "tp=4 pp=2"),
    (8, "tp=2 pp=4"),
    (8, "tp=2 ep=4 pp=2"),
    (8, "tp=2 ep=2 pp=2 micro_batch_size=2"),
    (8, "tp=2 ep=4 pp=2 virtual_pp=2"),
    (8, "ep=4 pp=2"),
    (8, "ep=2 pp=2"),
    (8, "ep=4"),
]


def overrides(text: str) -> list[str]:
    return [f"train.{o}" if o.startswith("micro") else f"parallel.{o}" for o in text.split()]


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS, ids=lambda v: str(v).replace(" ", "-"))
def test_layout_equals_one_process(pool: Pool, ranks: int, layout: str) -> None:
    worst = pool.run(overrides(layout), ranks)
    assert max(worst.values()) <= BOUND, worst
