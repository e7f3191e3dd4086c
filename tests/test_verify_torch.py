"""A torch model under check: what it takes and returns, its oracle, its runs, its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import bnfold
from bnfold.errors import BnfoldError, InconclusiveError, ProviderError, UsageError
from bnfold.verify import torch_devices
from bnfold.verify.judge import Verdict
from bnfold.verify.measure import judge_output
from bnfold.verify.models import load_model
from bnfold.verify.onnx_subject import OnnxSubject
from bnfold.verify.subject import RunOptions, TensorSpec
from bnfold.verify.torch_devices import CPU, CUDA, device_of, measured_tf32, settled
from bnfold.verify.torch_runner import Placement
from bnfold.verify.torch_subject import torch_subject
from bnfold.verify.torch_weights_expected import torch_expected, torch_weight_ranges
from models import build
from tests.torch_nets import exported, made, one_thread
from tests.verify_torch_nets import DEFECTS, FUSE, MAX, block, feeds, pair, spoilt, subject

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\):FutureWarning")

FLOAT = np.dtype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def single() -> Iterator[None]:
    yield from one_thread()


# ---- what it takes and returns ----


def nested(self: Any, x: Tensor, pair: Any, *more: Tensor, scale: Any = None, n: int = 2) -> Any:
    out = x * pair["a"] + pair["b"][0] + sum(more) * n
    return {"out": out, "none": None, "count": n, "both": (out.sum(), x.argmax(1)), "ok": True}


NESTED: Any = (
    torch.ones(2, 3), {"a": torch.ones(3), "b": [torch.ones(1)]}, torch.ones(3), torch.ones(3),
)  # fmt: skip


def names_of(specs: tuple[TensorSpec, ...]) -> list[str]:
    return [spec.name for spec in specs]


def test_inputs_are_called_as_the_parameters_of_forward_are() -> None:
    model = torch_subject(made(nested).eval(), "net", example_inputs=NESTED)
    assert names_of(model.inputs) == ["x", "pair[a]", "pair[b][0]", "more[0]", "more[1]"]
    assert model.inputs[0] == TensorSpec("x", FLOAT, (2, 3))


def test_arguments_by_name_are_inputs_and_what_is_no_tensor_stays() -> None:
    kwargs = {"scale": torch.ones(1), "n": 5}
    model = torch_subject(
        made(nested).eval(), "net", example_inputs=NESTED[:2], example_kwargs=kwargs
    )
    assert names_of(model.inputs) == ["x", "pair[a]", "pair[b][0]", "scale"]
    assert model.oracle()(feeds(model)[0])["output1"] == 5


def test_outputs_are_flattened_without_none_and_numbers_are_tensors() -> None:
    model = torch_subject(made(nested).eval(), "net", example_inputs=NESTED)
    assert [(spec.name, str(spec.dtype), spec.shape) for spec in model.outputs] == [
        ("output0", "float32", (2, 3)), ("output1", "int64", ()), ("output2", "float32", ()),
        ("output3", "int64", (2,)), ("output4", "bool", ()),
    ]  # fmt: skip
    found = model.runner(CPU, RunOptions()).run(feeds(model)[0])
    assert [str(found[spec.name].dtype) for spec in model.outputs] == [
        str(spec.dtype) for spec in model.outputs
    ]


def test_a_program_knows_its_inputs_and_sizes_that_vary() -> None:
    net, example = block()
    program = exported(net, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    model = torch_subject(program, "program")
    (spec,) = model.inputs
    assert spec.name == "input"
    assert spec.shape is not None
    assert isinstance(spec.shape[0], str)
    assert spec.shape[1:] == (3, 10, 10)
    assert model.outputs == (TensorSpec("output0", FLOAT, (spec.shape[0], 5)),)


UNITS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.mark.parametrize("dtype", UNITS)
def test_the_unit_is_that_of_the_coarsest_type(dtype: torch.dtype) -> None:
    net, example = block(dtype=dtype)
    assert subject(net, example).unit == UNITS[dtype]


# ---- what can't be checked ----


def dropout(self: Any, x: Tensor) -> Tensor:
    return nn.functional.dropout(x, training=True)


def program_in_training() -> Any:
    return torch.export.export(nn.Sequential(nn.Dropout()), (torch.ones(2),), strict=False)


REFUSED: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "without an example": (lambda: block()[0], None, "pass example_inputs="),
    "an example that does not fit": (lambda: block()[0], (), "can't be called"),
    "in training mode": (lambda: block()[0].train(), torch.ones(1), "node '1': it is in training"),
    "a graph in training mode": (
        lambda: fx.symbolic_trace(made(dropout)), torch.ones(1), "before exporting it"),
    "a program in training mode": (program_in_training, None, "it is in training mode"),
    "a class of one's own in training": (lambda: made(dropout), torch.ones(1), "call .eval()"),
    "no torch model": (lambda: 3, None, "no torch model"),
    "a Lazy module": (lambda: nn.LazyLinear(3).eval(), torch.ones(1), "run it once"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_checked_is_refused_in_words(case: str) -> None:
    build_it, example, words = REFUSED[case]
    with pytest.raises(UsageError, match=r"^net: ") as caught:
        torch_subject(build_it(), "net", example_inputs=example).runner(CPU, RunOptions())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- oracle and runs ----


def typed(self: Any, x: Tensor) -> Any:
    y = self.conv(x).to(torch.float16).float()
    y = y + torch.linspace(0, 1, y.shape[-1], dtype=torch.float32) + self.table
    return y.mean((2, 3), dtype=torch.float32)


def by_hand(model: Any, x: Tensor) -> Any:
    y = nn.functional.conv2d(x.double(), model.conv.weight.double(), model.conv.bias.double())
    ramp = torch.linspace(0, 1, y.shape[-1], dtype=torch.float64)
    return (y + ramp + model.table.double()).mean((2, 3))


FORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "module": lambda model, x: model,
    "graph": lambda model, x: fx.symbolic_trace(model),
    "program": lambda model, x: exported(model, (x,)),
}


@pytest.mark.parametrize("form", ["module", "program"])
def test_the_oracle_computes_in_float64_whatever_types_are_in_the_code(form: str) -> None:
    net = made(typed, conv=nn.Conv2d(3, 4, 3), table=torch.rand(1)).eval()
    x = torch.randn(2, 3, 8, 8)
    model = subject(FORMS[form](net, x), x)
    found = model.oracle()({"x": x.numpy()})["output0"]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, by_hand(net, x).detach(), rtol=1e-13)
    narrow = model.runner(CPU, RunOptions()).run({"x": x.numpy()})["output0"]
    assert narrow.dtype == np.float32
    assert 1e-7 < np.abs(narrow - found).max() < 1e-2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", UNITS)
def test_runs_are_off_by_about_the_rounding_of_the_type(form: str, dtype: torch.dtype) -> None:
    net, example = block(dtype=dtype)
    model = subject(FORMS[form](net, example), example)
    (sample,) = feeds(model, 1)
    right = model.oracle()(sample)["output0"]
    found = model.runner(CPU, RunOptions()).run(sample)["output0"]
    assert found.dtype == model.outputs[0].dtype
    error = np.linalg.norm(found.astype(np.float64) - right) / np.linalg.norm(right)
    assert 0 < error < 32 * UNITS[dtype]


def forgetful(self: Any, x: Tensor) -> Any:
    self.count += 1
    self.seen.append(1)
    self.last = x.sum() if self.last is None else self.last
    x.mul_(2)
    return x + self.count + len(self.seen) + self.last


@pytest.mark.parametrize("run", ["oracle", "runner"])
def test_a_run_changes_neither_the_model_nor_the_next_run(run: str) -> None:
    net = made(forgetful, count=torch.zeros(()), seen=[], last=None).eval()
    model = subject(net, torch.ones(2))
    compute = model.oracle() if run == "oracle" else model.runner(CPU, RunOptions()).run
    samples = [{"x": np.full(2, k, np.float32)} for k in (1, 2, 1)]
    one, other, again = (compute(sample)["output0"] for sample in samples)
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(samples[0]["x"], np.ones(2))
    assert float(net.get_buffer("count")) == 0.0
    assert (vars(net)["seen"], vars(net)["last"]) == ([], None)


def branching(self: Any, x: Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda v: v * 2.0, lambda v: v - 1.0, (x,))


def test_the_oracle_takes_the_branch_of_a_program() -> None:
    model = torch_subject(exported(made(branching).eval(), (torch.ones(3),)), "program")
    compute = model.oracle()
    for sign, right in ((1, 2.0), (-1, -2.0)):
        sample = {"x": np.full(3, sign, np.float32)}
        np.testing.assert_array_equal(compute(sample)["output0"], np.full(3, right))
        ran = model.runner(CPU, RunOptions()).run(sample)
        np.testing.assert_array_equal(ran["output0"], np.full(3, right, np.float32))


def test_bfloat16_is_fed_and_returned_as_ml_dtypes_has_it() -> None:
    model = subject(made(lambda self, x: x + 1).eval(), torch.ones(2, dtype=torch.bfloat16))
    found = model.runner(CPU, RunOptions()).run({"x": np.ones(2, ml_dtypes.bfloat16)})["output0"]
    assert found.dtype == ml_dtypes.bfloat16
    assert found.tolist() == [2, 2]


def refuses(self: Any, x: Tensor) -> Tensor:
    raise RuntimeError("\nnot implemented for 'Half'\nsee below")


def test_what_can_not_be_run_is_inconclusive_in_one_line() -> None:
    model = subject(made(refuses).eval(), torch.ones(1))
    for compute in (model.oracle(), model.runner(CPU, RunOptions()).run):
        with pytest.raises(InconclusiveError) as caught:
            compute({"x": np.ones(1, np.float32)})
        assert str(caught.value) == "torch can't run the model: not implemented for 'Half'"
    with pytest.raises(UsageError, match="input 'x' is not given"):
        model.oracle()({})


# ---- devices ----


def test_a_certificate_counts_what_ran_where() -> None:
    net, example = block()
    runner = subject(net, example).runner(CPU, RunOptions())
    runner.run({"input": example.numpy()})
    said = runner.certificate()
    assert said.provider == CPU
    assert said.runtime == f"torch {torch.__version__}"
    assert said.ran[CPU] >= len(net)
    assert (said.elsewhere, said.tf32, said.tf32_error) == ((), "", None)
    assert said.options["mkldnn.conv.fp32_precision"] == "ieee"


def test_an_operator_that_runs_elsewhere_is_named() -> None:
    """The device ``meta`` stands for one that is not there."""
    placed = Placement(torch.device("meta"))
    with placed:
        torch.empty(3, device="meta") * 2
        torch.arange(3)
        torch.ones(()) + 1
    assert placed.strays == []
    assert "aten.arange.default (cpu)" in placed.elsewhere
    with placed:
        torch.empty(3) + 1
    assert placed.strays == ["aten.empty.memory_format (cpu)", "aten.add.Tensor (cpu)"]


def test_a_stray_operator_is_no_pass_but_an_error() -> None:
    net, example = block()
    runner = subject(net, example, "net").runner(CPU, RunOptions())
    runner._placed = Placement(torch.device("meta"))
    with runner._placed:
        torch.ones(2) + 1
    with pytest.raises(ProviderError, match=r"^net: CPUExec.*elsewhere: .*aten.add.Tensor \(cpu\)"):
        runner.certificate()


MISSING: dict[str, tuple[str, bool, str | None, type[BnfoldError], str]] = {
    "another provider": ("DmlExecutionProvider", False, None, UsageError, "not on Dml"),
    "built without CUDA": (CUDA, False, None, ProviderError, "pip install"),
    "no device": (CUDA, False, "13.0", ProviderError, "nvidia-smi"),
}


@pytest.mark.parametrize("case", MISSING)
def test_a_device_that_is_missing_is_an_error(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    provider, available, built, kind, words = MISSING[case]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.version, "cuda", built)
    with pytest.raises(kind, match=words):
        device_of(provider)


def test_a_device_that_is_there_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of(CUDA) == torch.device("cuda")


@pytest.mark.parametrize(("tf32", "precision"), [(False, "ieee"), (True, "tf32")])
def test_settings_hold_during_a_run_and_not_after(tf32: bool, precision: str) -> None:
    known: Any = torch.backends
    before = (known.cudnn.conv.fp32_precision, known.cuda.matmul.fp32_precision,
              known.cudnn.benchmark, torch.get_num_threads())  # fmt: skip
    with settled(torch.device("cuda"), RunOptions(tf32=tf32, threads=1)):
        assert known.cudnn.conv.fp32_precision == precision
        assert known.cuda.matmul.fp32_precision == precision
        assert known.mkldnn.matmul.fp32_precision == "ieee"
        assert known.cudnn.deterministic and not known.cudnn.benchmark
        assert torch.get_num_threads() == 1
    after = (known.cudnn.conv.fp32_precision, known.cuda.matmul.fp32_precision,
             known.cudnn.benchmark, torch.get_num_threads())  # fmt: skip
    assert after == before


def test_tf32_that_was_not_asked_for_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured on the CPU, as if it were CUDA; a spoilt product is what TF32 makes of it."""
    drawn = torch_devices._drawn
    monkeypatch.setattr(torch_devices, "_drawn", lambda _device, *shape: drawn(_cpu, *shape))
    monkeypatch.setattr(torch_devices, "device_name", lambda _device: "a device")
    label, error = measured_tf32(torch.device("cuda"), False)
    assert label == "off"
    assert error is not None
    assert 0 < error < 1e-6
    monkeypatch.setattr(torch_devices, "_matmul_error", lambda _device: 3e-4)
    assert measured_tf32(torch.device("cuda"), True) == ("on", 3e-4)
    with pytest.raises(ProviderError, match="on a device, though TF32 is"):
        measured_tf32(torch.device("cuda"), False)


