"""Schedules against diffusers' tables and the inverses they promise; step grids against diffusers' schedulers."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    UniPCMultistepScheduler,
)

from ldm.samplers import SAMPLERS
from ldm.schedule import EDM, SIGMA_INFINITY, Grid, RectifiedFlow, VariancePreserving, step_grid
from pipelines.folder import schedule_from

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TABLES = {
    "linear": VariancePreserving.linear(),
    "scaled_linear": VariancePreserving.scaled_linear(),
    "cosine": VariancePreserving.cosine(),
    "short": VariancePreserving.linear(0.001, 0.2, 50),
    "zero_terminal": VariancePreserving.scaled_linear().zero_terminal_snr(),
}
SCHEDULERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "dpmpp_2m_sde": partial(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"),
    "unipc": UniPCMultistepScheduler,
    "lms": LMSDiscreteScheduler,
}
WHOLE = ("ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc")  # these step on whole rows only
GEOMETRIC = ("langevin", "predictor_corrector")  # on every path

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize(
    ("ours", "config"),
    [
        (VariancePreserving.linear(), {}),
        (
            VariancePreserving.linear(0.001, 0.1, 100),
            {"beta_start": 0.001, "beta_end": 0.1, "num_train_timesteps": 100},
        ),
        (VariancePreserving.scaled_linear(), SD),
        (VariancePreserving.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
        (VariancePreserving.cosine(300), {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 300}),
    ],
)
def test_tables_are_those_of_diffusers(ours, config):
    theirs = DDPMScheduler(**config)
    assert torch.equal(ours.betas, theirs.betas)
    assert torch.equal(ours.alphas_cumprod.float(), theirs.alphas_cumprod)


@pytest.mark.parametrize(
    "config",
    [
        {"beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "num_train_timesteps": 500},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 300, "beta_start": 0.1},
        {"trained_betas": [0.01, 0.02, 0.05, 0.3]},
        {"rescale_betas_zero_snr": True, "beta_end": 0.012},
    ],
    ids=lambda config: " ".join(config),
)
def test_tables_of_scheduler_configs_are_those_of_diffusers(config):
    theirs = DDPMScheduler(**config)
    ours, _ = schedule_from(dict(theirs.config))
    wanted = theirs.alphas_cumprod.double()
    kept = wanted > 1e-6  # pure noise is clamped
    torch.testing.assert_close(ours.alphas_cumprod.double()[kept], wanted[kept], rtol=2e-5, atol=0)
    assert ours.entries == len(wanted)


def test_the_zero_terminal_table_is_that_of_diffusers_and_ends_at_the_clamp():
    for ours, config in (
        (VariancePreserving.scaled_linear(), SD),
        (VariancePreserving.linear(), {}),
        (VariancePreserving.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
    ):
        rescaled = ours.zero_terminal_snr()
        theirs = DDIMScheduler(**config, rescale_betas_zero_snr=True).alphas_cumprod
        torch.testing.assert_close(rescaled.alphas_cumprod[:-1].float(), theirs[:-1], rtol=2e-3, atol=2e-8)
        assert theirs[-1] == 0
        assert rescaled.clamped
        assert not ours.clamped
        assert rescaled.sigma_max >= SIGMA_INFINITY
        assert rescaled.sigma_max > rescaled.table[-2]
        torch.testing.assert_close(rescaled.table[0], ours.table[0])  # the first row stays
        assert rescaled.zero_terminal_snr() is rescaled
    rescaled = VariancePreserving.scaled_linear().zero_terminal_snr()
    assert round(float(rescaled.table[-2])) == 2254
    assert rescaled.sigma_max == SIGMA_INFINITY
    # DDPM's own table has a row before the last that passes the usual clamp.
    linear = VariancePreserving.linear().zero_terminal_snr()
    assert float(linear.table[-2]) == pytest.approx(15406, abs=1)
    assert linear.sigma_max == pytest.approx(2 * float(linear.table[-2]))


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clock_and_level_are_exact_inverses_on_the_table(name, dtype):
    schedule = TABLES[name]
    rows = torch.arange(schedule.entries)
    sigma = schedule.table.to(dtype)
    assert torch.equal(schedule.timestep(sigma), rows.to(dtype))
    torch.testing.assert_close(
        schedule.sigma(rows.to(dtype)), sigma, rtol=1e-14 if dtype == torch.float64 else 0, atol=0
    )
    torch.testing.assert_close(schedule.alpha(schedule.table) ** 2, schedule.alphas_cumprod, rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", TABLES)
def test_between_rows_the_clock_is_log_linear_and_outside_it_stands_still(name):
    schedule = TABLES[name]
    t = torch.linspace(0, schedule.entries - 1, 997, dtype=torch.float64)
    torch.testing.assert_close(schedule.timestep(schedule.sigma(t)), t, rtol=0, atol=1e-9)
    half = (schedule.table[3] * schedule.table[4]).sqrt()
    torch.testing.assert_close(schedule.sigma(3.5), half.float())
    torch.testing.assert_close(schedule.timestep(half.float()), torch.tensor(3.5))
    outside = torch.tensor([schedule.sigma_min / 2, schedule.sigma_max * 2])
    assert schedule.timestep(outside).tolist() == [0, schedule.entries - 1]


def test_flow_and_edm_clocks_are_inverses_and_match_their_formulas():
    flow, edm = RectifiedFlow(), EDM(0.5)
    t = torch.linspace(0.001, 0.999, 333, dtype=torch.float64)
    torch.testing.assert_close(flow.timestep(flow.sigma(t)), t)
    torch.testing.assert_close(flow.alpha(flow.sigma(t)), 1 - t)
    assert float(flow.sigma(1.0)) == SIGMA_INFINITY == flow.sigma_max
    assert flow.clamped
    sigma = torch.logspace(-3, 3, 333, dtype=torch.float64)
    torch.testing.assert_close(edm.sigma(edm.timestep(sigma)), sigma)
    torch.testing.assert_close(edm.timestep(sigma), sigma.log() / 4)
    x = 0.5 * torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    noisy = x + 3 * torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    assert float((edm.alpha(3.0) * noisy).std()) == pytest.approx(1, abs=0.01)


def test_half_precision_levels_are_computed_in_float32():
    schedule = VariancePreserving.scaled_linear()
    sigma = torch.tensor([0.5, 14.0], dtype=torch.bfloat16)
    for value in (schedule.alpha(sigma), schedule.timestep(sigma), RectifiedFlow().alpha(sigma), EDM(1).alpha(sigma)):
        assert value.dtype == torch.float32


def test_products_give_the_same_table_as_betas():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    direct = VariancePreserving(betas)
    through = VariancePreserving.from_alphas_cumprod(torch.cumprod(1 - betas, 0))
    torch.testing.assert_close(direct.alphas_cumprod, through.alphas_cumprod, rtol=1e-12, atol=0)
    assert direct.entries == through.entries == 1000


@pytest.mark.parametrize(
    ("spacing", "steps"),
    [
        (spacing, steps)
        for spacing in ("leading", "trailing", "linspace")
        for steps in (1, 2, 7, 10, 20, 28, 48, 50, 61, 333, *([1000] if spacing == "trailing" else []))
        if (spacing, steps) != ("linspace", 1)  # theirs is the table's cleanest row; ours the noisiest, see below
    ],
)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_grids_are_those_of_the_scheduler_of_the_name(name, spacing, steps):
    theirs = SCHEDULERS[name](**SD, timestep_spacing=spacing, steps_offset=1)
    theirs.set_timesteps(steps)
    schedule = VariancePreserving.scaled_linear()
    ours = step_grid(schedule, steps, SAMPLERS[name].grid_for(schedule, spacing=spacing, offset=1))
    assert ours.shape == (steps + 1,)
    timesteps = theirs.timesteps[::2] if name == "heun" else theirs.timesteps  # it lists each but the first twice
    # For some counts (61, say) diffusers' trailing spacing goes on to a row of -1: floating point in numpy's arange.
    torch.testing.assert_close(
        schedule.timestep(ours[:-1]), timesteps[:steps].double(), rtol=0, atol=1e-9 if name in WHOLE else 0.05
    )
    sigmas = getattr(theirs, "sigmas", None)
    if sigmas is not None and len(timesteps) == steps:
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1:2], sigmas[-1:]]) if name == "heun" else sigmas
        torch.testing.assert_close(ours.float(), sigmas, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_default_grids_are_the_defaults_of_the_scheduler_of_the_name(name):
    schedule = VariancePreserving.linear()
    theirs = SCHEDULERS[name]()
    theirs.set_timesteps(25)
    ours = step_grid(schedule, 25, SAMPLERS[name].grid_for(schedule))
    timesteps = theirs.timesteps[::2] if name == "heun" else theirs.timesteps
    torch.testing.assert_close(schedule.timestep(ours[:-1]), timesteps.double(), rtol=0, atol=0.05)
    assert ours[-1] == 0


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("ramp", ["karras", "exponential"])
@pytest.mark.parametrize("name", ["euler", "heun", "lms", "dpmpp_2m", "unipc"])
def test_ramps_are_those_of_diffusers(name, ramp, spacing):
    theirs = SCHEDULERS[name](
        **SD, timestep_spacing=spacing, steps_offset=1, use_karras_sigmas=ramp == "karras",
        use_exponential_sigmas=ramp == "exponential",
    )  # fmt: skip
    theirs.set_timesteps(20)
    sigmas = theirs.sigmas
    if name == "heun":
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1:2], sigmas[-1:]])
    schedule = VariancePreserving.scaled_linear()
    ours = step_grid(schedule, 20, SAMPLERS[name].grid_for(schedule, spacing=spacing, offset=1, ramp=ramp))
    torch.testing.assert_close(ours.float(), sigmas, rtol=3e-6, atol=0)
    timesteps = theirs.timesteps[::2] if name == "heun" else theirs.timesteps
    # DPM++ and UniPC round their Karras clock to whole rows (and cut their exponential one); ours stays between them.
    torch.testing.assert_close(
        schedule.timestep(ours[:-1]), timesteps.double(), rtol=0, atol=1.001 if name in WHOLE else 2e-3
    )


def test_final_levels():
    schedule = VariancePreserving.scaled_linear()
    theirs = EulerDiscreteScheduler(**SD, final_sigmas_type="sigma_min")
    theirs.set_timesteps(12)
    ours = step_grid(schedule, 12, SAMPLERS["euler"].grid_for(schedule, final="sigma_min"))
    torch.testing.assert_close(ours.float(), theirs.sigmas, rtol=2e-6, atol=0)
    assert float(ours[-1]) == schedule.sigma_min == pytest.approx(0.0292, abs=1e-4)


def test_the_grids_the_design_names():
    schedule = VariancePreserving.scaled_linear()
    for name, first in (("ddim", 951), ("dpmpp_2m", 941)):
        grid = SAMPLERS[name].grid_for(schedule, spacing="leading", offset=1)
        assert float(schedule.timestep(step_grid(schedule, 20, grid)[0])) == first


@pytest.mark.parametrize(("steps", "rows"), [(100, range(99, -1, -1)), (50, range(99, 0, -2)), (99, range(99, 0, -1))])
def test_leading_steps_never_begin_after_the_last_row(steps, rows):
    schedule = VariancePreserving.linear(num_train_timesteps=100)
    visited = schedule.timestep(step_grid(schedule, steps, Grid("leading", offset=1))[:-1])
    torch.testing.assert_close(visited, torch.tensor(rows, dtype=torch.float64))


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_flow_grid_is_flow_match_euler(steps):
    theirs = FlowMatchEulerDiscreteScheduler(shift=1.0)
    theirs.set_timesteps(steps)
    for sampler in (sampler for name, sampler in SAMPLERS.items() if name not in GEOMETRIC and not sampler.grid.extra):
        ours = step_grid(RectifiedFlow(), steps, sampler.grid_for(RectifiedFlow()))
        assert ours[0] == SIGMA_INFINITY
        torch.testing.assert_close(RectifiedFlow().timestep(ours).float(), theirs.sigmas, rtol=0, atol=2.5e-4)
        torch.testing.assert_close(RectifiedFlow().timestep(ours[1:]).float(), theirs.sigmas[1:], rtol=1e-6, atol=1e-7)


def test_flow_grid_of_dpmpp_is_its_own():
    theirs = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    theirs.set_timesteps(20)
    ours = step_grid(RectifiedFlow(), 20, SAMPLERS["dpmpp_2m"].grid_for(RectifiedFlow()))
    # Theirs is the same spacing of a clock that ends at 0.999.
    torch.testing.assert_close(RectifiedFlow().timestep(ours).float() * 0.999, theirs.sigmas, rtol=0, atol=5e-4)


def test_edm_grid_is_equation_5():
    ours = step_grid(EDM(0.5), 18, SAMPLERS["heun"].grid_for(EDM(0.5)))
    for i in range(18):
        expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert float(ours[i]) == pytest.approx(expected, rel=1e-12)
    assert ours[-1] == 0
    exponential = step_grid(EDM(1.0, 0.01, 10), 4, "exponential")
    torch.testing.assert_close(exponential, torch.tensor([10, 1, 0.1, 0.01, 0], dtype=torch.float64))


def test_grids_on_schedules_that_end_in_pure_noise():
    schedule = TABLES["zero_terminal"]
    for sampler in SAMPLERS.values():  # a default grid visits the end that the rescaling is for
        assert step_grid(schedule, 20, sampler.grid_for(schedule))[0] == SIGMA_INFINITY
    for name in GEOMETRIC:
        for path in (schedule, TABLES["linear"], RectifiedFlow(), EDM(1.0)):
            ours = step_grid(path, 20, SAMPLERS[name].grid_for(path))
            torch.testing.assert_close(ours, step_grid(path, 20, "exponential"))
            assert SAMPLERS[name].grid_for(path, ramp="karras").spacing == "karras"
    for path in (schedule, RectifiedFlow(), VariancePreserving.cosine()):
        karras = step_grid(path, 10, "karras")
        assert karras[0] == path.sigma_max
        assert float(karras[1]) == pytest.approx(80)
        torch.testing.assert_close(karras[1:-1], step_grid(EDM(1.0, path.sigma_min, 80), 9, "karras")[:-1])
        assert step_grid(path, 1, "karras").tolist() == [path.sigma_max, 0]


def test_one_linspace_step_begins_at_the_noisiest_row():
    schedule = VariancePreserving.linear()
    assert step_grid(schedule, 1, "linspace").tolist() == [schedule.sigma_max, 0]


@pytest.mark.parametrize("schedule", [*TABLES.values(), RectifiedFlow()], ids=[*TABLES, "flow"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_grids_decrease(schedule, name):
    for steps in (1, 2, 3, 10, schedule.entries // 2):
        for ramp in (None, "karras", "exponential"):
            sigmas = step_grid(schedule, steps, SAMPLERS[name].grid_for(schedule, ramp=ramp))
            assert sigmas.dtype == torch.float64
            assert len(sigmas) == steps + 1
            falls = sigmas.diff() < 0
            assert bool(falls[:-1].all())
            assert bool(falls[-1]) or (name == "plms" and sigmas[-1] == sigmas[-2] == schedule.sigma_min)


def test_bad_grids_say_what_to_do():
    schedule = VariancePreserving.linear(num_train_timesteps=100)
    with pytest.raises(ValueError, match="at least one step, got steps=0"):
        step_grid(schedule, 0, "leading")
    with pytest.raises(ValueError, match="at most 100 steps"):
        step_grid(schedule, 101, "trailing")
    with pytest.raises(ValueError, match="at most 99 steps"):
        step_grid(schedule, 100, Grid("linspace", extra=1))
    assert len(step_grid(schedule, 150, "karras")) == 151
    with pytest.raises(ValueError, match=r"spacing of a step grid should be one of .*got 'cubic'"):
        step_grid(schedule, 10, "cubic")
    with pytest.raises(ValueError, match="final of a step grid"):
        replace(Grid("karras"), final="one")
    with pytest.raises(ValueError, match="no table of timesteps"):
        step_grid(EDM(1.0), 10, "leading")


def test_bad_tables_say_what_was_got():
    for betas in ([0.1], [0.1, 1.0], [0.0, 0.1], [[0.1, 0.2]], []):
        with pytest.raises(ValueError, match="betas should be a list of at least two numbers"):
            VariancePreserving(betas)
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        EDM(0.5, 3.0, 1.0)
    with pytest.raises(ValueError, match="sigma_data"):
        EDM(0)
    assert math.isclose(EDM(0.5).sigma_max, 80)
