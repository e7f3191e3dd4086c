"""Shapes that operations prove, judged by real runs: what is claimed has to be true in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from bnfold.torch_constants import Constants
from bnfold.torch_shapes import known_shapes
from bnfold.torch_sizes import Symbols, Window, added, product, quotient
from bnfold.torch_walk import walk

Pattern = tuple[int | str, ...] | None


class Net(nn.Module):
    """A function of its layers and inputs; ``forward`` takes as many as ``arity`` says."""

    def __init__(self, run: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Any:
        return self.run(*self.layers, x)


class Two(Net):
    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self.run(*self.layers, x, y)


def traced(net: nn.Module) -> fx.GraphModule:
    return fx.symbolic_trace(net.eval())


def claims(graph_module: fx.GraphModule) -> Mapping[fx.Node, tuple[Any, ...]]:
    tensors = dict(graph_module.named_parameters()) | dict(graph_module.named_buffers())
    nodes = graph_module.graph.find_nodes(op="get_attr")
    held = {node: str(node.target) for node in nodes if str(node.target) in tensors}
    walked = walk(graph_module, held)
    return known_shapes(walked, Constants(walked, held, tensors))


class Recorder(fx.Interpreter):
    """The shape of every tensor that a run makes."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if isinstance(made, Tensor):
            self.shapes[n] = tuple(made.shape)
        return made


def untrue(claimed: Mapping[fx.Node, tuple[Any, ...]], real: Mapping[Any, Any]) -> list[str]:
    """The claims that one run shows to be wrong."""
    wrong, meaning = [], dict[str, int]()
    pairs = [(n.name, s, real[n]) for n, s in claimed.items() if n in real]
    for name, shape, sizes in pairs:
        if len(shape) != len(sizes):
            wrong.append(f"{name}: {shape} is {sizes}")
            continue
        for dim, size in zip(shape, sizes, strict=True):
            if dim is None or isinstance(dim, int):
                right = dim is None or dim == size
            else:
                right = meaning.setdefault(dim, size) == size
            if not right:
                wrong.append(f"{name}: {shape} is {sizes}")
    products = [dim for dim in meaning if "*" in dim]
    for dim in products:
        factors = [int(f) if f.isdigit() else meaning.get(f) for f in dim.split("*")]
        if None not in factors and product(factors) != meaning[dim]:
            wrong.append(f"{dim} = {meaning[dim]}")
    return wrong


def judged(net: nn.Module, runs: list[tuple[tuple[int, ...], ...]]) -> fx.GraphModule:
    """Trace ``net``, and run it on inputs of all these shapes."""
    graph_module = traced(net)
    claimed = claims(graph_module)
    for shapes in runs:
        recorder = Recorder(graph_module)
        with torch.no_grad():
            recorder.run(*(torch.randn(shape) for shape in shapes))
        assert untrue(claimed, recorder.shapes) == []
        assert all(node in recorder.shapes for node in claimed if node.op != "placeholder")
    return graph_module


def matches(shape: tuple[Any, ...] | None, pattern: Pattern, names: dict[str, Any]) -> bool:
    """Whether a shape is as expected: a letter is a symbol, one and the same throughout."""
    if shape is None or pattern is None:
        return shape is None and pattern is None
    if len(shape) != len(pattern):
        return False
    for dim, want in zip(shape, pattern, strict=True):
        if isinstance(want, int) and dim != want:
            return False
        named = isinstance(want, str) and want != "?"
        if named and (not isinstance(dim, str) or names.setdefault(str(want), dim) != dim):
            return False
    return len(set(names.values())) == len(names)


@dataclass(frozen=True, slots=True)
class Row:
    """A net, shapes to run it on, what has to be known of its first input and its output."""

    net: nn.Module
    runs: list[Any]
    given: Pattern
    made: Pattern


IMAGES = [((2, 4, 8, 8),), ((1, 4, 11, 6),), ((3, 4, 7, 16),)]
EVEN = [((2, 4, 8, 8),), ((1, 4, 12, 16),)]
SEQUENCES = [((2, 5, 6),), ((3, 1, 6),)]
IMAGE: Pattern = ("n", 4, "h", "w")


