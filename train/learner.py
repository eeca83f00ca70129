"""The loss as one module: what DDP and FSDP wrap."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from conditioning.context import Context
from conditioning.pair import with_sizes
from pipelines.folder import Model

Loss = Callable[..., Tensor]  # as `ldm.loss.denoising_loss`: [B]


class Learner(nn.Module):
    """A model's loss as a module: everything that learns is called through it.

    tells: the text encoder learns as well, so captions come in and not their context. windows: that the longest of all
    captions needs, for then every batch has as many.
    """

    def __init__(self, model: Model, loss: Loss, tells: bool, windows: int = 1):
        super().__init__()
        self.denoiser, self.loss = model.denoiser, loss
        self.conditioner: Any = model.conditioner if tells else None
        self.windows = windows

    def forward(
        self,
        x0: Tensor,
        told: Context | list[str],
        sizes: Tensor,
        sigma: Tensor,
        noise: Tensor,
        beside: Context,
        **options: Any,
    ) -> Tensor:
        """The loss of each picture, [B].

        Args:
            x0, sigma, noise, options: of the loss.
            told: the context of the captions, or the captions.
            sizes: of the pictures, [B, 6], for a model that is told of them (`conditioning.pair.with_sizes`).
            beside: what else the network is told.
        """
        context: Any = told
        if self.conditioner is not None:
            chunks = max(self.windows, self.conditioner.chunks(context))
            context = self.conditioner(context, chunks=chunks)
        context = with_sizes(context, sizes)
        return self.loss(self.denoiser, x0, context | beside, sigma, noise, **options)
