"""The model that a run trains: one that exists, or a new U-Net between an existing autoencoder and text encoder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from conditioning.clip import ClipText
from conditioning.context import Unconditional
from conditioning.labels import Labels
from conditioning.pair import ClipTextPair
from ldm.blocks import ImageAttention, ResnetBlock
from ldm.pixel_unet import PixelUNet, PixelUNetConfig
from ldm.transformer import PictureTransformer
from ldm.unet import UNet, UNetConfig
from pipelines.conditioners import load_conditioner
from pipelines.defaults import Defaults
from pipelines.files import load_autoencoder, newest
from pipelines.find import find_autoencoder, find_model
from pipelines.folder import Model, load_model, scheduler_config
from train.captions import clean
from train.launch import matrix_type, sharding
from train.muon import BETAS, Muon
from train.settings import Config
from train.shards import open_shards
from train.sources import first_captions, is_remote, open_source, split_parts
from vae.autoencoder import Autoencoder, Identity


def build(config: Config, checkpoint: Path | None = None) -> Model:
    """The model to train: an existing one, or a new U-Net between an existing autoencoder and text encoder.

    checkpoint: of this run, whose model is taken instead, where it holds one and not just what was added to it.
    """
    model = _build(config, checkpoint)
    if config.inpainting and not model.inpaints:
        widen(model)
    return model


def _build(config: Config, checkpoint: Path | None) -> Model:
    whole = checkpoint if checkpoint and (checkpoint / "unet").is_dir() else None
    if whole or config.model:
        model = load_model(whole or config.model)
        model.defaults = replace(
            model.defaults,
            caption_dropout=config.caption_dropout,
            data=config.data,
            views=config.views,
            size=config.size or model.defaults.size,
            steps=config.steps or model.defaults.steps,
            sampler=config.sampler or model.defaults.sampler,
            guidance_scale=_or(config.guidance_scale, model.defaults.guidance_scale),
            guidance_interval=config.guidance_interval or model.defaults.guidance_interval,
        )
        if isinstance(model.conditioner, ClipTextPair):
            model.conditioner.size = model.size  # what it says where no picture does
        return model
    vae = open_autoencoder(config.vae)
    conditioner: Labels | Unconditional | ClipTextPair
    if config.text_encoder == "labels":
        conditioner = Labels(class_names(config))
    elif config.text_encoder == "none":
        conditioner = Unconditional()
    else:
        conditioner = load_conditioner(text_folder(config.text_encoder), {})  # type: ignore[assignment]
    tower: ClipText | None = getattr(conditioner, "tower", None)
    size = config.size or own_size(vae)
    classes = getattr(conditioner, "num_embeddings", None)
    text = tower.config.hidden_size if tower else None
    kind = config.unet
    if isinstance(conditioner, ClipTextPair) and isinstance(kind, UNetConfig):
        text, summary = conditioner.widths
        sizes: dict[str, Any] = {"addition_time_embed_dim": 256}
        sizes["projection_class_embeddings_input_dim"] = summary + 6 * 256
        kind = replace(kind, addition_embed_type="text_time", **sizes)
        conditioner.size = size
    unet = fitted(kind, vae.latent_channels, size // vae.downscale, classes, text)
    if isinstance(unet, PixelUNetConfig) and config.path not in ("flow", "edm") and unet.timestep_scale == 1:
        unet = replace(unet, timestep_scale=1 / 400)  # a thousand rows run as far as EDM's clock does
    if config.learned_variance:
        unet = replace(unet, out_channels=2 * vae.latent_channels)
    defaults = Defaults(
        steps=config.steps or 20,
        guidance_scale=_or(config.guidance_scale, 3.0),
        guidance_interval=config.guidance_interval,
        sampler=config.sampler or ("ddpm" if config.learned_variance else "dpmpp_2m"),
        caption_dropout=config.caption_dropout,
        data=config.data,
        views=config.views,
        size=size,
    )
    torch.manual_seed(config.seed)
    scheduler = scheduler_config(
        config.path,
        config.prediction,
        sigma_data=config.sigma_data,
        zero_snr=config.zero_snr,
        learned_variance=config.learned_variance,
    )
    return Model(new_unet(unet), vae, conditioner, scheduler, defaults)


@torch.no_grad()
def widen(model: Model) -> None:
    """Lets a U-Net take the mask and the masked picture as well, which at first change nothing: their weights are 0.

    Raises ValueError for a model without an autoencoder, or whose U-Net is for small pictures.
    """
    if not isinstance(model.unet, UNet) or not isinstance(model.vae, Autoencoder):
        raise ValueError("--inpainting is for the text U-Net in the latents of an autoencoder")
    old = model.unet.conv_in
    inputs = 2 * model.vae.latent_channels + 1
    wider = nn.Conv2d(inputs, old.out_channels, 3, padding=1).to(old.weight)
    nn.init.zeros_(wider.weight)
    wider.weight[:, : old.in_channels] = old.weight
    wider.bias.copy_(old.bias)  # type: ignore[union-attr, arg-type]
    model.unet.conv_in = wider
    model.unet.config = replace(model.unet.config, in_channels=inputs)


def optimizer_for(learner: nn.Module, config: Config, accelerator: Accelerator) -> torch.optim.Optimizer:
    """The optimizer that the settings name, of all that learns; ValueError where it can't be had here."""
    rate, decay = config.learning_rate, config.weight_decay
    if (kind := sharding(accelerator)) and config.optimizer != "adamw":
        raise ValueError(f"--optimizer {config.optimizer} needs whole matrices, and {kind} shards them: take adamw")
    if config.optimizer == "muon":
        return Muon(learner, rate, decay, matrix_type(accelerator))
    weights = [weight for weight in learner.parameters() if weight.requires_grad]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(weights, rate, betas=BETAS, weight_decay=decay, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(f"--optimizer adamw8bit needs bitsandbytes ({error}): install it, or take adamw") from None
    return AdamW8bit(weights, rate, betas=BETAS, weight_decay=decay)


def share_statistics(network: nn.Module, accelerator: Accelerator) -> None:
    """Lets batch norms see the whole batch that several GPUs share, as one would; on a CPU, which can't, it is said."""
    if accelerator.num_processes == 1 or not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return
    if accelerator.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    else:
        accelerator.print("batch norms see the share of a batch that a process has: their number changes the run")


def decaying(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """A network's weights as AdamW's groups: matrices decay; gains, biases and a temperature do not."""
    matrices = [weight for weight in network.parameters() if weight.ndim > 1]
    others = [weight for weight in network.parameters() if weight.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def open_autoencoder(vae: str) -> Autoencoder | Identity:
    """What `--vae` names: a folder, run or hub id, "bundled", or "none" for pixels, "grey" for grey ones."""
    if vae in ("none", "grey"):
        return Identity(3 if vae == "none" else 1)
    return load_autoencoder(find_autoencoder(vae))


def text_folder(text_encoder: str) -> Path:
    """Where the text encoder and tokenizer lie that `--text-encoder` names: a folder or run of that layout, "bundled",
    or a model's id on the hub. ValueError where they do not."""
    if text_encoder == "bundled":
        return find_model(None)
    folder = newest(Path(text_encoder).expanduser())
    return folder if (folder / "text_encoder").is_dir() else find_model(text_encoder)


def own_size(vae: Autoencoder | Identity) -> int:
    """The side in pixels of the pictures that an autoencoder was trained on; 32 without one."""
    own = 32 if isinstance(vae, Identity) else vae.config.sample_size
    return own if isinstance(own, int) else max(own)


def side_for(asked: int | None, vae: Autoencoder | Identity) -> int:
    """Of the pictures to train on: what was asked for, or the autoencoder's own; ValueError where that does not fit."""
    size = asked or own_size(vae)
    if size % vae.downscale:
        raise ValueError(f"--size {size}: expected a multiple of {vae.downscale}, the autoencoder's factor")
    return size


def class_names(config: Config) -> list[str]:
    """What --text-encoder labels tells apart, sorted; of streams what their tables list, for they are not read twice.

    Raises ValueError where a stream from elsewhere lists no classes."""
    names: set[str] = set()
    for _, part in split_parts(config.data):
        shards = open_shards(part, config.template) if config.streaming or is_remote(part) else None
        if shards and shards.classes:
            names |= set(clean(shards.classes))
        elif shards and not shards.on_disk:
            raise ValueError(
                f"--text-encoder labels needs all classes before the first picture, and the stream {part!r} lists none "
                "(a ClassLabel column would): copy it to this machine, or take a text encoder"
            )
        else:
            names |= first_captions(open_source(part, 32, font=config.font, template=config.template))
    return sorted(names)


def fitted(
    unet: UNetConfig | PixelUNetConfig, channels: int, side: int, classes: int | None, text: int | None
) -> UNetConfig | PixelUNetConfig:
    """The network with the channels of the latents, the classes (and their null) or the width of the text that it is
    to be told."""
    ends: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels,
        "sample_size": side,
        "num_class_embeds": classes,
    }
    if isinstance(unet, UNetConfig):
        return replace(unet, cross_attention_dim=text, **ends) if text else replace(without_text(unet), **ends)
    if text:
        raise ValueError("this U-Net is told of classes or nothing: give --text-encoder labels or none, or another one")
    return replace(unet, **ends)


@torch.no_grad()
def new_unet(config: UNetConfig | PixelUNetConfig) -> UNet | PixelUNet:
    """New weights, with which the network puts out zero."""
    if isinstance(config, PixelUNetConfig):
        return PixelUNet(config)
    unet = UNet(config)
    begin_at_zero(unet)
    _zero(unet.conv_out)
    return unet


@torch.no_grad()
def begin_at_zero(network: nn.Module) -> None:
    """Sets the last layer of each residual branch to zero, so that the shortcuts carry everything at first (Dhariwal &
    Nichol, 2021; `zero_module` in their code)."""
    for module in network.modules():
        if isinstance(module, ResnetBlock):
            _zero(module.conv2)
        elif isinstance(module, PictureTransformer):
            _zero(module.proj_out)
        elif isinstance(module, ImageAttention):
            _zero(module.to_out[0])


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def without_text(unet: UNetConfig) -> UNetConfig:
    """The same widths with attention of the picture to itself alone, in heads of as many channels."""
    return replace(
        unet,
        down_block_types=tuple(kind.replace("CrossAttn", "Attn") for kind in unet.down_block_types),
        mid_block_type=unet.mid_block_type and unet.mid_block_type.removesuffix("CrossAttn"),
        up_block_types=tuple(kind.replace("CrossAttn", "Attn") for kind in unet.up_block_types),
        attention_head_dim=unet.block_out_channels[0] // unet.per_level("attention_head_dim")[0],
    )
