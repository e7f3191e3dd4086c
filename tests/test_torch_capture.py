"""What modules compute is captured whole or in parts, and nothing is changed on the way."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from bnfold.torch_capture import Captured, Captures, capture
from bnfold.torch_guard import owners, storage_of
from bnfold.torch_tracer import AUTOCAST
from tests.capture_nets import (
    Asserting,
    BatchNormAct,
    Block,
    Branching,
    FrozenNorm,
    Iterates,
    Keeping,
    Optional,
    OwnConv,
    PlainConv,
    Raising,
    Randomly,
    Several,
    Takes,
)

M = TypeVar("M", bound=nn.Module)


def randomised(module: M) -> M:
    generator = torch.Generator().manual_seed(3)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.randn(tensor.shape, generator=generator).sign() * (
                torch.rand(tensor.shape, generator=generator) + 0.3
            )
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):
            buffer.abs_()
    return module.eval()


def image() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def numpy_state() -> bytes:
    state: Any = np.random.get_state()
    return bytes(state[1].tobytes())


def paths(captures: Captures) -> list[str]:
    return [part.path for part in captures.parts]


def called(part: Captured, op: str = "call_module") -> list[str]:
    assert part.graph_module is not None
    return [str(n.target) for n in part.graph_module.graph.nodes if n.op == op]


def only(captures: Captures) -> Captured:
    (part,) = captures.parts
    return part


# ---- whole modules ----


def test_with_inputs_a_module_is_exported() -> None:
    module = randomised(Block())
    captures = capture(module, (image(),))
    part = only(captures)
    assert part.program is not None and part.graph_module is None and not captures.failures
    assert torch.equal(part.program.module()(image()), module(image()))
    assert part.program.state_dict["conv.weight"] is module.conv.weight


def test_one_tensor_stands_for_a_tuple_of_one() -> None:
    assert only(capture(randomised(Block()), image())).program is not None


def test_keyword_inputs_are_enough() -> None:
    assert only(capture(randomised(Block()), None, {"x": image()})).program is not None


def test_a_batch_can_be_dynamic() -> None:
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = only(capture(randomised(Block()), image(), None, shapes)).program
    assert program is not None
    program.module()(torch.cat([image()] * 3))


WHOLE: list[Callable[[], nn.Module]] = [
    Block,
    FrozenNorm,
    Asserting,
    lambda: nn.Sequential(Block(), BatchNormAct(3), PlainConv(3, 3, 1), OwnConv(3, 3, 1)),
    lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())),
    Keeping,
    Optional,
]


@pytest.mark.parametrize("make", WHOLE)
def test_without_inputs_a_module_is_traced(make: Callable[[], nn.Module]) -> None:
    module = randomised(make())
    captures = capture(module)
    part = only(captures)
    assert part.path == "" and part.graph_module is not None and not captures.failures
    assert torch.equal(part.graph_module(image()), module(image()))
    assert not part.outside_readers


def test_leaves_are_layers_that_compute_what_torch_does() -> None:
    module: Any = nn.Sequential(Block(), BatchNormAct(3), PlainConv(3, 3, 1), OwnConv(3, 3, 1))
    part = only(capture(module.eval()))
    assert called(part) == ["0.conv", "0.bn", "2"]
    assert {"1.weight", "1.running_mean", "3.weight"} <= {*called(part, "get_attr")}


def test_a_layer_whose_forward_was_replaced_is_no_leaf() -> None:
    module = randomised(Block())
    forward = module.conv.forward
    module.conv.forward = lambda x: forward(x) * 2  # type: ignore[method-assign,assignment]
    part = only(capture(module))
    assert called(part) == ["bn"]
    assert part.graph_module is not None
    assert torch.equal(part.graph_module(image()), module(image()))


def test_a_forward_that_was_replaced_on_the_module_itself_is_what_is_traced() -> None:
    module = randomised(Block())
    module.forward = lambda x: module.bn(x)  # type: ignore[method-assign]
    assert called(only(capture(module))) == ["bn"]


def test_buffers_keep_their_names() -> None:
    assert called(only(capture(nn.Sequential(FrozenNorm()))), "get_attr") == [
        "0.weight",
        "0.running_var",
    ]


def test_a_module_of_several_names_goes_by_its_first() -> None:
    module = Several()
    module.again = module.one
    whole = nn.Sequential(module.one, module.one)
    assert called(only(capture(whole))) == ["0.conv", "0.bn"] * 2


def test_training_modes_are_captured_as_they_are() -> None:
    module = Block().train()
    program = only(capture(module, image())).program
    assert program is not None and module.training
    kinds = {str(node.target) for node in program.graph.nodes if "batch_norm" in str(node.target)}
    assert kinds == {"aten.batch_norm.default"}
    module.eval().bn.train()
    graph = only(capture(module)).graph_module
    assert graph is not None and not graph.training and graph.get_submodule("bn").training


def test_inputs_say_which_arguments_are_given() -> None:
    module = randomised(Branching(Optional()))
    assert capture(module, image()).failures[0].path == ""
    skipping = Optional().eval()
    skipping.forward = lambda x, skip=None: Optional.forward(skipping, x, skip)  # type: ignore[method-assign]
    program = only(capture(skipping, (image(), image()))).program
    assert program is not None
    assert any("add" in str(node.target) for node in program.graph.nodes)


class Flags(nn.Module):
    """Cannot be exported, can be traced once the flag is known."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: dict[str, Tensor], twice: bool, *rest: Tensor) -> Any:
        y = self.block(x["image"]) + rest[0]
        y = y.new_tensor(y.sum().tolist()) + y if torch.compiler.is_exporting() else y
        assert float(1) == 1
        return self.block(y) if twice else y


