"""Which weights of a model learn, and what a checkpoint shows of them.

Whole networks, and a checkpoint is a model folder; adapters of low rank beside them (LoRA, arXiv:2106.09685, by peft);
or the vectors of one new word (textual inversion, arXiv:2208.01618): then a checkpoint has these alone, and the name of
the model that they belong to.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from conditioning.clip import PREFIX, ClipTextEncoder
from conditioning.pair import ClipTextPair
from conditioning.unfilled import unfilled
from ldm.unet import UNet
from pipelines.adapters import CALLED, NAME, save_lora
from pipelines.embeddings import NAME as LEARNED
from pipelines.embeddings import PAIR as PAIR_KEYS
from pipelines.embeddings import save_embedding
from pipelines.files import read_json, read_tensors, write_json
from pipelines.find import find_model
from pipelines.folder import Model, save_model
from train.settings import LORA_TARGETS, Config
from train.state import whole


def make_trainable(model: Model, config: Config, checkpoint: Path | None) -> None:
    """Lets those weights learn that the settings name, and no others; adapters begin as the checkpoint has them.

    Raises ValueError for a text encoder that is not CLIP's, or adapters of layers that there are not.
    """
    for part in model.parts():
        part.requires_grad_(False).eval()
    networks = networks_of(model, config)
    if isinstance(model.unet, UNet):
        model.unet.gradient_checkpointing = config.gradient_checkpointing
    if config.token:
        _add_token(model, config, checkpoint)
    elif config.lora_rank:
        _add_adapters(networks, config, checkpoint)
    else:
        for network in networks.values():
            network.requires_grad_(True)
    if isinstance(model.conditioner, ClipTextEncoder | ClipTextPair):
        for weight in model.conditioner.unused():  # several processes would wait for their gradients
            weight.requires_grad_(False)
    for network in networks.values():
        network.train()


def networks_of(model: Model, config: Config) -> dict[str, nn.Module]:
    """The networks in which something learns, as `learning` and LoRA files name them."""
    networks: dict[str, nn.Module] = {}
    if "unet" in config.train and not config.token:
        networks["unet"] = model.unet
    if tells(config):
        networks |= {name: encoder.tower for name, encoder in encoders_of(model).items()}
    return networks


def encoders_of(model: Model) -> dict[str, ClipTextEncoder]:
    """CLIP's text encoders by the names of their folders; ValueError where there is none."""
    if isinstance(model.conditioner, ClipTextEncoder):
        return {"text_encoder": model.conditioner}
    if isinstance(model.conditioner, ClipTextPair):
        return {"text_encoder": model.conditioner.first, "text_encoder_2": model.conditioner.second}
    kind = type(model.conditioner).__name__
    raise ValueError(f"no text encoder can learn here: this model is told by {kind}, not by CLIP")


def tells(config: Config) -> bool:
    """Whether something of the text encoder learns, so that contexts can't be kept."""
    return bool(config.token) or "text_encoder" in config.train


def check_token(config: Config, captions: list[tuple[str, ...]]) -> None:
    """ValueError when a word is to be learned that no caption has."""
    if config.token and not any(config.token in caption for group in captions for caption in group):
        raise ValueError(
            f"--token {config.token!r} is in no caption, for instance {captions[0][0]!r}: write it where the thing is "
            "named that it shall stand for"
        )


def refuse_shards(model: Model, config: Config) -> None:
    """ValueError for what can't be trained in shards (FSDP): all but a whole text U-Net."""
    if config.lora_rank or tells(config) or not isinstance(model.unet, UNet):
        raise ValueError(
            "FSDP is for training a whole text U-Net: adapters, words, text encoders and the U-Net for small pictures "
            "take --config_file train/configs/gpus.yaml"
        )


def statistics(model: Model) -> dict[str, Tensor]:
    """What training changes beside weights: the running statistics of batch norms."""
    return {f"unet.{name}": buffer for name, buffer in model.unet.named_buffers()}


def learning(model: Model, config: Config) -> dict[str, nn.Parameter]:
    """The weights that learn, by the names of their networks: "unet.conv_in.weight", "text_encoder.…"."""
    return {
        f"{part}.{name}": weight
        for part, network in networks_of(model, config).items()
        for name, weight in network.named_parameters()
        if weight.requires_grad
    }


def save_trained(model: Model, config: Config, folder: Path) -> None:
    """What a checkpoint shows: the model, or what was added to it."""
    if config.token:
        tables: list[Any] = [e.tower.embeddings["token_embedding"] for e in encoders_of(model).values()]
        learned = tuple(table.vectors for table in tables)
        save_embedding(folder, config.token, learned if len(learned) > 1 else learned[0])
        write_json(folder / "atelier.json", {"base": config.model, "data": config.data})
        return
    if not config.lora_rank:
        save_model(model, folder)
        return
    from peft import get_peft_model_state_dict

    networks = networks_of(model, config)
    factors = {part: whole(get_peft_model_state_dict(network)) for part, network in networks.items()}
    said = {name: getattr(config, name) for name in CALLED if getattr(config, name) is not None}
    base = read_json(find_model(config.model) / "scheduler" / "scheduler_config.json")
    if changed := {key: value for key, value in model.scheduler.items() if base.get(key) != value}:
        said["scheduler"] = changed
    save_lora(folder, factors, dict.fromkeys(networks, config.lora_alpha or config.lora_rank), said)
    write_json(folder / "atelier.json", {"base": config.model, "data": config.data})


