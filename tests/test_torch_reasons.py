"""Every reason that a torch model can have, with a witness and words that a user can act on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bnfold.planning import Reason
from tests.torch_nets import (
    GRAPH,
    MODULE,
    PROGRAM,
    TRACED,
    error,
    folded,
    lively,
    made,
    one_thread,
    outputs,
    random,
    step,
)

IMAGE = (2, 3, 6, 6)
single = pytest.fixture(autouse=True, scope="module")(one_thread)


@dataclass(frozen=True, slots=True)
class Case:
    """A net with a step that stays.

    Attributes:
        build: The net.
        name: The step; as the kind of model names it.
        witness: What stands in its way.
        words: What its sentence says.
        hint: What its hint says.
        kind: How the net is given.
        inputs: Shapes of the inputs.
        level: As for `bnfold.fold`.
        positive: Whether all gammas are.
        half: Whether the net is in half precision, with the numbers that it was built with.
    """

    build: Callable[[], nn.Module]
    name: str
    witness: tuple[str, ...]
    words: str
    hint: str
    kind: str = MODULE
    inputs: tuple[tuple[int, ...], ...] = (IMAGE,)
    level: str = "max"
    positive: bool = False
    half: bool = False

    def fold(self) -> tuple[Any, Any, list[Tensor]]:
        """The net, the result, the inputs."""
        model, dtype = self.build().eval(), torch.float16 if self.half else torch.float64
        model = model.half() if self.half else lively(model, positive=self.positive)
        feeds = [random(*shape, seed=k).to(dtype) for k, shape in enumerate(self.inputs)]
        return model, folded(self.kind, model, feeds, level=self.level), feeds


def conv(inputs: int = 3, channels: int = 3, size: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, channels, size, **options)


def norm(channels: int = 3, **options: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, **options)


def hooked() -> nn.Module:
    model = nn.Sequential(conv(), norm())
    model[1].register_forward_hook(lambda *_: None)
    return model


def added_in_place(self: Any, x: Tensor) -> Any:
    y = self.conv(x)
    z = functional.relu(self.bn(y), inplace=True)
    return self.out(z) + y


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = norm()

    def forward(self, x: Tensor) -> Any:
        return self.bn(x) + x


class Uncalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.spare = norm()

    def forward(self, x: Tensor) -> Any:
        return self.conv(x)


class AlwaysTraining(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> AlwaysTraining:
        del mode
        return super().train(True)


def by_inputs(self: Any, x: Tensor, mean: Tensor) -> Any:
    return functional.batch_norm(self.conv(x), mean, self.var)


def weight_given(self: Any, x: Tensor, weight: Tensor) -> Any:
    return self.bn(functional.conv2d(x, weight))


def bias_given(self: Any, x: Tensor, bias: Tensor) -> Any:
    return self.bn(functional.conv2d(x, self.w, bias))


def norm_and_conv(self: Any, x: Tensor) -> Any:
    y = self.conv(x)
    return self.bn(y), y


def between_rectifiers(self: Any, x: Tensor) -> Any:
    return torch.relu(torch.relu(self.conv(x)) * self.k)


def signs() -> Tensor:
    return torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64).view(3, 1, 1)


def captured(self: Any, x: Tensor) -> Any:
    y = self.conv(x)
    chosen = torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (y,))
    return self.bn(y), chosen


def dequantised(self: Any, x: Tensor) -> Any:
    return self.bn(functional.linear(x, self.q.double()))


def too_large() -> Any:
    model: Any = nn.Sequential(conv(), norm())
    with torch.no_grad():
        model[0].weight.fill_(300)
        model[1].running_var.fill_(1e-6)
    return model


def free(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


CASES: dict[Reason, list[Case]] = {
    Reason.TRAINING_MODE: [
        Case(
            lambda: nn.Sequential(conv(), AlwaysTraining(3)),
            "1",
            ("1",),
            "statistics of the batch",
            "evaluation mode",
        ),
    ],
    Reason.NOT_CONSTANT: [
        Case(
            lambda: made(by_inputs, conv=conv(), var=random(3).abs()),
            "batch_norm",
            ("'mean'",),
            "not constant",
            "",
            PROGRAM,
            (IMAGE, (3,)),
        ),
    ],
    Reason.WEIGHT_NOT_CONSTANT: [
        Case(
            lambda: made(weight_given, bn=norm()),
            "bn",
            ("conv2d",),
            "weight of conv2d",
            "conv2d",
            inputs=(IMAGE, (3, 3, 1, 1)),
        ),
    ],
    Reason.SHARED_WEIGHT: [
        Case(
            lambda: made(
                lambda self, x: (self.bn(self.conv(x)), self.conv.weight * 2),
                conv=conv(),
                bn=norm(),
            ),
            "bn",
            ("output 'mul'",),
            "also read by output 'mul'",
            "weight of its own",
        ),
    ],
    Reason.CHANNEL_AXIS: [
        Case(
            lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
            "1",
            ("0",),
            "channels of 0",
            "shapes",
            TRACED,
            ((2, 3),),
        ),
        Case(
            lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
            "1",
            ("0",),
            "channels of 0",
            "shapes",
            MODULE,
            ((2, 4, 3),),
        ),
    ],
    Reason.OTHER_READER: [
        Case(
            lambda: made(lambda self, x: self.sum(self.conv(x)), conv=conv(), sum=Both()),
            "sum.bn",
            ("sum.add",),
            "also read by sum.add",
            "level max",
            level="local",
        ),
    ],
    Reason.GRAPH_BOUNDARY: [
        Case(
            lambda: made(norm_and_conv, conv=conv(), bn=norm()),
            "bn",
            ("'conv'",),
            "an output of the graph",
            "in the place of 'conv'",
            level="local",
        ),
    ],
    Reason.CAPTURED: [
        Case(
            lambda: made(captured, conv=conv(), bn=norm()),
            "bn",
            ("'conv'",),
            "captured by a subgraph",
            "inlining",
            PROGRAM,
            level="local",
        ),
    ],
    Reason.ZERO_PADDING: [
        Case(
            lambda: nn.Sequential(norm(), conv(3, 4, 3, padding=1)),
            "0",
            ("1",),
            "every output of 1",
            "padding 0",
        ),
    ],
    Reason.BIAS_NOT_CONSTANT: [
        Case(
            lambda: made(bias_given, w=free(3, 3, 1, 1), bn=norm()),
            "bn",
            ("conv2d",),
            "bias of conv2d",
            "constant bias in conv2d",
            PROGRAM,
            (IMAGE, (3,)),
        ),
    ],
    Reason.EXTRA_OPERATOR: [
        Case(
            lambda: made(
                lambda self, x: self.bn(functional.conv2d(x, self.w)), w=free(3, 3, 1, 1), bn=norm()
            ),
            "bn",
            ("conv2d",),
            "Add of its own after conv2d",
            "a bias in conv2d",
        ),
    ],
    Reason.NO_LINEAR_NEIGHBOUR: [
        Case(
            lambda: nn.Sequential(nn.ReLU(), norm(), nn.ReLU()),
            "1",
            ("0 before it", "2 after it"),
            "no constant weight",
            "level max",
            level="local",
        ),
    ],
    Reason.ZERO_SCALE: [
        Case(
            lambda: nn.Sequential(norm(), nn.MaxPool2d(2), conv()),
            "0",
            ("'input'",),
            "0 or next to 0",
            "dead channels",
        ),
    ],
    Reason.SHIFT: [
        Case(
            lambda: nn.Sequential(conv(), nn.ReLU(), norm(), nn.ReLU()),
            "2",
            ("3",),
            "shift can't pass 3",
            "without a shift",
        ),
    ],
    Reason.FENCED: [
        Case(
            lambda: nn.Sequential(nn.Sigmoid(), norm(), nn.Sigmoid()),
            "1",
            ("0", "2"),
            "0, 2",
            "linear operator",
        ),
    ],
    Reason.SIGN: [
        Case(
            lambda: made(between_rectifiers, conv=conv(), k=signs()),
            "mul",
            ("relu", "relu_1"),
            "negative",
            "positive scale",
            kind,
        )
        for kind in (GRAPH, PROGRAM)
    ],
    Reason.OTHER_PATH: [
        Case(
            lambda: made(
                lambda self, x: self.out(self.sum(self.conv(x))),
                conv=conv(),
                out=conv(),
                sum=Both(),
            ),
            "sum.bn",
            ("sum.add",),
            "through sum.add",
            "convolution on that path",
            positive=True,
        ),
    ],
    Reason.WEIGHT_TYPE: [
        Case(
            lambda: made(
                dequantised, q=torch.tensor([[3, -1, 7]] * 4).to(torch.int8), bn=nn.BatchNorm1d(4)
            ),
            "bn",
            ("linear",),
            "int8",
            "before linear is quantised",
            PROGRAM,
            ((2, 3),),
        ),
    ],
    Reason.RANGE: [
        Case(too_large, "1", ("0",), "channel 0", "wider type", half=True),
    ],
    Reason.OTHER_STEP: [
        Case(
            lambda: made(
                lambda self, x, y: (self.one(self.conv(x)), self.two(self.conv(y))),
                conv=conv(),
                one=norm(),
                two=norm(),
            ),
            "two",
            ("one",),
            "units of this step and of one",
            "keeping one",
            PROGRAM,
            (IMAGE, IMAGE),
            positive=True,
        ),
    ],
    Reason.HOOK: [
        Case(hooked, "1", ("'1'",), "'1' is seen by a hook", "removing the hook"),
        Case(hooked, "1", ("'1'",), "'1' is seen by a hook", "removing the hook", TRACED),
    ],
    Reason.IN_PLACE: [
        Case(
            lambda: made(added_in_place, conv=conv(), bn=norm(), out=conv()),
            "bn",
            ("bn",),
            "changed in place while others still read it (relu",
            "not in place",
            positive=True,
        ),
    ],
    Reason.IN_CODE: [
        Case(
            lambda: made(lambda self, x: self.conv(x) * self.k, conv=conv(), k=free(3, 1, 1)),
            "mul",
            ("Net",),
            "in the code of Net",
            "ExportedProgram",
        ),
        Case(
            lambda: made(lambda self, x: self.inner(x) + 1.0, inner=nn.Sequential(conv())),
            "add",
            ("Net",),
            "in the code of Net",
            "GraphModule",
            TRACED,
        ),
    ],
    Reason.SEVERAL_CALLS: [
        Case(
            lambda: made(
                lambda self, x, y: (self.bn(self.conv(x)), self.bn(y)), conv=conv(), bn=norm()
            ),
            "bn",
            ("bn@1",),
            "one module does it and bn@1",
            "a module of its own",
            inputs=(IMAGE, IMAGE),
        ),
    ],
    Reason.NOT_CAPTURED: [
        Case(Uncalled, "spare", ("spare",), "could not be captured", "example inputs"),
    ],
}


def test_every_reason_has_a_case() -> None:
    # Only `optimize` takes folds back, and it is for files; of merges see `test_torch_merges`.
    others = {Reason.ROLLED_BACK, Reason.GROWS, Reason.BORDER, Reason.GEOMETRY}
    assert {*CASES} == {*Reason} - others


def cases() -> list[Any]:
    return [
        pytest.param(reason, case, id=f"{reason.slug} {number}")
        for reason, found in CASES.items()
        for number, case in enumerate(found)
    ]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of torch.cond
@pytest.mark.parametrize(("reason", "case"), cases())
def test_a_step_that_stays_says_why_and_what_would_free_it(reason: Reason, case: Case) -> None:
    model, result, feeds = case.fold()
    found = step(result.report, case.name)
    assert (found.verdict, found.code) == ("kept", reason.code), found.sentence
    assert found.witness == case.witness
    assert case.words in found.sentence
    assert case.hint in found.hint
    assert error(outputs(model, feeds), outputs(result.model, feeds)) < 1e-9
