"""Multistep consistency distillation: a student that does in one step what its teacher does in many.

The levels from the largest to 0 are cut into as many segments as the student shall have steps. Along the teacher's
probability-flow path the student's own Euler step to the end b of the segment, D + b / sigma (x - D), shall arrive at
the same point from everywhere in the segment (Heek, Hoogeboom & Salimans, "Multistep consistency models",
arXiv:2403.06807, algorithm 1). With one segment that is consistency distillation (Song et al., arXiv:2303.01469); the
more segments, the nearer to the teacher. The sampler is `euler` over the ends of the segments, which is DDIM. Unlike
the paper's, the loss is the square of the distance, the teacher's steps are plain DDIM and always as many.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ldm.denoiser import Context, noised, per_picture
from ldm.loss import Weight

ConditionalDenoise = Callable[[Tensor, Tensor, Context], Tensor]  # (x, sigma [B], context) -> estimate of x_0


def euler_step(x: Tensor, x0: Tensor, sigma: Tensor, to: Tensor) -> Tensor:
    """x at the level `to`, along the straight line through the estimate x0; sigma, to: [B], sigma above 0."""
    return x0 + per_picture(to / sigma, x) * (x - x0)


def subdivided(sigmas: Tensor, substeps: int, lowest: float, rho: float = 7.0) -> Tensor:
    """Each step of a sampler's levels cut into `substeps`, evenly in sigma^(1 / rho) (arXiv:2206.00364, equation 5).

    sigmas: [steps + 1], decreasing to 0; lowest: from which the last step of the last cut goes to 0, or half of what
    that one begins at. Returns [steps * substeps + 1].
    """
    levels = []
    for a, b in pairwise(sigmas.tolist()):
        end, count = (b, substeps + 1) if b else (min(lowest, a / 2), substeps)
        levels.append(torch.linspace(a ** (1 / rho), end ** (1 / rho), count, dtype=torch.float64)[:substeps] ** rho)
    return torch.cat([*levels, torch.zeros(1, dtype=torch.float64)]).to(sigmas)


@dataclass(frozen=True)
class Segments:
    """The levels at which teacher and student meet.

    Attributes:
        sigmas: [steps * substeps + 1], decreasing, the last one 0.
        substeps: of the teacher, in each segment.

    Raises:
        ValueError: levels that are not so many or do not decrease to 0.
    """

    sigmas: Tensor
    substeps: int

    def __post_init__(self) -> None:
        count = len(self.sigmas) - 1
        if self.substeps < 1 or count < 1 or count % self.substeps:
            raise ValueError(f"{count} steps of a teacher are no whole number of segments of {self.substeps}")
        if self.sigmas[-1] != 0 or not bool((self.sigmas.diff() < 0).all()):
            raise ValueError(f"levels should decrease to 0, got {self.sigmas.tolist()}")

    def sigma(self, u: Tensor) -> Tensor:
        """The level at which uniform numbers u in [0, 1) begin; [B]."""
        count = len(self.sigmas) - 1
        exact = (u.cpu() if u.device.type == "mps" else u).double()  # which has no float64
        rung = (exact * count).long().clamp(max=count - 1)
        return self.sigmas.to(u)[rung.to(u.device)]

    def ends(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(the next level, the end of the segment) after levels that `sigma` gave; [B] each."""
        levels = self.sigmas.to(sigma.device, sigma.dtype)
        rung = (levels[None] - sigma[:, None]).abs().argmin(1)
        return levels[rung + 1], levels[(rung // self.substeps + 1) * self.substeps]


@dataclass(frozen=True)
class ConsistencyLoss:
    """The student's error, called as `ldm.loss.denoising_loss` is.

    Attributes:
        teacher: guided as the student shall be without guidance.
    """

    teacher: ConditionalDenoise
    segments: Segments

    def __call__(
        self,
        student: ConditionalDenoise,
        x0: Tensor,
        context: Context,
        sigma: Tensor,
        noise: Tensor,
        weight: Weight,
    ) -> Tensor:
        """[B]: mean square distance of the student's estimate from the one that leads where the path does, weighted.

        x0: clean latents, [B, C, H, W]; sigma: [B] of `Segments.sigma`; noise: standard normal, like x0.
        """
        x = noised(x0, sigma, noise)
        target = self.target(student, x, sigma.to(x), context)
        # Older PyTorch keeps the casts that autocast made of weights without a gradient, and gives the student those.
        torch.clear_autocast_cache()
        return weight(sigma) * (student(x, sigma, context) - target).square().flatten(1).mean(1)

    @torch.no_grad()
    def target(self, student: ConditionalDenoise, x: Tensor, sigma: Tensor, context: Context) -> Tensor:
        """The estimate of x_0 whose Euler step goes to where the student arrives from the teacher's next point."""
        following, end = self.segments.ends(sigma)
        nearer = euler_step(x, self.teacher(x, sigma, context), sigma, following)
        arrived = following == end  # there is nothing left to jump over, and at 0 no estimate to ask for
        level = torch.where(arrived, sigma, following)
        jumped = euler_step(nearer, student(nearer, level, context), level, end)
        point = torch.where(per_picture(arrived, x), nearer, jumped)
        share = per_picture(end / sigma, x)
        return (point - share * x) / (1 - share)
