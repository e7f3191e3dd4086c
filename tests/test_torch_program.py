"""An ExportedProgram stays one, and stays right, whatever is edited in it.

The edits are made by hand, in float64: what folds a BatchNorm is not under test here.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind

from bnfold.errors import UsageError
from bnfold.torch_bodies import bodies
from bnfold.torch_program import ProgramEditor, rewrite_constants

pytestmark = [
    # torch copies its own tree specs in a way that it deprecates,
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\):FutureWarning"),
    # and unflatten reads attributes before it sets them.
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]

aten = torch.ops.aten
NORMS = (aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)
CONVS = (aten.conv2d.default, aten.convolution.default)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            assert tensor is not None
            tensor.copy_(torch.randn(channels))
        norm.weight[0], norm.weight[-1] = -1e-3, 0.0
        assert norm.running_var is not None
        norm.running_var.copy_(torch.rand(channels) + 0.1)
    return norm


class Block(nn.Module):
    """A Conv without a bias, and a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = batch_norm(4)

    def forward(self, x: Tensor) -> Tensor:
        normal: Tensor = self.bn(self.conv(x))
        return normal


class Net(nn.Module):
    """Blocks around a Relu, with a constant and buffers of both kinds."""

    kept: Tensor
    unkept: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.conv = nn.Conv2d(4, 4, 1)
        self.bn = batch_norm(4)
        self.constant = torch.randn(4, 1, 1, dtype=torch.float64)
        self.register_buffer("kept", torch.randn(4, 1, 1))
        self.register_buffer("unkept", torch.randn(4, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.block(x)) * self.kept + self.unkept
        normal: Tensor = self.bn(self.conv(x))
        return normal + self.constant


class Branches(nn.Module):
    """A block in a branch of a cond, the other branch without; a cond in it where it is deep."""

    def __init__(self, deep: bool) -> None:
        super().__init__()
        self.block, self.other, self.deep = Block(), nn.Conv2d(3, 4, 3), deep

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            normal: Tensor = self.block(x)
            return normal.sin().mean((2, 3))

        def plain(x: Tensor) -> Tensor:
            normal: Tensor = self.other(x)
            return normal.mean((2, 3))

        def outer(x: Tensor) -> Tensor:
            return chosen(x.mean() > -9, inner, plain, x)

        return chosen(x.sum() > 0, outer if self.deep else inner, plain, x)


Branch = Callable[[Tensor], Any]


def chosen(which: Tensor, one: Branch, other: Branch, x: Tensor) -> Tensor:
    result: Tensor = torch.cond(which, one, other, (x,))
    return result


class Wrapped(nn.Module):
    """A block in the body of ``no_grad`` or of ``autocast``."""

    def __init__(self, context: str) -> None:
        super().__init__()
        self.block, self.context = Block(), context

    def forward(self, x: Tensor) -> Tensor:
        off = torch.autocast("cpu", enabled=False)
        with torch.no_grad() if self.context == "no_grad" else off:
            y: Tensor = self.block(x)
        return y.cos()


Nets = Callable[[], nn.Module]


@cache
def dynamic(net: Nets) -> ExportedProgram:
    batch = ({0: Dim("batch", min=2)},)
    return export(net().double().eval(), (image(),), dynamic_shapes=batch)


@cache
def decomposed(net: Nets) -> ExportedProgram:
    program: ExportedProgram = dynamic(net).run_decompositions()
    return program


@cache
def loaded(net: Nets) -> ExportedProgram:
    return saved_and_loaded(dynamic(net))


def exported(net: nn.Module, *inputs: Tensor) -> ExportedProgram:
    return export(net.double().eval(), inputs)


def saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    back: ExportedProgram = torch.export.load(file)
    return back


EXPORTS = (dynamic, decomposed, loaded)
Export = Callable[[Nets], ExportedProgram]


SHALLOW, DEEP = partial(Branches, False), partial(Branches, True)


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 6, 6, dtype=torch.float64)


def all_nodes(module: fx.GraphModule) -> list[fx.Node]:
    nodes = list(module.graph.nodes)
    return nodes + [inner for n in nodes for body in bodies(n) for inner in all_nodes(body)]


def held_name(editor: ProgramEditor, node: Any) -> str:
    """The tensor that ``node`` is, in a body by the place that its operand has."""
    if node in editor.held:
        return editor.held[node]
    source = editor._nest.source(node)
    assert source is not None
    return editor.held[source]