def unsharded(model: Model) -> Model:
    """The model with whole weights in the computer's memory, for one process to write; a collective call: every
    process has to make it."""
    changed: dict[str, Any] = {}
    if _sharded(model.unet):
        changed["unet"] = _copied(model.unet)
    told = model.conditioner
    if isinstance(told, ClipTextEncoder) and _sharded(told):
        changed["conditioner"] = _rebuilt(told)
    elif isinstance(told, ClipTextPair) and _sharded(told):
        pair = ClipTextPair(_rebuilt(told.first), _rebuilt(told.second), zero_null=told.zero_null)
        pair.size = told.size
        changed["conditioner"] = pair
    return replace(model, **changed) if changed else model


class NewRows(nn.Module):
    """An embedding table of which some rows learn, on their own: weight decay and momentum leave the others alone."""

    def __init__(self, table: nn.Embedding, rows: list[int]):
        super().__init__()
        self.table, self.rows = table, rows
        self.vectors = nn.Parameter(table.weight.detach()[rows].clone())  # [n, D]

    def forward(self, ids: Tensor) -> Tensor:
        """[B, L] -> [B, L, D]"""
        found = self.table(ids)
        for row, vector in zip(self.rows, self.vectors, strict=True):
            found = torch.where((ids == row)[..., None], vector, found)
        return found


def _add_token(model: Model, config: Config, checkpoint: Path | None) -> None:
    """Teaches every text encoder the word: as the checkpoint has it, else as --token-from, else as anything."""
    saved = read_tensors(checkpoint / LEARNED)[0] if checkpoint else {}
    for number, encoder in enumerate(encoders_of(model).values()):
        tower: Any = encoder.tower
        table = tower.embeddings["token_embedding"].weight.detach()
        if saved:
            vectors = saved[config.token] if config.token in saved else saved[PAIR_KEYS[number]]
        elif config.token_from:
            known = encoder.clip_tokenizer.encode(config.token_from)
            if not known:
                raise ValueError(f"--token-from {config.token_from!r} says nothing: expected a known word")
            vectors = table[[known[i % len(known)] for i in range(config.token_vectors)]].clone()
        else:
            draw = torch.Generator().manual_seed(config.seed)
            spread = torch.randn(config.token_vectors, table.shape[1], generator=draw)
            vectors = table.mean(0) + table.std(0) * spread.to(table)
        rows = encoder.add_tokens({config.token: vectors})
        tower.embeddings["token_embedding"] = NewRows(tower.embeddings["token_embedding"], rows)


def _sharded(network: nn.Module) -> bool:
    return any(isinstance(weight, DTensor) for weight in network.parameters())


def _rebuilt(encoder: ClipTextEncoder) -> ClipTextEncoder:
    return ClipTextEncoder(_copied(encoder.tower), encoder.clip_tokenizer)


def _copied(network: Any) -> Any:
    weights = whole(dict(network.state_dict()))
    with unfilled():
        copied = type(network)(network.config)
    copied.load_state_dict(weights, assign=True)
    return copied


def _add_adapters(networks: dict[str, nn.Module], config: Config, checkpoint: Path | None) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    rank, alpha = config.lora_rank, config.lora_alpha or config.lora_rank
    found = {part: _found(network, config.lora_targets) for part, network in networks.items()}
    missing = [t for t in config.lora_targets if not any(t in targets for targets in found.values())]
    bare = [part for part, targets in found.items() if not targets]
    if bare or (missing and config.lora_targets != LORA_TARGETS):
        where, targets = bare or list(networks), config.lora_targets if bare else missing
        ends = {path.rpartition(".")[2] for part in where for path in _layers(networks[part])}
        raise ValueError(
            f"--lora-targets {' '.join(targets)}: no layer of {' or '.join(where)} is called so; names there "
            f"end in {', '.join(sorted(ends))}"
        )
    saved = read_tensors(checkpoint / NAME)[0] if checkpoint else None
    for part, network in networks.items():
        with torch.random.fork_rng([]):  # the first factor is drawn, the second zero
            torch.manual_seed(config.seed)
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=found[part]), network)
        if saved is not None:
            mine = {name.removeprefix(f"{part}."): t for name, t in saved.items() if name.startswith(f"{part}.")}
            mine = {name.removeprefix(PREFIX): t for name, t in mine.items()}
            set_peft_model_state_dict(network, mine)


def _layers(network: nn.Module) -> list[str]:
    """The layers that can have adapters."""
    return [path for path, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def _found(network: nn.Module, targets: tuple[str, ...]) -> list[str]:
    paths = [f".{path}" for path in _layers(network)]
    return [target for target in targets if any(path.endswith(f".{target}") for path in paths)]
