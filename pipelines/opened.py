"""A model in hand: opened, moved to a device, with what was added to it, and saved."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import torch

from pipelines.device import best_device, data_type, usable_device
from pipelines.embeddings import load_embedding
from pipelines.folder import Model, for_atelier_alone, load_model, save_model
from pipelines.loras import Loras

LOG = logging.getLogger("atelier")


class OpenedModel:
    """What every pipeline has.

    Attributes:
        model: the networks, the conditioner, the schedule and the model's defaults (`pipelines.folder.Model`).
        source: "bundled", a folder or a hub id, for the settings in a PNG; "" for a model that was not opened.
    """

    def __init__(self, model: Model, source: str = ""):
        self.model, self.source = model, source
        self.progress = True
        model.loras = model.loras or Loras()
        self._embeddings: list[str] = []  # what was learned from files

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        attention: Literal["sdpa", "xformers"] = "sdpa",
        torch_dtype: torch.dtype | str | None = None,
        use_safetensors: bool | None = None,
        safety_checker: None = None,
        requires_safety_checker: bool = False,
    ) -> Self:
        """Opens a model folder, a training run's folder or a hub id; the bundled model when nothing is given.

        Args:
            device: by default cuda, else mps, else cpu.
            dtype: of the weights, torch.float16 or "float16"; by default bfloat16 on a CUDA GPU that has it, else
                float32, which models that predict the mean of a step need anywhere.
            revision: branch or commit of a hub id.
            variant: "fp16" reads the 16-bit files where a folder has both (diffusers' name); `dtype` still decides.
            attention: of the U-Net: PyTorch's own, or xformers', which needs a CUDA device.
            torch_dtype, use_safetensors, safety_checker, requires_safety_checker: as in diffusers; pickled weights are
                never opened, and there is no safety checker.

        Raises:
            ValueError: no model there, or one that is broken or not implemented; or xformers where it can't run.
        """
        if use_safetensors is False:
            raise ValueError("use_safetensors=False: only safetensors are read, pickled weights may run code")
        if safety_checker is not None or requires_safety_checker:
            raise ValueError("there is no safety checker in Atelier: leave it out or pass safety_checker=None")
        dtype, torch_dtype = data_type(dtype), data_type(torch_dtype)
        if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
            raise ValueError(f"dtype={dtype} and torch_dtype={torch_dtype} are two names of one thing: give one")
        chosen = usable_device(device or best_device())
        bf16 = chosen.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        wanted = dtype or torch_dtype or (torch.bfloat16 if bf16 else torch.float32)
        model = load_model(path_or_hub_id, dtype=wanted, revision=revision, variant=variant)
        if model.prediction == "mean" and not (dtype or torch_dtype) and bf16:  # which can't be computed with it
            wanted = torch.float32
            model = load_model(path_or_hub_id, dtype=wanted, revision=revision, variant=variant)
        source = "bundled" if path_or_hub_id is None else str(path_or_hub_id)
        pipe = cls(model, source + (f"@{revision}" if revision else "")).to(chosen)
        model.unet.set_attention(attention)
        LOG.info("%s on %s, %s", pipe.source, chosen, str(wanted).removeprefix("torch."))
        return pipe

    @property
    def device(self) -> torch.device:
        return next(self.model.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.unet.parameters()).dtype

    def to(self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None) -> Self:
        """Moves the networks to a device, or to a data type, or both; returns the pipeline."""
        target = self.device if device is None or isinstance(device, torch.dtype) else usable_device(device)
        dtype = device if isinstance(device, torch.dtype) else dtype
        for part in self.model.parts():
            part.to(target, self.model.vae_dtype(dtype) if part is self.model.vae else dtype)
        # Convolutions are faster this way on every device that we measured (benchmarks/README.md).
        self.model.unet.to(memory_format=torch.channels_last)
        self.model.vae.to(memory_format=torch.channels_last)
        return self

    def set_progress_bar_config(self, disable: bool = False) -> None:
        """Shows or hides the progress bar (diffusers' name)."""
        self.progress = not disable

    @property
    def loras(self) -> dict[str, float]:
        """The LoRAs in use and their weights."""
        return self.model.loras.weights

    def load_lora(self, where: str | Path, weight: float = 1.0) -> None:
        """Merges a LoRA into the weights (arXiv:2106.09685); several add up. One that was trained to be painted with in
        so many steps, such as a student (train/distill.py), changes what a call takes when nothing is said.

        Args:
            where: a .safetensors file of diffusers, peft or kohya's scripts, a folder or training run that has one, a
                hub id, or owner/name/file.safetensors there.
            weight: of its change: 1 as it was trained, 0 for nothing.

        Raises:
            ValueError: none is there, or a part of it fits nothing in this model, which then stays as it is.
        """
        self.model.loras.load(self.model, where, weight)

    def load_loras(self, places: Sequence[str | Path], weights: Sequence[float]) -> None:
        """Several, as a command line names them; weights: one for each, or one for all. ValueError for others."""
        if len(weights) not in (1, len(places)) or (not places and tuple(weights) != (1.0,)):
            raise ValueError(f"{len(weights)} --lora-weight for {len(places)} --lora: give one, or as many")
        for where, weight in zip(places, weights if len(weights) > 1 else tuple(weights) * len(places), strict=True):
            self.load_lora(where, weight)

    def set_lora(self, where: str | Path, weight: float) -> None:
        """Another weight for a LoRA, by what it was loaded from; ValueError if none was."""
        self.model.loras.set(self.model, where, weight)

    def unload_loras(self) -> None:
        """Removes every LoRA: the weights are what they were, to the bit."""
        self.model.loras.unload(self.model)

    def load_embedding(self, where: str | Path, token: str | None = None) -> tuple[str, ...]:
        """Teaches the text encoder learned tokens, for prompts (textual inversion, arXiv:2208.01618); returns them.

        Args:
            where: a .safetensors file of diffusers or AUTOMATIC1111, a folder, training run or hub id; of SDXL's kind
                one with vectors for both text encoders, clip_l and clip_g.
            token: what it is called in prompts; by default as the file has it, or else by the file's own name.

        Raises:
            ValueError: nothing is there, it is of another text encoder, or the token is known already.
        """
        tokens = load_embedding(self.model.conditioner, where, token)
        self._embeddings += tokens
        return tokens

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | str | None = None) -> None:
        """Writes a diffusers folder, which `StableDiffusionPipeline.from_pretrained` (`StableDiffusionXLPipeline` for
        SDXL's kind) opens and paints the same from.

        LoRAs in use are in the weights, embeddings in the tokenizer and the text encoder.
        dtype: what the weights are stored as; by default what they are in here. torch.int8 is for the smallest folder,
        which only Atelier opens.
        Raises ValueError for a model that such a folder cannot describe (a flow, EDM, labels), before writing.
        """
        folder = Path(folder).expanduser()
        if reason := for_atelier_alone(self.model):
            raise ValueError(f"this model can't be saved for diffusers: {reason}; training runs keep it as it is")
        save_model(self.model, folder, torch.int8 if dtype in (torch.int8, "int8") else data_type(dtype))
