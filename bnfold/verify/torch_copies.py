"""A copy of a module to run: its tensors converted, and fresh before every run.

Whatever a forward does to its module (caches, counters, buffers written to) is undone, so that two
runs start from one state, and the module that was given is never touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.proxy import TraceError
from torch.nn.parameter import is_lazy

from bnfold.errors import BnfoldError, InconclusiveError, UsageError
from bnfold.torch_graph_tree import copied as copied_graph_module
from bnfold.torch_guard import quiet, tensors_of, unchanged

Convert = Callable[[Tensor], Tensor]


class Replica:
    """A copy of a module or a program that can be run again and again.

    Args:
        model: The module or program.
        name: What messages call it.
        convert: What becomes of each tensor that it holds; gives a tensor of its own.
        device: Where what a program makes by itself is to lie.

    Raises:
        UsageError: There is no copy of such a model.
    """

    def __init__(
        self, model: Any, name: str, convert: Convert, device: torch.device | None = None
    ) -> None:
        module = _module_of(model, device)
        pairs = _converted(module, name, convert)
        self.module = _copied(module, name, pairs)
        self._pairs = [*pairs.values()]
        self._versions = [made._version for _, made in self._pairs]

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model returns, from its first state.

        Raises:
            InconclusiveError: It can't be run.
        """
        try:
            with unchanged(self.module):
                torch.manual_seed(0)
                return self.module(*args, **kwargs)
        except BnfoldError:
            raise
        except TraceError as error:
            raise InconclusiveError("it draws random numbers, so no two runs agree") from error
        except Exception as error:
            raise InconclusiveError(f"torch can't run the model: {words(error)}") from error
        finally:
            self._restore()

    def _restore(self) -> None:
        """Tensors that the run wrote to hold again what they held."""
        for i, (original, made) in enumerate(self._pairs):
            if made._version != self._versions[i]:
                with torch.no_grad():
                    made.copy_(original)
                self._versions[i] = made._version


def _module_of(model: Any, device: torch.device | None) -> nn.Module:
    if not isinstance(model, ExportedProgram):
        module: nn.Module = model
        return module
    if device is not None and device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        model = move_to_device_pass(model, str(device))
    with quiet():
        made: nn.Module = model.module()
        return made


def _converted(module: nn.Module, name: str, convert: Convert) -> dict[int, tuple[Tensor, Tensor]]:
    """Every tensor that the module holds and what becomes of it, by identity."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    if any(is_lazy(t) for t in (*module.parameters(), *module.buffers())):
        raise UsageError("a Lazy module has no weights yet", file=name, todo="run it once")
    with torch.no_grad():
        for _, _, tensor in tensors_of(module):
            if id(tensor) not in found:
                made = convert(tensor.detach())
                made = made.clone() if made.data_ptr() == tensor.data_ptr() else made
                if isinstance(tensor, nn.Parameter):
                    made = nn.Parameter(made, requires_grad=False)
                found[id(tensor)] = tensor, made
    return found


def _copied(module: nn.Module, name: str, pairs: dict[int, tuple[Tensor, Tensor]]) -> nn.Module:
    memo: dict[int, Any] = {key: made for key, (_, made) in pairs.items()}
    try:
        if isinstance(module, fx.GraphModule):
            return copied_graph_module(module, memo)
        with quiet():
            return copy.deepcopy(module, memo)
    except Exception as error:
        met = f"a copy of {type(module).__name__} can't be made: {words(error)}"
        raise UsageError(met, file=name, todo="check an exported program of it") from error


def words(error: Exception) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
