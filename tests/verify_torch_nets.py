"""Torch models with right folds and wrong ones, by bnfold and by another tool."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

import bnfold
from bnfold.verify.torch_sites import TorchSites, torch_sites
from bnfold.verify.torch_subject import TorchSubject, torch_subject
from models import build

MAX, LOCAL, FUSE = "max", "local", "fuse"

Feeds = dict[str, NDArray[Any]]


@cache
def pair(name: str, how: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A net of `models`, folded by bnfold on one of its levels or by torch's own tool."""
    net, example = build(name)
    if how != FUSE:
        return net, bnfold.fold(net, example, level=how).model, example
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own module
        from torch.fx.experimental.optimization import fuse

        graph = fx.symbolic_trace(copy.deepcopy(net))
        return graph, fuse(copy.deepcopy(graph)), example


def subject(model: Any, example: Any, name: str = "<model>") -> TorchSubject:
    return torch_subject(model, name, example_inputs=example)


def feeds(model: TorchSubject, count: int = 2, seed: int = 0) -> list[Feeds]:
    """Normal numbers for every input."""
    rng = np.random.default_rng(seed)
    return [
        {
            spec.name: rng.standard_normal(
                [n if isinstance(n, int) else 3 for n in spec.shape or ()]
            ).astype(spec.dtype)
            for spec in model.inputs
        }
        for _ in range(count)
    ]


def checked(reference: Any, candidate: Any, example: Any, *, ours: bool) -> TorchSites:
    """What tier B says of a pair."""
    before = subject(reference, example)
    return torch_sites(before, subject(candidate, example), feeds(before), ours=ours)


def block(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, Tensor]:
    """A Conv with a norm, twice, and a Linear; statistics are random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
        )  # fmt: skip
        for path in ("1", "4"):
            nn.init.normal_(net.get_parameter(f"{path}.weight"), 1, 0.3)
            nn.init.normal_(net.get_parameter(f"{path}.bias"), 0, 0.5)
            net.get_buffer(f"{path}.running_mean").normal_(0, 0.5)
            net.get_buffer(f"{path}.running_var").uniform_(0.05, 2)
        return net.eval().to(dtype), torch.randn(2, 3, 10, 10).to(dtype)


# ---- defects ----


def changed_sites(reference: nn.Module, candidate: nn.Module) -> list[str]:
    """Paths of the linear modules whose weights a fold changed, with a bias."""
    before = dict(reference.named_parameters())
    return [
        path
        for path, module in candidate.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear)
        and module.bias is not None
        and f"{path}.weight" in before
        and not torch.equal(before[f"{path}.weight"], module.weight)
    ]


def _channels(module: Any) -> tuple[Tensor, Tensor]:
    """The weights of the two largest output channels."""
    axis = int(isinstance(module, nn.modules.conv._ConvTransposeNd))
    weight = module.weight.data.transpose(0, axis)
    order = weight.flatten(1).norm(dim=1).argsort(descending=True)
    return weight[int(order[0])], weight[int(order[1])]


def _bias(module: Any, _old: Any) -> None:
    module.bias.data *= 1.001


def _channel(module: Any, _old: Any) -> None:
    _channels(module)[0].mul_(1.001)


def _swapped(module: Any, _old: Any) -> None:
    one, other = _channels(module)
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)


def _sign(module: Any, _old: Any) -> None:
    _channels(module)[0].neg_()


def _stale(module: Any, old: Any) -> None:
    module.weight.data.copy_(old.weight.data)


def _epsilon(module: Any, _old: Any) -> None:
    # Of a variance of 0.05, which the smallest ones of a real net are below.
    module.weight.data *= 1 + 0.5 * 1e-5 / 0.05


DEFECTS: Mapping[str, Callable[[Any, Any], None]] = {
    "bias times 1.001": _bias,
    "one channel times 1.001": _channel,
    "two channels swapped": _swapped,
    "sign of a channel": _sign,
    "stale weight": _stale,
    "forgotten eps": _epsilon,
}


def spoilt(reference: nn.Module, candidate: nn.Module, path: str, defect: str) -> nn.Module:
    """A copy of ``candidate`` with a defect at the site ``path``."""
    wrong = copy.deepcopy(candidate)
    with torch.no_grad():
        DEFECTS[defect](wrong.get_submodule(path), reference.get_submodule(path))
    return wrong
