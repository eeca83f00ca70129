"""The bundled model's folder: what was trained, in a byte a weight, opened by all that reads the whole one."""

from pathlib import Path

import open_clip
import pytest
import torch

from pipelines import TextToImagePipeline
from pipelines.adapters import save_lora
from pipelines.files import load_autoencoder, newest, save_network, write_json
from pipelines.folder import load_model, save_model
from pipelines.quantized import dequantize, quantize
from tests.conftest import tiny_text_encoder
from tests.test_extractors import CLIP
from train.bundle import Config, _same, main
from train.clip_model import export_text_tower, load_clip, save_clip
from train.extractors import open_extractor


@pytest.fixture(scope="module")
def runs(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    tokenizer = tiny_text_encoder().clip_tokenizer
    text = {**CLIP["text_cfg"], "vocab_size": len(tokenizer), "width": 32}  # type: ignore[dict-item]
    for name in ("clip", "another"):
        torch.manual_seed(len(name))
        clip = open_clip.CLIP(**(arguments := CLIP | {"text_cfg": text}))
        save_clip(runs / name, clip, arguments, tokenizer)
    model = load_model(model_folder)
    model.conditioner = export_text_tower(load_clip(runs / "clip" / "clip").model, tokenizer)
    save_model(model, runs / "model" / "checkpoint-0000005")
    channels = model.unet.conv_in.out_channels
    factors = {
        "conv_in.lora_A.weight": torch.randn(2, 4, 3, 3),
        "conv_in.lora_B.weight": torch.randn(channels, 2, 1, 1),
    }
    for name, base in (("student", "model"), ("strange-student", "other-model")):
        save_lora(runs / name, {"unet": factors}, {"unet": 2}, {"steps": 3, "guidance_scale": 1.0})
        write_json(runs / name / "atelier.json", {"base": str(runs / base)})
    with torch.no_grad():
        model.unet.conv_in.weight.neg_()
    save_model(model, runs / "other-model")
    return runs


def test_what_three_trainings_left_is_one_small_folder(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundled"
    save_model(load_model(runs / "model"), out)  # as a bundle of 32 bits was
    (out / "README.md").write_text("a card")
    main(Config(runs / "model", runs / "clip", runs / "student", out))
    assert (out / "README.md").read_text() == "a card"
    assert not (out / "model_index.json").exists()
    assert [file.name for file in out.glob("unet/*.safetensors")] == ["diffusion_pytorch_model.int8.safetensors"]
    whole = TextToImagePipeline.from_pretrained(runs / "model", device="cpu")
    small = TextToImagePipeline.from_pretrained(out, device="cpu")
    for name, weight in whole.model.unet.state_dict().items():
        assert (small.model.unet.state_dict()[name] - weight).norm() <= 0.02 * weight.norm() + 1e-6, name
    weights = sum(w.numel() for w in whole.model.unet.state_dict().values())
    assert (out / "unet" / "diffusion_pytorch_model.int8.safetensors").stat().st_size < 1.6 * weights + 40_000

    captions = ["a red circle", "a blue square"]
    theirs = load_clip(runs / "clip" / "clip").encode_text(captions)
    assert float((load_clip(out / "clip").encode_text(captions) * theirs).sum(1).min()) > 0.999
    assert open_extractor(str(out)).embed is not None

    small.load_lora(out / "student")
    assert (small.model.defaults.steps, small.model.defaults.guidance_scale) == (3, 1.0)
    assert oct((out / "clip" / "open_clip_model.int8.safetensors").stat().st_mode)[-3:] == "644"


def test_another_decoder_of_the_same_latents(runs: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "decoder", tmp_path / "bundled"
    vae = load_autoencoder(newest(runs / "model") / "vae")
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(-1)
    save_network(vae, run)
    main(Config(runs / "model", runs / "clip", out=out, vae=run))
    small = load_model(out)
    wanted = -load_model(runs / "model").vae.decoder.conv_out.weight
    torch.testing.assert_close(small.vae.decoder.conv_out.weight, wanted, atol=0.01, rtol=0.01)

    out.rename(tmp_path / ".bundled.before.partial")  # as a call that was killed while it replaced the folder leaves it
    (tmp_path / ".bundled.before.partial" / "README.md").write_text("a card")
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(-1)
    save_network(vae, run)
    with pytest.raises(ValueError, match="has another encoder than"):
        main(Config(runs / "model", runs / "clip", out=out, vae=run))
    assert (out / "README.md").read_text() == "a card"


def test_weights_are_known_again_in_8_bits_and_only_those(runs: Path) -> None:
    unet = load_model(runs / "model").unet.state_dict()
    stored = dequantize(quantize(unet))
    assert _same(stored, unet)
    assert _same(unet, stored)
    assert _same(stored, dequantize(quantize(stored)))
    halves = {name: weight.half().float() for name, weight in unet.items()}  # as a bundle has its text encoder
    assert _same(halves, unet)
    assert _same(dequantize(quantize(halves)), unet)
    for name, share in (("conv_in.weight", 0.02), ("conv_in.bias", 0.002)):
        tuned = unet | {name: unet[name] * (1 + share * torch.randn(unet[name].shape))}  # by hardly more than rounding
        assert not _same(tuned, unet)
        assert not _same(stored, tuned)
    assert not _same({"conv_in.weight": unet["conv_in.weight"]}, unet)


def test_a_run_that_is_none_is_named_and_nothing_is_lost(runs: Path, tmp_path: Path) -> None:
    save_model(load_model(runs / "model"), tmp_path)
    kept = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="nowhere"):
        main(Config(Path("nowhere"), runs / "clip", None, tmp_path))
    with pytest.raises(ValueError, match="open_clip_config"):
        main(Config(runs / "model", runs / "model", None, tmp_path))
    with pytest.raises(ValueError, match=r"another is another than the one whose text encoder is in"):
        main(Config(runs / "model", runs / "another", None, tmp_path))
    with pytest.raises(ValueError, match="pytorch_lora_weights"):
        main(Config(runs / "model", runs / "clip", runs / "clip", tmp_path))
    with pytest.raises(ValueError, match=r"strange-student learnt from another model than --model, from .*other-model"):
        main(Config(runs / "model", runs / "clip", runs / "strange-student", tmp_path))
    assert sorted(tmp_path.rglob("*")) == kept
    with pytest.raises(ValueError, match="would be replaced, and"):
        main(Config(runs / "model", runs / "clip", None, runs))
    assert (runs / "model").is_dir()
    (tmp_path / "atelier.json").unlink()
    with pytest.raises(ValueError, match="would be replaced, and is no model's folder: name a new one"):
        main(Config(runs / "model", runs / "clip", None, tmp_path))
    assert (tmp_path / "unet").is_dir()
