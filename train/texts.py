"""The context of captions: what a text encoder says of them, computed once where that can be."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from conditioning.context import Conditioner, Context
from train.aside import opened_whole, save_whole
from train.cache import FORMAT, SHARD, weights_digest
from train.data import sent
from train.pictures import digest

TABLE_BYTES = 10**9  # up to which the states of all captions are kept in memory
BATCH = 256  # captions encoded at once


def longest(conditioner: Conditioner, captions: Sequence[tuple[str, ...]]) -> int:
    """How many windows of the encoder the longest of these captions needs; 1 where there are no windows."""
    chunks = getattr(conditioner, "chunks", None)
    return chunks(sorted({caption for group in captions for caption in group} | {""})) if chunks else 1


class Texts:
    """Captions to context rows, all encoded once,

    - into memory,
    - or, where they do not fit, into files;
    - as they come, where one of them needs more than one window of the encoder (all batches then have as many as the
      longest caption needs), where there is no place for files, or where they were not foreseen, as shuffled tags.
    """

    def __init__(
        self,
        conditioner: Conditioner,
        captions: Sequence[tuple[str, ...]],
        device: torch.device,
        *,
        cache: Path | None = None,
        accelerator: Accelerator | None = None,
    ):
        """cache: folder for states that do not fit into memory; with `accelerator`, its processes share the work."""
        self.conditioner, self.device = conditioner, device
        distinct = sorted({caption for group in captions for caption in group} | {""})
        bytes_ = sum(value.numel() * value.element_size() for value in flat(conditioner([""])).values()) * len(distinct)
        self.windows = windows = longest(conditioner, captions)
        self.row = {caption: i for i, caption in enumerate(distinct)}
        self.table: dict[str, Tensor] | None = None  # states of all captions, in memory
        self.files: list[dict[str, Tensor]] | None = None  # or mapped from files of `SHARD` captions
        if windows == 1 and bytes_ <= TABLE_BYTES:
            self.table = self._encode(distinct)
        elif windows == 1 and cache:
            say = accelerator.print if accelerator else print
            self.files = self._cached(distinct, cache, bytes_ // 2, Share.of(accelerator), say)

    @property
    def encodes(self) -> bool:
        """Whether captions that were foreseen need the encoder."""
        return self.table is None and self.files is None

    @torch.no_grad()
    def _encode(self, captions: list[str]) -> dict[str, Tensor]:
        parts = [flat(self.conditioner(captions[i : i + BATCH])) for i in range(0, len(captions), BATCH)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _cached(
        self, distinct: list[str], cache: Path, bytes_: int, share: "Share", say: Callable[[str], None]
    ) -> list[dict[str, Tensor]] | None:
        """Files of states in float16, keyed by captions, the encoder's weights, and what it makes of some of them."""
        some = self._encode(distinct[:: max(1, len(distinct) // 8)][:8])
        seen = [value.cpu().float().numpy().tobytes() for value in some.values()]
        weights = weights_digest(self.conditioner) if isinstance(self.conditioner, nn.Module) else ""
        place = cache / f"texts-{share.same(digest(FORMAT, weights, *seen, *distinct))}"  # another device, other bits
        files = [place / f"{i:06d}.safetensors" for i in range(-(-len(distinct) // SHARD))]
        missing = [file for file in files if not file.is_file()]
        place.mkdir(parents=True, exist_ok=True)
        needed, free = bytes_ * len(missing) / len(files) / 1e6, shutil.disk_usage(place).free / 1e6
        if missing:
            say(f"text states in {place}: {len(missing)} of {len(files)} files to compute, {needed:,.0f} MB")
        if share.same(needed > free):
            say(f"the disk has {free:,.0f} MB free: captions are encoded as they come, which costs time")
            return None
        for i in range(share.rank, len(files), share.processes):
            if not files[i].is_file():
                states = self._encode(distinct[i * SHARD : (i + 1) * SHARD])
                save_whole({n: (v.half() if v.is_floating_point() else v).cpu() for n, v in states.items()}, files[i])
        share.wait()
        mapped = []
        for file in files:
            with opened_whole(file) as opened:
                mapped.append({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        return mapped

    def _windows(self, captions: Sequence[str]) -> dict[str, int]:
        """As many windows for every batch, because the empty ones count: no batch may show how it was divided."""
        chunks = getattr(self.conditioner, "chunks", None)
        return {"chunks": max(self.windows, chunks(list(captions)))} if chunks else {}

    def __call__(self, captions: Sequence[str]) -> Context:
        """The context of these captions; the empty one is the null."""
        rows = [self.row.get(caption) for caption in captions]
        if self.encodes or None in rows:
            told = self.conditioner(list(captions), **self._windows(captions))
            return nested({name: v.to(self.device) for name, v in flat(told).items()})
        places = [row for row in rows if row is not None]
        if self.table is not None:
            chosen = torch.tensor(places)
            return nested({name: v[sent(chosen, v.device)].to(self.device) for name, v in self.table.items()})
        assert self.files
        found = [{name: v[row % SHARD] for name, v in self.files[row // SHARD].items()} for row in places]
        states = {name: sent(torch.stack([one[name] for one in found]), self.device) for name in found[0]}
        return nested({name: v.float() if v.is_floating_point() else v for name, v in states.items()})


class Share(NamedTuple):
    """Which part of the work a process has, and how it meets the others."""

    rank: int
    processes: int
    wait: Callable[[], None]

    @staticmethod
    def of(accelerator: Accelerator | None) -> "Share":
        if accelerator is None:
            return Share(0, 1, lambda: None)
        return Share(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)

    def same(self, value: Any) -> Any:
        """That of the main process."""
        return broadcast_object_list([value])[0] if self.processes > 1 else value


def flat(context: Mapping[str, Any]) -> dict[str, Tensor]:
    """A context whose dicts within (`added_cond_kwargs`) are joined to their names: "added_cond_kwargs/text_embeds"."""
    found: dict[str, Tensor] = {}
    for name, value in context.items():
        found |= {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return found


def nested(flat_context: Mapping[str, Tensor]) -> Context:
    """The inverse of `flat`."""
    found: Context = {}
    for name, value in flat_context.items():
        outer, _, inner = name.partition("/")
        if inner:
            found.setdefault(outer, {})[inner] = value
        else:
            found[outer] = value
    return found
