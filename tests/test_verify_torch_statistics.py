"""What a torch model says of its inputs agrees with what its ONNX form says, and is valid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from bnfold.verify.dtypes import family
from bnfold.verify.onnx_inputs import input_specs
from bnfold.verify.onnx_statistics import statistics_of
from bnfold.verify.synthetic import synthetic
from bnfold.verify.torch_statistics import torch_facts
from bnfold.verify.torch_subject import torch_subject
from models.export import export_traced


class Normalised(nn.Module):
    """Grey levels made numbers around zero, then a convolution."""

    def __init__(self, rest: nn.Module) -> None:
        super().__init__()
        self.rest = rest
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3]).reshape(3, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.2, 0.3, 0.4]).reshape(3, 1, 1))

    def forward(self, x: Tensor) -> Any:
        return self.rest((x / 255 - self.mean) / self.deviation)  # type: ignore[operator]


def trained(norm: nn.Module, before: Callable[[Tensor], Tensor], example: Tensor) -> None:
    """Shows a BatchNorm inputs of another mean and deviation than the standard ones."""
    generator = torch.Generator().manual_seed(1)
    norm.train()
    for _ in range(60):
        norm(before(3 + 2 * torch.randn((16, *example.shape[1:]), generator=generator)))
    norm.eval()


def conv_net(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 3, **options), nn.BatchNorm2d(12), nn.ReLU())
    trained(net[1], net[0], torch.zeros(1, 3, 12, 12))
    return net.eval().requires_grad_(False)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU())
    trained(net[1], net[0], torch.zeros(1, 6))
    return net.eval().requires_grad_(False)


def norm_first() -> nn.Sequential:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    trained(net[0], lambda x: x, torch.zeros(1, 3, 12, 12))
    return net.eval().requires_grad_(False)


IMAGE = torch.zeros(2, 3, 12, 12)
NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "a convolution": (lambda: conv_net(bias=False), IMAGE),
    "a convolution with a bias": (conv_net, IMAGE),
    "a dilated convolution": (lambda: conv_net(dilation=2), IMAGE),
    "a linear layer": (mlp, torch.zeros(2, 6)),
    "a BatchNorm": (norm_first, IMAGE),
    "a normalisation": (lambda: Normalised(conv_net()).eval(), IMAGE),
}


@pytest.mark.parametrize("what", NETS)
def test_the_torch_model_and_its_export_say_the_same(what: str, tmp_path: Path) -> None:
    make, example = NETS[what]
    net = make()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = torch_facts(torch_subject(net, "net", example_inputs=(example,)))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    ((_, of_torch),) = found.statistics.items()

    export_traced(net, example, tmp_path / "net.onnx")
    proto = onnx.load(tmp_path / "net.onnx")
    (spec,) = specs = input_specs(proto)
    of_onnx = statistics_of(proto, specs, {spec.name: tuple(example.shape)})[spec.name]
    for field in ("mean", "white", "smooth", "shared"):
        one, other = getattr(of_torch, field), getattr(of_onnx, field)
        np.testing.assert_allclose(one, other, rtol=0.02, atol=0.02 * float(of_onnx.white.max()))
    if what != "a normalisation":  # which was not there in training
        np.testing.assert_allclose(of_torch.mean, 3, atol=0.3)
        whole = np.sqrt(of_torch.white**2 + of_torch.smooth**2 + of_torch.shared**2)
        np.testing.assert_allclose(whole, 2, rtol=0.15)


def test_programs_say_what_their_modules_say() -> None:
    net = conv_net()
    program = torch.export.export(net, (IMAGE,), strict=False)
    of_net = torch_facts(torch_subject(net, "net", example_inputs=(IMAGE,)))
    of_program = torch_facts(torch_subject(program, "program"))
    (one,), (other,) = of_net.statistics.values(), of_program.statistics.values()
    np.testing.assert_allclose(one.mean, other.mean, rtol=1e-5)
    np.testing.assert_allclose(one.white, other.white, rtol=1e-5)


class Words(nn.Module):
    """Two tables, a mask and an image, of which only the tables say anything."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(50, 4), nn.Embedding(3, 4)

    def forward(self, words: Tensor, kinds: Tensor, mask: Tensor, image: Tensor) -> Any:
        embedded = self.words(words) + self.kinds(kinds)
        return (embedded * mask[..., None]).sum() + torch.tanh(image).sum()


def test_indices_stay_below_the_tables_they_are_looked_up_in() -> None:
    words = torch.zeros(2, 7, dtype=torch.int64)
    example = (words, words, torch.zeros(2, 7), torch.zeros(1, 3, 4, 4))
    subject = torch_subject(Words().eval(), "words", example_inputs=example)
    facts = torch_facts(subject)
    assert {name: limit.high for name, limit in facts.limits.items()} == {"words": 50, "kinds": 3}
    assert not facts.statistics
    drawn = synthetic(subject.inputs, 8, limits=facts.limits, statistics=facts.statistics)
    for feed in drawn.feeds:
        assert feed["kinds"].max() < 3
        subject.oracle()(feed)
    assert max(int(feed["words"].max()) for feed in drawn.feeds) > 30


class Curved(nn.Module):
    """A square root before the convolution: its input is no affine map of the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.rest = conv_net()

    def forward(self, x: Tensor) -> Any:
        return self.rest(torch.sqrt(x + 1))


class Failing(nn.Module):
    """Takes no constants."""

    def forward(self, x: Tensor) -> Any:
        if not x.std() > 0:
            raise ValueError("constant")
        return x


@pytest.mark.parametrize("net", [Curved(), Failing(), nn.Conv2d(3, 2, 1)], ids=str)
def test_nothing_is_said_where_nothing_is_known(net: nn.Module) -> None:
    facts = torch_facts(torch_subject(net.eval(), "net", example_inputs=(IMAGE,)))
    assert not facts.statistics
    assert not facts.limits
    drawn = synthetic(torch_subject(net, "net", example_inputs=(IMAGE,)).inputs, 2)
    assert all(family(array.dtype) == "float" for array in drawn.feeds[0].values())
