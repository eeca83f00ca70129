"""The U-Net against diffusers' UNet2DConditionModel on the same weights."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ldm.blocks import attend, rename_old_keys
from ldm.transformer import Attention
from ldm.unet import UNet, UNetConfig, timestep_embedding

SMALL: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "SD 1.x": {},
    "SD 2.x": {
        "use_linear_projection": True,
        "upcast_attention": True,
        "attention_head_dim": (2, 8),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "classes": {"num_class_embeds": 5, "layers_per_block": 1},
    "every other key": {
        "class_embed_type": "timestep",
        "resnet_time_scale_shift": "scale_shift",
        "layers_per_block": (1, 2),
        "transformer_layers_per_block": (2, 1),
        "mid_block_scale_factor": 1.5,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-3,
        "in_channels": 3,
        "out_channels": 6,
        "downsample_padding": 0,
    },
    "no middle": {"mid_block_type": None, "layers_per_block": 1},
}
PIXELS: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
}


def pair(**changes) -> tuple[UNet, Any]:
    """Ours and diffusers' with the same weights, passed both ways through strict loads."""
    torch.manual_seed(0)
    ours = UNet(UNetConfig(**{**SMALL, **changes}))
    theirs = UNet2DConditionModel.from_config(ours.config.to_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for parameter in ours.parameters():  # new norms are all ones and zeros, which would hide a swap
        parameter.data += 0.2 * torch.randn_like(parameter) if parameter.ndim == 1 else 0
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def inputs(model: UNet, size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, model.config.in_channels, *size, generator=generator)
    context = {}
    if model.looks_at_context:
        context["encoder_hidden_states"] = torch.randn(2, 5, model.config.cross_attention_dim, generator=generator)
    if model.class_embedding is not None:
        context["class_labels"] = torch.tensor([3, 1])
    return sample, torch.tensor([7.0, 991.0]), context


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_all_gradients_equal_diffusers(name):
    ours, theirs = pair(**CONFIGS[name])
    sample, timestep, context = inputs(ours)
    leaves = [sample, context["encoder_hidden_states"]]
    target = torch.randn(2, ours.config.out_channels, 8, 8, generator=torch.Generator().manual_seed(2))

    def run(model):
        for leaf in leaves:
            leaf.grad = None
            leaf.requires_grad_()
        output = model(sample, timestep, **context)
        output = output if isinstance(output, Tensor) else output.sample
        (output * target).sum().backward()
        return output.detach(), [leaf.grad for leaf in leaves], {k: p.grad for k, p in model.named_parameters()}

    (output, at_inputs, at_weights), (output2, at_inputs2, at_weights2) = run(ours), run(theirs)
    close(output, output2)
    for a, b in zip(at_inputs, at_inputs2, strict=True):
        close(a, b)
    assert at_weights.keys() == at_weights2.keys()
    for key, gradient in at_weights.items():
        assert gradient is not None, key
        close(gradient, at_weights2[key], 1e-4 * max(1.0, gradient.abs().max().item()))


def test_dropout_is_diffusers():
    ours, theirs = (model.train() for model in pair(dropout=0.3))
    sample, timestep, context = inputs(ours)

    def run(model):
        torch.manual_seed(3)
        output = model(sample, timestep, **context)
        return output if isinstance(output, Tensor) else output.sample

    dropped = run(ours)
    close(dropped, run(theirs))
    assert not torch.allclose(dropped, run(ours.eval()), atol=0.01)


def test_norms_have_the_eps_of_diffusers():
    ours, theirs = pair()
    eps = [{k: m.eps for k, m in model.named_modules() if hasattr(m, "eps")} for model in (ours, theirs)]
    assert eps[0]  # too small a difference to show in an output of unit size
    assert eps[0] == {k: v for k, v in eps[1].items() if k in eps[0]}


def test_unconditional_pixel_network_equals_diffusers():
    ours, theirs = pair(**PIXELS)
    sample, timestep, _ = inputs(ours)
    close(ours(sample, timestep), theirs(sample, timestep, None).sample)


def test_old_attention_keys_load():
    ours, _ = pair(**PIXELS)
    state = ours.state_dict()
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = dict(state)
    for new_name, old_name in names.items():
        old = {k.replace(new_name, old_name): v for k, v in old.items()}
    assert old.keys() != state.keys()
    assert rename_old_keys(old).keys() == state.keys()
    assert rename_old_keys(state).keys() == state.keys()
    fresh = UNet(ours.config)
    fresh.load_state_dict(old, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), state.values(), strict=True))


