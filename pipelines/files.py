"""Networks as folders: config.json and safetensors, read with errors that say what to do."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from conditioning.unfilled import unfilled
from pipelines.quantized import dequantize, quantize
from vae.autoencoder import Autoencoder

STEM = "diffusion_pytorch_model"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError naming the file when it is missing or broken."""
    if not file.is_file():
        raise ValueError(f"{file} is missing: is {file.parent} a model folder, and is it complete?")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error}): copy or download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} should hold a JSON object, it holds a {type(value).__name__}")
    return value


@contextmanager
def blaming(file: Path) -> Iterator[None]:
    """Whatever a config in this file makes fail, inside, is a ValueError that names it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except ValueError as error:
        if str(file) in str(error):
            raise
        raise ValueError(f"{file}: {error}") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, re.error) as error:
        raise ValueError(f"{file} holds a value that makes no sense ({type(error).__name__}: {error})") from error


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Its folder is made, if there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_weights(folder: Path, stem: str = STEM, variant: str | None = None) -> dict[str, Tensor]:
    """All tensors of a network: one safetensors file or its shards, of the variant asked for if there are several.

    variant: None or "fp16", as in diffusers: the 16-bit files, named so. 8-bit ones come last.
    Raises ValueError when there is none (pickled weights are not opened), or when a file is truncated.
    """
    plain = [f"{stem}.safetensors.index.json", f"{stem}.safetensors"]
    half = [f"{stem}.safetensors.index.fp16.json", f"{stem}.fp16.safetensors"]
    names = [*(half + plain if variant else plain + half), f"{stem}.int8.safetensors"]
    files = [folder / name for name in names if (folder / name).is_file()][:1]
    if files and files[0].suffix == ".json":
        files = [folder / name for name in _shards(files[0])]
    if not files:
        pickled = ", ".join(f.name for f in folder.glob("*.bin"))
        raise ValueError(
            f"no {stem}.safetensors in {folder}"
            + (f"; {pickled} is pickled and may run code when opened: convert it to safetensors" if pickled else "")
        )
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= read_tensors(file)[0]
    return dequantize(weights)


def _shards(index: Path) -> list[str]:
    """The files that an index names; ValueError where it is none, or names what does not lie beside it."""
    said = read_json(index).get("weight_map")
    names = sorted(map(str, set(said.values()))) if isinstance(said, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{index}: expected a weight_map that names files beside it, got {names[:3] or said}")
    return names


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and the notes in its header; ValueError when it is broken or truncated."""
    try:
        with safe_open(file, "pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is broken or not complete ({error}): copy or download it again") from None


def open_network(kind: Any, folder: Path, dtype: torch.dtype | None = None, variant: str | None = None) -> Any:
    """A network of this kind from its folder, frozen, in float32 by default; ValueError when names or shapes of the
    weights do not fit its config."""
    config = folder / "config.json"
    values = read_json(config)
    with unfilled(), blaming(config):
        network = kind.from_config(values)
    try:
        network.load_state_dict(read_weights(folder, variant=variant), strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the weights in {folder} do not fit its config.json: {str(error)[:600]}") from None
    return network.to(dtype or torch.float32).eval().requires_grad_(False)


def save_network(network: nn.Module, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes config.json and the weights, stored as `dtype` (as they are by default), for diffusers to open.

    torch.int8: `quantize`d, in a file named so, which diffusers does not read.
    """
    write_json(folder / "config.json", network.config.to_dict())  # type: ignore[operator, union-attr]
    weights, file = network.state_dict(), folder / f"{STEM}.safetensors"
    exact = {name: weights.pop(name) for name in getattr(network, "exact", ())}
    if dtype is torch.int8:
        weights, file, dtype = quantize(weights), folder / f"{STEM}.int8.safetensors", None
    weights = {name: w.to("cpu", dtype if w.is_floating_point() else None) for name, w in weights.items()} | exact
    weights = {name: w.detach().cpu().contiguous() for name, w in weights.items()}
    partial = file.with_name(f"{file.name}.partial")  # the network's own weights may be mapped from the file as it is
    save_file(weights, partial, metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", partial)  # safetensors lets only the owner read
    os.replace(partial, file)
    for other in folder.glob(f"{STEM}*.safetensors*"):  # shards, 16 bits: of a model that was here before
        if other != file:
            other.unlink()  # it might be read instead


def load_autoencoder(folder: Path, dtype: torch.dtype | None = None, variant: str | None = None) -> Autoencoder:
    """An `AutoencoderKL` folder, frozen; a training run's folder stands for its newest checkpoint."""
    folder = newest(Path(folder))
    if not (folder / "config.json").is_file() and (folder / "vae").is_dir():
        folder = folder / "vae"
    return open_network(Autoencoder, folder, dtype, variant)


def newest(folder: Path) -> Path:
    """The newest checkpoint in a training run's folder; any other folder is itself."""
    return (checkpoints(folder) or [folder])[-1]


def checkpoints(output: Path) -> list[Path]:
    """The whole checkpoints in a training run's folder, oldest first."""
    found = [f for f in output.glob("checkpoint-*") if CHECKPOINT.fullmatch(f.name) and f.is_dir()]
    return sorted(found, key=lambda f: int(f.name.split("-")[1]))
