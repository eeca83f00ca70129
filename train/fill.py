"""`atelier data cache`: what training computes of a set before its first step, computed beforehand."""

from pathlib import Path

from pipelines.conditioners import load_conditioner
from train.build import open_autoencoder, side_for, text_folder
from train.feed import open_feed
from train.launch import start
from train.texts import Texts


def fill(
    data: str,
    vae: str,
    size: int | None,
    text_encoder: str,
    buckets: bool,
    multiple: int,
    batch: int,
    template: str,
    cache: Path,
    workers: int,
    font: str | None,
    views: int,
) -> None:
    """Latents, and with a text encoder the states of captions that do not fit into memory. Raises ValueError for data
    that cannot be used, or where the disk has no room."""
    accelerator = start()
    autoencoder = open_autoencoder(vae).to(accelerator.device)
    feed = open_feed(
        data,
        autoencoder,
        side_for(size, autoencoder),
        seed=0,
        global_batch=batch,
        cache=cache,
        accelerator=accelerator,
        workers=workers,
        buckets=buckets,
        multiple=multiple,
        template=template,
        font=font,
        views=views,
        captions=text_encoder != "none",
    )
    if feed.count is None:
        raise ValueError(
            f"--data {data!r} is read as a stream, whose latents are not kept: nothing to compute beforehand"
        )
    if text_encoder not in ("", "none"):
        conditioner = load_conditioner(text_folder(text_encoder), {})
        conditioner.to(accelerator.device)
        texts = Texts(conditioner, feed.captions, accelerator.device, cache=cache, accelerator=accelerator)
        if texts.table is not None:
            accelerator.print("the captions' states fit into memory: training computes them when it starts")
    accelerator.print(f"latents are in {cache}")
