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
from pipelines.find import find_file
from pipelines.folder import Model

STRENGTH = "1 as it was trained, 0 for nothing"


class Loaded(NamedTuple):
    """A LoRA in use."""

    factors: dict[str, Factors]  # of its layers
    weight: float
    painting: dict[str, Any]  # what calls take meanwhile: some of `CALLED`, and "scheduler"


class Loras:
    """The LoRAs that are merged into a model, each under the name that it was loaded by: one of these for a model."""

    def __init__(self, model: Model):
        self.model = model
        self._loaded: dict[str, Loaded] = {}
        self._own: dict[str, Tensor] = {}  # layer -> its own weight, on the CPU, where a LoRA changes it
        self._defaults, self._scheduler = Said(), Said()

    @classmethod
    def of(cls, model: Model) -> "Loras":
        """Those of this model, whichever pipeline loaded them."""
        model.loras = model.loras or cls(model)
        return model.loras

    @property
    def weights(self) -> dict[str, float]:
        """Name -> weight of those that are loaded."""
        return {name: lora.weight for name, lora in self._loaded.items()}

    def load(self, where: str | Path, weight: float = 1.0) -> None:
        """Merges a file (`read_lora`); one that is loaded already is read again and gets the new weight."""
        weight = number("weight", weight, STRENGTH)
        file = find_file(where, (NAME, PEFT))
        lora = Loaded(read_lora(file, self.model), weight, painting_of(file))
        self._merge({name: other for name, other in self._loaded.items() if name != str(where)} | {str(where): lora})

    def set(self, where: str | Path, weight: float) -> None:
        """Another weight for what was loaded from there; ValueError if nothing was."""
        name = str(where)
        if name not in self._loaded:
            raise ValueError(f"no LoRA {name!r} is loaded: {', '.join(self._loaded) or 'none'} is")
        weight = number("weight", weight, STRENGTH)
        self._merge(self._loaded | {name: self._loaded[name]._replace(weight=weight)})

    def unload(self) -> None:
        """Removes all: every weight is what it was."""
        self._merge({})

    def _merge(self, loras: dict[str, Loaded]) -> None:
        """These and no others; where that fails, half way, the ones before."""
        try:
            self._write(loras)
        except BaseException:
            self._write(self._loaded)
            raise
        self._loaded = loras
        self._say()

    @torch.no_grad()
    def _write(self, loras: Mapping[str, Loaded]) -> None:
        layers = layers_of(self.model)
        changed = {layer for lora in loras.values() for layer in lora.factors}
        for name in changed | self._own.keys():
            weight: Any = layers[name].weight
            own = self._own.setdefault(name, weight.detach().to("cpu", copy=True))
            merged = own.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
            for lora in loras.values():
                if name in lora.factors and lora.weight:
                    down, up = (f.to(merged).flatten(1) for f in lora.factors[name][:2])
                    merged = merged + lora.weight * lora.factors[name].scale * (up @ down).view_as(merged)
            weight.copy_(merged)
        self._own = {name: own for name, own in self._own.items() if name in changed}

    def _say(self) -> None:
        """What calls take: as the LoRAs in use say, the last of them first."""
        called: dict[str, Any] = {}
        scheduled: dict[str, Any] = {}
        for lora in self._loaded.values():
            if lora.weight:
                called |= {key: value for key, value in lora.painting.items() if key in CALLED}
                scheduled |= lora.painting.get("scheduler", {})
        model = self.model
        model.defaults = replace(model.defaults, **self._defaults.over(vars(model.defaults), called))
        model.scheduler = self._scheduler.over(model.scheduler, scheduled)


class Said:
    """Values that stand in for others, which come back, unless somebody changed them meanwhile."""

    def __init__(self) -> None:
        self.own: dict[str, Any] = {}
        self.said: dict[str, Any] = {}

    def over(self, values: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
        """`values` without what was said before, and with what is said now."""
        mine = {key for key, value in self.said.items() if key in values and values[key] == value}
        before = {k: self.own[k] if k in mine else v for k, v in values.items() if k not in mine or k in self.own}
        self.own, self.said = {key: before[key] for key in said if key in before}, dict(said)
        return before | self.said
