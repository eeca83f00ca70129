"""The semantic encoder: pictures of any kind in, one token out, and what one token is to cross-attention."""

import json

import pytest
import torch

from conditioning.semantic import SemanticConfig, SemanticEncoder
from ldm.transformer import Attention, TextContext
from ldm.unet import UNet, UNetConfig

SMALL = SemanticConfig(code_dim=12, block_out_channels=(8, 16), norm_num_groups=4)


@pytest.fixture(scope="module")
def encoder() -> SemanticEncoder:
    torch.manual_seed(0)
    encoder = SemanticEncoder(SMALL)
    for parameter in encoder.parameters():  # branches begin at zero, which would hide a mistake in them
        torch.nn.init.normal_(parameter, std=0.2)
    return encoder.eval().requires_grad_(False)


def draw(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_picture_becomes_one_token_that_the_unet_takes(encoder: SemanticEncoder) -> None:
    images = draw(3, 3, 16, 16)
    codes, context = encoder.encode(images), encoder(images)
    assert codes.shape == (3, 12)
    assert context.keys() == {"encoder_hidden_states"}
    assert context["encoder_hidden_states"].equal(codes[:, None])
    unet = UNet(
        UNetConfig(
            in_channels=3,
            out_channels=3,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=2,
            norm_num_groups=4,
        )
    )
    one, other = unet(images, 500.0, **context), unet(images, 500.0, **encoder.context(codes.roll(1, 0)))
    assert one.shape == images.shape
    assert ((one - other).abs().flatten(1).amax(1) > 1e-4).all()


def test_to_one_token_attention_is_one_linear_function_everywhere(encoder: SemanticEncoder) -> None:
    torch.manual_seed(2)
    attention = Attention(8, heads=2, context_channels=12)
    states = encoder(draw(2, 3, 16, 16))["encoder_hidden_states"]
    seen = attention(torch.randn(2, 5, 8), TextContext(states, None))
    torch.testing.assert_close(seen, attention.to_out[0](attention.to_v(states)).expand(2, 5, 8))


def test_each_picture_has_its_code_alone_and_in_a_batch(encoder: SemanticEncoder) -> None:
    images = draw(3, 3, 20, 20)
    codes = encoder.encode(images)
    torch.testing.assert_close(torch.cat([encoder.encode(image[None]) for image in images]), codes)
    assert (codes[0] - codes[1]).abs().max() > 1e-2


@pytest.mark.parametrize("side", [4, 7, 28, 33])
def test_sides_of_any_length(encoder: SemanticEncoder, side: int) -> None:
    assert encoder.encode(draw(1, 3, side, side + 2)).isfinite().all()


def test_grey_pictures_have_one_channel_or_three_alike(encoder: SemanticEncoder) -> None:
    grey = draw(2, 1, 16, 16)
    torch.manual_seed(0)
    of_grey = SemanticEncoder(SemanticConfig(code_dim=12, in_channels=1, block_out_channels=(8,), norm_num_groups=4))
    for network in (encoder, of_grey):
        torch.testing.assert_close(network.encode(grey.expand(-1, 3, -1, -1)), network.encode(grey))
    colours = draw(2, 3, 16, 16)
    torch.testing.assert_close(of_grey.encode(colours), of_grey.encode(colours.mean(1, keepdim=True)))


def test_the_code_says_where_things_are(encoder: SemanticEncoder) -> None:
    """A mean over the whole picture, 1 × 1 fields, hardly does."""
    torch.manual_seed(0)
    blind = SemanticEncoder(SemanticConfig(code_dim=12, block_out_channels=(8, 16), norm_num_groups=4, fields=1))
    image = torch.zeros(1, 3, 32, 32)
    image[..., 10:14, 10:14] = 1  # far from the edges, moved by what the levels halve
    moved = image.roll((8, 8), (2, 3))

    def change(network: SemanticEncoder) -> float:
        with torch.no_grad():
            empty, one, other = (network.encode(x) for x in (torch.zeros_like(image), image, moved))
        return float((other - one).norm() / (one - empty).norm())

    assert change(blind) < 0.05
    assert change(encoder) > 0.5


def test_the_config_survives_json_and_refuses_what_it_does_not_know() -> None:
    kept = json.loads(json.dumps(SMALL.to_dict()))
    assert kept["_class_name"] == "SemanticEncoder"
    assert SemanticConfig.from_dict(kept) == SMALL
    weights = SemanticEncoder(SMALL).state_dict()
    SemanticEncoder.from_config(kept).load_state_dict(weights)
    with pytest.raises(ValueError, match="of a UNet2DConditionModel"):
        SemanticConfig.from_dict({"_class_name": "UNet2DConditionModel"})
    with pytest.raises(ValueError, match="no config key dropout"):
        SemanticConfig.from_dict({**kept, "dropout": 0.1})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"in_channels": 4}, "in_channels=4: expected 3, or 1"),
        ({"code_dim": 0}, "code_dim"),
        ({"fields": 0}, "fields of at least 1"),
        ({"block_out_channels": (12,)}, "multiples of 8"),
        ({"block_out_channels": ()}, "multiples of 8"),
    ],
)
def test_bad_configs_are_refused_by_name(values: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SemanticConfig(**values)


@pytest.mark.parametrize("images", [["a fox"], draw(3, 16, 16), draw(1, 4, 16, 16)], ids=["text", "one", "four"])
def test_what_is_no_batch_of_pictures_is_refused(encoder: SemanticEncoder, images: object) -> None:
    with pytest.raises(ValueError, match=r"is told pictures \[B, 3 or 1, H, W\]"):
        encoder(images)
