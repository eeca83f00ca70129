"""What `leads.py` changes and the project has no flag for: each a context in which `train/ldm.py` trains otherwise.

All are called with the path of a run of train/clip.py, and give the goal to train for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import train.ldm
from train.extractors import open_extractor
from train.objective import Objective, denoising
from train.settings import Config
from train.state import EMA

Goal = Callable[..., Objective]


@contextmanager
def as_it_is(_: str) -> Iterator[Goal]:
    yield denoising


@contextmanager
def replaced(**functions: Any) -> Iterator[None]:
    """Inside, train/ldm.py calls these."""
    before = {name: getattr(train.ldm, name) for name in functions}
    for name, function in functions.items():
        setattr(train.ldm, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(train.ldm, name, function)


@contextmanager
def immiscible(_: str) -> Iterator[Goal]:
    """The noises of a batch go to the pictures that they are nearest to, as an assignment (arXiv:2406.12303)."""
    from scipy.optimize import linear_sum_assignment

    draw = train.ldm.draw_batch

    def assigned(*given: Any, **named: Any) -> Any:
        batch = draw(*given, **named)
        distances = torch.cdist(batch.x0.flatten(1), batch.noise.flatten(1))
        batch.noise = batch.noise[torch.from_numpy(linear_sum_assignment(distances.cpu().numpy())[1])]
        return batch

    with replaced(draw_batch=assigned):
        yield denoising


@contextmanager
def power_ema(_: str) -> Iterator[Goal]:
    """The power-function average (arXiv:2312.02696, equation 1) that is a tenth of the training wide."""

    class PowerEMA(EMA):
        @torch.no_grad()
        def step(self, update: int) -> None:
            decay = (1 - 1 / (update + 1)) ** 7.94
            torch._foreach_lerp_(self.weights, [p.float() for p in self.source], 1 - decay)

    with replaced(EMA=PowerEMA):
        yield denoising


@contextmanager
def aligned(clip: str) -> Iterator[Goal]:
    """The middle of the U-Net shall point where this project's CLIP sees the clean picture, for the first 40% of the
    updates (after REPA, arXiv:2410.06940; without its projector and its positions: the first channels are taken as they
    are, and features from the mean of those seen so far, which all pictures share)."""
    extract = open_extractor(clip)
    known: dict[int, Tensor] = {}  # row -> feature; each picture is decoded and seen once
    now: dict[str, Any] = {}
    build, draw = train.ldm.build, train.ldm.draw_batch

    def hooked(*given: Any) -> Any:
        model = now["model"] = build(*given)
        model.unet.mid_block.register_forward_hook(lambda _, __, output: now.update(middle=output))  # type: ignore
        return model

    def noted(config: Config, feed: Any, update: int, first: int, whole: int, *given: Any, **named: Any) -> Any:
        batch = draw(config, feed, update, first, whole, *given, **named)
        rows = feed.order(update, first, config.batch_size, whole)[1].tolist()
        now["wanted"] = None
        if not feed.rehearses and update < 0.4 * config.updates:
            if new := [i for i, row in enumerate(rows) if row not in known]:
                known.update(zip([rows[i] for i in new], features(batch.x0[new]), strict=True))
            mean = torch.stack(list(known.values())).mean(0)
            now["wanted"] = F.normalize(torch.stack([known[row] for row in rows]) - mean, dim=1).to(batch.x0)
        return batch

    @torch.no_grad()
    def features(latents: Tensor) -> Tensor:
        vae = now["model"].vae  # which may have been sent off the device
        pictures = vae.decode(latents.to(next(vae.parameters()))).clamp(-1, 1)
        pixels = ((pictures.cpu() + 1) * 127.5).round().to(torch.uint8)
        return F.normalize(extract([picture.permute(1, 2, 0).numpy() for picture in pixels]).float(), dim=1)

    def goal(*given: Any) -> Objective:
        plain = denoising(*given)

        def loss(*args: Any, **options: Any) -> Tensor:
            losses, wanted = plain.loss(*args, **options), now.get("wanted")
            if wanted is None or not torch.is_grad_enabled():
                return losses
            width = wanted.shape[1]
            found = F.normalize(now["middle"].float().mean((2, 3))[:, :width], dim=1)
            return losses + 0.5 * (1 - (found * wanted).sum(1))

        return plain._replace(loss=loss)

    with replaced(build=hooked, draw_batch=noted):
        yield goal
