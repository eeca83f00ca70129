"""CLIP's text encoder (Radford et al. 2021): a small tower with the parameter names of transformers' CLIPTextModel,
or CLIPTextModelWithProjection.

It needs torch, tokenizers and safetensors alone, so that a picture does not pay for transformers' imports.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conditioning.context import Context
from conditioning.text import LongPrompts, TextEncoder
from conditioning.tokenizer import ClipTokenizer
from conditioning.unfilled import unfilled

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # Hendrycks and Gimpel, 2016
    "gelu": F.gelu,
}
PREFIX = "text_model."  # what transformers 4 wrote before every name, and diffusers' clip_skip still expects

# Keys of config.json that change nothing in what the tower computes: origin, storage, initialisation, another head.
INERT = {"_name_or_path", "architectures", "model_type", "dtype", "torch_dtype", "transformers_version"}
INERT |= {"initializer_factor", "initializer_range", "_attn_implementation_autoset"}
PROJECTED = "CLIPTextModelWithProjection"  # whose config.json means its projection_dim


@dataclass(frozen=True)
class ClipTextConfig:
    """The keys of a transformers CLIPTextConfig that shape the tower, with its defaults."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 1
    projection_dim: int | None = None  # width of the summary's projection, where the tower has one

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act: got {self.hidden_act!r}, implemented are {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} heads")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ClipTextConfig":
        """Reads a config.json; ValueError, by name, for a value that asks for what is not implemented here."""
        known = {field.name for field in fields(cls)}
        if config.get("model_type", "clip_text_model") != "clip_text_model":
            raise ValueError(f"model_type: got {config['model_type']!r}, expected 'clip_text_model'")
        # A switch that is off (0, False, None, empty) asks for nothing; any other unknown key might.
        strange = [f"{k}={v!r}" for k, v in config.items() if v and k not in known | INERT]
        if strange:
            raise ValueError(f"the config of the text encoder asks for what is not implemented: {', '.join(strange)}")
        given = {k: v for k, v in config.items() if k in known and v is not None}
        if PROJECTED not in (config.get("architectures") or ()):
            given.pop("projection_dim", None)  # of CLIP as a whole: this tower was saved without it
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """A config.json. float32, else transformers opens 16-bit weights in half precision beside a float32 U-Net."""
        return {
            "architectures": ["CLIPTextModel" if self.projection_dim is None else PROJECTED],
            "model_type": "clip_text_model",
            **asdict(self),
            "attention_dropout": 0.0,
            "projection_dim": self.projection_dim or self.hidden_size,
            "dtype": "float32",
        }


