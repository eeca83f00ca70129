"""Networks whose features stand for pictures in distances between sets: `open_extractor(NAME)`.

A name is one of

    inception                the Inception network of FID, through torchmetrics, its weights from their own source
    inception:FILE           the same, weights from a file (.pth or .safetensors)
    RUN                      a run or folder of train/recogniser.py, train/classifier.py or train/clip.py
    bundled                  the bundled model's CLIP, which is no judge of what its own text tower asked for
    FOLDER, OWNER/NAME       a CLIP, or another tower of pictures (DINOv2, ViT), of transformers
    ARCHITECTURE:TAG         a CLIP of open_clip, with the weights of that tag, such as ViT-B-32:laion2b_s34b_b79k
    ARCHITECTURE:FILE        the same with the weights of a .safetensors file

What a picture goes through is said by `Extractor.resize`: Pillow's resampling, which looks at every pixel when it makes
a picture smaller. Resizing that does not changes distances more than models differ (Parmar et al., arXiv:2104.11222).
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from conditioning.open_clip import open_model
from ldm.classifier import NoisyClassifier
from pipelines.classifier import load_classifier
from pipelines.device import exact_float32
from pipelines.files import newest, read_json, read_tensors
from pipelines.find import BUNDLED
from train.cache import weights_digest
from train.data import to_unit

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # Radford et al., 2021
WITH_CLASS_TOKEN = (  # of transformers, as its first; others begin with a patch, or have no tokens
    "vit", "vit_msn", "deit", "beit", "data2vec-vision", "dinov2", "dinov2_with_registers", "dinov3_vit"
)  # fmt: skip
LEVEL = 0.05  # of the noise that a classifier of noisy pictures is shown: the median of its preset `clean`
ACCURACY = "accuracy.json"  # in a recogniser's checkpoint: the share of unseen pictures that is right, by task
INCEPTION, INCEPTION_SIDE = "inception", 299
HERE = (
    "Without it, features that need no download: a run of train/recogniser.py (--preset cifar10, mnist or pictograms) "
    "or of train/clip.py; a distance on those compares models with one another, and is no FID"
)


@dataclass
class Extractor:
    """Pictures to features, and what has to be said beside a number that comes of them."""

    name: str  # as it was asked for
    network: nn.Module
    side: int  # of the pictures that it takes, in pixels
    compute: Callable[[Tensor], Tensor]  # uint8 [B, side, side, 3] -> [B, d]
    embed: Callable[[Sequence[str]], Tensor] | None = None  # captions to [B, d], where it is a CLIP
    is_cut: Callable[[str], bool] | None = None  # whether that reads a caption's beginning alone
    is_fids: bool = False  # FID's own Inception, with the weights whose distances are called FID
    reads: object = None  # all that features hang on beside the weights; None: the network's own `config` and the side

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False)
        self.digest = weights_digest(self.network, self.reads)[:16]

    @property
    def resize(self) -> str:
        return f"to {self.side}×{self.side}, bicubic of Pillow (antialiased), 8 bits"

    def described(self) -> dict[str, Any]:
        """What files of figures say of it; of a recogniser also how often it is right about real pictures."""
        said: dict[str, Any] = {"name": self.name, "hash": self.digest, "resize": self.resize}
        accuracy = newest(Path(self.name).expanduser()) / ACCURACY
        return said | ({"accuracy": read_json(accuracy)} if accuracy.is_file() else {})

    @property
    def is_inception(self) -> bool:
        return self.name.partition(":")[0] == INCEPTION

    @torch.no_grad()
    @exact_float32()  # features are kept, and compared with those of other devices
    def __call__(self, pixels: Sequence[np.ndarray]) -> Tensor:
        """Square pictures, uint8 [side, side, 3] each -> [B, d] float32, on the CPU."""
        device = next(self.network.parameters()).device
        features = self.compute(resized(pixels, self.side).to(device)).float().cpu()
        if features.ndim != 2 or len(features) != len(pixels):
            raise ValueError(
                f"the extractor {self.name} gives features of shape {list(features.shape)} for {len(pixels)} pictures: "
                "expected a row for each"
            )
        return features


def resized(pixels: Sequence[np.ndarray], side: int) -> Tensor:
    """Square pictures, uint8 [any, any, 3] each, as networks are shown them: uint8 [B, side, side, 3]."""
    shape = (side, side)
    same = (p if p.shape[:2] == shape else Image.fromarray(p).resize(shape, Image.Resampling.BICUBIC) for p in pixels)
    return torch.from_numpy(np.stack([np.asarray(one) for one in same]))


def open_extractor(name: str, device: torch.device | str = "cpu") -> Extractor:
    """Opens what the module's text lists; ValueError where it is none of that, or can't be had here."""
    kind, _, weights = name.partition(":")
    folder = BUNDLED if name == "bundled" else newest(Path(name).expanduser())
    if kind == INCEPTION:
        found = _inception(name, weights)
    elif folder.is_dir():
        found = _of_folder(name, folder)
    elif weights:
        found = _open_clip(name, kind, weights)
    elif name.count("/") == 1 and not name.startswith((".", "~", "/")):
        found = _transformers(name, name)
    else:
        raise ValueError(
            f"--extractor {name!r}: expected inception, inception:FILE, bundled, a run of train/recogniser.py, "
            "train/classifier.py or train/clip.py, a folder or hub id of transformers, or ARCHITECTURE:WEIGHTS of "
            "open_clip (train/extractors.py lists them)"
        )
    found.network.to(device)
    return found


def _inception(name: str, file: str) -> Extractor:
    try:
        inception, theirs = (
            import_module(m) for m in ("torchmetrics.image.fid", "torch_fidelity.feature_extractor_inceptionv3")
        )
    except ImportError as error:
        raise ValueError(
            f"--extractor {name}: the Inception network of FID comes with the packages torchmetrics and torch-fidelity "
            f"({error}): pip install torchmetrics torch-fidelity. {HERE}"
        ) from None
    source = theirs.URL_INCEPTION_V3
    if file and not Path(file).expanduser().is_file():
        raise ValueError(f"--extractor {name}: no file there; the weights are those of {source}. {HERE}")
    state = _read_weights(Path(file).expanduser()) if file else _fetched(source)
    known = not file or _is_download(Path(file).expanduser(), source)
    with tempfile.TemporaryDirectory() as folder:  # the library would unpickle whatever a file holds: it gets tensors
        copy = Path(folder) / "weights.pth"
        torch.save(state, copy)
        try:
            network = inception.NoTrainInceptionV3(
                name="inception-v3-compat", features_list=["2048"], feature_extractor_weights_path=str(copy)
            )
        except RuntimeError as error:
            raise ValueError(
                f"--extractor {name}: not the weights of FID's Inception, those of {source} ({str(error)[:200]})"
            ) from None
    return Extractor(name, network, INCEPTION_SIDE, lambda pixels: network(pixels.permute(0, 3, 1, 2)), is_fids=known)


def _is_download(file: Path, url: str) -> bool:
    """Whether a file is the one at an address, whose name ends in the beginning of its SHA-256, as torch.hub has it."""
    said = re.search(r"-([0-9a-f]{8,})\.", url.rpartition("/")[2])
    with open(file, "rb") as opened:
        return said is not None and hashlib.file_digest(opened, "sha256").hexdigest().startswith(said[1])


def _fetched(url: str) -> dict[str, Tensor]:
    place = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    try:
        return torch.hub.load_state_dict_from_url(url, check_hash=True, weights_only=True, progress=False)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"--extractor inception: the weights could not be fetched ({error}). Put the file from {url} at {place}, "
            f"or anywhere and give --extractor inception:FILE. {HERE}"
        ) from None


def _read_weights(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return read_tensors(file)[0]
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # of whatever kind: it is not a file of tensors alone
        raise ValueError(
            f"{file} can't be read as weights ({type(error).__name__}): copy or download it again"
        ) from None


def _of_folder(name: str, folder: Path) -> Extractor:
    for clip in (folder, folder / "clip"):
        if (clip / "open_clip_config.json").is_file():
            return _own_clip(name, clip)
    config = folder / "config.json"
    said = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    kind = said.get("_class_name")
    if kind == "Recogniser":
        return _recogniser(name, folder)
    if kind == "NoisyClassifier":
        return _classifier(name, folder)
    if "model_type" in said:
        return _transformers(name, str(folder))
    held = ", ".join(sorted(f.name for f in folder.iterdir())[:8]) or "nothing"
    raise ValueError(
        f"--extractor {name}: {folder} holds no network of pictures that is known (it holds {held}): expected a run of "
        "train/recogniser.py, train/classifier.py or train/clip.py, or a folder of transformers"
    )


def _recogniser(name: str, folder: Path) -> Extractor:
    from train.recogniser_model import as_seen, load_recogniser

    network = load_recogniser(folder)
    config = network.config
    return Extractor(
        name, network, config.sample_size, lambda pixels: network.features(as_seen(config, to_unit(pixels)))
    )


def _classifier(name: str, folder: Path) -> Extractor:
    network = load_classifier(folder)
    config = network.config
    if config.in_channels not in (1, 3):
        raise ValueError(
            f"--extractor {name}: a classifier of latents ({config.in_channels} channels), not of pictures"
        )

    def compute(pixels: Tensor) -> Tensor:
        images = to_unit(pixels)
        return _last_but_one(network, images if config.in_channels == 3 else images.mean(1, keepdim=True))

    return Extractor(name, network, config.sample_size, compute)


def _last_but_one(network: NoisyClassifier, images: Tensor) -> Tensor:
    """What the last layer takes, [B, d], at the lowest noise level that such a classifier is asked at."""
    kept: list[Tensor] = []
    hook = network.linear_out.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    try:
        network(images, LEVEL)
    finally:
        hook.remove()
    return kept[0]


def _own_clip(name: str, folder: Path) -> Extractor:
    from train.clip_model import CONFIG, load_clip, tokenise

    clip = load_clip(folder)

    def embed(captions: Sequence[str]) -> Tensor:
        ids = tokenise(clip.tokenizer, captions, clip.length)
        return clip.model.encode_text(ids.to(next(clip.model.parameters()).device))

    def is_cut(caption: str) -> bool:
        return len(clip.tokenizer.encode(caption)) + 2 > clip.length

    reads = read_json(folder / CONFIG)
    return Extractor(
        name, clip.model, clip.size, lambda pixels: clip.model.encode_image(to_unit(pixels)), embed, is_cut, reads=reads
    )


def _open_clip(name: str, architecture: str, weights: str) -> Extractor:
    import open_clip

    if architecture not in open_clip.list_models():
        raise ValueError(f"--extractor {name}: {architecture!r} is no architecture of open_clip, nor a folder here")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if weights not in tags and Path(weights).suffix != ".safetensors":
        raise ValueError(
            f"--extractor {name}: expected a .safetensors file or one of {', '.join(tags)} after the colon"
        )
    try:
        model = open_model(architecture, weights)
    except Exception as error:  # of the network, the hub, the file
        raise ValueError(f"--extractor {name}: {type(error).__name__}: {error}. {HERE}") from None
    tokenizer, side = open_clip.get_tokenizer(architecture), model.visual.image_size
    said = open_clip.get_model_preprocess_cfg(model) | normal_of(architecture, tags if weights not in tags else [])
    normal = _normaliser(said["mean"], said["std"])
    side = side[0] if isinstance(side, tuple) else side

    def embed(captions: Sequence[str]) -> Tensor:
        return model.encode_text(tokenizer(list(captions)).to(next(model.parameters()).device))

    def is_cut(caption: str) -> bool:
        longer = tokenizer([caption], context_length=2 * tokenizer.context_length)
        counts = [int((ids != longer[0, -1]).sum()) for ids in (tokenizer([caption]), longer)]  # the last one fills
        return counts[0] < counts[1]

    told = open_clip.get_model_config(architecture)
    if open_clip.get_pretrained_cfg(architecture, weights).get("quick_gelu"):
        told = told | {"quick_gelu": True}
    reads = (told, said["mean"], said["std"], side)
    return Extractor(name, model, side, lambda pixels: model.encode_image(normal(pixels)), embed, is_cut, reads=reads)


def normal_of(architecture: str, tags: Sequence[str]) -> dict[str, Any]:
    """The mean and spread of pixels that all weights of an architecture were trained with, which a file doesn't say.

    Raises ValueError where they differ."""
    import open_clip

    every = [open_clip.get_pretrained_cfg(architecture, tag) for tag in tags]
    known = {(tuple(cfg["mean"]), tuple(cfg["std"])) for cfg in every if cfg.get("mean") and cfg.get("std")}
    if len(known) > 1:
        raise ValueError(
            f"weights of {architecture} want pixels of different means, and a file does not say which: give one of "
            f"{', '.join(tags)} after the colon"
        )
    return dict(zip(("mean", "std"), known.pop(), strict=True)) if known else {}


def _transformers(name: str, where: str) -> Extractor:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(where)
        kinds: dict[str, Any] = {
            "clip": transformers.CLIPModel,
            "clip_vision_model": transformers.CLIPVisionModelWithProjection,
        }
        if config.model_type not in (*kinds, *WITH_CLASS_TOKEN):
            raise ValueError(
                f"a {config.model_type}, of which it is not known that its first token stands for the whole picture: "
                f"expected one of {', '.join((*kinds, *WITH_CLASS_TOKEN))}"
            )
        opener = kinds.get(config.model_type, transformers.AutoModel)
        model, told = opener.from_pretrained(where, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
        lacking = [
            key for kind in ("missing_keys", "mismatched_keys") for key in told[kind] if "pooler" not in str(key)
        ]
        if lacking:  # which the library would make up
            raise ValueError(f"its weights lack {len(lacking)} tensors, for instance {lacking[0]}")
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(where) if config.model_type == "clip" else None
    except (OSError, ValueError, RuntimeError) as error:
        there = "" if Path(where).expanduser().is_dir() else "there is no such folder, and as a hub id: "
        raise ValueError(f"--extractor {name}: {there}{str(error).strip().splitlines()[0]}. {HERE}") from None
    side = getattr(getattr(config, "vision_config", config), "image_size", None)
    if side is None:
        raise ValueError(f"--extractor {name}: a {config.model_type}, whose config names no image_size")
    try:
        shown: Any = transformers.AutoImageProcessor.from_pretrained(where)
        mean, std = shown.image_mean, shown.image_std
        crop = getattr(shown, "crop_size", None) or {}
        side = crop.get("height") or side  # DINOv2's config names the side of its table of positions
    except (OSError, ValueError):
        if config.model_type not in kinds:
            raise ValueError(
                f"--extractor {name}: preprocessor_config.json is missing: mean and spread of pixels"
            ) from None
        mean, std = CLIP_MEAN, CLIP_STD
    normal = _normaliser(mean, std)

    def compute(pixels: Tensor) -> Tensor:
        if config.model_type == "clip":
            return model.get_image_features(normal(pixels)).pooler_output
        output = model(pixel_values=normal(pixels))
        return output.image_embeds if config.model_type in kinds else output.last_hidden_state[:, 0]

    def embed(captions: Sequence[str]) -> Tensor:
        how = {"padding": True, "truncation": True, "max_length": config.text_config.max_position_embeddings}
        ids = tokenizer(list(captions), **how, return_tensors="pt").to(model.device)
        return model.get_text_features(**ids).pooler_output

    def is_cut(caption: str) -> bool:
        return len(tokenizer(caption).input_ids) > config.text_config.max_position_embeddings

    reads = (config.model_type, _without_versions(config.to_diff_dict()), list(mean), list(std), side)
    if not tokenizer:
        return Extractor(name, model, side, compute, reads=reads)
    return Extractor(name, model, side, compute, embed, is_cut, reads=reads)


def _without_versions(said: Any) -> Any:
    """A config of transformers without what says who wrote it, and with its keys in order."""
    if not isinstance(said, dict):
        return said
    told = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures")
    return {key: _without_versions(said[key]) for key in sorted(said) if key not in told}


def _normaliser(mean: Sequence[float], std: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """uint8 [B, H, W, 3] -> [B, 3, H, W], of these means and spreads of pixels in [0, 1]."""

    def normal(pixels: Tensor) -> Tensor:
        m, s = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (mean, std))
        return (pixels.permute(0, 3, 1, 2) / 255 - m) / s

    return normal
