"""Random torch modules, folded in all kinds and on both levels: they say the same.

What is checked is in `random_torch_nets`: outputs in float64 (and what hooks see) within 1e-9 of
the unfolded model, also for another size of the batch; the given module is left as it was, bit for
bit; the state of the result can be stored and loaded; every step has a verdict.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import bnfold
from tests.random_torch_nets import (
    BARE,
    CORE,
    DYNAMIC,
    FX,
    FX_BARE,
    IN_PLACE,
    LEVELS,
    MODULE,
    PROGRAM,
    TOLERANCE,
    Net,
    Trial,
    error,
    faults,
    random_net,
    run,
    state,
)

pytestmark = [
    # torch copies its own tree specs in a way that it deprecates,
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\):FutureWarning"),
    # and keeps gradients of what a hook of ours clones.
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
]

SEEDS = range(40, 46)
MANY = range(100, 140)
CHEAP = (BARE, FX, FX_BARE)
EXPORTED = (MODULE, IN_PLACE, PROGRAM, DYNAMIC)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Nets this small take several threads longer than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def net(seed: int) -> Net:
    return random_net(seed, 1 + seed % 14)


def said(net: Net, wrong: list[str]) -> str:
    return "\n".join([net.code, *wrong])


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_exported_says_the_same_when_folded(seed: int) -> None:
    wrong = faults(net(seed), [LEVELS[seed % 2]], EXPORTED)
    assert not wrong, said(net(seed), wrong)


# 5117: read by a step, then changed in place; 9139: by an augmented assignment.
@pytest.mark.parametrize("seed", [*MANY, 5117, 9139])
def test_what_is_traced_says_the_same_when_folded(seed: int) -> None:
    wrong = faults(net(seed), kinds=CHEAP)
    assert not wrong, said(net(seed), wrong)


@pytest.mark.parametrize("seed", [43])
def test_a_decomposed_program_says_the_same_when_folded(seed: int) -> None:
    wrong = faults(net(seed), kinds=[CORE])
    assert not wrong, said(net(seed), wrong)


# ---- what the random nets found ----

LINES = (
    "functional.relu(v, inplace=True)", "v.relu_()", "v.mul_(2)", "v *= 2; v.sin_()", "v[:1] *= 2",
    "v[:1].copy_(x[1:])",
)  # fmt: skip


def late(line: str) -> Net:
    """A net that changes ``v`` after a step has read it, and before the step's result is read."""
    body = f"v = torch.sin(x)\n    w = v / 3\n    {line}\n    return self.m0(w), v"
    names: dict[str, Any] = {"torch": torch, "functional": nn.functional, "__name__": __name__}
    exec(f"def forward(self, x):\n    {body}", names)
    module = type("Late", (nn.Module,), {"forward": names["forward"]})()
    module.m0 = nn.Linear(4, 4).double()
    given = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(2, 4)
    return Net(module.eval(), body, (given,), [])


@pytest.mark.parametrize("kind", [MODULE, BARE, PROGRAM, DYNAMIC, FX])
@pytest.mark.parametrize("line", LINES)
def test_what_changes_after_a_step_read_it_is_read_as_it_was(line: str, kind: str) -> None:
    assert not faults(late(line), kinds=[kind])


# ---- the nets and the judge ----


def verdicts(seed: int, level: str) -> Counter[str]:
    report = bnfold.fold(net(seed).module, level=level).report
    return Counter(step.how or step.code for step in report.steps)


def test_the_nets_hold_many_kinds_of_steps_and_many_fold() -> None:
    """Or the tests above would say nothing."""
    met: Counter[str] = Counter()
    for seed in MANY:
        for level in LEVELS:
            met += verdicts(seed, level)
    assert {"backward", "forward", "around", "BNF010", "BNF017", "BNF018", "BNF021"} <= set(met)
    assert sum(met[how] for how in ("backward", "forward", "around", "merged")) > 30
    assert sum(met[code] for code in met if code.startswith("BNF")) > 40


def test_folding_twice_finds_next_to_nothing_more() -> None:
    more = []
    for seed in MANY:
        once = bnfold.fold(net(seed).module).model
        if bnfold.fold(once).report.folded:
            more.append(seed)
    assert len(more) <= 0.05 * len(MANY), more


def test_a_weight_that_is_off_by_a_millionth_is_noticed() -> None:
    """The judge does say no."""
    noticed = 0
    for seed in range(100, 110):
        found = net(seed)
        wrong = copy.deepcopy(found.module)
        expected = run(found, found.module, found.inputs)
        for module in wrong.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data *= 1 + 1e-6
        noticed += error(run(found, wrong, found.inputs), expected) > TOLERANCE
    assert noticed >= 4


def test_a_module_that_was_written_to_is_noticed() -> None:
    module = copy.deepcopy(net(100).module)
    before = state(module)
    assert state(module) == before
    next(iter(module.parameters())).data.flatten()[0] += 1e-15
    assert state(module) != before


def test_a_seed_gives_one_net() -> None:
    """Or what fails could not be found again."""
    torch.manual_seed(1)
    one = random_net(104, 9)
    torch.manual_seed(2)
    two = random_net(104, 9)
    assert one.code == two.code
    assert state(one.module) == state(two.module)


def test_a_model_that_can_not_be_made_is_passed_over() -> None:
    """Torch traces no assignment to an index; that is no fault of ours."""
    trial = Trial(net(12), "max")
    assert not list(trial.faults([FX]))
