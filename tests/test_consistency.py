"""Multistep consistency against the Gaussian, whose denoiser and probability-flow paths have closed forms."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm.consistency import ConsistencyLoss, Segments, euler_step, subdivided
from ldm.denoiser import per_picture
from ldm.samplers import SAMPLERS, euler
from ldm.schedule import EDM, VariancePreserving, step_grid

DATA = 0.7  # standard deviation of the data


def teacher(x: Tensor, sigma: Tensor, context: object = None) -> Tensor:
    return per_picture(DATA**2 / (DATA**2 + sigma**2), x) * x


def path(x: Tensor, sigma: Tensor, to: Tensor) -> Tensor:
    """Where the probability flow leads from x."""
    return per_picture(((DATA**2 + to**2) / (DATA**2 + sigma**2)).sqrt(), x) * x


def levels(steps: int, substeps: int) -> Segments:
    return Segments(step_grid(VariancePreserving.scaled_linear(), steps * substeps, "trailing"), substeps)


def student(segments: Segments):
    """The estimate whose step to the end of the segment follows the path exactly."""

    def estimate(x: Tensor, sigma: Tensor, context: object = None) -> Tensor:
        end = segments.ends(sigma)[1]
        share = per_picture(end / sigma, x)
        return (path(x, sigma, end) - share * x) / (1 - share)

    return estimate


def drawn(segments: Segments, count: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x0 = DATA * torch.randn(count, 2, dtype=torch.float64, generator=draw)
    noise = torch.randn(count, 2, dtype=torch.float64, generator=draw)
    return x0, segments.sigma((torch.arange(count, dtype=torch.float64) + 0.5) / count), noise


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("substeps", [1, 2, 16])
def test_cut_steps_meet_the_samplers_own_levels(steps: int, substeps: int) -> None:
    schedule = EDM(0.5)
    coarse = step_grid(schedule, steps, SAMPLERS["ddim"].grid_for(schedule, spacing="trailing"))
    fine = subdivided(coarse, substeps, schedule.sigma_min)
    assert len(fine) == steps * substeps + 1
    torch.testing.assert_close(fine[::substeps], coarse)
    Segments(fine, substeps)  # which asks for decreasing levels that end at 0
    assert float(fine[-2]) >= schedule.sigma_min / 2
    assert float(coarse[-2]) > 0.1  # each step has something to do
    if substeps > 2:  # as a grid between the same ends is
        a, b = (float(level) for level in fine[[0, substeps]])
        inner = torch.linspace(a ** (1 / 7), (b or schedule.sigma_min) ** (1 / 7), substeps + (b > 0)) ** 7
        torch.testing.assert_close(fine[:substeps].float(), inner[:substeps], rtol=1e-4, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_exact_student_has_less_error_with_every_step_of_its_teacher(steps: int) -> None:
    """One Euler step of the teacher errs by the square of its length, and so does the estimate, relative to what is
    left of the segment: half the length, a quarter of the error or less."""
    worst = []
    for substeps in (32, 64, 128):
        segments = levels(steps, substeps)
        x0, sigma, noise = drawn(segments)
        loss = ConsistencyLoss(teacher, segments)(student(segments), x0, {}, sigma, noise, torch.ones_like)
        assert loss.shape == (400,)
        worst.append(float(loss.mean()))  # of squares
    assert worst[0] < 0.05
    orders = [math.log2(a / b) / 2 for a, b in pairwise(worst)]
    assert min(orders) > 0.8


def test_the_exact_student_paints_what_the_path_ends_in() -> None:
    for steps in (1, 2, 4):
        segments = levels(steps, 16)
        ends = segments.sigmas[::16]
        x = float(ends[0]) * torch.randn(5, 3, dtype=torch.float64)
        exact = student(segments)
        painted = euler(lambda x, s, f=exact: f(x, torch.full((5,), float(s), dtype=x.dtype)), x, ends)
        first = torch.full((5,), float(ends[0]), dtype=x.dtype)
        torch.testing.assert_close(painted, path(x, first, torch.zeros_like(first)))


def test_with_one_step_of_the_teacher_the_student_learns_its_estimate() -> None:
    segments = levels(4, 1)
    x0, sigma, noise = drawn(segments)
    target = ConsistencyLoss(teacher, segments).target(student(segments), x0 + sigma[:, None] * noise, sigma, {})
    torch.testing.assert_close(target, teacher(x0 + sigma[:, None] * noise, sigma))


def test_only_the_student_at_its_own_level_learns() -> None:
    segments = levels(2, 4)
    factor = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    calls = []

    def learner(x: Tensor, sigma: Tensor, context: object) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return factor * teacher(x, sigma)

    def guided(x: Tensor, sigma: Tensor, context: object) -> Tensor:
        assert not torch.is_grad_enabled()
        return teacher(x, sigma)

    x0, sigma, noise = drawn(segments, 8)
    weights = torch.linspace(1, 2, 8, dtype=torch.float64)
    loss = ConsistencyLoss(guided, segments)(learner, x0, {}, sigma, noise, lambda s: weights)
    loss.sum().backward()
    assert calls == [False, True]
    x = x0 + sigma[:, None] * noise
    target = ConsistencyLoss(guided, segments).target(lambda x, s, c: 0.9 * teacher(x, s), x, sigma, {})
    plain = teacher(x, sigma)
    torch.testing.assert_close(loss, weights * (0.9 * plain - target).square().mean(1))
    slope = (weights[:, None] * (0.9 * plain - target) * plain).mean(1).sum() * 2
    torch.testing.assert_close(factor.grad, slope)


def test_all_of_the_student_learns_in_mixed_precision() -> None:
    """Its weights were cast without a gradient just before, for the estimate that it is compared with."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.SiLU(), torch.nn.Linear(8, 2))
    segments = levels(2, 4)
    x0, sigma, noise = (value.float() for value in drawn(segments, 8))
    with torch.autocast("cpu", torch.bfloat16):
        loss = ConsistencyLoss(teacher, segments)(lambda x, s, c: network(x.float()), x0, {}, sigma, noise, lambda s: 1)
    loss.sum().backward()
    assert all(weight.grad is not None and float(weight.grad.abs().sum()) > 0 for weight in network.parameters())


