"""Text encoders of open_clip's models, any architecture whose text tower is open_clip's own, as conditioning."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from conditioning.text import LongPrompts, TextEncoder

OpenClipLayer = Literal["last", "penultimate"]


def open_model(name: str, weights: str | None, device: str | torch.device = "cpu") -> Any:
    """`open_clip.create_model` with the activation that the weights were trained with.

    Many a tag ("openai", "metaclip_400m") is of weights for QuickGELU, and listed for architectures of GELU as well:
    open_clip itself only warns, and computes something else.
    """
    import open_clip

    trained = open_clip.get_pretrained_cfg(name.replace("/", "-"), weights) if weights else {}
    quick = bool(trained.get("quick_gelu"))
    return open_clip.create_model(name, weights, device=device, force_quick_gelu=quick, require_pretrained=True)


class OpenClipEncoder(TextEncoder):
    """Captions to the hidden states of an open_clip text tower, `encoder_hidden_states` [B, chunks * L, D].

    layer: "last", or "penultimate" as Stable Diffusion 2 was trained on; the tower's last norm is applied to either.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, layer: OpenClipLayer = "last", long_prompts: LongPrompts = "chunks"
    ):
        text: Any = getattr(model, "text", model)  # open_clip.CLIP is its own text tower, the other classes have one
        if not hasattr(text, "positional_embedding") or not hasattr(model, "forward_intermediates"):
            raise ValueError(f"the text tower {type(text).__name__} of {type(model).__name__} is not implemented here")
        if layer not in get_args(OpenClipLayer):
            raise ValueError(f"layer: got {layer!r}, expected one of {get_args(OpenClipLayer)}")
        super().__init__(_Tokens(tokenizer, getattr(text, "pad_id", 0)), text.context_length, long_prompts)
        layers = len(text.transformer.resblocks)
        self.model, self.index = model, layers - {"last": 1, "penultimate": 2}[layer]
        if self.index < 0:
            raise ValueError(f"layer: got {layer!r}, but the tower has {layers} layer")

    def embed(self, ids: Tensor) -> Tensor:
        intermediates: Any = self.model.forward_intermediates
        return intermediates(
            text=ids, text_indices=[self.index], normalize_intermediates=True, intermediates_only=True
        )["text_intermediates"][0]

    @classmethod
    def from_name(
        cls,
        name: str | Path,
        pretrained: str | Path | None = None,
        device: str | torch.device = "cpu",
        *,
        layer: OpenClipLayer = "last",
        long_prompts: LongPrompts = "chunks",
    ) -> "OpenClipEncoder":
        """Opens an architecture by open_clip's name, with `pretrained` weights (a tag or a file), or a local folder.

        The folder holds open_clip_config.json and the weights. The picture tower is let go. Raises ValueError for a
        name, a tag or a folder that open_clip does not know.
        """
        import open_clip

        is_folder = Path(name).is_dir()
        if not is_folder and not pretrained and ":" not in str(name):
            raise ValueError(f"{name}: give `pretrained`, a tag of open_clip.list_pretrained() or a file of weights")
        identifier = f"local-dir:{name}" if is_folder else str(name)
        try:
            weights = str(pretrained) if pretrained else None
            model = open_model(identifier, weights, device)
            tokenizer = open_clip.get_tokenizer(identifier)
        except (RuntimeError, FileNotFoundError) as error:
            raise ValueError(f"open_clip cannot open {name} with weights {pretrained}: {error}") from error
        del model.visual
        return cls(model.eval().requires_grad_(False), tokenizer, layer=layer, long_prompts=long_prompts)


class _Tokens:
    """open_clip's two kinds of tokenizer behind one face: its own byte-pair one, and one of transformers."""

    def __init__(self, tokenizer: Any, pad: int):
        self.clean, self.pad = tokenizer.clean_fn, pad
        if hasattr(tokenizer, "sot_token_id"):
            self.inner: Any = tokenizer
            self.prefix: tuple[int, ...] = (tokenizer.sot_token_id,)
            self.suffix: tuple[int, ...] = (tokenizer.eot_token_id,)
            return
        if getattr(tokenizer, "tokenizer_mode", "") or getattr(tokenizer, "strip_sep_token", False):
            raise ValueError(f"the tokenizer mode {tokenizer.tokenizer_mode or 'strip_sep_token'!r} is not implemented")
        self.inner = tokenizer.tokenizer
        if self.inner.pad_token_id is not None:
            self.pad = self.inner.pad_token_id
        # What a tokenizer puts around a text shows around any text.
        bare, whole = self.encode("a"), self.inner("a").input_ids
        at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        self.prefix, self.suffix = tuple(whole[:at]), tuple(whole[at + len(bare) :])

    def encode(self, text: str) -> list[int]:
        if hasattr(self.inner, "sot_token_id"):
            return self.inner.encode(text)  # cleans the text itself
        return self.inner(self.clean(text), add_special_tokens=False).input_ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(list(ids)).strip()
