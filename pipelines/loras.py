"""LoRA (arXiv:2106.09685): small files of low-rank changes, merged into the weights of a model to paint with.

W becomes W + weight * alpha / rank * B A, so a picture costs what it cost without. What was replaced is kept, and
comes back to the bit.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipelines.adapters import CALLED, NAME, PEFT, Factors, layers_of, painting_of, read_lora
from pipelines.arguments import number
from pipelines.files import blaming
from pipelines.find import find_file
from pipelines.folder import Model, schedule_from
from pipelines.scheduler import grid_of, sampler_of

STRENGTH = "1 as it was trained, 0 for nothing"


class Loaded(NamedTuple):
    """A LoRA in use."""

    factors: dict[str, Factors]  # of its layers
    weight: float
    painting: dict[str, Any]  # what calls take meanwhile: some of `CALLED`, and "scheduler"


class Loras:
    """The LoRAs that are merged into a model, each under the name that it was loaded by.

    One of these for a model, `Model.loras`, whichever pipeline loads. Each call is handed the model: kept here, it
    would be part of a cycle, and stay in a GPU's memory when nobody has it any more.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Loaded] = {}
        self._own: dict[str, Tensor] = {}  # layer -> its own weight, on the CPU, where a LoRA changes it
        self._defaults, self._scheduler = Said(), Said()

    @property
    def weights(self) -> dict[str, float]:
        """Name -> weight of those that are loaded."""
        return {name: lora.weight for name, lora in self._loaded.items()}

    def load(self, model: Model, where: str | Path, weight: float = 1.0) -> None:
        """Merges a file (`read_lora`); one that is loaded already is read again and gets the new weight."""
        name, weight = str(where), number(f"{where}: weight", weight, STRENGTH)
        file = find_file(where, (NAME, PEFT))
        lora = Loaded(read_lora(file, model), weight, painting_of(file))
        with blaming(file):
            config = model.scheduler | lora.painting.get("scheduler", {})
            grid_of(config, model.schedule, lora.painting.get("sampler") or sampler_of(config))
            if (other := schedule_from(config)[1]) != model.prediction:
                raise ValueError(f"its scheduler is of prediction {other}, the model's of {model.prediction}")
        self._merge(model, {other: kept for other, kept in self._loaded.items() if other != name} | {name: lora})

    def set(self, model: Model, where: str | Path, weight: float) -> None:
        """Another weight for what was loaded from there; ValueError if nothing was."""
        name = str(where)
        if name not in self._loaded:
            raise ValueError(f"no LoRA {name!r} is loaded: {', '.join(self._loaded) or 'none'} is")
        weight = number(f"{where}: weight", weight, STRENGTH)
        self._merge(model, self._loaded | {name: self._loaded[name]._replace(weight=weight)})

    def unload(self, model: Model) -> None:
        """Removes all: every weight is what it was."""
        self._merge(model, {})

    def _merge(self, model: Model, loras: dict[str, Loaded]) -> None:
        """These and no others; where that fails, half way, the ones before."""
        try:
            self._write(model, loras)
        except BaseException:
            self._write(model, self._loaded)
            raise
        self._loaded = loras
        self._say(model)

    @torch.no_grad()
    def _write(self, model: Model, loras: Mapping[str, Loaded]) -> None:
        changed = {layer for lora in loras.values() for layer in lora.factors}
        for name, layer in layers_of(model).items():
            if name not in changed | self._own.keys():
                continue
            weight: Any = layer.weight
            own = self._own.setdefault(name, weight.detach().to("cpu", copy=True))
            merged = own.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
            for lora in loras.values():
                if name in lora.factors and lora.weight:
                    down, up = (f.to(merged).flatten(1) for f in lora.factors[name][:2])
                    merged = merged + lora.weight * lora.factors[name].scale * (up @ down).view_as(merged)
            weight.copy_(merged)
        self._own = {name: own for name, own in self._own.items() if name in changed}

    def _say(self, model: Model) -> None:
        """What calls take: as the LoRAs in use say, the last of them first."""
        called: dict[str, Any] = {}
        scheduled: dict[str, Any] = {}
        for lora in self._loaded.values():
            if lora.weight:
                called |= {key: value for key, value in lora.painting.items() if key in CALLED}
                scheduled |= lora.painting.get("scheduler", {})
        model.defaults = replace(model.defaults, **self._defaults.over(vars(model.defaults), called))
        model.scheduler = self._scheduler.over(model.scheduler, scheduled)


class Said:
    """Values that stand in for others, which come back; where somebody changed one meanwhile, that one stays."""

    def __init__(self) -> None:
        self.own: dict[str, Any] = {}
        self.said: dict[str, Any] = {}

    def over(self, values: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
        """`values` without what was said before, and with what is said now."""
        mine = {key for key, value in self.said.items() if key in values and values[key] == value}
        before = {k: self.own[k] if k in mine else v for k, v in values.items() if k not in mine or k in self.own}
        again = {key for key in said if key not in mine and key in self.said and self.said[key] == said[key]}
        new = {key: value for key, value in said.items() if key not in again}
        self.own, self.said = {key: before[key] for key in new if key in before}, dict(said)
        return before | new