def conv(*args: Any, **kwargs: Any) -> nn.Module:
    return nn.Conv2d(*args, **kwargs)


def same_conv(out: int = 6) -> nn.Module:
    return nn.Conv2d(4, out, 3, padding=1)


def channel_shuffle(c: nn.Module, x: Tensor) -> Any:
    x = c(x)
    b, channels, h, w = x.shape
    x = x.view(b, 2, channels // 2, h, w).transpose(1, 2).contiguous()
    return x.view(b, -1, h, w)


def squeeze_excite(c: nn.Module, down: nn.Module, up: nn.Module, x: Tensor) -> Any:
    x = c(x)
    gate = x.mean([2, 3], keepdim=True)
    return x * torch.sigmoid(up(functional.relu(down(gate))))


def old_squeeze_excite(c: nn.Module, fc: nn.Module, x: Tensor) -> Any:
    x = c(x)
    b, channels, _, _ = x.size()
    gate = fc(functional.adaptive_avg_pool2d(x, 1).view(b, channels)).view(b, channels, 1, 1)
    return x * gate.expand_as(x)


def unet(down: nn.Module, inner: nn.Module, up: nn.Module, out: nn.Module, x: Tensor) -> Any:
    skip = functional.relu(down(x))
    deep = up(inner(functional.max_pool2d(skip, 2)))
    return out(torch.cat([skip, deep], 1))


def attention(c: nn.Module, qkv: nn.Module, proj: nn.Module, x: Tensor) -> Any:
    x = c(x).flatten(2).transpose(1, 2)
    b, n, width = x.shape
    q, k, v = qkv(x).reshape(b, n, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
    weights = ((q * (width // 2) ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
    return proj((weights @ v).transpose(1, 2).reshape(b, n, width))


def fused_attention(qkv: nn.Module, norm: nn.Module, x: Tensor) -> Any:
    q, k, v = qkv(norm(x).permute(0, 2, 1).permute(0, 2, 1)).chunk(3, dim=-1)
    return functional.scaled_dot_product_attention(q, k, v)


def split_channels(c: nn.Module, x: Tensor) -> Any:
    a, b, rest = c(x).split([1, 2, 3], 1)
    return torch.cat((a, b * 2, functional.hardswish(rest)[:, :1]), dim=1)


def chunked(c: nn.Module, x: Tensor) -> Any:
    a, b = torch.chunk(c(x), 2, 1)
    return torch.stack([a, b], dim=1)


def patches(c: nn.Module, x: Tensor) -> Any:
    b, channels, h, w = c(x).shape
    return c(x).view(b, channels, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)


def space_to_depth(c: nn.Module, x: Tensor) -> Any:
    x = c(x)
    return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2]], 1)


def resized(c: nn.Module, x: Tensor) -> Any:
    return c(x) + functional.interpolate(functional.avg_pool2d(c(x), 3, 2, 1), size=c(x).shape[-2:])


def by_list(c: nn.Module, x: Tensor) -> Any:
    x = c(x)
    return x.view(x.shape[:1] + (2, -1) + x.shape[2:])  # noqa: RUF005 - a trace can't unpack


def global_pool(c: nn.Module, x: Tensor) -> Any:
    x = c(x)
    return functional.avg_pool2d(x, x.size()[2:]).squeeze(-1).squeeze(-1)


def residual(one: nn.Module, two: nn.Module, x: Tensor) -> Any:
    return functional.relu_(two(functional.gelu(one(x))).add_(x))


def masked(c: nn.Module, x: Tensor) -> Any:
    x = c(x)
    best, where = x.max(dim=1)
    return torch.where(x > 0, x, best.unsqueeze(1)) + where[:, None].float()


def gathered(c: nn.Module, x: Tensor) -> Any:
    return torch.einsum("nchw,nkhw->nck", c(x), c(x)).topk(2, -1).values


def graph_conv(c: nn.Module, x: Tensor) -> Any:
    n, channels, h, w = c(x).size()
    flat = c(x).view(n, channels, h * w)
    return torch.bmm(flat, flat.transpose(1, 2)).unsqueeze(-1).repeat(1, 1, 1, 5)


def expanded(c: nn.Module, x: Tensor) -> Any:
    pooled = functional.adaptive_max_pool2d(c(x), (1, None))  # type: ignore[arg-type]
    return pooled.expand(-1, -1, 3, -1)


def of_constants(c: nn.Module, x: Tensor) -> Any:
    return c(x) * torch.arange(6).view(1, -1, 1, 1)


def shrinking(c: nn.Module, x: Tensor) -> Any:
    x = c(x)
    return x.narrow(1, 1, 3)[:, -2:, x.shape[2] - 4 :, 0]


def windows(c: nn.Module, x: Tensor) -> Any:
    x = c(x)
    rows = functional.unfold(x, 3, padding=1).view(-1, 6, 9, x.size(2), x.size(3))
    return rows.sum(2) + x.unfold(1, 2, 2)[..., 0].repeat_interleave(2, 1)


def positions(c: nn.Module, x: Tensor) -> Any:
    x = functional.normalize(c(x), dim=1, out=None)
    return x + torch.arange(x.size(3))[None, None, None]


def heads(norm: nn.Module, layer: nn.Module, x: Tensor) -> Any:
    x = norm(x.permute(1, 0, 2))
    return layer(x, x, x, need_weights=False)[0] + x


def norms(norm: nn.Module, group: nn.Module, c: nn.Module, x: Tensor) -> Any:
    x = group(c(x))
    return norm(x.permute(0, 2, 3, 1))


class Table(nn.Module):
    """A parameter whose shape takes part in sums, and a batch of rank 3 after an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 6)
        self.places = nn.Parameter(torch.randn(1, 5, 6))
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.words((x.abs() > 0.5).long().flatten(1))
        made: Tensor = self.norm(tokens + self.places).mean(1)
        return made


KNOWN: dict[str, Row] = {
    "conv": Row(Net(lambda c, x: c(x), conv(4, 6, 3, stride=2)), IMAGES, IMAGE, ("n", 6, "?", "?")),
    "conv that keeps sizes": Row(Net(lambda c, x: c(x), same_conv()), IMAGES, IMAGE,
                                 ("n", 6, "h", "w")),
    "conv padded by name": Row(Net(lambda c, x: c(x), conv(4, 6, 3, padding="same", dilation=2)),
                               IMAGES, IMAGE, ("n", 6, "h", "w")),
    "conv padded by reflection": Row(
        Net(lambda c, x: c(x), conv(4, 6, 3, padding=1, padding_mode="reflect")), IMAGES, IMAGE,
        ("n", 6, "h", "w")),
    "conv padded on one axis": Row(Net(lambda c, x: c(x), conv(4, 6, 3, padding=(1, 0), groups=2)),
                                   IMAGES, IMAGE, ("n", 6, "h", "?")),
    "conv1d": Row(Net(lambda c, x: c(x), nn.Conv1d(4, 6, 1)), [((2, 4, 9),), ((1, 4, 3),)],
                  ("n", 4, "l"), ("n", 6, "l")),
    "conv3d": Row(Net(lambda c, x: c(x), nn.Conv3d(4, 6, (1, 3, 1))), [((2, 4, 3, 4, 5),)],
                  ("n", 4, "d", "h", "w"), ("n", 6, "d", "?", "w")),
    "functional conv": Row(
        Net(lambda c, x: functional.conv2d(x, c.weight, None, 1, 1), same_conv()), IMAGES, IMAGE,
        ("n", 6, "h", "w")),
    "transposed conv": Row(Net(lambda c, x: c(x), nn.ConvTranspose2d(4, 6, 2, 2, groups=2)), IMAGES,
                           IMAGE, ("n", 6, "hh", "ww")),
    "transposed conv with output padding": Row(
        Net(lambda c, x: c(x), nn.ConvTranspose2d(4, 6, 3, 2, 1, 1)), IMAGES, IMAGE,
        ("n", 6, "hh", "ww")),
    "channel shuffle": Row(Net(channel_shuffle, same_conv()), IMAGES, IMAGE, ("n", 6, "h", "w")),
    "flatten and linear": Row(
        Net(lambda c, f, x: f(functional.adaptive_avg_pool2d(c(x), (2, 1)).flatten(1)), same_conv(),
            nn.Linear(12, 5)), IMAGES, IMAGE, ("n", 5)),
    "reshape and linear": Row(
        Net(lambda c, f, x: f(c(x).mean((-2, -1)).reshape(x.size(0), -1)), same_conv(),
            nn.Linear(6, 5)), IMAGES, IMAGE, ("n", 5)),
    "squeeze and excite": Row(
        Net(squeeze_excite, same_conv(), conv(6, 2, 1), conv(2, 6, 1)), IMAGES, IMAGE,
        ("n", 6, "h", "w")),
    "squeeze and excite by linear": Row(Net(old_squeeze_excite, same_conv(), nn.Linear(6, 6)),
                                        IMAGES, IMAGE, ("n", 6, "h", "w")),
    "unet": Row(Net(unet, same_conv(), conv(6, 8, 3, padding=1), nn.ConvTranspose2d(8, 6, 2, 2),
                    conv(12, 3, 1)), EVEN, IMAGE, ("n", 3, "h", "w")),
    "attention": Row(Net(attention, conv(4, 6, 2, 2), nn.Linear(6, 18), nn.Linear(6, 6)), EVEN,
                     IMAGE, ("n", "t", 6)),
    "fused attention": Row(Net(fused_attention, nn.Linear(6, 18), nn.LayerNorm(6)), SEQUENCES,
                           ("b", "t", 6), ("b", "t", 6)),
    "split": Row(Net(split_channels, same_conv()), IMAGES, IMAGE, ("n", 4, "h", "w")),
    "chunk": Row(Net(chunked, same_conv()), IMAGES, IMAGE, ("n", 2, 3, "h", "w")),
    "patches": Row(Net(patches, same_conv()), EVEN, IMAGE, ("n", 6, 2, 2, "hh", "ww")),
    "slices with steps": Row(Net(space_to_depth, same_conv()), EVEN, IMAGE, ("n", 12, "?", "?")),
    "resized to a size": Row(Net(resized, same_conv()), IMAGES, IMAGE, ("n", 6, "h", "w")),
    "view by a list": Row(Net(by_list, same_conv()), IMAGES, IMAGE, ("n", 2, 3, "h", "w")),
    "pooling over all": Row(Net(global_pool, same_conv()), IMAGES, IMAGE, ("n", 6)),
    "residual in place": Row(Net(residual, same_conv(), conv(6, 4, 1)), IMAGES, IMAGE, IMAGE),
    "max of an axis": Row(Net(masked, same_conv()), IMAGES, IMAGE, ("n", 6, "h", "w")),
    "einsum and topk": Row(Net(gathered, same_conv()), IMAGES, IMAGE, ("n", 6, 2)),
    "bmm and repeat": Row(Net(graph_conv, same_conv()), IMAGES, IMAGE, ("n", 6, 6, 5)),
    "expand": Row(Net(expanded, same_conv()), IMAGES, IMAGE, ("n", 6, 3, "w")),
    "times a constant": Row(Net(of_constants, same_conv()), IMAGES, IMAGE, ("n", 6, "h", "w")),
    "slices": Row(Net(shrinking, same_conv()), IMAGES, IMAGE, ("n", 2, "?")),
    "windows": Row(Net(windows, same_conv()), IMAGES, IMAGE, ("?", 6, "h", "w")),
    "positions": Row(Net(positions, same_conv()), IMAGES, IMAGE, ("n", 6, "h", "?")),
    "attention as a layer": Row(
        Net(heads, nn.LayerNorm(6), nn.MultiheadAttention(6, 2)), SEQUENCES, ("b", "t", 6),
        ("t", "b", 6)),
    "norms": Row(Net(norms, nn.LayerNorm(6), nn.GroupNorm(2, 6), same_conv()), IMAGES, IMAGE,
                 ("n", "h", "w", 6)),
    "embedding and a parameter": Row(Table(), [((2, 5),), ((1, 5, 1),)], None, ("?", 6)),
    "batch_norm 2d proves its input": Row(Net(lambda b, x: b(x), nn.BatchNorm2d(4)), IMAGES, IMAGE,
                                          IMAGE),
    "batch_norm 3d proves its input": Row(
        Net(lambda b, x: torch.relu(b(torch.tanh(x))), nn.BatchNorm3d(4)), [((2, 4, 3, 2, 5),)],
        ("n", 4, "d", "h", "w"), ("n", 4, "d", "h", "w")),
    "what proves comes later": Row(
        Net(lambda b, c, x: b(torch.relu(x)) + c(x * 2), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1)),
        [((2, 4, 3),)], ("n", 4, "l"), ("n", 4, "l")),
    "channels proved by statistics": Row(
        Net(lambda c, b, x: b(c(x).flatten(1)), nn.Conv1d(1, 2, 1), nn.BatchNorm1d(8)),
        [((3, 1, 4),)], ("n", 1, 4), ("n", 8)),
    "pixel shuffle": Row(Net(lambda c, x: functional.pixel_shuffle(c(x), 2), conv(4, 8, 1)),
                         IMAGES, IMAGE, ("n", 2, "hh", "ww")),
    "upsampling": Row(Net(lambda c, up, x: up(c(x)), same_conv(), nn.Upsample(scale_factor=2)),
                      IMAGES, IMAGE, ("n", 6, "hh", "ww")),
    "padding": Row(Net(lambda c, x: functional.pad(c(x), (0, 0, 1, 1, 0, 2)), same_conv()),
                   IMAGES, IMAGE, ("n", 8, "?", "w")),
    "rank by flatten alone": Row(Net(lambda f, x: f(x.flatten(1)), nn.Linear(12, 5)),
                                 [((2, 3, 4),), ((1, 12),), ((2, 2, 3, 2),)], None, ("?", 5)),
    "rank by view alone": Row(Net(lambda x: x.view(x.size(0), 2, -1)), [((2, 4, 3),), ((1, 6),)],
                              None, ("?", 2, "?")),
    "leaf activations": Row(
        Net(lambda c, s, d, x: d(s(c(x))).softmax(1), same_conv(), nn.SiLU(), nn.Dropout()),
        IMAGES, IMAGE, ("n", 6, "h", "w")),
}  # fmt: skip


def shape_of_result(graph_module: fx.GraphModule) -> tuple[Any, ...] | None:
    result = graph_module.graph.output_node().args[0]
    assert isinstance(result, fx.Node)
    return claims(graph_module).get(result)


def shape_of_input(graph_module: fx.GraphModule) -> tuple[Any, ...] | None:
    first = graph_module.graph.find_nodes(op="placeholder")[0]
    return claims(graph_module).get(first)


@pytest.mark.parametrize("row", KNOWN.values(), ids=KNOWN)
def test_what_operations_prove_is_known_and_true(row: Row) -> None:
    graph_module = judged(row.net, row.runs)
    names: dict[str, Any] = {}
    given, made = shape_of_input(graph_module), shape_of_result(graph_module)
    assert matches(given, row.given, names), given
    assert matches(made, row.made, names), (given, made)


class Views(nn.Module):
    """The pieces of a chunk of an axis of unknown size, and sizes that may be anything."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.permute(0, 2, 1).chunk(2, dim=1)
        rows = first.size(1) * 2 + 1
        return torch.cat([first, second], 1).new_zeros((rows - 1, x.shape[0] + x.shape[1]))


UNKNOWN: dict[str, tuple[nn.Module, list[Any], Pattern]] = {
    "linear of any rank": (Net(lambda f, b, x: b(f(x)), nn.Linear(4, 6), nn.BatchNorm1d(6)),
                           [((2, 4),)], None),
    "linear of rank 3": (Net(lambda f, b, x: b(f(x)), nn.Linear(4, 6), nn.BatchNorm1d(6)),
                         [((2, 6, 4),)], None),
    "pooling with or without a batch": (Net(lambda p, x: p(x), nn.MaxPool2d(2)),
                                        [((2, 4, 4),), ((2, 3, 4, 4),)], None),
    "a sum of an unknown rank": (Net(lambda c, x: c(x.unsqueeze(0)).sum(0) + x, nn.Conv1d(3, 3, 1)),
                                 [((3, 5),)], None),
    "squeeze of a size that may be 1": (Net(lambda c, x: c(x).squeeze(), conv(4, 6, 1)),
                                        [((2, 4, 3, 3),), ((1, 4, 3, 1),)], None),
    "an index by a mask": (Net(lambda c, x: c(x)[c(x) > 0], conv(4, 6, 1)), IMAGES, None),
    "sizes of any value": (Views(), [((2, 5, 6),), ((1, 4, 3),), ((4, 9, 8),)], ("?", "?")),
    "broadcast of symbols": (Net(lambda c, p, x: p(c(x)) + c(x)[:, :, :1, :1], conv(4, 6, 1),
                                 nn.AvgPool2d(2, 2)), IMAGES, ("?", 6, "?", "?")),
    "pooling that rounds up": (
        Net(lambda c, p, x: p(c(x)), conv(4, 6, 1), nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
        IMAGES, ("?", 6, "?", "?")),
    "a fraction of the size": (
        Net(lambda c, x: functional.interpolate(c(x), scale_factor=1.5), conv(4, 6, 1)), IMAGES,
        ("?", 6, "?", "?")),
    "where by a condition alone": (Net(lambda c, x: torch.where(c(x) > 0)[0], conv(4, 6, 1)),
                                   IMAGES, None),
    "batch_norm after a reshape in place": (
        Net(lambda b, x: b(x).unsqueeze_(0), nn.BatchNorm2d(4)), IMAGES, None),
}  # fmt: skip


@pytest.mark.parametrize("case", UNKNOWN.values(), ids=UNKNOWN)
def test_what_nothing_proves_is_not_claimed(
    case: tuple[nn.Module, list[Any], Pattern],
) -> None:
    net, runs, made = case
    graph_module = judged(net, runs)
    found = shape_of_result(graph_module)
    assert matches(found, made, {}), found
    assert found is None or all(isinstance(s, str) for s, m in zip(found, made or (), strict=True)
                                if m == "?")  # fmt: skip


def test_sizes_that_have_to_be_equal_get_one_name() -> None:
    graph_module = judged(
        Two(lambda one, two, x, y: torch.cat([one(x), two(y)], 1), conv(4, 6, 1), conv(3, 2, 1)),
        [((2, 4, 5, 6), (2, 3, 5, 6))],
    )
    first, second = graph_module.graph.find_nodes(op="placeholder")
    found = claims(graph_module)
    assert found[first][2:] == found[second][2:]
    assert found[first][0] == found[second][0]


def test_sizes_that_broadcast_are_not_taken_for_equal() -> None:
    graph_module = judged(
        Two(lambda one, two, x, y: one(x) + two(y), conv(4, 6, 1), conv(3, 6, 1)),
        [((2, 4, 5, 6), (1, 3, 5, 1)), ((1, 4, 1, 6), (3, 3, 2, 6))],
    )
    first, second = graph_module.graph.find_nodes(op="placeholder")
    found = claims(graph_module)
    assert not {found[first][0], *found[first][2:]} & {found[second][0], *found[second][2:]}


def test_a_hook_that_may_change_the_result_leaves_it_unknown() -> None:
    net = Net(lambda c, x: functional.relu(c(x)), conv(4, 6, 1))
    net.layers[0].register_forward_hook(lambda module, args, made: made.flatten(1))
    assert claims(traced(net)) == {}


class Conv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sum(1)


def test_a_module_with_a_forward_of_its_own_proves_nothing() -> None:
    graph = fx.Graph()
    graph.output(graph.call_module("conv", (graph.placeholder("x"),)))
    assert claims(fx.GraphModule({"conv": Conv(4, 6, 1)}, graph)) == {}


def test_a_function_that_is_called_like_one_of_torch_proves_nothing() -> None:
    def relu(x: Tensor) -> Tensor:
        return x[0]

    graph = fx.Graph()
    x = graph.call_module("conv", (graph.placeholder("x"),))
    made = graph.call_function(relu, (x,))
    graph.output(made)
    found = claims(fx.GraphModule({"conv": conv(4, 6, 1)}, graph))
    assert x in found
    assert made not in found


def test_what_writes_to_a_given_tensor_leaves_all_unknown() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    made = graph.call_module("norm", (x,))
    graph.call_function(torch.add, (made, made), {"out": y})
    graph.output(y)
    assert claims(fx.GraphModule({"norm": nn.BatchNorm2d(4)}, graph)) == {}


def test_the_judge_finds_a_wrong_claim() -> None:
    graph_module = traced(Net(lambda c, x: c(x), same_conv()))
    recorder = Recorder(graph_module)
    recorder.run(torch.randn(2, 4, 5, 6))
    x, node = list(graph_module.graph.nodes)[:2]
    for wrong in (
        {node: ("n", 6, "h")}, {node: ("n", 7, "h", "w")}, {node: ("n", 6, "h", "h")},
        {x: ("n", 4, "h", "w"), node: ("n", 6, "w", "w")}, {x: ("n", 4, "n*2", "w")},
    ):  # fmt: skip
        assert untrue(wrong, recorder.shapes)


# ---- sizes ----


@pytest.mark.parametrize(
    ("size", "by", "expected"),
    [
        (12, 4, 3), (12, 5, None), ("h", 1, "h"), ("h", 2, None), ("4*h", 2, "2*h"),
        ("2*h*w", "h", "2*w"), ("2*h", "2*h", 1), ("h", "w", None), ("h*h", "h", "h"), (0, 3, 0),
        (5, 0, None), (None, 2, None), ("6*h", "4*h", None),
    ],
)  # fmt: skip
def test_a_quotient_is_known_where_it_is_exact(size: Any, by: Any, expected: Any) -> None:
    assert quotient(size, by) == expected
    if expected is not None:
        assert product((expected, by)) == size


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [(2, 3, 5), ("h", "h", "2*h"), ("h", "2*h", "3*h"), ("h", 0, "h"), (0, "w", "w"),
     ("h", "w", None), ("h", 1, None), (None, 0, None), (None, 2, None)],
)  # fmt: skip
def test_a_sum_is_known_where_it_is_a_product(one: Any, other: Any, expected: Any) -> None:
    assert added(one, other) == expected


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("window", [(k, s, p) for k in (1, 2, 3) for s in (1, 2, 3)
                                    for p in (0, 1) if 2 * p <= k])  # fmt: skip
def test_windows_stop_where_torch_stops(window: tuple[int, int, int], ceil: bool) -> None:
    kernel, stride, padding = window
    found = Window(kernel, stride, 2 * padding, ceil=ceil)
    for size in range(3, 13):
        real = functional.max_pool1d(
            torch.zeros(1, 1, size), kernel, stride, padding, 1, ceil
        ).shape[-1]
        assert found.over(size) == real
        symbolic = found.over(f"{stride}*m" if stride > 1 else "m")
        if size % stride == 0 and symbolic is not None:
            assert symbolic == "m"
            assert size // stride == real


def test_symbols_are_replaced_by_what_they_are_found_to_be() -> None:
    symbols = Symbols()
    symbols.equate("a", "b")
    symbols.equate("b", 3)
    symbols.equate("c", "2*d")
    symbols.equate("d", "d*e")
    symbols.equate("2*f", 8)
    symbols.equate("3*g", 8)
    assert [symbols.resolve(s) for s in ("a", "2*a*c", "f", "g", None)] == [3, "12*d", 4, "g", None]
