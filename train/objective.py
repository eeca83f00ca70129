"""What a U-Net is trained to do: which noise levels it sees, and its loss there."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from conditioning.context import Context
from ldm.loss import HybridLoss, Weight, denoising_loss, training_noise, training_weight
from ldm.schedule import VariancePreserving
from pipelines.folder import Model
from train.settings import Config


class Objective(NamedTuple):
    sigma: Callable[[Tensor], Tensor]  # uniform numbers [B] -> noise levels [B]
    loss: Callable[..., Tensor]  # as `ldm.loss.denoising_loss`: [B]
    weight: Weight


def denoising(model: Model, config: Config, contexts: Callable[[list[str]], Context] | Any) -> Objective:
    """Estimates of the clean latents: diffusion training."""
    levels = training_noise(config.noise, model.schedule, mean=config.noise_mean, std=config.noise_std)
    table = isinstance(model.schedule, VariancePreserving)  # on the flow such levels have nearly the same clock
    if (
        config.noise != "uniform"
        and table
        and model.schedule.ends_in_noise
        and model.prediction not in ("epsilon", "mean")
    ):
        raise ValueError(  # once in a hundred million draws, by the mean and deviation that are usual here
            f"{config.noise} noise all but never shows the pure noise that this table ends in, where sampling begins: "
            "take --noise uniform (and another --output, where a run was begun otherwise)"
        )
    if model.learned_variance and (config.huber or config.perturbation):
        raise ValueError("a learned variance has a loss of its own: leave out --huber and --perturbation")
    floor, gamma = config.min_snr_floor, config.min_snr_gamma
    weight = training_weight(config.weight, model.denoiser, levels, gamma=gamma, floor=floor)
    loss = HybridLoss(model.denoiser) if model.learned_variance else partial(denoising_loss, huber=config.huber)
    return Objective(levels.sigma, loss, weight)
