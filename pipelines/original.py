"""Names of layers in the code that Stable Diffusion was published with, as kohya's scripts have them for SDXL."""

import re

from ldm.unet_config import UNetConfig

# Within a residual block, and outside of the levels.
RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
ENDS = {
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
}
MIDDLE = ("resnets_0", "attentions_0", "resnets_1")


def diffusers_name(name: str, config: UNetConfig) -> str:
    """A layer's name in `ldm.unet.UNet`, dots written as underscores; any other name stays as it is.

    There the blocks of all levels are counted through, each a list of its layers: residual block, attention, and the
    change of size at the end of a level (on the way down a block of its own).
    """
    if name in ENDS:
        return ENDS[name]
    if found := re.fullmatch(r"middle_block_([012])_(.+)", name):
        return f"mid_block_{MIDDLE[int(found[1])]}_{RESNET.get(found[2], found[2])}"
    found = re.fullmatch(r"(input|output)_blocks_(\d+)_([012])_(.+)", name)
    layers = config.layers_per_block
    if not found or not isinstance(layers, int):
        return name
    way, block, place, rest = "down" if found[1] == "input" else "up", int(found[2]), int(found[3]), found[4]
    level, layer = divmod(block - (way == "down"), layers + 1)
    if rest in ("op", "conv"):
        return f"{way}_blocks_{level}_{way}samplers_0_conv"
    kind = "attentions" if place else "resnets"
    return f"{way}_blocks_{level}_{kind}_{layer}_{RESNET.get(rest, rest)}"
