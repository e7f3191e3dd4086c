"""How the modules of a model are called while it is captured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.module import register_module_forward_hook


@dataclass(slots=True)
class Observed:
    """Which modules were always called with one tensor, and gave one tensor."""

    _simple: dict[int, bool] = field(default_factory=dict)

    def is_simple(self, module: nn.Module) -> bool:
        """Whether ``module`` was called, and always with one tensor for one tensor."""
        return self._simple.get(id(module), False)

    def see(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Note one call."""
        one = len(args) == 1 and not kwargs and isinstance(args[0], Tensor | Proxy)
        simple = one and isinstance(output, Tensor | Proxy)
        self._simple[id(module)] = simple and self._simple.get(id(module), True)


@contextmanager
def observing() -> Iterator[Observed]:
    """Watch every call of a module; nothing of the modules is changed."""
    seen = Observed()
    handle = register_module_forward_hook(seen.see, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
