"""Edits of a GraphModule by hand: the result computes the same, the given one is untouched."""

from __future__ import annotations

import copy
import io
import operator
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from bnfold.torch_edit import Editor
from bnfold.torch_graph import GraphEditor

CHANNELS = 4


# ---- nets ----


def norm() -> nn.BatchNorm2d:
    """A normalisation with statistics that hide nothing: negative, tiny and zero entries."""
    made = nn.BatchNorm2d(CHANNELS).double()
    with torch.no_grad():
        made.weight.copy_(torch.randn(CHANNELS) * torch.tensor([1.0, -1.0, 1e-3, 0.0]))
        made.bias.copy_(torch.randn(CHANNELS))
        made.running_mean.copy_(torch.randn(CHANNELS))  # type: ignore[union-attr]
        made.running_var.copy_(torch.rand(CHANNELS) + torch.tensor([1e-6, 0.5, 1.0, 2.0]))  # type: ignore[union-attr]
    return made


def conv(bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=bias).double()


class Plain(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(bias), norm(), nn.ReLU())
        self.head = conv()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x))
        return y


class Functional(nn.Module):
    """The weights are attributes, and arguments of functions."""

    scale: Tensor

    def __init__(self, spelling: Callable[..., Tensor] = F.conv2d) -> None:
        super().__init__()
        self.spelling = spelling
        self.weight = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 3, 3).double())
        self.register_buffer("scale", torch.randn(CHANNELS).double(), persistent=False)
        self.shift = torch.randn(CHANNELS, 1, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.spelling(x, self.weight) * self.scale.reshape(-1, 1, 1)
        return scaled.add(self.shift).relu()


class Shared(nn.Module):
    """One convolution under two names, another one called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = conv(bias=False)
        self.again = self.first
        self.twice = conv()
        self.bn = norm()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.first(x)) + self.bn(self.again(x + 1))
        z: Tensor = self.twice(self.twice(y))
        return z


class Branching(nn.Module):
    """A convolution without bias inside a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(CHANNELS, CHANNELS, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.cond(
            x.sum() > 0, lambda v: self.linear(v).relu(), lambda v: v.cos(), (x,)
        )
        return y


class Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # or tracing computes with them


def shared() -> fx.GraphModule:
    """Tracing calls a module by one name always; graphs that are made by hand need not."""
    model = Shared()
    graph = traced(model).graph
    find(graph, "first", 1).target = "again"
    return fx.GraphModule(model, graph)


def traced(model: nn.Module) -> fx.GraphModule:
    found = fx.GraphModule(model, Tracer().trace(model.eval()), type(model).__name__)
    for node in found.graph.nodes:
        node.type = None  # of this file these are strings, which torch can't pickle
    found.recompile()
    return found


def exported(model: nn.Module) -> fx.GraphModule:
    found = torch.export.export(model.eval(), (images(),), strict=False).module()
    assert isinstance(found, fx.GraphModule)
    return found


def decomposed(model: nn.Module) -> fx.GraphModule:
    program = torch.export.export(model.eval(), (images(),), strict=False)
    with warnings.catch_warnings():  # torch warns of how it copies its own tree specifications
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        found = program.run_decompositions().module()
    assert isinstance(found, fx.GraphModule)
    return found


def images() -> Tensor:
    return torch.randn(
        2, CHANNELS, 5, CHANNELS, generator=torch.Generator().manual_seed(1)
    ).double()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# ---- edits by hand ----


def find(graph: fx.Graph, word: str, number: int = 0) -> fx.Node:
    """The node that computes what ``word`` says."""
    computing = [n for n in graph.nodes if n.op.startswith("call_")]
    found: list[fx.Node] = [n for n in computing if word in str(n.target)]
    return found[number]


def scale_and_shift(editor: Editor, path: str, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    held = {name: tensor.detach() for name, tensor in editor.tensors.items()}
    scale = held[f"{path}.weight"] / (held[f"{path}.running_var"] + eps).sqrt()
    return scale, held[f"{path}.bias"] - scale * held[f"{path}.running_mean"]


def fold(
    editor: Editor, call: fx.Node, bn: fx.Node, path: str, weight: str, value: fx.Node
) -> None:
    """Fold the normalisation ``path``, which ``bn`` runs, into the convolution ``call``."""
    scale, shift = scale_and_shift(editor, path)
    owner = weight.rpartition(".")[0]
    bias = f"{owner}.bias" if owner else "bias"
    if bias in editor.tensors:
        editor.write(bias, editor.tensors[bias].detach() * scale + shift)
    else:
        bias = editor.add(bias, shift, like=weight)
        editor.set_argument(call, "bias", bias)
    editor.write(weight, editor.tensors[weight].detach() * scale.reshape(-1, 1, 1, 1))
    data = bn.args[0]
    assert isinstance(data, fx.Node)
    editor.bypass(value, data)


def fold_plain(editor: GraphEditor) -> fx.GraphModule:
    """Fold the normalisation of `Plain`, in whatever form the graph has."""
    graph = editor.graph_module.graph
    modules = any(n.op == "call_module" and n.target == "body.0" for n in graph.nodes)
    call = find(graph, "body.0" if modules else "conv")
    bn = find(graph, "body.1" if modules else "batch_norm")
    value = next((u for u in bn.users if u.target is operator.getitem), bn)
    fold(editor, call, bn, "body.1", "body.0.weight", value)
    editor.sweep()
    return editor.finish()


def state(model: fx.GraphModule) -> tuple[str, dict[str, Tensor], list[str]]:
    tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}
    return model.code, tensors, [str(n.meta.keys()) for n in model.graph.nodes]


def assert_untouched(model: fx.GraphModule, before: tuple[str, dict[str, Tensor], Any]) -> None:
    code, tensors, meta = state(model)
    assert (code, meta) == (before[0], before[2])
    assert list(tensors) == list(before[1])
    assert all(torch.equal(tensors[name], before[1][name]) for name in tensors)


def assert_alike(result: nn.Module, reference: Tensor, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(result(x), reference, rtol=1e-12, atol=1e-12)


def pointers(module: nn.Module) -> set[int]:
    held = [*module.parameters(), *module.buffers()]
    held += [v for m in module.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    return {t.data_ptr() for t in held if t.numel()}


FORMS = {"traced": traced, "exported": exported, "decomposed": decomposed}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_a_normalisation_folds_and_only_the_copy_changes(
    form: str, bias: bool, inplace: bool
) -> None:
    given = FORMS[form](Plain(bias))
    reference, before, seen = given(images()).detach(), state(given), pointers(given)
    result = fold_plain(GraphEditor(given, inplace=inplace))
    assert_alike(result, reference, images())
    assert set(result.state_dict()) == {
        "body.0.weight", "body.0.bias", "head.weight", "head.bias",
    }  # fmt: skip
    assert "norm" not in result.code
    assert (result is given) == inplace
    if not inplace:
        assert_untouched(given, before)
        assert not seen & pointers(result)


def test_weights_stay_the_very_same_objects_until_they_are_written() -> None:
    given = traced(Plain())
    editor = GraphEditor(given)
    kept = dict(given.named_parameters())
    assert editor.graph_module is not given
    assert editor.graph_module.get_submodule("head") is not given.get_submodule("head")
    assert all(editor.tensors[name] is tensor for name, tensor in kept.items())
    editor.write("head.bias", torch.zeros(CHANNELS).double())
    assert editor.tensors["head.weight"] is kept["head.weight"]
    assert editor.tensors["head.bias"] is not kept["head.bias"]
    assert given.get_parameter("head.bias") is kept["head.bias"]


@pytest.mark.parametrize("trained", [True, False])
def test_written_and_added_parameters_keep_whether_they_are_trained(trained: bool) -> None:
    model = Plain(bias=False)
    model.body[0].requires_grad_(trained)
    result = fold_plain(GraphEditor(traced(model)))
    for name in ("body.0.weight", "body.0.bias"):
        written = result.get_parameter(name)
        assert isinstance(written, nn.Parameter)
        assert written.requires_grad == trained
        assert written.is_leaf


def test_a_shape_may_change_and_metadata_follows() -> None:
    editor = GraphEditor(exported(Plain()))
    node = next(n for n, name in editor.held.items() if name == "head.bias")
    assert node.meta["val"].shape == (CHANNELS,)
    editor.write("head.bias", torch.zeros(1, CHANNELS))
    assert (node.meta["val"].shape, node.meta["val"].dtype) == ((1, CHANNELS), torch.float32)
    assert type(node.meta["val"]).__name__ == "FakeTensor"


# ---- sharing ----


def test_what_is_shared_under_two_names_is_shared_in_the_copy_and_written_once() -> None:
    given = shared()
    reference = given(images()).detach()
    editor = GraphEditor(given)
    copied = editor.graph_module
    assert copied.get_submodule("first") is copied.get_submodule("again")
    scale, shift = scale_and_shift(editor, "bn")
    editor.write("again.weight", editor.tensors["first.weight"] * scale.reshape(-1, 1, 1, 1))
    assert editor.tensors["first.weight"] is editor.tensors["again.weight"]
    name = editor.add("first.bias", shift, like="first.weight")
    assert editor.tensors["again.bias"] is editor.tensors[name]
    for number, call in ((0, "first"), (1, "again")):
        editor.set_argument(find(copied.graph, call), "bias", f"{call}.bias")
        bn = find(copied.graph, "bn", number)
        editor.bypass(bn, bn.all_input_nodes[0])
    editor.sweep()
    result = editor.finish()
    assert_alike(result, reference, images())
    assert result.get_submodule("first") is result.get_submodule("again")
    assert "bn.weight" not in result.state_dict()
    assert given.get_submodule("first").bias is None


def test_a_module_that_is_called_elsewhere_too_stays() -> None:
    given = shared()
    editor = GraphEditor(given)
    bn = find(editor.graph_module.graph, "bn")
    editor.bypass(bn, bn.all_input_nodes[0])
    editor.sweep()
    result = editor.finish()
    assert result.state_dict().keys() == given.state_dict().keys()
    model, x = given.get_submodule, images()
    inner = model("first")(x) + model("bn")(model("first")(x + 1))
    assert_alike(result, model("twice")(model("twice")(inner)).detach(), x)


def test_a_name_that_is_gone_is_deleted_and_the_other_name_stays() -> None:
    given = shared()
    editor = GraphEditor(given)
    again = find(editor.graph_module.graph, "again")
    editor.bypass(again, again.all_input_nodes[0])
    editor.sweep()
    names = editor.finish().state_dict().keys()
    assert "first.weight" in names
    assert "again.weight" not in names


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(conv(), conv(), nn.Identity())
    model[1].weight = model[0].weight
    editor = GraphEditor(traced(model))
    editor.write("0.weight", torch.ones_like(editor.tensors["0.weight"]))
    assert editor.tensors["1.weight"] is editor.tensors["0.weight"]
    result = editor.finish()
    assert result.get_parameter("0.weight") is result.get_parameter("1.weight")
    assert float(result.get_parameter("1.weight").detach().min()) == 1.0


def test_a_tie_can_be_cut_by_an_added_tensor() -> None:
    model = nn.Sequential(conv(), conv())
    model[1].weight = model[0].weight
    editor = GraphEditor(traced(model))
    name = editor.add("1.weight", torch.zeros_like(editor.tensors["1.weight"]), like="1.weight")
    assert name == "1.weight_1"
    editor.set_argument(find(editor.graph_module.graph, "1"), "weight", name)
    assert editor.tensors["1.weight"] is editor.tensors[name]
    assert editor.tensors["0.weight"] is not editor.tensors[name]
    editor.write("0.weight", torch.ones_like(editor.tensors["0.weight"]))
    assert not editor.tensors["1.weight"].any()
    editor.sweep()
    assert set(editor.finish().state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}


# ---- functions and their arguments ----


def by_keyword(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(input=x, weight=weight, padding=1)


def by_position(x: Tensor, weight: Tensor) -> Tensor:
    return torch.conv2d(x, weight, None, 1, 1)


def by_aten(x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = torch.ops.aten.conv2d.default(x, weight, None, [1, 1], [1, 1])
    return y


@pytest.mark.parametrize("spelling", [F.conv2d, by_keyword, by_position, by_aten])
def test_a_function_gets_a_bias_however_it_is_called(spelling: Callable[..., Tensor]) -> None:
    given = traced(Functional(spelling))
    reference = given(images()).detach()
    editor = GraphEditor(given)
    assert editor.tensors.keys() == {"weight", "scale", "shift"}
    graph = editor.graph_module.graph
    convolution, scaled, shifted = (find(graph, word) for word in ("conv2d", "mul", "add"))
    scale, shift = editor.tensors["scale"], editor.tensors["shift"]
    editor.write("weight", editor.tensors["weight"].detach() * scale.reshape(-1, 1, 1, 1))
    name = editor.add("bias", shift.reshape(-1), like="weight")
    editor.set_argument(convolution, "bias", name)
    editor.bypass(shifted, scaled)
    editor.bypass(scaled, convolution)
    editor.sweep()
    result = editor.finish()
    assert_alike(result, reference, images())
    assert set(result.state_dict()) == {"weight", "bias"}
    assert not hasattr(result, "scale") and not hasattr(result, "shift")
    assert [n.target for n in result.graph.nodes if n.op == "call_method"] == ["relu"]
    assert hasattr(given, "scale") and hasattr(given, "shift")


@pytest.mark.parametrize("first", ["scaled", "shifted"])
def test_steps_that_vanish_one_after_another_may_be_bypassed_in_any_order(first: str) -> None:
    editor = GraphEditor(traced(Functional()))
    graph = editor.graph_module.graph
    convolution, scaled, shifted = (find(graph, word) for word in ("conv2d", "mul", "add"))
    pairs = [(scaled, convolution), (shifted, scaled)]
    for value, data in pairs if first == "scaled" else reversed(pairs):
        editor.bypass(value, data)
    assert find(graph, "relu").args == (convolution,)
    editor.sweep()
    assert set(editor.tensors) == {"weight"}


ARGUMENTS: dict[str, tuple[Callable[..., Any], str]] = {
    "torch.addmm, its first": (lambda x, a, b: torch.addmm(a, x, b), "input"),
    "torch.addmm, by keyword": (lambda x, a, b: torch.addmm(input=a, mat1=x, mat2=b), "input"),
    "torch.addmm, in ATen's words": (lambda x, a, b: torch.addmm(a, x, b), "self"),
    "torch.ops.aten.addmm": (lambda x, a, b: torch.ops.aten.addmm.default(a, x, b), "self"),
    "method addmm": (lambda x, a, b: a.addmm(x, b), "self"),
    "operator": (lambda x, a, b: x @ b + a, "other"),
    "method add": (lambda x, a, b: torch.mm(x, b).add(a), "other"),
    "torch.add by keyword": (lambda x, a, b: torch.add(input=x @ b, other=a), "other"),
    "F.linear": (lambda x, a, b: F.linear(x, b, a), "bias"),
    "F.linear by keyword": (lambda x, a, b: F.linear(x, weight=b, bias=a), "bias"),
    "F.layer_norm": (lambda x, a, b: F.layer_norm(x @ b, (CHANNELS,), bias=a), "bias"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_an_argument_is_replaced_where_it_is_given(case: str) -> None:
    function, argument = ARGUMENTS[case]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(CHANNELS).double())
            self.b = nn.Parameter(torch.randn(CHANNELS, CHANNELS).double())

        def forward(self, x: Tensor) -> Any:
            return function(x, self.a, self.b)

    x = torch.randn(3, CHANNELS).double()
    given = traced(Net())
    editor = GraphEditor(given)
    new = torch.randn(CHANNELS).double()
    name = editor.add("a", new, like="a")
    reader = next(n for n, held in editor.held.items() if held == "a")
    editor.set_argument(next(iter(reader.users)), argument, name)
    editor.sweep()
    result = editor.finish()
    assert set(result.state_dict()) == {"a_1", "b"}
    assert_alike(result, function(x, new, given.b).detach(), x)


def test_a_node_that_reads_a_tensor_is_made_once_and_stands_before_its_readers() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight = graph.get_attr("weight")
    first = graph.call_function(F.linear, (x, weight))
    second = graph.call_function(F.linear, (first, weight))
    graph.output(second)
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(CHANNELS, CHANNELS))
    editor = GraphEditor(fx.GraphModule(model, graph))
    name = editor.add("bias", torch.ones(CHANNELS), like="weight")
    for call in (
        find(editor.graph_module.graph, "linear", 1),
        find(editor.graph_module.graph, "linear"),
    ):
        editor.set_argument(call, "bias", name)
    editor.sweep()
    assert [n.target for n in editor.held] == ["weight", "bias"]
    inner = torch.zeros(1, CHANNELS) @ model.weight.T + 1
    torch.testing.assert_close(
        editor.finish()(torch.zeros(1, CHANNELS)), inner @ model.weight.T + 1
    )


def test_a_body_of_a_branch_is_handed_a_new_tensor() -> None:
    given = exported(Branching())
    before = state(given)
    editor = GraphEditor(given)
    body = editor.graph_module.get_submodule("true_graph_0")
    assert isinstance(body, fx.GraphModule)
    shift = torch.randn(CHANNELS).double()
    name = editor.add("linear.bias", shift, like="linear.weight")
    for _ in range(2):  # the second time it is there
        editor.set_argument(find(body.graph, "linear"), "bias", name)
    editor.sweep()
    result = editor.finish()
    x = images()
    weight = result.get_parameter("linear.weight").detach()
    assert_alike(result, (x.abs() @ weight.T + shift).relu(), x.abs())
    assert_alike(result, (-x.abs()).cos(), -x.abs())
    assert_untouched(given, before)


def test_a_body_is_swept_and_handed_no_more_than_it_reads() -> None:
    editor = GraphEditor(exported(Branching()))
    outer = find(editor.graph_module.graph, "cond")
    body = editor.graph_module.get_submodule("true_graph_0")
    assert isinstance(body, fx.GraphModule)
    linear = find(body.graph, "linear")
    editor.bypass(linear, linear.all_input_nodes[0])
    editor.sweep()
    result = editor.finish()
    assert not result.state_dict()
    assert outer.args[3] == (next(n for n in result.graph.nodes if n.op == "placeholder"),)
    x = images()
    assert_alike(result, x.abs(), x.abs())
    assert_alike(result, (-x.abs()).cos(), -x.abs())


# ---- what is removed, what stays ----


class Untidy(nn.Module):
    """Nodes and modules that nobody needs, before any edit."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.idle = conv(), norm(), conv()
        self.note = "mine"

    def forward(self, x: Tensor) -> Tensor:
        _ = self.idle(x)
        x.add_(0)
        y: Tensor = self.bn(self.conv(x))
        return y


def test_what_was_dead_before_and_what_changes_tensors_stays() -> None:
    editor = GraphEditor(traced(Untidy()))
    graph = editor.graph_module.graph
    fold(editor, find(graph, "conv"), find(graph, "bn"), "bn", "conv.weight", find(graph, "bn"))
    editor.sweep()
    assert [n.target for n in graph.nodes][1:-1] == ["idle", "add_", "conv"]
    assert {n.partition(".")[0] for n in editor.finish().state_dict()} == {"idle", "conv"}


def test_a_module_that_no_node_named_stays() -> None:
    given = traced(Untidy())
    given.spare = nn.Sequential(norm())
    editor = GraphEditor(given)
    graph = editor.graph_module.graph
    fold(editor, find(graph, "conv"), find(graph, "bn"), "bn", "conv.weight", find(graph, "bn"))
    editor.sweep()
    result = editor.finish()
    assert "spare.0.weight" in result.state_dict()
    assert "spare.0.weight" not in editor.tensors
    assert result.get_parameter("spare.0.weight") is not given.get_parameter("spare.0.weight")


class Chain(nn.Module):
    """What computes the second factor is dead when the product is bypassed."""

    def __init__(self, factor: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.factor = factor
        self.scale = nn.Parameter(torch.ones(CHANNELS, 1, 1).double())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor(self.scale, x)


CHAINS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "functions": (lambda s, x: torch.sqrt(F.relu(s) / 2), True),
    "methods": (lambda s, x: s.abs().reshape(1, -1, 1, 1), True),
    "in place, as a method": (lambda s, x: x.abs_(), False),
    "in place, as a function": (lambda s, x: torch.relu_(x), False),
    "in place, by keyword": (lambda s, x: F.relu(x, inplace=True), False),
    "in place, by position": (lambda s, x: F.relu(x, True), False),
    "in place, as an operator": (lambda s, x: x - s, False),  # made so in the test
    "in place, in ATen": (lambda s, x: torch.ops.aten.relu_.default(x), False),
    "into an output": (lambda s, x: torch.add(x, s, out=x), False),
    "by chance": (lambda s, x: F.dropout(x, 0.5, True), False),
    "statistics": (
        lambda s, x: F.batch_norm(x, s.reshape(-1), s.reshape(-1), None, None, True), False
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHAINS)
def test_only_what_computes_and_nothing_else_is_removed(case: str) -> None:
    factor, pure = CHAINS[case]
    editor = GraphEditor(traced(Chain(factor)))
    graph = editor.graph_module.graph
    if "operator" in case:
        find(graph, "sub").target = operator.isub
    product = find(graph, "mul")
    editor.bypass(product, next(iter(graph.nodes)))
    editor.sweep()
    left = [n for n in graph.nodes if n.op.startswith("call")]
    assert bool(left) != pure
    assert product not in graph.nodes


@pytest.mark.parametrize(
    ("change", "stays"),
    [
        (lambda m: None, False),
        (lambda m: m.train(), True),
        (lambda m: m.register_forward_hook(lambda *given: None), True),
    ],
)
def test_a_dead_module_goes_unless_somebody_may_watch_it(
    change: Callable[[nn.Module], Any], stays: bool
) -> None:
    model = nn.Sequential(conv(), norm(), nn.ReLU()).eval()
    given = traced(model)
    change(given.get_submodule("1"))
    editor = GraphEditor(given)
    graph = editor.graph_module.graph
    editor.bypass(find(graph, "2"), next(iter(graph.nodes)))
    editor.sweep()
    assert ("1.weight" in editor.finish().state_dict()) == stays


def test_metadata_of_the_result_of_sweep_names_what_is_there() -> None:
    editor = GraphEditor(exported(Plain(bias=False)))
    fold_plain(editor)
    assert set(editor.tensors) == set(editor.held.values()) == set(
        editor.graph_module.state_dict())  # fmt: skip
    biases = [n for n, name in editor.held.items() if name == "body.0.bias"]
    assert biases[0].meta["val"].shape == (CHANNELS,)


# ---- names ----


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("body.0.bias", "body.0.bias"),  # None stands there
        ("body.0.weight", "body.0.weight_1"),  # taken
        ("body.0.forward", "body.0.forward_1"),  # a method
        ("body.0.kernel_size", "body.0.kernel_size_1"),
        ("extra", "extra"),
        ("nowhere.else.scale", "body.0.scale"),  # beside the other one
    ],
)
def test_an_added_tensor_gets_a_free_name(name: str, found: str) -> None:
    editor = GraphEditor(traced(Plain(bias=False)))
    assert editor.add(name, torch.ones(CHANNELS), like="body.0.weight") == found
    assert isinstance(editor.graph_module.get_parameter(found), nn.Parameter)
    assert editor.tensors[found] is editor.graph_module.get_parameter(found)
    assert editor.add(found, torch.ones(CHANNELS), like="body.0.weight") != found


@pytest.mark.parametrize(
    ("like", "kind", "persistent"),
    [("weight", "_parameters", True), ("scale", "_buffers", False), ("shift", "__dict__", False)],
)
def test_an_added_tensor_is_held_as_its_like_is(like: str, kind: str, persistent: bool) -> None:
    given = traced(Functional())
    given._non_persistent_buffers_set.add("scale")  # which tracing forgets
    del given.shift
    given.shift = torch.ones(CHANNELS, 1, 1).double()
    given.register_parameter("empty", None)
    editor = GraphEditor(given)
    assert editor.add("empty", torch.ones(CHANNELS), like=like) == "empty"
    root = editor.graph_module
    assert "empty" in (vars(root) if kind == "__dict__" else getattr(root, kind))
    assert ("empty" in root.state_dict()) == persistent
    assert root.empty is editor.tensors["empty"]
    assert given.empty is None


# ---- everything else about the object ----


class Mine(fx.GraphModule):
    def describe(self) -> str:
        return f"mine, {self.note}"


def test_class_attributes_flags_hooks_and_metadata_survive() -> None:
    model = Untidy()
    made = fx.symbolic_trace(model.eval())
    given = Mine(made, made.graph, class_name="Special")
    given.meta["source"] = ["a"]
    vars(given).update(note="kept", extra=[1, 2])
    given.register_buffer("fleeting", torch.ones(1), persistent=False)
    calls: list[str] = []
    given.register_forward_hook(lambda *_: calls.append("root"))
    given.get_submodule("conv").register_forward_pre_hook(lambda *_: calls.append("conv"))
    given.get_submodule("idle").train()
    reference = given(images()).detach()
    calls.clear()
    result = GraphEditor(given).finish()
    assert_alike(result, reference, images())
    assert calls == ["conv", "root"]
    assert isinstance(result, Mine)
    assert type(result).__name__ == "Special"
    assert result.describe() == "mine, kept"
    assert result.extra == [1, 2] and result.extra is not given.extra
    assert result.meta == {"source": ["a"]}
    assert "fleeting" not in result.state_dict() and result.fleeting is not given.fleeting
    flags = [(name, m.training) for name, m in given.named_modules()]
    assert [(name, m.training) for name, m in result.named_modules()] == flags


def test_nodes_keep_their_names() -> None:
    class Net(nn.Module):
        def forward(self, input: Tensor, max: Tensor) -> Tensor:
            return input * max + input * max

    args = (images(), images())
    given = torch.export.export(Net(), args, strict=False).module()
    assert isinstance(given, fx.GraphModule)
    next(iter(given.graph.nodes)).name = "input"  # as fx would not name it, and torch.export does
    given.recompile()
    editor = GraphEditor(given)
    assert [n.name for n in editor.graph_module.graph.nodes] == [n.name for n in given.graph.nodes]
    editor.sweep()
    result = editor.finish()
    assert result.code == given.code
    torch.testing.assert_close(result(*args), Net()(*args))


def test_structured_inputs_and_outputs_survive() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = conv(), norm()

        def forward(self, pair: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"y": self.bn(self.conv(pair["a"])), "z": pair["b"]}

    pair = {"a": images(), "b": torch.ones(2)}
    given = torch.export.export(Net().eval(), (pair,), strict=False).module()
    assert isinstance(given, fx.GraphModule)
    reference = given(pair)
    editor = GraphEditor(given)
    graph = editor.graph_module.graph
    bn = find(graph, "batch_norm")
    fold(editor, find(graph, "conv"), bn, "bn", "conv.weight", bn)
    editor.sweep()
    found = editor.finish()(pair)
    assert list(found) == ["y", "z"]
    torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-12)


def test_inputs_of_an_exported_module_are_still_checked() -> None:
    result = fold_plain(GraphEditor(exported(Plain())))
    with pytest.raises((AssertionError, RuntimeError)):
        result(torch.zeros(2, CHANNELS + 1, 5, CHANNELS).double())
    with pytest.raises(NotImplementedError):
        result.train()


def through_pickle(model: fx.GraphModule) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: fx.GraphModule) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_export(model: fx.GraphModule) -> Any:
    return torch.export.export(model, (images(),), strict=False).module()


@pytest.mark.parametrize("way", [through_pickle, through_torch_save, copy.deepcopy, through_export])
def test_the_result_can_be_stored_copied_and_exported(way: Callable[..., Any]) -> None:
    given = traced(Plain(bias=False))
    reference = given(images()).detach()
    result = fold_plain(GraphEditor(given))
    again = way(result)
    assert_alike(again, reference, images())
    assert set(again.state_dict()) == set(result.state_dict())


def test_a_state_dict_goes_into_the_result_and_into_nothing_else() -> None:
    given = traced(nn.Sequential(nn.LSTM(CHANNELS, CHANNELS, bidirectional=True)))
    x = torch.randn(3, 2, CHANNELS)
    reference = [t.detach() for t in (given(x)[0], given(x)[1][0])]
    result = GraphEditor(given).finish()
    torch.testing.assert_close(result(x)[0], reference[0], rtol=0, atol=0)
    result.load_state_dict({n: torch.zeros_like(t) for n, t in result.state_dict().items()})
    assert not result(x)[0].any()
    torch.testing.assert_close(given(x)[0], reference[0], rtol=0, atol=0)
    result.half()
    assert {p.dtype for p in given.parameters()} == {torch.float32}


def test_nested_graph_modules_are_copied_too() -> None:
    inner = traced(Plain())
    given = traced(nn.Sequential(nn.Identity()))
    given.add_submodule("0", inner)
    result = GraphEditor(given).finish()
    copied = result.get_submodule("0")
    assert isinstance(copied, fx.GraphModule)
    assert copied is not inner and copied.graph is not inner.graph
    assert_alike(result, inner(images()).detach(), images())


def test_an_old_style_weight_norm_is_copied() -> None:
    with pytest.warns(FutureWarning):
        normed = torch.nn.utils.weight_norm(conv())  # its weight is no leaf
    model = nn.Sequential(normed, nn.ReLU())
    model(images())
    given = traced(model)
    result = GraphEditor(given).finish()
    assert_alike(result, given(images()).detach(), images())
    assert not {id(p) for p in given.parameters()} & {id(p) for p in result.parameters()}


def test_a_parametrized_weight_is_not_held_under_its_own_name() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(conv()), nn.ReLU())
    editor = GraphEditor(traced(model))
    assert "0.weight" not in editor.tensors
    assert "0.bias" in editor.tensors
    assert_alike(editor.finish(), model(images()).detach(), images())