def fold(editor: ProgramEditor, norm: fx.Node) -> None:
    """``bn(conv(x))`` as ``conv'(x)``, by the textbook."""
    conv = norm.args[0]
    assert isinstance(conv, fx.Node) and conv.target in CONVS
    gamma, beta, mean, var = (editor.tensors[held_name(editor, n)] for n in norm.args[1:5])
    scale = gamma.detach() / torch.sqrt(var + 1e-5)
    name = held_name(editor, conv.args[1])
    weight = editor.tensors[name].detach()
    bias = conv.args[2] if len(conv.args) > 2 else None
    old = torch.zeros(()) if bias is None else editor.tensors[held_name(editor, bias)].detach()
    new = (old - mean) * scale + beta.detach()
    editor.write(name, weight * scale.reshape(-1, 1, 1, 1))
    if bias is None:
        at = editor.add(name.removesuffix("weight") + "bias", new, like=name)
        editor.set_argument(conv, "bias", at)
    else:
        editor.write(held_name(editor, bias), new)
    users = [user for user in norm.users if "native" in str(norm.target)]
    editor.bypass(users[0] if users else norm, conv)


def folded(program: ExportedProgram) -> ExportedProgram:
    editor = ProgramEditor(program)
    for node in all_nodes(editor.graph_module):
        if node.target in NORMS and node.all_input_nodes[0].target in CONVS:
            fold(editor, node)
    editor.sweep()
    return editor.finish()


def norms(program: ExportedProgram) -> int:
    return sum(node.target in NORMS for node in all_nodes(program.graph_module))


def outputs(program: ExportedProgram, *inputs: Tensor) -> list[Tensor]:
    result = program.module()(*inputs)
    return list(result) if isinstance(result, list | tuple) else [result]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        if not other.is_floating_point():
            assert torch.equal(one, other)
        else:
            assert torch.dist(one, other) <= 1e-12 * torch.linalg.vector_norm(other)


def assert_valid(program: ExportedProgram, *inputs: Tensor) -> None:
    """It is what torch asks of a program, and computes one thing in all its forms."""
    program.validate()  # type: ignore[no-untyped-call]
    expected = outputs(program, *inputs)
    assert_close(outputs(saved_and_loaded(program), *inputs), expected)
    assert_close(outputs(program.run_decompositions(), *inputs), expected)
    unflattened = torch.export.unflatten(program)(*inputs)
    assert_close(list(unflattened) if isinstance(unflattened, tuple) else [unflattened], expected)


def snapshot(program: ExportedProgram) -> tuple[str, dict[str, Tensor], str]:
    tensors = {**program.state_dict, **program.constants}
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    return str(program), copies, str(program.module_call_graph)


def assert_unchanged(program: ExportedProgram, before: tuple[str, dict[str, Tensor], str]) -> None:
    text, tensors, calls = snapshot(program)
    assert (text, calls) == (before[0], before[2])
    assert tensors.keys() == before[1].keys()
    assert all(torch.equal(tensors[name], before[1][name]) for name in tensors)


# ---- a fold ----


@pytest.mark.parametrize("made", EXPORTS, ids=lambda each: each.__name__)
def test_a_fold_by_hand_gives_a_valid_program_with_the_same_outputs(made: Export) -> None:
    program = made(Net)
    before = snapshot(program)
    result = folded(program)
    assert (norms(program), norms(result)) == (2, 0)
    for x in (image(2), image(5)):
        assert_close(outputs(result, x), outputs(program, x))
    assert_valid(result, image(5))
    assert result.example_inputs == program.example_inputs
    assert result.dialect == program.dialect
    assert result.range_constraints == program.range_constraints
    assert_unchanged(program, before)


def test_the_state_names_what_is_left_in_the_order_of_the_model() -> None:
    result = folded(dynamic(Net))
    state = ["block.conv.weight", "block.conv.bias", "conv.weight", "conv.bias", "kept"]
    assert list(result.state_dict) == state
    assert set(result.constants) == {"constant", "unkept"}
    assert [spec.arg.name for spec in result.graph_signature.input_specs] == [
        "p_block_conv_weight", "p_block_conv_bias", "p_conv_weight", "p_conv_bias", "b_kept",
        "b_unkept", "c_constant", "x",
    ]  # fmt: skip
    assert all(isinstance(result.state_dict[name], nn.Parameter) for name in state[:4])


