"""Features: each kind of network gives what its own library computes, of pictures that were resized with care."""

import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import torch_fidelity.feature_extractor_inceptionv3 as fid
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torchmetrics.image.fid import NoTrainInceptionV3

from conditioning.open_clip import OpenClipEncoder
from ldm.classifier import NoisyClassifier, NoisyClassifierConfig
from pipelines.files import save_network
from tests.conftest import CAPTIONS, tiny_text_encoder
from train.clip_model import load_clip, save_clip
from train.data import to_unit
from train.extractors import CLIP_MEAN, CLIP_STD, normal_of, open_extractor
from train.recogniser_model import BEFORE_LOGITS, Recogniser, RecogniserConfig, load_recogniser

CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 0, "width": 16, "heads": 2, "layers": 1},
}


def pictures(side: int, count: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(count)]


def batch(pixels: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pixels))


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("recogniser")
    config = RecogniserConfig(tasks=(("class", ("a", "b", "c")),), sample_size=9, widths=(8, 12), in_channels=1)
    network = Recogniser(config)
    network(torch.randn(64, 1, 9, 9))  # the norms have seen something
    save_network(network, folder)
    return folder


def test_a_recogniser_gives_its_last_layer_but_one(recogniser: Path) -> None:
    extractor, network = open_extractor(str(recogniser)), load_recogniser(recogniser)
    shown = pictures(9)
    features = extractor(shown)
    assert features.shape == (3, 12)
    grey = to_unit(batch(shown)).mean(1, keepdim=True)
    logits = BEFORE_LOGITS * features @ network.linear_out.weight.T
    assert torch.allclose(logits, network(grey)[0], atol=1e-6)
    assert not extractor.is_inception
    assert extractor.embed is None


def test_the_hash_is_that_of_the_weights(recogniser: Path, tmp_path: Path) -> None:
    network = load_recogniser(recogniser)
    save_network(network, tmp_path / "copy")
    assert open_extractor(str(tmp_path / "copy")).digest == open_extractor(str(recogniser)).digest
    network.linear_out.weight[0, 0] += 1
    save_network(network, tmp_path / "other")
    assert open_extractor(str(tmp_path / "other")).digest != open_extractor(str(recogniser)).digest


def test_resizing_looks_at_every_pixel(recogniser: Path) -> None:
    """A fine checkerboard is grey from afar, and so are its features; leaving pixels out would see black or white."""
    extractor = open_extractor(str(recogniser))
    board = np.where(np.indices((90, 90)).sum(0) % 2, 255, 0).astype(np.uint8)[..., None].repeat(3, 2)
    grey = np.full((9, 9, 3), 127, np.uint8)
    assert torch.allclose(extractor([board]), extractor([grey]), atol=1e-3)
    assert not torch.allclose(extractor([board[::10, ::10]]), extractor([grey]), atol=5e-3)
    (large,) = pictures(31, 1)
    by_pillow = np.asarray(Image.fromarray(large).resize((9, 9), Image.Resampling.BICUBIC))
    assert torch.equal(extractor([large]), extractor([by_pillow]))
    assert extractor.resize == "to 9×9, bicubic of Pillow (antialiased), 8 bits"


def test_a_noisy_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = NoisyClassifierConfig(labels=("a", "b"), in_channels=3, sample_size=8, block_out_channels=(8, 16))
    network = NoisyClassifier(config)
    torch.nn.init.normal_(network.linear_out.weight)
    save_network(network, tmp_path / "pixels")
    shown = pictures(8)
    features = open_extractor(str(tmp_path / "pixels"))(shown)
    scale = network.schedule.alpha(torch.tensor(0.05))  # as its forward says
    logits = network.prior + config.sigma_data * scale * network.linear_out(features)
    assert torch.allclose(logits, network(to_unit(batch(shown)), 0.05), atol=1e-5)
    save_network(NoisyClassifier(replace(config, in_channels=4)), tmp_path / "latents")
    with pytest.raises(ValueError, match="a classifier of latents"):
        open_extractor(str(tmp_path / "latents"))


def test_the_projects_own_clip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = tiny_text_encoder().clip_tokenizer
    arguments = CLIP | {"text_cfg": {**CLIP["text_cfg"], "vocab_size": len(tokenizer)}}  # type: ignore[dict-item]
    save_clip(tmp_path / "run", open_clip.CLIP(**arguments), arguments, tokenizer)
    extractor, judge = open_extractor(str(tmp_path / "run")), load_clip(tmp_path / "run" / "clip")
    shown = pictures(16)
    assert extractor.embed is not None
    with torch.no_grad():
        for ours, theirs in (
            (extractor(shown), judge.encode_image(to_unit(batch(shown)))),
            (extractor.embed(CAPTIONS), judge.encode_text(CAPTIONS)),
        ):
            assert torch.allclose(F.normalize(ours, dim=1), theirs, atol=1e-5)