@pytest.mark.parametrize("size", [(9, 7), (5, 8), (1, 3)])
def test_sides_of_any_length(size):
    three_levels = {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
    }
    ours, theirs = pair(**three_levels)
    sample, timestep, context = inputs(ours, size)
    close(ours(sample, timestep, **context), theirs(sample, timestep, **context).sample)


def test_attention_mask_equals_diffusers_and_hides_what_it_masks():
    ours, theirs = pair()
    sample, timestep, context = inputs(ours)
    states = context["encoder_hidden_states"]
    for mask in (torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]), torch.tensor([[True] * 5, [False] * 5])):
        expected = theirs(sample, timestep, states, encoder_attention_mask=mask).sample
        close(ours(sample, timestep, states, mask), expected)
    changed = states.clone()
    changed[0, 3:] = 5.0
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    close(ours(sample, timestep, states, mask), ours(sample, timestep, changed, mask), 1e-6)
    assert (ours(sample, timestep, states) - ours(sample, timestep, changed)).abs().max() > 1e-3


def test_timestep_may_be_a_number_a_scalar_or_one_for_each():
    ours, theirs = pair(**PIXELS)
    sample, _, _ = inputs(ours)
    expected = theirs(sample, 17, None).sample
    for timestep in (17, 17.0, torch.tensor(17), torch.tensor([17, 17]), torch.tensor([17.0])):
        close(ours(sample, timestep), expected, 1e-5)
    fraction = torch.tensor([0.25, -1.4])  # EDM's clock is fractional and negative
    close(ours(sample, fraction), theirs(sample, fraction, None).sample)


def test_timestep_embedding_is_float32_of_the_definition():
    t = torch.tensor([0.0, 1.0, 333.25, 999.0], dtype=torch.float64)
    wave = timestep_embedding(t, 6, cosine_first=True, freq_shift=0)
    angle = t[:, None] * 10000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    assert wave.dtype == torch.float32
    close(wave.double(), torch.cat([angle.cos(), angle.sin()], dim=1))
    assert timestep_embedding(t, 7, cosine_first=True, freq_shift=0).shape == (4, 7)


def test_gradient_checkpointing_changes_no_gradient_and_keeps_fewer_tensors():
    ours, _ = pair(num_class_embeds=5, dropout=0.1)
    ours.train()
    sample, timestep, context = inputs(ours)

    def run(checkpointing: bool) -> tuple[int, dict[str, Tensor]]:
        ours.gradient_checkpointing = checkpointing
        ours.zero_grad()
        torch.manual_seed(3)  # dropout must draw the same in the second forward pass
        kept: list[int] = []

        def keep(x: Tensor) -> Tensor:
            kept.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = ours(sample, timestep, **context).square().sum()
        loss.backward()
        return sum(kept), {k: p.grad.clone() for k, p in ours.named_parameters() if p.grad is not None}

    (kept, plain), (kept_less, recomputed) = run(False), run(True)
    assert kept_less < 0.5 * kept
    for key, gradient in plain.items():
        close(recomputed[key], gradient, 1e-5 * max(1.0, gradient.abs().max().item()))


def test_contexts_are_projected_once_and_give_the_same_output():
    ours, _ = pair()
    sample, timestep, context = inputs(ours)
    states = context["encoder_hidden_states"]
    cross = [m for m in ours.modules() if isinstance(m, Attention) and m.to_k.in_features == 12]
    calls = []
    for module in cross:
        module.to_k.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        plain = ours(sample, timestep, states)
        other = ours(sample, timestep, -states)
        calls.clear()
        with ours.reuse_contexts():
            for _ in range(3):
                assert torch.equal(ours(sample, timestep, states), plain)
            assert len(calls) == len(cross)
            assert torch.equal(ours(sample, timestep, -states), other)
            assert len(calls) == 2 * len(cross)
        nn.init.zeros_(cross[0].to_v.weight)
        assert not torch.equal(ours(sample, timestep, states), plain)  # nothing is kept afterwards
    with ours.reuse_contexts():  # training inside is not broken by it
        ours(sample, timestep, states).sum().backward()
        assert cross[0].to_k.weight.grad is not None


