"""The AdamW update: kernel against reference, fp32 against torch's, rounding that is right on average, any layout."""

import pytest
import torch

from kernels.adamw import Moment, Place, Step, adamw, adamw_reference, decode, encode, keys_of, random_bits, round_bf16
from tests.kernels.conftest import relative_error

FORMS = ["fp32", "bf16", "8bit"]
SHAPES = [(3, 300, 128), (5, 32, 32), (1, 1000, 128), (33, 16, 16), (4, 5, 8), (1, 1, 1)]  # R, W, block
STEP = Step(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.1, count=3)


def moments(R: int, W: int, block: int, form: str, device: str) -> tuple[Moment, Moment]:
    first, second = (torch.randn(R, W) / 10).to(device), torch.rand(R, W).to(device) ** 4
    if form == "8bit":
        bits = torch.randint(0, 1 << 16, (R, W), device=device)
        return encode(first, block, bits, False), encode(second, block, bits, True)
    dtype = torch.bfloat16 if form == "bf16" else torch.float32
    return Moment(first.to(dtype)), Moment(second.to(dtype))


def copy(moment: Moment) -> Moment:
    return Moment(*(None if t is None else t.clone() for t in moment))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")], ids=str)
@pytest.mark.parametrize(("R", "W", "block"), SHAPES)
def test_the_kernel_is_the_reference(
    R: int, W: int, block: int, dtypes: tuple[str, str], form: str, device: str
) -> None:
    """fp32 to rounding.  What is rounded stochastically may land on the other side where the two differ by an ulp:
    then it is next to the reference's, and rarely."""
    dtype, gradient_dtype = (getattr(torch, d) for d in dtypes)
    weight = torch.randn(R, W).to(device, dtype)  # drawn on the CPU: a single bf16 number may well stay what it is
    gradient = (torch.randn(R, W) * torch.randn(R, W).exp()).to(device, gradient_dtype)
    kept = moments(R, W, block, form, device)
    more = (torch.tensor(0.7, device=device), STEP, keys_of(7, "x", 3), Place(70_000, 1 << 20, 17), block)
    ours, theirs = ([weight.clone(), gradient, *map(copy, kept)] for _ in range(2))
    adamw(*ours, *more)
    adamw_reference(*theirs, *more)
    assert not torch.equal(theirs[0], weight)
    for a, b in zip([ours[0], *ours[2], *ours[3]], [theirs[0], *theirs[2], *theirs[3]], strict=True):
        if a is None:
            assert b is None
        elif a.dtype == torch.float32:
            assert relative_error(a, b) < 1e-6
        else:  # neighbours: bf16 patterns and codes both count up with the magnitude
            whole = [t.view(torch.int16) if t.dtype == torch.bfloat16 else t for t in (a, b)]
            apart = (whole[0].int() - whole[1].int()).abs()
            assert apart.max() <= 1
            assert apart.sum() <= 1 + R * W // 100


