"""The network for vectors: shapes, its start, the clocks of every path, classes, and what it refuses."""

import pytest
import torch

from ldm.denoiser import Denoiser
from ldm.mlp import MLP
from ldm.schedule import EDM, RectifiedFlow, VariancePreserving, step_grid

PATHS = {"table": VariancePreserving.linear(), "flow": RectifiedFlow(), "edm": EDM(0.5)}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def begun(**options):
    """A network whose last layer is no longer zero."""
    torch.manual_seed(0)
    network = MLP(2, width=32, **options)
    torch.nn.init.normal_(network.linear_out.weight)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize(("dim", "dim_out"), [(1, None), (2, None), (7, 14)])
def test_it_begins_at_zero_and_keeps_the_shape(dim, dim_out):
    network, x = MLP(dim, width=16, depth=2, dim_out=dim_out), draw(5, dim)
    for timestep in (0.3, torch.tensor(7), torch.rand(5)):
        assert torch.equal(network(x, timestep), torch.zeros(5, dim_out or dim))
    network(x, 0.3).sum().backward()
    gradient = network.linear_out.bias.grad
    assert gradient is not None
    assert float(gradient.abs().min()) > 0  # and it leaves


def test_one_time_is_that_time_for_all_and_rows_do_not_meet():
    network, x = begun(), draw(4, 2)
    times = torch.tensor([0.0, 10.0, 500.0, 999.0])
    together = network(x, times)
    for i, time in enumerate(times):
        torch.testing.assert_close(network(x, time)[i], together[i])
        torch.testing.assert_close(network(x[i : i + 1], float(time))[0], together[i])


@pytest.mark.parametrize("path", PATHS)
def test_levels_of_noise_are_told_apart_on_every_clock(path):
    """Where the levels of 18 steps lie, neighbours change the embedding by far more than rounding does."""
    network, schedule = begun(), PATHS[path]
    levels = step_grid(schedule, 18, "karras")[1:-1].float()
    out = network(torch.ones(len(levels), 2), schedule.timestep(levels))
    gaps = (out[1:] - out[:-1]).norm(dim=1)
    assert float(gaps.min()) > 5e-5 * float(out.norm(dim=1).mean()), gaps


@pytest.mark.parametrize("path", PATHS)
def test_it_learns_what_depends_on_the_level_alone(path):
    """The size of the noise in x, which the clock alone says: x itself is kept from it."""
    schedule = PATHS[path]
    torch.manual_seed(0)
    network = MLP(1, width=32, depth=1)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    sigma = torch.logspace(-1.5, 1, 64)
    wanted = torch.tanh(2 * sigma.log())[:, None]
    for _ in range(200):
        loss = (network(torch.zeros(64, 1), schedule.timestep(sigma)) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.01  # a constant: 0.8


def test_classes_change_the_result_and_have_a_null():
    network, x = begun(num_class_embeds=3), draw(3, 2)
    results = [network(x, 0.5, class_labels=torch.full((3,), label)) for label in range(3)]
    assert not any(torch.allclose(a, b) for a, b in zip(results, results[1:] + results[:1], strict=True))
    denoiser = Denoiser(network, EDM(1.0), "edm")
    mixed = denoiser(x, 0.5, {"class_labels": torch.tensor([0, 1, 2])})
    alone = denoiser(x[1:2], 0.5, {"class_labels": torch.tensor([1])})
    torch.testing.assert_close(mixed[1:2], alone)


def test_double_precision_stays():
    network = begun().double()
    assert network(draw(3, 2).double(), 0.5).dtype == torch.float64


def test_what_it_refuses():
    for sizes in ({"dim": 0}, {"dim": 2, "width": 0}, {"dim": 2, "depth": 0}):
        with pytest.raises(ValueError, match="at least 1, got dim="):
            MLP(**sizes)
    with pytest.raises(ValueError, match=r"needs class_labels \[B\]"):
        MLP(2, width=8, num_class_embeds=3)(draw(2, 2), 0.0)
    with pytest.raises(ValueError, match="has no classes: leave class_labels out"):
        MLP(2, width=8)(draw(2, 2), 0.0, class_labels=torch.tensor([0, 1]))