_cpu = torch.device("cpu")


# ---- weights ----


@pytest.mark.parametrize("name", ["levit", "caffe"])
def test_what_bnfold_made_is_known_and_its_weights_are_right(name: str) -> None:
    reference, candidate, example = pair(name, MAX)
    found = torch_expected(reference, candidate, example_inputs=example)
    assert found.ours
    assert found.tier is not None
    assert (found.tier.tier, found.tier.verdict) == ("A", Verdict.PASS)


def test_of_another_tool_there_is_no_tier_a() -> None:
    reference, candidate, example = pair("resnet", FUSE)
    found = torch_expected(reference, candidate, example_inputs=example)
    assert (found.tier, found.ours) == (None, False)
    assert "another tool" in found.message


def test_of_another_kind_there_is_no_tier_a() -> None:
    net, example = block()
    found = torch_expected(net, exported(net, (example,)), example_inputs=example)
    assert found.tier is None
    assert "a program made of a module" in found.message


@pytest.mark.parametrize(
    "defect", [d for d in DEFECTS if d not in ("stale weight", "forgotten eps")]
)
def test_a_wrong_weight_is_named(defect: str) -> None:
    net, example = block()
    wrong = spoilt(net, bnfold.fold(net, example).model, "3", defect)
    found = torch_expected(net, wrong, example_inputs=example)
    assert found.tier is not None
    assert found.tier.verdict is Verdict.FAIL
    assert "'3." in found.tier.message


