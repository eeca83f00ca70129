"""Class labels as conditioning: a name or an id becomes the row of an embedding that the network learns."""

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from conditioning.context import Context, checked


class Labels(nn.Module):
    """Names or ids of classes in, `class_labels` [B] (long) out.

    The null is a class of its own, `len(names)`, as in DiT and classifier-free guidance on labels: the network's table
    has `num_embeddings` rows. The empty caption stands for it.
    """

    null_id: Tensor

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.names = tuple(checked(names))
        if len(set(self.names)) < len(self.names) or "" in self.names:
            raise ValueError(f"names: got {list(self.names)}, expected names that differ and are not empty")
        self.ids = {name: i for i, name in enumerate(self.names)} | {"": len(self.names)}
        self.num_embeddings = len(self.names) + 1
        self.register_buffer("null_id", torch.tensor(len(self.names)), persistent=False)

    def forward(self, captions: Sequence[str | int]) -> Context:
        """Raises ValueError for a name or an id that is no class, saying which names come close."""
        ids = [self._id(label) for label in checked(captions, (str, int))]
        return {"class_labels": torch.tensor(ids, device=self.null_id.device)}

    def _id(self, label: str | int) -> int:
        if isinstance(label, int):
            if 0 <= label < len(self.names):
                return label
            raise ValueError(f"label {label}: expected an id from 0 to {len(self.names) - 1}, or '' for none")
        if label in self.ids:
            return self.ids[label]
        close = difflib.get_close_matches(label, self.names) or self.names[:5]
        raise ValueError(f"label {label!r} is none of the {len(self.names)} classes; did you mean {', '.join(close)}?")