def normal(shown: list[np.ndarray], mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    return (batch(shown).permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@pytest.fixture(scope="module")
def their_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    encoder = tiny_text_encoder()
    encoder.clip_tokenizer.save(folder)
    width = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": encoder.clip_tokenizer.prefix[0], "eos_token_id": encoder.clip_tokenizer.suffix[0]}
    text = {**width, **ids, "vocab_size": len(encoder.clip_tokenizer), "max_position_embeddings": 16}
    config = transformers.CLIPConfig(
        text_config=text,
        vision_config={**width, "image_size": 16, "patch_size": 8, "projection_dim": 12},
        projection_dim=12,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def test_a_clip_of_transformers(their_clip: Path, tmp_path: Path) -> None:
    extractor, shown = open_extractor(str(their_clip)), pictures(16)
    model = transformers.CLIPModel.from_pretrained(their_clip)
    tokenizer = transformers.AutoTokenizer.from_pretrained(their_clip)
    assert extractor.embed is not None
    with torch.no_grad():
        theirs = model.get_image_features(pixel_values=normal(shown, CLIP_MEAN, CLIP_STD)).pooler_output
        assert torch.allclose(extractor(shown), theirs, atol=1e-5)
        ids = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
        assert torch.allclose(extractor.embed(CAPTIONS), model.get_text_features(**ids).pooler_output, atol=1e-5)
        tower = transformers.CLIPVisionModelWithProjection.from_pretrained(their_clip)
        tower.save_pretrained(tmp_path / "tower")
        alone = open_extractor(str(tmp_path / "tower"))
        assert torch.allclose(alone(shown), theirs, atol=1e-5)
        assert alone.embed is None
    weights = load_file(their_clip / "model.safetensors")
    broken = shutil.copytree(their_clip, tmp_path / "broken")
    save_file({k: w for k, w in weights.items() if "visual_projection" not in k}, broken / "model.safetensors")
    with pytest.raises(ValueError, match="lack 1 tensors, for instance visual_projection"):
        open_extractor(str(broken))


def test_another_tower_of_transformers(tmp_path: Path) -> None:
    """Its first token, with the normalisation that its files name."""
    torch.manual_seed(0)
    width = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.Dinov2Model(transformers.Dinov2Config(image_size=28, patch_size=14, **width))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is missing"):
        open_extractor(str(tmp_path))
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    described = {"image_processor_type": "BitImageProcessor", "image_mean": mean, "image_std": std}
    sizes = {"crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 28}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(described | sizes))
    shown = pictures(28)
    with torch.no_grad():
        theirs = model(pixel_values=normal(shown, mean, std)).last_hidden_state[:, 0]
    extractor = open_extractor(str(tmp_path))
    assert torch.allclose(extractor(shown), theirs, atol=1e-4)
    said = json.loads((tmp_path / "config.json").read_text()) | {"transformers_version": "99.0"}
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert open_extractor(str(tmp_path)).digest == extractor.digest  # whoever wrote it
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(described | sizes | {"image_mean": std}))
    assert open_extractor(str(tmp_path)).digest != extractor.digest


def test_towers_without_a_token_for_the_picture_are_refused(tmp_path: Path) -> None:
    transformers.ConvNextConfig(hidden_sizes=[4, 4, 4, 4], depths=[1, 1, 1, 1]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a convnext, of which it is not known .* expected one of clip, .*dinov2"):
        open_extractor(str(tmp_path))


def test_features_are_a_row_for_each_picture(recogniser: Path) -> None:
    extractor = replace(open_extractor(str(recogniser)), compute=lambda pixels: pixels.float())
    with pytest.raises(ValueError, match=r"features of shape \[3, 9, 9, 3\] for 3 pictures: expected a row for each"):
        extractor(pictures(9))


def test_a_safetensors_file_and_an_architecture_of_open_clip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    described = CLIP | {"text_cfg": {**CLIP["text_cfg"], "vocab_size": 49408, "context_length": 77}}  # type: ignore[dict-item]
    (tmp_path / "tiny-for-tests.json").write_text(json.dumps(described))
    open_clip.add_model_config(tmp_path)
    model = open_clip.create_model("tiny-for-tests").eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    extractor = open_extractor(f"tiny-for-tests:{tmp_path / 'weights.safetensors'}")
    shown = pictures(16)
    assert extractor.embed is not None
    with torch.no_grad():
        theirs = model.encode_image(normal(shown, CLIP_MEAN, CLIP_STD))
        assert torch.allclose(extractor(shown), theirs, atol=1e-5)
        ids = open_clip.get_tokenizer("tiny-for-tests")(CAPTIONS)
        assert torch.allclose(extractor.embed(CAPTIONS), model.encode_text(ids), atol=1e-5)
    quick = described | {"quick_gelu": True}
    (tmp_path / "tiny-for-tests-quick.json").write_text(json.dumps(quick))
    open_clip.add_model_config(tmp_path)
    twin = open_extractor(f"tiny-for-tests-quick:{tmp_path / 'weights.safetensors'}")
    assert not torch.equal(twin(shown), extractor(shown))
    assert twin.digest != extractor.digest
    assert extractor.is_cut is not None
    assert [extractor.is_cut(caption) for caption in ("a fox", "fox " * 75, "fox " * 76)] == [False, False, True]
    with pytest.raises(ValueError, match=r"expected a \.safetensors file or one of"):
        open_extractor("ViT-B-32:nothing")
    with pytest.raises(ValueError, match="nowhere"):
        open_extractor("tiny-for-tests:nowhere.safetensors")


def test_a_file_is_shown_pixels_as_all_weights_of_its_architecture_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for architecture, mean in (("ViT-B-32", CLIP_MEAN[0]), ("ViT-B-16-SigLIP", 0.5)):
        normal = normal_of(architecture, open_clip.list_pretrained_tags_by_model(architecture))
        assert normal["mean"][0] == pytest.approx(mean)
    assert normal_of("tiny-for-tests", []) == {}  # that open_clip's own default is taken for
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda _, tag: {"mean": [len(tag)], "std": [1.0]})
    with pytest.raises(ValueError, match=r"want pixels of different means.* give one of openai, mixed"):
        normal_of("ViT-B-32", ["openai", "mixed"])


@pytest.mark.parametrize(("weights", "quick"), [("openai", True), ("laion2b_s34b_b79k", False)])
def test_weights_have_the_activation_that_they_were_trained_with(
    weights: str, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tag for QuickGELU open_clip itself would make a network with GELU, and warn."""

    def create_model(name: str, tag: str, **options: object) -> None:
        raise ValueError(f"{name} {tag} {options['force_quick_gelu']}")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    with pytest.raises(ValueError, match=f"ViT-B-32 {weights} {quick}"):
        open_extractor(f"ViT-B-32:{weights}")
    with pytest.raises(ValueError, match=f"ViT-B-32 {weights} {quick}"):
        OpenClipEncoder.from_name("ViT-B-32", weights)


def test_inception_is_that_of_torchmetrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights that are drawn here: those of FID can't be downloaded by a test."""
    with monkeypatch.context() as patch, torch.random.fork_rng([]):
        torch.manual_seed(0)
        patch.setattr(fid, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *a, **k: None)
        weights = fid.FeatureExtractorInceptionV3("drawn", ["2048"])
    state = {name: tensor.contiguous() for name, tensor in weights.state_dict().items()}
    torch.save(state, tmp_path / "drawn.pth")
    save_file(state, tmp_path / "drawn.safetensors")
    theirs = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(tmp_path / "drawn.pth"))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 299, 299, 3), np.uint8)
    expected = theirs(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert expected.std() > 0
    for file in ("drawn.pth", "drawn.safetensors"):
        found = open_extractor(f"inception:{tmp_path / file}")
        assert (found.is_inception, found.is_fids) == (True, False)
        torch.testing.assert_close(found(list(pixels)), expected)
    digest = hashlib.sha256((tmp_path / "drawn.pth").read_bytes()).hexdigest()
    monkeypatch.setattr(fid, "URL_INCEPTION_V3", f"https://there/weights-{digest[:8]}.pth")
    assert open_extractor(f"inception:{tmp_path / 'drawn.pth'}").is_fids
    assert not open_extractor(f"inception:{tmp_path / 'drawn.safetensors'}").is_fids


def test_without_inceptions_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match=r"could not be fetched \(no network\). Put the file from https://"):
        open_extractor("inception")
    with pytest.raises(ValueError, match=r"no file there; the weights are those of https://"):
        open_extractor(f"inception:{tmp_path / 'nowhere.pth'}")
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match=r"pip install torchmetrics torch-fidelity.*features that need no download"):
        open_extractor("inception")


def test_what_is_no_extractor(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"'nowhere': expected inception"):
        open_extractor("nowhere")
    with pytest.raises(ValueError, match="no architecture of open_clip"):
        open_extractor("no-such:weights")
    with pytest.raises(ValueError, match="holds no network of pictures that is known"):
        open_extractor(str(model_folder))