class Attention(nn.Module):
    def __init__(self, config: ClipTextConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        width = config.hidden_size
        self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, L, D] -> [B, L, D]
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, L, D / heads]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: ClipTextConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config: ClipTextConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipText(nn.Module):
    """A causal transformer over token ids; loads and gives the weights of transformers' CLIPTextModel, or of
    CLIPTextModelWithProjection, where the config has a projection_dim."""

    def __init__(self, config: ClipTextConfig):
        super().__init__()
        self.config = config
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(config.vocab_size, config.hidden_size),
                "position_embedding": nn.Embedding(config.max_position_embeddings, config.hidden_size),
            }
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))})
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.text_projection: nn.Linear | None = None
        if config.projection_dim is not None:
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, ids: Tensor, clip_skip: int = 0) -> Tensor:
        """[B, L] ids -> [B, L, D], the hidden states `clip_skip` layers before the last, normalised as diffusers does.

        Raises as `states`.
        """
        return self.final_layer_norm(self.states(ids, clip_skip)[-1])

    def states(self, ids: Tensor, clip_skip: int = 0) -> list[Tensor]:
        """[B, L] ids -> what the embedding and then each layer but the last `clip_skip` put out, [B, L, D], no norm.

        Raises ValueError when there are fewer layers than that or fewer positions than ids.
        """
        layers = list(self.encoder["layers"].children())
        if not 0 <= clip_skip <= len(layers):
            raise ValueError(f"clip_skip: got {clip_skip}, expected 0 to {len(layers)}, the layers of this encoder")
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"got {ids.shape[1]} tokens, the encoder has {self.config.max_position_embeddings} positions"
            )
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.embeddings["token_embedding"](ids) + self.embeddings["position_embedding"](positions)
        found = [x]
        for layer in layers[: len(layers) - clip_skip]:
            found.append(layer(found[-1]))
        return found

    def pool(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The hidden states [B, L, D] at the end of the text -> [B, D], CLIP's own summary of a caption."""
        # Configs from before transformers 4.31 say 2 and mean "the highest id": the end of text is CLIP's last token.
        legacy = self.config.eos_token_id == 2
        end = ids if legacy else (ids == self.config.eos_token_id).int()
        return hidden[torch.arange(len(ids), device=ids.device), end.argmax(dim=1)]

    def summary(self, last: Tensor, ids: Tensor) -> Tensor:
        """What the last layer put out, [B, L, D] -> text_embeds [B, projection_dim]; only with a projection."""
        assert self.text_projection is not None
        return self.text_projection(self.pool(self.final_layer_norm(last), ids))

    def put_rows(self, ids: Sequence[int], vectors: Tensor) -> None:
        """Embeds the tokens `ids` as `vectors` [n, D], in a table that grows to hold the highest of them."""
        table: Any = self.embeddings["token_embedding"].weight
        rows = max(table.shape[0], max(ids) + 1)
        grown = table.new_zeros(rows, table.shape[1])
        grown[: table.shape[0]], grown[list(ids)] = table.detach(), vectors.to(table)
        self.embeddings["token_embedding"] = nn.Embedding.from_pretrained(grown, freeze=not table.requires_grad)
        self.config = replace(self.config, vocab_size=rows)

    @classmethod
    def from_weights(cls, config: ClipTextConfig, weights: Mapping[str, Tensor]) -> "ClipText":
        """A tower of the given weights, with or without "text_model." in their names; ValueError if one is missing."""
        with unfilled():
            tower = cls(config)
        named = {name.removeprefix(PREFIX): weight for name, weight in weights.items()}
        named.pop("embeddings.position_ids", None)  # 0, 1, 2, …: a buffer that transformers once saved
        try:
            tower.load_state_dict(named, assign=True)
        except RuntimeError as error:
            raise ValueError(f"these weights are not those of the CLIP text encoder in config.json: {error}") from error
        return tower


class ClipTextEncoder(TextEncoder):
    """Captions to a CLIP tower's hidden states, `encoder_hidden_states` [B, chunks * L, D].

    clip_skip: layers left out at the end (diffusers' argument); may be set at any time.
    """

    def __init__(
        self, tower: ClipText, tokenizer: ClipTokenizer, *, clip_skip: int = 0, long_prompts: LongPrompts = "chunks"
    ):
        positions = tower.config.max_position_embeddings
        super().__init__(tokenizer, min(int(tokenizer.length or positions), positions), long_prompts)
        if len(tokenizer) > tower.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, the text encoder {tower.config.vocab_size}: "
                "they are not of the same model"
            )
        self.tower, self.clip_tokenizer, self.clip_skip = tower, tokenizer, clip_skip

    def embed(self, ids: Tensor) -> Tensor:
        return self.tower(ids, self.clip_skip)

    def forward(self, captions: Sequence[str], *, chunks: int | None = None, clip_skip: int | None = None) -> Context:
        """clip_skip: instead of its own. Raises as `ids`, and `ClipText.states`."""
        ids = self.ids(captions, chunks=chunks)
        skipped = self.clip_skip if clip_skip is None else clip_skip
        return self.context(ids, self.tower(ids.flatten(0, 1), skipped))

    def unused(self) -> list[nn.Parameter]:
        """Weights behind the layer that is looked at, where a tower has a projection: nothing can be learned there."""
        return list(self.tower.text_projection.parameters()) if self.tower.text_projection else []

    def add_tokens(self, tokens: Mapping[str, Tensor]) -> list[int]:
        """Learns words, each as one vector or several, [n, D] (textual inversion, arXiv:2208.01618); their ids.

        Raises ValueError, and learns nothing, when one is known already.
        """
        self.clip_tokenizer.check_new({token: len(vectors) for token, vectors in tokens.items()})
        every = []
        for token, vectors in tokens.items():
            ids = self.clip_tokenizer.add_token(token, len(vectors))
            self.tower.put_rows(ids, vectors)
            every += ids
        if every and self.tower.config.eos_token_id == 2:  # "the highest id", which it is no longer
            self.tower.config = replace(self.tower.config, eos_token_id=self.clip_tokenizer.suffix[0])
        return every

    @classmethod
    def from_folder(
        cls,
        text_encoder: str | Path,
        tokenizer: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        clip_skip: int = 0,
        long_prompts: LongPrompts = "chunks",
    ) -> "ClipTextEncoder":
        """Opens the `text_encoder` and `tokenizer` folders of a Stable Diffusion model, frozen, ready to encode.

        Raises ValueError when a file is missing or broken, or asks for what is not implemented.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(text_encoder)
        config, weights = folder / "config.json", folder / "model.safetensors"
        for file in (config, weights):
            if not file.is_file():
                raise ValueError(f"{file} is missing: expected the folder of a CLIP text encoder, saved as safetensors")
        try:
            tensors = load_file(weights)
            tower = ClipText.from_weights(ClipTextConfig.from_dict(json.loads(config.read_text("utf-8"))), tensors)
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder}: broken file ({error}); is the download complete?") from error
        tower = tower.to(device=device, dtype=dtype).eval().requires_grad_(False)
        return cls(tower, ClipTokenizer.from_folder(tokenizer), clip_skip=clip_skip, long_prompts=long_prompts)

    def save(self, text_encoder: str | Path, tokenizer: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes folders that transformers' CLIPTextModel, or CLIPTextModelWithProjection, and CLIPTokenizer open; the
        weights are stored in `dtype`."""
        from safetensors.torch import save_file

        folder = Path(text_encoder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {full_name(k): v.detach().to("cpu", dtype).contiguous() for k, v in self.tower.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        for other in folder.glob("model*.safetensors*"):  # shards, 16 bits: of an encoder that was here before
            if other.name != "model.safetensors":
                other.unlink()  # it might be read instead
        text = json.dumps(self.tower.config.to_dict(), indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors lets only the owner read
        self.clip_tokenizer.save(tokenizer)


def full_name(name: str) -> str:
    """What transformers 4 calls a layer or weight of a tower, in files: the projection alone is beside the model."""
    return name if name.startswith("text_projection.") else PREFIX + name.removeprefix(PREFIX)