def test_tensors_that_are_not_written_are_shared_with_the_given_program() -> None:
    program = dynamic(Net)
    result = folded(program)
    assert result.state_dict["kept"] is program.state_dict["kept"]
    assert result.constants["constant"] is program.constants["constant"]
    assert result.state_dict["conv.weight"] is not program.state_dict["conv.weight"]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_parameter_keeps_whether_it_is_trained_and_its_bias_follows(frozen: bool) -> None:
    net = Block()
    net.conv.weight.requires_grad_(not frozen)
    result = folded(exported(net, image()))
    trained = {name: tensor.requires_grad for name, tensor in result.named_parameters()}
    assert trained == {"conv.weight": not frozen, "conv.bias": not frozen}


def test_a_program_that_was_loaded_keeps_its_guards() -> None:
    program = saved_and_loaded(dynamic(Block))
    program._guards_code = ["L['x'].size()[0] <= 3"]
    assert folded(program)._guards_code == program._guards_code


# ---- names ----


class Awkward(nn.Module):
    """Names that fx would change, and a name that is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv = Block().conv
        self.bn = batch_norm(4)
        self.Conv.bias_1 = nn.Buffer(torch.ones(4))
        self.Conv.add_module("bias_2", nn.Identity())

    def forward(self, input: Tensor, max: Tensor) -> tuple[Tensor, Tensor]:
        normal: Tensor = self.bn(self.Conv(input))
        shift = self.Conv.get_buffer("bias_1")
        return normal + shift.reshape(-1, 1, 1), max


def test_names_of_placeholders_stay_and_new_ones_are_those_of_torch() -> None:
    program = exported(Awkward(), image(), image())
    result = folded(program)
    names = [spec.arg.name for spec in result.graph_signature.input_specs]
    assert names == ["p_conv_weight", "p_conv_bias", "b_conv_bias_1", "input", "max"]
    x = image(), image()
    assert_close(outputs(result, *x), outputs(program, *x))
    assert_valid(result, *x)


@pytest.mark.parametrize(
    ("asked", "got"),
    [("Conv.bias", "Conv.bias"), ("Conv.bias_1", "Conv.bias_1_1"), ("Conv.weight", "Conv.weight_1"),
     ("Conv", "Conv_1"), ("forward", "forward_1")],
)  # fmt: skip
def test_a_name_that_is_taken_gets_a_number(asked: str, got: str) -> None:
    editor = ProgramEditor(exported(Awkward(), image(), image()))
    assert editor.add(asked, torch.zeros(4), like="Conv.weight") == got
    assert got in editor.tensors and got in editor.held.values()


@pytest.mark.parametrize("like", ["block.conv.weight", "kept", "unkept", "constant"])
def test_a_new_tensor_is_of_the_kind_of_the_one_beside_it(like: str) -> None:
    program = dynamic(Net)
    editor = ProgramEditor(program)
    step = next(n for n in editor.graph_module.graph.nodes if n.target is aten.mul.Tensor)
    value = torch.randn(4, 1, 1, dtype=torch.float64)
    editor.set_argument(step, "other", editor.add("new", value, like=like))
    result = editor.finish()
    specs = {spec.target: spec for spec in result.graph_signature.input_specs}
    assert specs["new"].kind is specs[like].kind
    assert specs["new"].persistent is specs[like].persistent
    assert ("new" in result.state_dict) is (like in result.state_dict)
    assert ("new" in result.constants) is (like in result.constants)
    kinds = [spec.kind for spec in result.graph_signature.input_specs]
    order = [InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR, InputKind.USER_INPUT]
    assert kinds == sorted(kinds, key=order.index)
    x = image()
    assert_close(outputs(result, x), outputs(rewrite_constants(program, {"kept": value}), x))


# ---- bodies of higher-order operators ----


@pytest.mark.parametrize(
    ("made", "net"),
    [(decomposed, SHALLOW), (dynamic, DEEP)],
    ids=["decomposed", "deep"],
)
def test_a_fold_in_a_branch_reaches_it_through_all_its_operands(made: Export, net: Nets) -> None:
    program = made(net)
    before = snapshot(program)
    result = folded(program)
    assert (norms(program), norms(result)) == (1, 0)
    for sign in (1.0, -1.0):
        x = sign * image().abs()
        assert_close(outputs(result, x), outputs(program, x))
    assert_valid(result, image().abs())
    assert_unchanged(program, before)
    # Four statistics and weights less, the bias is new; the counter was no operand.
    assert set(result.state_dict) == {
        "block.conv.weight", "block.conv.bias", "other.weight", "other.bias"
    }  # fmt: skip


@pytest.mark.parametrize("context", ["no_grad", "autocast"])
def test_a_fold_in_a_wrapped_body_is_a_valid_program(context: str) -> None:
    program = dynamic(partial(Wrapped, context))
    assert any(bodies(node) for node in program.graph.nodes)
    result = folded(program)
    assert norms(result) == 0
    x = image(3)
    assert_close(outputs(result, x), outputs(program, x))
    assert_valid(result, x)


def test_a_tensor_that_a_body_has_already_is_not_handed_to_it_again() -> None:
    editor = ProgramEditor(dynamic(DEEP))
    convs = [node for node in all_nodes(editor.graph_module) if node.target in CONVS]
    inputs = [len(node.graph.find_nodes(op="placeholder")) for node in convs]
    for conv in convs:
        editor.set_argument(conv, "weight", "other.weight")
    assert [len(node.graph.find_nodes(op="placeholder")) for node in convs] == inputs
    editor.write("other.weight", torch.randn(7, 3, 3, 3))
    stated = [node.all_input_nodes[1].meta["val"] for node in convs]
    assert {(value.dtype, value.shape[0]) for value in stated} == {(torch.float32, 7)}


class Identities(nn.Module):
    """A branch whose steps do nothing: without them its outputs are its input."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        def steps(x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 1.0, x * 1.0

        def others(x: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, x + 2

        return tuple(chosen(x.sum() > 0, steps, others, x))


def test_a_branch_whose_outputs_would_be_its_input_gives_copies_of_it() -> None:
    program = dynamic(Identities)
    editor = ProgramEditor(program)
    for node in all_nodes(editor.graph_module):
        if node.target is aten.mul.Tensor:
            editor.bypass(node, node.all_input_nodes[0])
    editor.sweep()
    result = editor.finish()
    for x in (image().abs(), -image().abs()):
        assert_close(outputs(result, x), outputs(program, x))
        assert_valid(result, x)


# ---- outputs and signatures ----


class Outputs(nn.Module):
    """Steps that do nothing, at all outputs."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x.sin()
        return x * 1.0, y * 1.0, y, x.relu()


@pytest.mark.parametrize("made", [dynamic, decomposed], ids=lambda each: each.__name__)
def test_outputs_may_become_one_node_or_an_input(made: Export) -> None:
    program = made(Outputs)
    editor = ProgramEditor(program)
    for node in all_nodes(editor.graph_module):
        if node.target is aten.mul.Tensor:
            editor.bypass(node, node.all_input_nodes[0])
    editor.sweep()
    result = editor.finish()
    assert len(list(result.graph.nodes)) == len(list(program.graph.nodes)) - 2
    names = [spec.arg.name for spec in result.graph_signature.output_specs]
    assert names == ["x", "sin", "sin", "relu"]
    x = image()
    assert_close(outputs(result, x), outputs(program, x))
    assert_valid(result, x)


class Updating(nn.Module):
    """Buffers and an input that change, and outputs that are what they were before."""

    state: Tensor
    zeros: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.randn(2, 3, 6, 6))
        self.register_buffer("zeros", torch.zeros(2, 3, 6, 6))
        self.block, self.trained = Block(), batch_norm(3)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        old, given = self.state.mul(1.0), y.mul(1.0)
        x = x - self.zeros
        self.zeros.copy_(torch.zeros_like(x))
        self.state.add_(x)
        y.add_(1)
        return old, given, self.block(self.trained(x))


@pytest.mark.parametrize("functional", [False, True])
def test_mutations_stay_and_what_was_read_before_them_is_not_changed(functional: bool) -> None:
    net = Updating().double().eval()
    net.trained.train()
    program = export(net, (image(), image()))
    program = program.run_decompositions() if functional else program
    editor = ProgramEditor(program)
    for node in all_nodes(editor.graph_module):
        if node.target in NORMS and node.all_input_nodes[0].target in CONVS:
            fold(editor, node)
        elif functional and node.target in (aten.mul.Tensor, aten.sub.Tensor):
            editor.bypass(node, node.all_input_nodes[0])
    editor.sweep()
    result = editor.finish()
    assert sum("mul" in node.name for node in result.graph.nodes) == (0 if functional else 2)
    assert {s.target for s in result.graph_signature.output_specs} == {
        s.target for s in program.graph_signature.output_specs
    }
    assert "trained.num_batches_tracked" in result.state_dict
    runs = []
    # A module changes the tensors of the program that it was made of: each has its own.
    copies = [saved_and_loaded(each) for each in (program, result, result.run_decompositions())]
    for each in copies:
        torch.manual_seed(7)
        x, y, module = image(), image(), each.module()
        made = [*module(x, y), *module(x, y), y]
        runs.append(made + [buffer for name, buffer in sorted(module.named_buffers())
                            if name in result.state_dict])  # fmt: skip
    for run in runs[1:]:
        assert_close(run, runs[0])


class Nested(nn.Module):
    """Blocks whose calls can be kept, the second of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.bn = Block(), Block(), batch_norm(4)
        self.second.conv = nn.Conv2d(4, 4, 1)
        self.second.bn = batch_norm(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.second(torch.relu(self.bn(self.first(x))))
        return y, self.second(y.sin())


@pytest.mark.parametrize(
    "kept",
    [("first.bn", "second"), ("first", "first.conv", "first.bn", "bn"), ("second", "second.bn")],
    ids="+".join,
)
def test_calls_of_modules_that_are_kept_can_be_unflattened(kept: tuple[str, ...]) -> None:
    net = Nested().double().eval()
    program = export(net, (image(),), preserve_module_call_signature=kept)
    editor = ProgramEditor(program)
    for node in all_nodes(editor.graph_module):
        if node.target in NORMS and "first" in str(node.args[1]):
            fold(editor, node)
    step = next(n for n in editor.graph_module.graph.nodes if "p_bn_weight" in map(str, n.args))
    editor.bypass(step, step.args[0])  # as if it did nothing
    last = [n for n in editor.graph_module.graph.nodes if n.target in NORMS][-1]
    editor.bypass(last, last.args[0])
    editor.sweep()
    result = editor.finish()
    assert_valid(result, image())
    calls = {entry.fqn for entry in result.module_call_graph if entry.signature is not None}
    assert ("first" in calls) is ("first" in kept)
    assert "bn" not in calls


# ---- what is swept ----


class Leftovers(nn.Module):
    """A dead node and an unread parameter from the start; a normalisation under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.unread = Block(), nn.Parameter(torch.randn(3))
        self.again = self.block.bn

    def forward(self, x: Tensor) -> Tensor:
        x.cos()
        step = torch.tensor([1.0, 2.0], dtype=torch.float64)
        normal: Tensor = self.block(x)
        return normal * step[0]


def test_what_had_no_reader_from_the_start_stays() -> None:
    program = dynamic(Leftovers)
    editor = ProgramEditor(program)
    editor.sweep()
    result = editor.finish()
    assert str(result.graph) == str(program.graph)
    assert list(result.state_dict) == list(program.state_dict)


def test_of_a_normalisation_that_is_gone_nothing_stays_under_any_name() -> None:
    program = dynamic(Leftovers)
    assert {"block.bn.running_mean", "again.num_batches_tracked"} <= program.state_dict.keys()
    result = folded(program)
    assert set(result.state_dict) == {"block.conv.weight", "block.conv.bias", "unread"}
    assert_valid(result, image())


def test_a_constant_made_in_the_forward_goes_with_its_last_reader() -> None:
    program = dynamic(Leftovers)
    editor = ProgramEditor(program)
    step = next(n for n in editor.graph_module.graph.nodes if n.target is aten.mul.Tensor)
    editor.bypass(step, step.args[0])
    editor.sweep()
    result = editor.finish()
    assert not result.constants
    assert next(n.name for n in result.graph.nodes if n.op == "call_function") == "cos"
    assert_valid(result, image())


class Effects(nn.Module):
    """Nodes with effects that nobody reads once the step at the output is gone."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.bn = batch_norm(3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        torch._check(x.sum().item() < 1e9)  # type: ignore[no-untyped-call]
        normal: Tensor = self.bn(x)
        return x + normal.mean().mul(0.0) * self.count.add_(1)


def test_nodes_with_effects_are_never_swept() -> None:
    net = Effects().double()
    program = export(net, (image(),))
    editor = ProgramEditor(program)
    for node in editor.graph_module.graph.nodes:
        if node.target is aten.add.Tensor and node.args[0].name == "x":
            editor.bypass(node, node.args[0])
    editor.sweep()
    result = editor.finish()
    left = {str(node.target) for node in result.graph.nodes}
    assert {"aten.batch_norm.default", "aten.add_.Tensor"} <= left
    assert any("assert" in target for target in left)
    assert "aten.mean.default" not in left
    assert set(result.state_dict) == set(program.state_dict)


# ---- rewriting ----


@pytest.mark.parametrize("made", [dynamic, decomposed], ids=lambda each: each.__name__)
def test_rewritten_constants_are_those_of_the_program(made: Export) -> None:
    program = made(Net)
    before = snapshot(program)
    old = {**program.state_dict, **program.constants}
    values = {name: torch.rand_like(old[name]) + 0.5 for name in old if "num_batch" not in name}
    result = rewrite_constants(program, values)
    new = {**result.state_dict, **result.constants}
    assert list(new) == list(old)
    for name, tensor in new.items():
        assert torch.equal(tensor, values.get(name, old[name]))
        assert isinstance(tensor, nn.Parameter) is isinstance(old[name], nn.Parameter)
        assert tensor.requires_grad == old[name].requires_grad
    net, x = Net().double().eval(), image()
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            tensor.copy_(new[name])
        net.constant.copy_(new["constant"])
    assert_close(outputs(result, x), [net(x)])
    assert_valid(result, x)
    assert_unchanged(program, before)


@pytest.mark.parametrize("made", [dynamic, decomposed], ids=lambda each: each.__name__)
def test_other_shapes_and_types_are_stated_throughout_the_program(made: Export) -> None:
    program = made(SHALLOW)
    names = [name for name in program.state_dict if "num_batches" not in name]
    values = {
        name: torch.randn(7, *program.state_dict[name].shape[1:], dtype=torch.float64).abs()
        for name in names
    }
    result = rewrite_constants(program, values)
    (found,) = outputs(result, image())
    assert found.shape[1] == 7
    inner = [node for node in all_nodes(result.graph_module) if node.target in CONVS]
    assert [node.meta["val"].shape[1] for node in inner] == [7, 7]
    output = result.graph.output_node().args[0][0]
    assert output.meta["val"].shape[1:] == found.shape[1:]
    assert_valid(result, image().abs())


class Tied(nn.Module):
    """Two names of one weight, and a second tensor of equal numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.own = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.own.load_state_dict(self.one.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        twice: Tensor = self.two(self.one(x))
        return twice.add(self.own(x))


def linear_input() -> Tensor:
    return torch.randn(2, 3, dtype=torch.float64)


@pytest.mark.parametrize("name", ["one.weight", "two.weight"])
def test_tied_weights_take_the_value_given_for_either_name(name: str) -> None:
    program = exported(Tied(), linear_input())
    value = torch.randn(3, 3, dtype=torch.float64)
    result = rewrite_constants(program, {name: value})
    state = result.state_dict
    assert state["one.weight"] is state["two.weight"] and torch.equal(state[name], value)
    assert not torch.equal(state["own.weight"], value)
    net = Tied().double()
    net.load_state_dict(state)
    x = linear_input()
    assert_close(outputs(result, x), [net(x)])
    assert_valid(result, x)


def test_a_write_keeps_a_tie_to_names_that_nothing_reads() -> None:
    program = exported(Tied(), linear_input())
    editor = ProgramEditor(program)
    read = {n.args[1] for n in editor.graph_module.graph.nodes if n.target is aten.linear.default}
    name, other = sorted(
        ("one.weight", "two.weight"), key=lambda each: each not in map(editor.held.get, read)
    )
    value = torch.randn(3, 3, dtype=torch.float64)
    editor.write(name, value)
    result = editor.finish()
    assert torch.equal(result.state_dict[name], value)
    assert torch.equal(result.state_dict[other], value)
    assert_valid(result, linear_input())


def of_all(value: Any, *names: str) -> dict[str, Any]:
    return dict.fromkeys(names, value)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (of_all(torch.zeros(3), "own.bais"), "'own.bais'.*did you mean own.bias"),
        (of_all(torch.zeros(3), "zzz"), "'zzz'.*see state_dict and constants"),
        (of_all(1.0, "own.bias"), "'own.bias'.*a float was given"),
        (of_all(torch.zeros(4), "own.bias"), "shapes or types do not fit"),
        (
            {"one.weight": torch.zeros(3, 3), "two.weight": torch.ones(3, 3)},
            "one.weight and two.weight are one tensor",
        ),
    ],
    ids=["misspelt", "unknown", "no tensor", "shape", "tied"],
)
def test_what_cannot_be_rewritten_is_refused(values: dict[str, Any], text: str) -> None:
    program = exported(Tied(), linear_input())
    before = snapshot(program)
    with pytest.raises(UsageError, match=text):
        rewrite_constants(program, values)
    assert_unchanged(program, before)
