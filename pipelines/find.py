"""Where a model, or a file beside one, is: on the disk, in the package or on the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from pipelines.files import newest

BUNDLED = Path(__file__).parent / "bundled"
STUDENT = "bundled-student"  # the name of the LoRA in it that paints in few steps
LORA, EMBEDDING = "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"  # diffusers' names
PEFT, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's names; the second has the strength


def find_model(where: str | Path | None, *, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder of a model: local, the bundled one for None, or fetched from the Hugging Face hub."""
    if where is None or str(where) == "bundled":
        if not (BUNDLED / "unet").is_dir():
            raise ValueError(f"the bundled model is not in {BUNDLED}: install from a complete checkout")
        return BUNDLED
    path = Path(where).expanduser()
    if path.is_dir():
        folder = newest(path)
        if not (folder / "unet" / "config.json").is_file():
            held = ", ".join(sorted(f.name for f in folder.iterdir())[:8]) or "nothing"
            beside = [flag for name, flag in ((LORA, "lora"), (EMBEDDING, "embedding")) if (folder / name).is_file()]
            hint = f"; it is loaded into a model by load_{beside[0]} (--{beside[0]})" if beside else ""
            raise ValueError(
                f"{folder} is no model folder: expected unet/, vae/ and scheduler/ in it, found {held}{hint}"
            )
        return folder
    if path.exists() or str(where).count("/") != 1 or str(where).startswith((".", "/", "~")):
        raise ValueError(
            f"{where} is not a model folder: give a folder that has unet/, vae/ and scheduler/, a hub id such as "
            "owner/name, or nothing for the bundled model"
        )
    weights = f"*{variant}*.safetensors" if variant else "*.safetensors"
    files = [
        "*.json",
        "*/*.json",
        "tokenizer*/*.txt",
        *(f"{part}/{weights}" for part in ("unet", "vae", "text_encoder", "text_encoder_2")),
        *(f"{part}/*.safetensors" for part in ("semantic_encoder", "codes")),  # which have no variants
    ]
    return _download(str(where), files, ["*non_ema*", *([] if variant else ["*fp16*"])], revision)


def find_autoencoder(where: str | Path) -> Path:
    """The folder of an autoencoder, or of a model or run that has one: local, "bundled", or fetched from the hub."""
    if str(where) == "bundled":
        return find_model(None)
    path = Path(where).expanduser()
    if path.exists() or str(where).count("/") != 1 or str(where).startswith((".", "/", "~")):
        return path
    files = ["config.json", "diffusion_pytorch_model*.safetensors", "vae/config.json", "vae/*.safetensors"]
    return _download(str(where), files, ["*fp16*"])


def _download(hub_id: str, files: list[str], but: list[str], revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(hub_id, revision=revision, allow_patterns=files, ignore_patterns=but)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{hub_id} is no folder here and could not be fetched from the hub ({type(error).__name__}: {error})"
        ) from None
    return Path(folder)


def find_file(where: str | Path, names: Sequence[str]) -> Path:
    """A safetensors file beside a model, of adapters or embeddings.

    Args:
        where: the file; or a folder that has one of `names` or one such file only (a training run's folder stands for
            its newest checkpoint); or "bundled-student", beside the bundled model; or owner/name of the Hugging Face
            hub, which has the first of `names`; or owner/name/file.safetensors there. Nothing but that file is fetched,
            and what peft writes beside its own.

    Raises:
        ValueError: there is none, or it is pickled.
    """
    path = BUNDLED / "student" if where == STUDENT else Path(where).expanduser()
    if where == STUDENT and not path.is_dir():
        raise ValueError(f"the bundled model's student is not in {path}: install from a complete checkout")
    if path.is_dir():
        folder = newest(path)
        found = [folder / name for name in names if (folder / name).is_file()] or sorted(folder.glob("*.safetensors"))
        if found and (found[0].name in names or len(found) == 1):
            return found[0]
        held = ", ".join(sorted(f.name for f in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"{folder}: expected {' or '.join(names)} in it, or one .safetensors file; found {held}")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is no .safetensors file; pickled ones may run code when opened: convert it")
        return path
    hub_id, inside = "/".join(str(where).split("/")[:2]), "/".join(str(where).split("/")[2:])
    here = str(where).startswith((".", "/", "~")) or hub_id.count("/") != 1 or hub_id.endswith(".safetensors")
    if here or (inside and not inside.endswith(".safetensors")):
        raise ValueError(
            f"{where}: no such file or folder, nor a hub id such as owner/name or owner/name/file.safetensors"
        )
    return _fetch(hub_id, inside or names[0])


def _fetch(hub_id: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if file.rpartition("/")[2] == PEFT:
            hf_hub_download(hub_id, file.removesuffix(PEFT) + PEFT_CONFIG)
        return Path(hf_hub_download(hub_id, file))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{hub_id}/{file} is no file here and could not be fetched from the hub ({type(error).__name__}: {error}); "
            f"a file of another name there is {hub_id}/NAME.safetensors"
        ) from None
