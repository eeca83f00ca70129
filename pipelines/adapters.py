"""Files of LoRA (arXiv:2106.09685), low-rank changes of a model's weights: W + weight * alpha / rank * B A.

Those of diffusers, peft and kohya's scripts (as most on the hub are) are understood. This project's own say in their
header what a call shall take when nothing is said: steps, guidance, sampler.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from conditioning.clip import PREFIX, ClipTextEncoder, full_name
from conditioning.pair import ClipTextPair
from ldm.unet import UNet
from pipelines.defaults import read_defaults
from pipelines.files import blaming, read_json, read_tensors
from pipelines.find import LORA as NAME
from pipelines.find import PEFT, PEFT_CONFIG, find_file
from pipelines.folder import Model
from pipelines.original import diffusers_name

PAINTING = "painting"  # entry of the notes: some of CALLED, and "scheduler", changes of its config
CALLED = ("steps", "guidance_scale", "guidance_interval", "sampler")  # of a model's defaults
NOTES = "lora_adapter_metadata"  # diffusers' entry in the header: peft's settings, each with its part before it

# PATH.lora_A.weight (peft), PATH.lora.down.weight, PATH.to_q_lora.down.weight, PATH.lora_linear_layer.down.weight
# (diffusers, newer to older) and lora_unet_PATH.lora_down.weight (kohya).
FACTOR = re.compile(r"(.+?)(?:\.lora_(?:(A|down)|B|up)(?:\.\w+)?|[._]lora(?:_linear_layer)?\.(?:(down)|up))\.weight")
PARTS = {  # kohya's names of the networks
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
}
OTHER_KINDS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon with a third factor",
    "oft_": "OFT",
    "boft_": "BOFT",
    "ia3_": "IA3",
    "lora_embedding_": "LoRA of embeddings",
    "lora_B.bias": "LoRA with biases",
    ".diff": "full differences",
}


class Factors(NamedTuple):
    """What a file changes in one layer: scale * up @ down."""

    down: Tensor  # [rank, in] or [rank, in, height, width]
    up: Tensor  # [out, rank] or [out, rank, 1, 1]
    scale: float  # alpha / rank


def painting_of(file: Path) -> dict[str, Any]:
    """What a LoRA's header says of painting with it; nothing, where it was not trained here.

    Raises ValueError for a value that no call takes.
    """
    with safe_open(file, "pt") as opened:
        said = _header_notes(file, opened.metadata() or {}).get(PAINTING, {})
    if not isinstance(said, dict) or not isinstance(said.get("scheduler", {}), dict):
        raise ValueError(f"{file}: what its header says of painting is {said!r}, expected names and values")
    kept = {"scheduler": said["scheduler"]} if "scheduler" in said else {}
    return read_defaults({key: value for key, value in said.items() if key in CALLED}, file) | kept


def layers_of(model: Model) -> dict[str, nn.Module]:
    """The layers that a LoRA can change: "unet.conv_in", "text_encoder.encoder.layers.0.mlp.fc1" and so on."""
    networks: dict[str, nn.Module] = {"unet": model.unet}
    if isinstance(model.conditioner, ClipTextEncoder):
        networks["text_encoder"] = model.conditioner.tower
    elif isinstance(model.conditioner, ClipTextPair):
        networks["text_encoder"] = model.conditioner.first.tower
        networks["text_encoder_2"] = model.conditioner.second.tower
    return {
        f"{part}.{path}": layer
        for part, network in networks.items()
        for path, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def read_lora(where: str | Path, model: Model) -> dict[str, Factors]:
    """Layer -> its factors, every key of the file and every shape checked against the model, which stays as it is.

    where: as in `pipelines.find.find_file`: a .safetensors file, a folder or a hub id.
    Raises ValueError when there is none, when it holds something else, or when any of it fits no layer of the model.
    """
    file = find_file(where, (NAME, PEFT))
    tensors, header = read_tensors(file)
    with blaming(file):
        return _factors_of(file, tensors, header, model)


def _factors_of(
    file: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], model: Model
) -> dict[str, Factors]:
    if other := next((kind for key in tensors for mark, kind in OTHER_KINDS.items() if mark in key), None):
        raise ValueError(f"{file} holds {other}, which is not implemented: only LoRA, W + B A, is")
    pairs: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        if found := FACTOR.fullmatch(key):
            pairs.setdefault(found[1], {})["down" if found[2] or found[3] else "up"] = tensor
        elif not key.endswith(".alpha"):
            strange.append(key)
    alphas = {key.removesuffix(".alpha"): float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")}
    if not pairs:
        raise ValueError(f"{file} holds no LoRA: expected keys such as unet.….lora_A.weight, got {_some(tensors)}")
    notes, noted = _notes(file, header, alphas)
    layers = layers_of(model)
    names = {name.replace(".", "_"): name for name in layers}
    factors: dict[str, Factors] = {}
    for stem, pair in pairs.items():
        name = next((names[one] for one in _candidates(stem, model) if one in names), "")
        if not name or len(pair) < 2:
            strange.append(stem if len(pair) > 1 else f"{stem} (one factor without the other)")
            continue
        if name in factors:
            strange.append(f"{stem} (a second pair for one layer)")
            continue
        down, up = pair["down"], pair["up"]
        weight: Any = layers[name].weight
        rank = down.shape[0]
        sides = [[side for side in shape if side != 1] for shape in (down.shape[1:], weight.shape[1:])]
        if sides[0] != sides[1] or tuple(up.flatten(1).shape) != (weight.shape[0], rank):
            sizes = f"{tuple(up.shape)} times {tuple(down.shape)} for a weight of {tuple(weight.shape)}"
            strange.append(f"{stem} ({sizes})")
            continue
        with blaming(noted):
            factors[name] = Factors(down, up, _scale(name, rank, alphas.get(stem), notes))
    strange += [f"{stem}.alpha" for stem in alphas if stem not in pairs]
    if strange:
        raise ValueError(
            f"{file} is of another kind of model: {len(strange)} of its {len(pairs)} layers or keys fit nothing here, "
            f"such as {_some(strange)}; this model has {len(layers)} layers, such as {_some(layers)}"
        )
    return factors


def save_lora(
    where: str | Path,
    layers: Mapping[str, Mapping[str, Tensor]],
    alpha: Mapping[str, float],
    painting: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a LoRA as diffusers does, for `load_lora_weights` there and `TextToImagePipeline.load_lora` here.

    Args:
        where: a .safetensors file, or a folder in which it is called `NAME`.
        layers: "unet", "text_encoder" or "text_encoder_2" -> PATH.lora_A.weight [rank, in], PATH.lora_B.weight [out,
            rank] for some of its layers, as `peft.get_peft_model_state_dict` gives them.
        alpha: of each of these: B A is scaled by alpha / rank.
        painting: some of `CALLED`, and "scheduler", entries of its config, for calls that say nothing.

    Returns:
        The file.

    Raises:
        ValueError: nothing to write, or an unknown key.
    """
    file = Path(where)
    file = file if file.suffix == ".safetensors" else file / NAME
    tensors: dict[str, Tensor] = {}
    notes: dict[str, Any] = {PAINTING: dict(painting)} if painting else {}
    for part, state in layers.items():
        ranks = {key.removesuffix(".lora_A.weight"): f.shape[0] for key, f in state.items() if "lora_A" in key}
        expected = {f"{path}.lora_{factor}.weight" for path in ranks for factor in "AB"}
        if part not in PARTS.values() or not ranks or state.keys() != expected:
            raise ValueError(
                f"a LoRA of {part!r} with {_some(state.keys() ^ expected or state)}: expected 'unet', 'text_encoder' "
                "or 'text_encoder_2' with PATH.lora_A.weight and PATH.lora_B.weight of each layer"
            )
        rank = Counter(ranks.values()).most_common(1)[0][0]
        notes[f"{part}.r"], notes[f"{part}.lora_alpha"] = rank, alpha[part]
        notes[f"{part}.rank_pattern"] = {f"^{re.escape(path)}": r for path, r in ranks.items() if r != rank}
        # Without the prefix: transformers 5 has none, and of longer names peft compares the end.
        notes[f"{part}.target_modules"] = sorted(path.removeprefix(PREFIX) for path in ranks)
        for key, tensor in state.items():
            path = key if part == "unet" else full_name(key)
            tensors[f"{part}.{path}"] = tensor.detach().cpu().contiguous()
    if not tensors:
        raise ValueError("a LoRA of no layers: expected some of 'unet', 'text_encoder' or 'text_encoder_2'")
    file.parent.mkdir(parents=True, exist_ok=True)
    # One entry, without "format": safetensors writes several in any order, and equal runs should end with equal bytes.
    save_file(tensors, file, metadata={NOTES: json.dumps(notes, sort_keys=True)})
    return file


