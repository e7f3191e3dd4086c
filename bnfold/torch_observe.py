"""How the modules of a model are called while it is captured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.module import (
    _global_forward_hooks,
    _global_forward_hooks_with_kwargs,
    _global_forward_pre_hooks,
    register_module_forward_hook,
)


@dataclass(slots=True)
class Observed:
    """Which modules were always called with one tensor, and gave one tensor."""

    _simple: dict[int, bool] = field(default_factory=dict)

    def is_simple(self, module: nn.Module) -> bool:
        """Whether ``module`` was called, and always with one tensor for one tensor."""
        return self._simple.get(id(vars(module)), False)

    def see(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Note one call."""
        one = len(args) == 1 and not kwargs and isinstance(args[0], Tensor | Proxy)
        simple = one and isinstance(output, Tensor | Proxy)
        # torch.export may call another object that has the attributes of the module.
        key = id(vars(module))
        self._simple[key] = simple and self._simple.get(key, True)


def is_watched_globally() -> bool:
    """Whether hooks on all modules are there, which see and may change every tensor."""
    return bool(_global_forward_hooks or _global_forward_pre_hooks)


@contextmanager
def observing() -> Iterator[Observed]:
    """Watch every call of a module; nothing of the modules is changed."""
    seen = Observed()
    handle = register_module_forward_hook(seen.see, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
        # torch leaves the mark there, and torch.compile warns of it from then on.
        _global_forward_hooks_with_kwargs.pop(handle.id, None)
