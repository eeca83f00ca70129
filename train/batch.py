"""What one step of `train/ldm.py` sees: pictures of the feed, and every random draw, each a function of (seed, update,
position in the global batch)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from conditioning.context import Context
from conditioning.labels import Labels
from pipelines.folder import Model
from train.captions import choose
from train.data import chances, generator, sent
from train.feed import Feed
from train.inpainting import draw_mask, shown_beside
from train.settings import Config
from vae.autoencoder import Posterior


@dataclass
class Batch:
    """One step's pictures on one process, and every random draw that it needs."""

    x0: Tensor  # [B, C, h, w], samples of the posterior
    captions: list[str]  # one for each picture; "" where it was dropped
    sizes: Tensor  # [B, 6], original, crop and target, in pixels
    u: Tensor  # [B], uniform numbers that choose the noise levels
    noise: Tensor  # like x0
    weight: Tensor  # [B], of each picture's loss
    beside: Context  # what the network is told beside the captions
    options: dict[str, Tensor]  # more arguments of the loss


def draw_batch(
    config: Config,
    feed: Feed,
    update: int,
    first: int,
    global_batch: int,
    device: torch.device,
    *,
    model: Model | None = None,
    prior: int = -1,
) -> Batch:
    """Positions first … first + batch_size - 1 of an update's global batch.

    model: of labels, which know a picture's first caption alone, or for inpainting, which is shown masks. prior: the
    part of the data that has a weight of its own.
    """
    taken = feed.take(update, first, config.batch_size, global_batch)
    where, shape = (config.seed, update, first, config.batch_size, global_batch), taken.mean.shape[1:]
    drawn = chances(*where, shape, mixed=feed.count is None)
    captions = []
    canonical = model is not None and isinstance(model.conditioner, Labels)
    for group, chance in zip(taken.captions, drawn.chance.tolist(), strict=True):
        said = choose(group, chance, shuffle_tags=config.shuffle_tags, keep_tags=config.keep_tags)
        chosen = group[0] if canonical else said
        captions.append("" if chance[1] < config.caption_dropout else chosen)
    posterior_noise, noise = sent(drawn.normal, device)
    x0 = Posterior(taken.mean, taken.logvar).sample(posterior_noise)
    inpaints = model is not None and model.inpaints
    more = []  # further draws of each position, where there are any
    if config.offset_noise or config.perturbation or inpaints:
        more = [generator(config.seed, update, position, 1) for position in range(first, first + config.batch_size)]
    if config.offset_noise:  # N. Guttenberg, "Diffusion with offset noise" (2023)
        offset = torch.stack([torch.randn(len(x0[0]), 1, 1, generator=draw) for draw in more])
        noise = noise + config.offset_noise * sent(offset, device)
    options = {}
    if config.perturbation:
        unseen = torch.stack([torch.randn(noise.shape[1:], generator=draw) for draw in more])
        options["seen"] = noise + config.perturbation * sent(unseen, device)
    beside = {}
    if inpaints:
        assert model is not None
        assert taken.pixels is not None
        masks = sent(torch.stack([draw_mask(draw, *taken.pixels.shape[2:]) for draw in more]), device)
        unlike = sent(torch.stack([torch.randn(noise.shape[1:], generator=draw) for draw in more]), device)
        beside["concat"] = shown_beside(model.vae, taken.pixels, masks, unlike)
    weight = torch.where(sent(taken.parts, device) == prior, config.prior_weight, 1.0)
    return Batch(x0, captions, sent(taken.sizes, device), sent(drawn.u, device), noise, weight, beside, options)
