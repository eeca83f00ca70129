"""The likelihood of points under a diffusion: exact, by its probability flow, and from below, by its bound.

The data is a mixture in the plane, whose density at every noise level and whose denoiser are known. The flow carries a
point to a normal distribution and sums up how space was stretched on its way (arXiv:2011.13456, section 4.3), by the
exact trace or Hutchinson's estimate of it. The bound is a sum over the steps of a chain, in two forms with one mean:
each x_s beside q(x_s | x_t, x_0) (arXiv:2006.11239, equation 5), or beside both neighbours (arXiv:2208.11970, equation
45), which takes more draws. The model here is the best there is: its mean and variance are those of the true step.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro
from torch import Tensor

from examples.ancestral import optimal
from examples.toys import Mixture, figure, normal, save, square
from ldm.elbo import ancestral_step, consistency_elbo, elbo, gaussian_log_likelihood
from ldm.likelihood import draw_probes, log_likelihood
from ldm.schedule import VariancePreserving

DATA = Mixture([0.2, 0.3, 0.5], [[-1.2, 0.9], [1.1, 0.8], [0.1, -0.9]], [0.25, 0.2, 0.35])
BOTTOM, TOP = 0.05, 80.0  # noise levels: the likelihood is that of x at the lower
FORMS = {"by the posterior (DDPM)": elbo, "by both neighbours (Luo)": consistency_elbo}


def flow(x: Tensor, tolerance: float, probes: int = 0, seed: int = 0) -> Tensor:
    """Log-likelihood of points [N, 2] at the lowest level, in nats; probes: 0 takes the exact trace."""
    mean = (DATA.weights[:, None] * DATA.means).sum(0)
    variance = (DATA.weights[:, None] * ((DATA.means - mean) ** 2 + DATA.stds[:, None] ** 2)).sum(0)
    vectors = draw_probes(x, normal(seed), probes) if probes else None
    moments = {"data_mean": mean, "data_variance": variance}
    return log_likelihood(DATA.denoise, x, BOTTOM, TOP, probes=vectors, tolerance=tolerance, **moments).nats


def bounds(form: str, x0: Tensor, rows: int, draws: int) -> Tensor:
    """Draws of the bound for each of [N, 2], [draws, N], over so many rows of the linear table."""
    full = VariancePreserving.linear().alphas_cumprod
    table = VariancePreserving.from_alphas_cumprod(full[torch.linspace(0, 999, rows).round().long()])
    step = ancestral_step(DATA.denoise, optimal(DATA, table.table.flip(0)))
    noise, many = normal(5), x0.repeat(draws, 1)
    total = FORMS[form](step, many, table, noise, log_likelihood=gaussian_log_likelihood).total
    return total.view(draws, -1)


def main(out: Path = Path("runs/examples"), small: bool = False) -> dict[str, dict[float, float]]:
    """Returns the largest error of the flow in nats by tolerance ("exact trace"), the root mean square error by number
    of probes ("Hutchinson"), and by rows of the table for each form how far its mean is below the log-likelihood
    ("gap"), the standard error of that, and the standard deviation of one draw ("spread"), all in nats."""
    side, points, draws = (9, 100, 20) if small else (41, 400, 100)
    ticks = torch.linspace(-2.4, 2.4, side, dtype=torch.float64)
    plane = torch.cartesian_prod(ticks, ticks)
    exact = DATA.log_density(plane, BOTTOM)
    tolerances = (1e-2, 1e-4, 1e-6) if small else (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
    maps = {tolerance: flow(plane, tolerance) for tolerance in tolerances}
    some = DATA.draw(points, normal(1), BOTTOM)
    truth = DATA.log_density(some, BOTTOM)
    results: dict[str, dict[float, float]] = {
        "exact trace": {tolerance: float((found - exact).abs().max()) for tolerance, found in maps.items()},
        "Hutchinson": {
            number: float((flow(some, 1e-4, number) - truth).square().mean().sqrt())
            for number in ((1, 16) if small else (1, 2, 4, 8, 16, 32, 64))
        },
    }
    x0 = DATA.draw(points, normal(2))
    counts = (10, 40) if small else (5, 10, 20, 50, 100, 200)
    for form in FORMS:
        for rows in counts:
            drawn = bounds(form, x0, rows, draws)
            below = DATA.log_density(x0) - drawn.mean(0)
            results.setdefault(f"gap, {form}", {})[rows] = float(below.mean())
            results.setdefault(f"error, {form}", {})[rows] = float(drawn.var(0).mean().div(draws * points).sqrt())
            results.setdefault(f"spread, {form}", {})[rows] = float(drawn.var(0).mean().sqrt())
    fig, axes = figure(11.5, 6.2, 2, 3)
    shown = 1e-3 if 1e-3 in maps else 1e-4
    over = {"extent": (-2.4, 2.4, -2.4, 2.4), "origin": "lower"}
    image = axes[0, 0].imshow(maps[shown].view(side, side).T.numpy(), vmin=-12, cmap="magma", **over)
    fig.colorbar(image, ax=axes[0, 0], label="nats", extend="min")
    square(axes[0, 0], "log-likelihood of points of the plane,\nby the flow with exact trace", 2.4)
    difference = (maps[shown] - exact).abs().clamp(min=1e-8).log10()
    image = axes[0, 1].imshow(difference.view(side, side).T.numpy(), cmap="viridis", **over)
    fig.colorbar(image, ax=axes[0, 1], label="log₁₀ of nats")
    square(axes[0, 1], f"distance from the closed form,\ntolerance {shown:g}", 2.4)
    axes[0, 2].plot(*zip(*results["exact trace"].items(), strict=True), "o-")
    axes[0, 2].set(xlabel="tolerance of a step", ylabel="nats", title="exact trace: largest error in the plane")
    axes[1, 0].plot(*zip(*results["Hutchinson"].items(), strict=True), "o-", label="root mean square error")
    expected = {number: results["Hutchinson"][1] / number**0.5 for number in results["Hutchinson"]}
    axes[1, 0].plot(*zip(*expected.items(), strict=True), "--", color="0.6", label="1/√n")
    axes[1, 0].set(xlabel="n, probes", ylabel="nats", title="Hutchinson's trace: error for one point")
    for form, marker in zip(FORMS, "os", strict=True):
        gap, error = results[f"gap, {form}"], results[f"error, {form}"]
        axes[1, 1].errorbar(counts, [*gap.values()], [2 * e for e in error.values()], fmt=f"{marker}-", label=form)
        axes[1, 2].plot(counts, [*results[f"spread, {form}"].values()], f"{marker}-", label=form)
    axes[1, 1].axhline(0, color="0.6", linewidth=1)
    axes[1, 1].set(xlabel="rows of the table", ylabel="nats", title="log-likelihood - bound ± two standard errors")
    axes[1, 2].set(xlabel="rows of the table", ylabel="nats", title="standard deviation of a draw of the bound")
    for ax in axes.flat[2:]:
        ax.set(xscale="log", yscale="linear" if ax is axes[1, 1] else "log")
        ax.grid(alpha=0.25)
    for ax, marks in zip(axes[1], (results["Hutchinson"], counts, counts), strict=True):
        ax.set_xticks([*marks], [*map(str, marks)])
        ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes[1, 0].legend()
    axes[1, 2].legend(title="lecture, and its form", title_fontsize=8)
    save(fig, out, "likelihood")
    return results


if __name__ == "__main__":
    print(tyro.cli(main))