def test_what_rounds_twice_is_another_tool_and_not_wrong() -> None:
    net, example = block()
    other = bnfold.fold(net, example).model
    weight = other.get_parameter("3.weight").data.view(-1)
    weight[:3] = torch.nextafter(weight[:3], torch.full((3,), 100.0))
    assert torch_expected(net, other, example_inputs=example).tier is None
    weight[3] *= 1 + 1e-6
    assert torch_expected(net, other, example_inputs=example).tier is not None


def test_ranges_are_those_of_output_channels() -> None:
    net, example = build("unet")
    folded = bnfold.fold(net, example).model
    ranges = {found.tensor: found for found in torch_weight_ranges(net, folded)}
    assert ranges
    assert torch_weight_ranges(net, copy.deepcopy(net)) == ()
    for name, found in ranges.items():
        module: Any = folded.get_submodule(name.rpartition(".")[0])
        axis = int(isinstance(module, nn.ConvTranspose2d))
        weight = module.weight.detach().transpose(0, axis).flatten(1)
        assert found.after == pytest.approx(weight.abs().amax(dim=1).tolist())
        assert len(found.before) == len(found.after)


def test_many_channels_are_put_together() -> None:
    one, other = nn.Linear(2, 600), nn.Linear(2, 600)
    (found,) = torch_weight_ranges(one, other)
    assert len(found.after) == len(found.before) == 256
    assert max(found.after) == pytest.approx(float(other.weight.detach().abs().max()))


# ---- torch and ONNX ----


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spoil", [1.0, 1.001])
def test_an_onnx_candidate_is_judged_by_the_oracle_of_a_torch_reference(spoil: float) -> None:
    net, example = block()
    reference = subject(net, example, "net")
    folded = bnfold.fold(net, example).model
    folded.get_parameter("3.bias").data *= spoil
    program = torch.onnx.export(folded, (example,), dynamo=True, verbose=False)
    assert program is not None
    candidate = OnnxSubject(load_model(program.model_proto, "<candidate>"))
    samples = feeds(reference, 8)
    name, other = reference.inputs[0].name, candidate.inputs[0].name
    oracle, unfolded = reference.oracle(), reference.runner(CPU, RunOptions())
    runner = candidate.runner(CPU, RunOptions())
    said = judge_output(
        "output0",
        [oracle(sample)["output0"] for sample in samples],
        [unfolded.run(sample)["output0"] for sample in samples],
        [next(iter(runner.run({other: sample[name]}).values())) for sample in samples],
        unit=reference.unit,
    )
    assert said.verdict is (Verdict.PASS if spoil == 1 else Verdict.FAIL), said.message
