"""Networks whose weights are about to come from a file."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Undrawn(TorchFunctionMode):
    """Leaves out what draws first weights: on the meta device PyTorch's normal numbers come from Python code, and to
    run that it imports its compiler, which takes longer than painting a small picture."""

    def __torch_function__(
        self, function: Callable, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.normal_ or getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if function is torch.randn else function)(*args, **kwargs)


@contextmanager
def unfilled() -> Iterator[None]:
    """Modules built inside have no memory and no numbers: `load_state_dict(weights, assign=True)` gives them theirs."""
    with torch.device("meta"), _Undrawn():
        yield