def test_a_trace_takes_the_arguments_that_the_export_failed_with() -> None:
    module = randomised(Flags())
    module.block.register_forward_hook(lambda *_: _fail_while_exporting())
    captures = capture(module, ({"image": image()}, True, image()))
    whole, inside = captures.parts
    assert captures.failures[0].reason.startswith("torch.export: ")
    assert called(whole) == ["block", "block"] and called(inside) == ["block.conv", "block.bn"]
    assert whole.graph_module is not None
    assert torch.equal(
        whole.graph_module(image(), image()), module({"image": image()}, True, image())
    )


def _fail_while_exporting() -> None:
    if torch.compiler.is_exporting():
        raise ValueError("not like this")


def test_autocast_is_noted() -> None:
    class Casting(Block):
        def forward(self, x: Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                x = self.conv(x)
            return self.bn(x)

    graph = only(capture(Casting().eval())).graph_module
    assert graph is not None
    noted = {str(n.target): AUTOCAST in n.meta for n in graph.graph.nodes if n.op == "call_module"}
    assert noted == {"conv": True, "bn": False}


# ---- hooks and computed parameters ----


def test_a_watched_layer_is_a_leaf() -> None:
    module = Block().eval()
    module.bn.register_forward_hook(lambda *_: None)
    prune.l1_unstructured(module.conv, "weight", 0.5)  # type: ignore[no-untyped-call]
    captures = capture(module)
    assert called(only(captures)) == ["conv", "bn"] and not captures.failures


def test_what_is_inside_a_watched_module_is_a_part_of_its_own() -> None:
    module: Any = nn.Sequential(Block(), Block()).eval()
    module[1].register_forward_pre_hook(lambda *_: None)
    captures = capture(module)
    assert paths(captures) == ["", "1"]
    assert called(captures.parts[0]) == ["0.conv", "0.bn", "1"]
    assert called(captures.parts[1]) == ["1.conv", "1.bn"]


def test_a_shared_layer_inside_and_outside_of_a_watched_module_is_told() -> None:
    module: Any = nn.Sequential(Block(), Block()).eval()
    module[1].conv = module[0].conv
    module[1].register_forward_hook(lambda *_: None)
    weight = storage_of(module[0].conv.weight)
    whole, inside = capture(module).parts
    assert whole.outside_readers[weight] == ("1.conv.weight",)
    assert inside.outside_readers[weight] == ("0.conv.weight",)


def test_a_layer_of_a_watched_module_that_is_called_from_outside_is_told() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Any:
            return self.block(self.block.conv(x))

    module = Around().eval()
    module.block.register_forward_hook(lambda *_: None)
    whole, inside = capture(module).parts
    assert called(whole) == ["block.conv", "block"]
    assert storage_of(module.block.conv.weight) in inside.outside_readers
    assert storage_of(module.block.bn.running_var) not in inside.outside_readers  # type: ignore[arg-type]


# ---- parts ----


@pytest.mark.parametrize("inputs", [None, (image(),)], ids=["traced", "exported"])
def test_what_can_not_be_captured_leaves_the_parts(inputs: tuple[Tensor] | None) -> None:
    module = randomised(Several())
    captures = capture(module, inputs)
    assert paths(captures) == ["one", "layers.0", "layers.1", "by_name.last", "bn"]
    assert [called(part) for part in captures.parts][1:] == [
        ["layers.0.conv", "layers.0.bn"],
        ["layers.1.conv", "layers.1.bn"],
        ["by_name.last.conv", "by_name.last.bn"],
        ["bn"],
    ]
    assert {failure.path for failure in captures.failures} == {""}
    assert not any(part.outside_readers for part in captures.parts)
    for part in captures.parts:
        assert part.graph_module is not None
        assert torch.equal(part.graph_module(image()), module.get_submodule(part.path)(image()))


def test_a_failure_says_in_one_line_why() -> None:
    (failure,) = capture(Several().eval()).failures
    assert failure.reason.startswith("torch.fx: a branch depends on what a tensor holds")
    assert "Several.forward, line " in failure.reason
    assert [f.reason for f in capture(Raising().eval(), image()).failures] == [
        "torch.export: ValueError: no such thing",
        "torch.fx: ValueError: no such thing",
    ]
    assert paths(capture(Raising())) == ["block"]


def test_an_export_that_fails_says_nothing_to_the_terminal(
    capfd: pytest.CaptureFixture[str],
) -> None:
    capture(Several().eval(), image())
    out, err = capfd.readouterr()
    assert out == err == ""


def test_a_lazy_module_stays_lazy_and_stops_nobody() -> None:
    module: Any = nn.Sequential(Block(), nn.Flatten(), nn.LazyLinear(4)).eval()
    captures = capture(module, image())
    assert captures.failures[0].reason == "torch.export: a Lazy module has seen no input yet"
    assert called(only(captures)) == ["0.conv", "0.bn", "1", "2"]
    assert isinstance(module[2], nn.LazyLinear) and module[2].has_uninitialized_params()


def test_inputs_that_do_not_fit_leave_the_parts() -> None:
    captures = capture(Block().eval(), (image(), image()))
    assert len(captures.failures) == 2
    assert paths(captures) == ["bn"]


def test_a_shared_part_is_captured_once() -> None:
    module = Several()
    module.layers[1] = module.one
    assert paths(capture(module.eval())) == ["one", "layers.0", "by_name.last", "bn"]


def test_readers_outside_of_a_part_are_told_by_storage() -> None:
    module = Several()
    module.layers[0].conv = module.one.conv
    module.layers[1].conv.weight = module.by_name["last"].conv.weight
    module.direction = nn.Parameter(module.layers[1].bn.weight.detach()[:2])
    told = {part.path: {*part.outside_readers.values()} for part in capture(module.eval()).parts}
    assert told == {
        "one": {("layers.0.conv.weight",), ("layers.0.conv.bias",)},
        "layers.0": {("one.conv.weight",), ("one.conv.bias",)},
        "layers.1": {("by_name.last.conv.weight",), ("direction",)},
        "by_name.last": {("layers.1.conv.weight",)},
        "bn": set(),
    }


def test_a_second_path_to_the_part_itself_is_no_reader_outside() -> None:
    module = Several()
    module.again = module.one
    assert not any(part.outside_readers for part in capture(module.eval()).parts)


def test_owners_are_listed_under_all_names() -> None:
    module: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    module.append(module[0])
    held = owners(module)
    assert held[storage_of(module[0].weight)] == (("0", "weight"), ("1", "weight"), ("2", "weight"))
    assert held[storage_of(module[1].bias)] == (("1", "bias"),)
    assert len(owners(nn.Sequential(nn.Linear(3, 3, device="meta"), nn.LazyLinear(2)))) == 2


def test_code_that_can_not_be_traced_takes_no_part_apart() -> None:
    captures = capture(Takes().eval())
    assert paths(captures) == ["block.bn", "whole"]
    assert captures.failures[1].path == "block"
    assert captures.failures[1].reason.endswith("calls what is inside by itself")
    assert paths(capture(Iterates().eval())) == ["features.1", "rest"]


def test_code_reaches_modules_that_have_another_path() -> None:
    taking = Takes()
    module: Any = nn.Sequential(taking.block, taking)
    assert paths(capture(module.eval())) == ["0.bn", "1.whole"]


def test_a_part_of_optional_arguments_is_captured_only_if_they_do_not_matter() -> None:
    captures = capture(Branching(Optional()).eval())
    assert captures.failures[1].reason == (
        "torch.fx: what it computes depends on which optional arguments it is given"
    )
    assert "inner" not in paths(captures)

    class Unused(Block):
        def forward(self, x: Tensor, unused: Tensor | None = None) -> Any:
            return super().forward(x)

    assert paths(capture(Branching(Unused()).eval())) == ["inner"]


def test_compiled_code_is_a_leaf_beside_the_rest() -> None:
    with pytest.warns(DeprecationWarning):
        script = torch.jit.script(nn.ReLU())
    assert called(only(capture(nn.Sequential(Block(), script).eval())))[-1] == "1"


# ---- nothing changes ----


def snapshot(module: nn.Module) -> list[tuple[Any, ...]]:
    return [
        (
            path,
            type(part),
            part.training,
            {k: v for k, v in vars(part).items() if not isinstance(v, dict | list)},
            {k: [*v] for k, v in vars(part).items() if isinstance(v, dict | list)},
            [(n, id(t), t.detach().clone().numpy().tobytes()) for n, t in _own(part)],
        )
        for path, part in module.named_modules(remove_duplicate=False)
    ]


def _own(part: nn.Module) -> list[tuple[str, Tensor]]:
    held = {**part._parameters, **part._buffers}
    return [(name, tensor) for name, tensor in held.items() if tensor is not None]


CHANGING: list[Callable[[], nn.Module]] = [
    Block,
    Several,
    Keeping,
    Takes,
    Raising,
    FrozenNorm,
    lambda: Branching(Keeping()),
    lambda: Randomly(lambda: torch.randn(1)),
    lambda: Randomly(random.random),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inputs", [None, (image(),)], ids=["traced", "exported"])
@pytest.mark.parametrize("make", CHANGING)
def test_a_capture_changes_nothing(
    make: Callable[[], nn.Module], inputs: tuple[Tensor] | None, training: bool
) -> None:
    module = make().train(training)
    before = snapshot(module)
    states = (torch.get_rng_state(), random.getstate(), numpy_state())
    assert torch.is_grad_enabled()
    capture(module, inputs)
    assert torch.is_grad_enabled()
    assert snapshot(module) == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert numpy_state() == states[2]


def test_a_snapshot_sees_changes() -> None:
    module = Keeping().train()
    before = snapshot(module)
    assert snapshot(copy.deepcopy(module)) != before
    module(image())
    assert snapshot(module) != before


DRAWING: list[Callable[[], Any]] = [
    lambda: torch.randn(1),
    lambda: torch.zeros(3, 1, 1).uniform_(),
    random.random,
    lambda: float(np.random.rand()),
]


@pytest.mark.parametrize("draw", DRAWING)
def test_a_trace_that_draws_random_numbers_is_no_proof(draw: Callable[[], Any]) -> None:
    captures = capture(Randomly(draw).eval())
    assert paths(captures) == ["block"]
    assert "random numbers are drawn while tracing" in captures.failures[0].reason


def test_an_export_that_draws_python_numbers_is_no_proof() -> None:
    captures = capture(Randomly(random.random).eval(), image())
    assert paths(captures) == ["block"]


def test_a_trace_that_writes_to_the_module_is_no_proof() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()
            self.__dict__["count"] = torch.zeros(())

        def forward(self, x: Tensor) -> Any:
            self.__dict__["count"].add_(1)
            return self.block(x)

    module = Counting().eval()
    captures = capture(module)
    assert paths(captures) == ["block"]
    assert "a tensor of the module is written to" in captures.failures[0].reason
    assert module.__dict__["count"] == 0


def test_no_graph_of_gradients_is_kept() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, 1, 1))
            self.shift = torch.ones(3, 1, 1, requires_grad=True) * 2

        def forward(self, x: Tensor) -> Any:
            return x * self.scale + (self.shift + 1)

    graph = only(capture(Scaled())).graph_module
    assert graph is not None
    assert all(buffer.grad_fn is None for buffer in graph.buffers())