def test_levels_are_drawn_evenly_and_end_where_their_segment_does() -> None:
    segments = levels(4, 8)
    x = segments.sigma((torch.arange(3200, dtype=torch.float64) + 0.5) / 3200)
    values, counts = x.unique(return_counts=True)
    assert len(values) == 32
    assert set(counts.tolist()) == {100}
    following, end = segments.ends(segments.sigmas[:-1])
    assert following.equal(segments.sigmas[1:])
    assert end.equal(segments.sigmas[8::8].repeat_interleave(8))
    half = segments.sigma(torch.rand(100))  # in float32 they are told apart as well
    assert bool((segments.ends(half)[0] < half).all())


def test_a_step_to_zero_is_the_estimate() -> None:
    x, x0, sigma = torch.randn(3, 2), torch.randn(3, 2), torch.rand(3) + 0.1
    assert euler_step(x, x0, sigma, torch.zeros(3)).equal(x0)
    torch.testing.assert_close(euler_step(x, x0, sigma, sigma), x)


@pytest.mark.parametrize(
    ("sigmas", "substeps"), [([2.0, 1.0, 0.5, 0.0], 2), ([2.0, 1.0, 0.5], 2), ([1.0, 2.0, 0.0], 1), ([0.0], 1)]
)
def test_levels_that_are_no_segments_are_refused(sigmas: list[float], substeps: int) -> None:
    with pytest.raises(ValueError, match=r"segments|decrease"):
        Segments(torch.tensor(sigmas), substeps)