def test_conditions_that_miss_or_would_be_ignored_are_refused():
    text, _ = pair()
    pixels, _ = pair(**PIXELS)
    classes, _ = pair(**CONFIGS["classes"])
    sample, timestep, context = inputs(text)
    states = context["encoder_hidden_states"]
    for model, arguments, name in (
        (text, {}, "encoder_hidden_states"),
        (text, {"encoder_hidden_states": states[..., :7]}, r"\(2, 5, 7\)"),
        (text, {**context, "class_labels": torch.tensor([1, 1])}, "class_labels"),
        (text, {**context, "added_cond_kwargs": {"time_ids": states}}, "added_cond_kwargs"),
        (pixels, context, "encoder_hidden_states"),
        (pixels, {"encoder_attention_mask": torch.ones(2, 5)}, "encoder_attention_mask"),
        (classes, context, "class_labels"),
    ):
        with pytest.raises(ValueError, match=name):
            model(sample, timestep, **arguments)


def test_xformers_is_refused_where_it_cannot_run():
    ours, _ = pair()
    with pytest.raises(ValueError, match="CUDA"):
        ours.set_attention("xformers")
    with pytest.raises(ValueError, match="flash"):
        ours.set_attention("flash")
    ours.set_attention("sdpa")
    q = torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="can't run on cpu"):  # as after moving a network back from a GPU
        attend(q, q, q, 2, None, "xformers")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_xformers_equals_sdpa():
    pytest.importorskip("xformers")
    ours, _ = pair()
    ours.cuda()
    sample, timestep, context = inputs(ours)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).cuda()
    arguments = (sample.cuda(), timestep.cuda(), context["encoder_hidden_states"].cuda())
    expected = ours(*arguments), ours(*arguments, mask)
    ours.set_attention("xformers")
    close(ours(*arguments), expected[0], 1e-3)
    close(ours(*arguments, mask), expected[1], 1e-3)


def test_attend_is_softmax_attention():
    q, k, v = (torch.randn(2, n, 8, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (3, 5, 6))
    v = v[:, :5]
    mask = torch.tensor([0.0, -1.0, 2.0, -1e4, 0.5], dtype=torch.float64).expand(2, 1, 1, 5)
    expected = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        scores = q[..., part] @ k[..., part].mT / 2 + mask[:, 0]
        expected.append(scores.softmax(-1) @ v[..., part])
    close(attend(q, k, v, 2, mask, "sdpa"), torch.cat(expected, -1), 1e-12)


def test_compiles_without_a_graph_break():
    ours, _ = pair(layers_per_block=1)
    sample, timestep, context = inputs(ours)
    with torch.no_grad():
        compiled = torch.compile(ours, fullgraph=True, backend="eager")
        close(compiled(sample, timestep, **context), ours(sample, timestep, **context), 1e-6)


def test_runs_under_autocast_and_in_bfloat16():
    ours, _ = pair(num_class_embeds=5)
    sample, timestep, context = inputs(ours)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = ours(sample, timestep, **context, encoder_attention_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ours(sample, timestep, **context, encoder_attention_mask=mask)
        mixed.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())
    # Text encoders give float32: the network takes it in its own type.
    half = ours.bfloat16()(sample.bfloat16(), timestep, **context, encoder_attention_mask=mask)
    assert half.dtype == torch.bfloat16
    for output in (mixed, half):
        assert (output.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_memory_format_is_kept():
    ours, _ = pair()
    sample, timestep, context = inputs(ours)
    expected = ours(sample, timestep, **context)
    ours.to(memory_format=torch.channels_last)
    output = ours(sample.to(memory_format=torch.channels_last), timestep, **context)
    assert output.is_contiguous(memory_format=torch.channels_last)
    close(output, expected)


def test_attention_learns_the_same_in_half_precision() -> None:
    """In float32, which is faster, as by PyTorch's own function in float64."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 12, generator=draw).requires_grad_() for n in (5, 7, 7))
    mask = torch.zeros(2, 1, 1, 7)
    mask[1, ..., 4:] = -1e4
    for given in (None, mask):
        with torch.autocast("cpu", torch.bfloat16):
            halves = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), 3, given, "sdpa")
        assert halves.dtype == torch.bfloat16
        split = [x.double().unflatten(2, (3, -1)).transpose(1, 2) for x in (q, k, v)]
        exact = nn.functional.scaled_dot_product_attention(*split, attn_mask=None if given is None else given.double())
        exact = exact.transpose(1, 2).flatten(2)
        close(halves.double(), exact, 2e-2)
        slopes = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (halves.double(), exact)]
        for mine, true in zip(*slopes, strict=True):
            close(mine, true, 0.1)