def test_fp32_is_torchs_adamw(device: str) -> None:
    weight = torch.randn(7, 40, device=device)
    twin = weight.clone().requires_grad_()
    theirs = torch.optim.AdamW([twin], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    kept = [Moment(torch.zeros_like(weight)) for _ in range(2)]
    for count in range(1, 6):
        twin.grad = torch.randn_like(weight)
        gradient, clip = twin.grad * 4, torch.tensor(0.25, device=device)
        adamw(weight, gradient, *kept, clip, STEP._replace(count=count), (0, 0), Place(40), 128)
        theirs.step()
        assert relative_error(weight, twin.detach()) < 1e-6


def test_rounding_is_right_on_average(device: str) -> None:
    """Of 2^16 draws: bf16, and both codes at every magnitude down to their smallest step."""
    bits = torch.arange(1 << 16, device=device)
    for x in (1.0, 1.001, -3.1415, 1e-20):
        mean = round_bf16(torch.full_like(bits, x, dtype=torch.float32), bits).double().mean().item()
        assert mean == pytest.approx(torch.tensor(x).double().item(), rel=1e-6)
    values = torch.tensor([-1.0, 0.6, -0.01, 1e-4, 3e-5, 0.0], device=device)
    for second in (False, True):
        x = values.abs() if second else values
        block = encode(x.repeat(1 << 16, 1), 8, bits[:, None].expand(-1, 6), second)
        mean = decode(block, 8).double().mean(0)
        assert torch.allclose(mean, x.double(), rtol=1e-4, atol=1e-9), second


def test_a_second_moment_is_0_only_where_it_is(device: str) -> None:
    x = torch.tensor([[1.0, 1e-12, 1e-30, 0.0]], device=device)
    for bits in (0, 65535):
        found = encode(x, 4, torch.full((1, 4), bits, device=device), True)
        assert (found.data > 0).tolist() == [[True, True, True, False]]
    weight, gradient = torch.ones(1, 16, device=device), torch.zeros(1, 16, device=device)
    gradient[0, :2] = torch.tensor([1.0, 1e-12])
    kept = [encode(torch.zeros_like(weight), 16, gradient.long(), second) for second in (False, True)]
    adamw(weight, gradient, *kept, torch.tensor(1.0, device=device), STEP, (1, 2), Place(16), 16)
    assert kept[1].data[0, :3].tolist() == [255, 1, 0]


def test_a_clip_of_nan_calls_the_update_off(device: str) -> None:
    for form in FORMS:
        kept = moments(3, 32, 16, form, device)
        weight, gradient = torch.ones(3, 32, device=device).bfloat16(), torch.full((3, 32), torch.inf, device=device)
        held = [weight, *(t for m in kept for t in m if t is not None)]
        before = [t.clone() for t in held]
        adamw(weight, gradient, *kept, torch.tensor(torch.nan, device=device), STEP, (1, 2), Place(32), 16)
        assert all(map(torch.equal, held, before)), form


def test_what_is_not_finite_stays_so(device: str) -> None:
    """A broken gradient must not be hidden by a code or a rounding."""
    for form in FORMS:
        kept = moments(2, 32, 32, form, device)
        weight, gradient = (torch.ones(2, 32, device=device).bfloat16() for _ in range(2))
        gradient[1, 3] = torch.nan
        adamw(weight, gradient, *kept, torch.tensor(1.0, device=device), STEP, (1, 2), Place(32), 32)
        assert weight[0].isfinite().all()
        assert weight[1, 3].isnan()
        assert not any(decode(m, 32)[1, 3].isfinite() for m in kept)


def test_the_bits_are_fair_and_belong_to_the_element() -> None:
    index = torch.arange(1 << 18)
    for bits in random_bits(index + (5 << 31), keys_of(1, "w", 2)):
        ones = torch.stack([(bits >> i & 1).double().mean() for i in range(32)])
        assert (ones - 0.5).abs().max() < 5 * 0.5 / 512  # five standard deviations
        x = bits.double() - bits.double().mean()
        for lag in (1, 128, 2688):
            assert abs((x[lag:] * x[:-lag]).mean() / x.var()) < 5 / 512
    first = random_bits(index, keys_of(1, "w", 2))[0]
    for seed, name, step in ((2, "w", 2), (1, "v", 2), (1, "w", 3)):
        assert (random_bits(index, keys_of(seed, name, step))[0] == first).sum() < 10
    assert torch.equal(random_bits(index[1000:], keys_of(1, "w", 2))[0], first[1000:])


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_a_tensor_are_updated_as_the_whole(form: str, device: str) -> None:
    """By rows as data parallelism has them, by columns as tensor parallelism does."""
    weight, gradient = torch.randn(6, 64, device=device).bfloat16(), torch.randn(6, 64, device=device)
    kept = moments(6, 64, 16, form, device)
    rest = (torch.tensor(1.0, device=device), STEP, keys_of(3, "w", 1))
    whole = [weight.clone(), *map(copy, kept)]
    adamw(whole[0], gradient, *whole[1:], *rest, Place(64), 16)
    for rows, columns in ((slice(0, 4), slice(0, 64)), (slice(2, 6), slice(32, 64))):

        def cut(t: torch.Tensor | None, rows=rows, columns=columns) -> torch.Tensor | None:
            per = 1 if t is None or t.shape[1] == 64 else 16
            return None if t is None else t[rows, columns.start // per : columns.stop // per].contiguous().clone()

        part = [cut(weight), *(Moment(*map(cut, m)) for m in kept)]
        adamw(part[0], cut(gradient), *part[1:], *rest, Place(64, rows.start, columns.start), 16)
        assert torch.equal(part[0], cut(whole[0]))
        for ours, theirs in zip(part[1:], whole[1:], strict=True):
            assert torch.equal(ours.data, cut(theirs.data))
            assert ours.scale is None or torch.equal(ours.scale, cut(theirs.scale))


def test_what_does_not_fit_is_refused() -> None:
    weight, kept = torch.ones(2, 32), moments(2, 32, 16, "8bit", "cpu")
    rest = (torch.tensor(1.0), STEP, (0, 0), Place(32))
    for bad in ({"gradient": torch.ones(2, 31)}, {"block": 32}, {"block": 12}, {"gradient": torch.ones(32, 2).T}):
        given = {"gradient": weight, "block": 16} | bad
        with pytest.raises(ValueError, match="does not fit"):
            adamw(weight, given["gradient"], *kept, *rest, given["block"])