def _candidates(stem: str, model: Model) -> Iterator[str]:
    """What a layer of a file may be called in `layers_of`, dots written as underscores; at last what the oldest say."""
    name = stem.removeprefix("base_model.model.").replace(".processor", "").replace(".", "_").replace("text_model_", "")
    for theirs, ours in PARTS.items():
        if name.startswith(theirs + "_"):
            name = ours + name.removeprefix(theirs)
    if name.startswith("unet_") and isinstance(model.unet, UNet):
        name = "unet_" + diffusers_name(name.removeprefix("unet_"), model.unet.config)
    for full in (name, f"unet_{name}", f"text_encoder_{name}"):
        yield full
        yield re.sub("_to_out$", "_to_out_0", full)
        yield re.sub("_to_(q|k|v|out)$", r"_\1_proj", full)


def _notes(file: Path, header: Mapping[str, str], alphas: Mapping[str, float]) -> tuple[dict[str, Any], Path]:
    """peft's settings of a file, and where they are: in its header, or in the file that peft writes beside its own."""
    beside = file.parent / PEFT_CONFIG
    if NOTES not in header and file.name == PEFT and beside.is_file():
        return read_json(beside), beside
    if NOTES not in header and file.name == PEFT and not alphas:
        raise ValueError(
            f"{file} is of peft, and {PEFT_CONFIG}, which peft writes beside it, is missing: its strength is there"
        )
    return _header_notes(file, header), file


