"""The model that a run trains: one that exists, or a new U-Net between an existing autoencoder and text encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from conditioning.context import Unconditional
from conditioning.labels import Labels
from ldm.blocks import ResnetBlock
from ldm.transformer import PictureTransformer
from ldm.unet import UNet, UNetConfig
from pipelines.files import load_autoencoder, newest
from pipelines.folder import Defaults, Model, find_model, load_conditioner, load_model, scheduler_config
from train.sources import first_captions, open_source
from vae.autoencoder import Autoencoder, Identity

if TYPE_CHECKING:
    from train.ldm import Config


def build(config: Config) -> Model:
    """The model to train: an existing one, or a new U-Net between an existing autoencoder and text encoder."""
    if config.model:
        model = load_model(config.model)
        model.defaults = replace(
            model.defaults,
            caption_dropout=config.caption_dropout,
            data=config.data,
            size=config.size or model.defaults.size,
            steps=config.steps or model.defaults.steps,
            guidance_scale=_or(config.guidance_scale, model.defaults.guidance_scale),
            guidance_interval=config.guidance_interval or model.defaults.guidance_interval,
        )
        return model
    vae: Autoencoder | Identity
    if config.vae == "none":
        vae = Identity()
    else:
        vae = load_autoencoder(find_model(None) if config.vae == "bundled" else Path(config.vae))
    conditioner: Labels | Unconditional
    if config.text_encoder == "labels":
        conditioner = Labels(sorted(first_captions(open_source(config.data, 32, font=config.font))))
    elif config.text_encoder == "none":
        conditioner = Unconditional()
    else:
        where = None if config.text_encoder == "bundled" else config.text_encoder
        folder = find_model(None) if where is None else newest(Path(where))
        conditioner = load_conditioner(folder, {})  # type: ignore[assignment]
    tower = getattr(conditioner, "tower", None)
    own = 32 if isinstance(vae, Identity) else vae.config.sample_size
    size = config.size or (own if isinstance(own, int) else max(own))
    unet = replace(
        config.unet if tower else without_text(config.unet),
        in_channels=vae.latent_channels,
        out_channels=vae.latent_channels,
        sample_size=size // vae.downscale,
        cross_attention_dim=tower.config.hidden_size if tower else config.unet.cross_attention_dim,
        num_class_embeds=getattr(conditioner, "num_embeddings", None),
    )
    defaults = Defaults(
        steps=config.steps or 20,
        guidance_scale=_or(config.guidance_scale, 3.0),
        guidance_interval=config.guidance_interval,
        sampler="dpmpp_2m",
        caption_dropout=config.caption_dropout,
        data=config.data,
        size=size,
    )
    torch.manual_seed(config.seed)
    scheduler = scheduler_config(config.path, config.prediction, zero_snr=config.zero_snr)
    return Model(new_unet(unet), vae, conditioner, scheduler, defaults)


@torch.no_grad()
def new_unet(config: UNetConfig) -> UNet:
    """New weights, with branches that begin at zero (Dhariwal & Nichol, 2021, as their code has it): the shortcuts
    carry the picture through from the first update on."""
    unet = UNet(config)
    for module in unet.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, PictureTransformer):
            nn.init.zeros_(module.proj_out.weight)
    nn.init.zeros_(unet.conv_out.weight)
    return unet


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