def _header_notes(file: Path, header: Mapping[str, str]) -> dict[str, Any]:
    try:
        notes = json.loads(header.get(NOTES, "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: {NOTES} in its header is not JSON ({error})") from None
    if not isinstance(notes, dict):
        raise ValueError(f"{file}: {NOTES} in its header should be a JSON object, it is {notes!r}")
    return notes


def _scale(name: str, rank: int, alpha: float | None, notes: Mapping[str, Any]) -> float:
    """alpha / rank, or what rank-stabilised LoRA (arXiv:2312.03732) takes; without an alpha it is 1, as everywhere."""
    part, _, path = name.partition(".")

    def note(key: str) -> Any:
        return notes.get(f"{part}.{key}", notes.get(key))

    if alpha is None:
        # peft's rule: a pattern is the end of a name; the last of them is the name in transformers 4.
        patterns = (note("alpha_pattern") or {}).items()
        found = [a for p, a in patterns for full in (path, PREFIX + path) if re.match(rf"(.*\.)?({p})$", full)]
        alpha = found[0] if found else note("lora_alpha")
    if alpha is None:
        return 1.0
    if not math.isfinite(alpha):
        raise ValueError(f"the alpha of {name} is {alpha}, expected a number")
    return alpha / (math.sqrt(rank) if note("use_rslora") else rank)


def _some(names: Any) -> str:
    """The first three, for a message."""
    names = list(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
