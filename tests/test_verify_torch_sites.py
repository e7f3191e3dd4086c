"""Tier B of torch models: right folds raise no alarm, wrong ones are caught where they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnfold
from bnfold.verify.judge import Verdict
from bnfold.verify.torch_sites import torch_sites
from models import NETS
from tests.torch_nets import exported, made, one_thread
from tests.verify_torch_nets import (
    DEFECTS,
    FUSE,
    LOCAL,
    MAX,
    block,
    changed_sites,
    checked,
    pair,
    spoilt,
    subject,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\):FutureWarning")

# torch's own tool folds nothing in these.
_UNTOUCHED = (("frozen_buffers", FUSE), ("frozen_statistics", FUSE))
RIGHT = [(name, how) for name in NETS for how in (MAX, FUSE) if (name, how) not in _UNTOUCHED]
WRONG = [("speech", LOCAL), ("caffe", MAX), ("unet", FUSE)]


@pytest.fixture(scope="module", autouse=True)
def single() -> Iterator[None]:
    yield from one_thread()


@pytest.mark.parametrize(("name", "how"), RIGHT)
def test_a_right_fold_is_no_alarm(name: str, how: str) -> None:
    reference, candidate, example = pair(name, how)
    found = checked(reference, candidate, example, ours=how != FUSE)
    assert found.tier.verdict is Verdict.PASS, found.tier.message
    assert found.tier.sites
    assert all(site.verdict is Verdict.PASS and site.ratio <= 1 for site in found.tier.sites)


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize(("name", "how"), WRONG)
def test_a_wrong_fold_is_caught_and_its_site_named(name: str, how: str, defect: str) -> None:
    reference, candidate, example = pair(name, how)
    sites = changed_sites(reference, candidate)
    path = sites[len(sites) // 2]
    wrong = spoilt(reference, candidate, path, defect)
    found = checked(reference, wrong, example, ours=how != FUSE)
    assert found.tier.verdict is Verdict.FAIL, found.tier.message
    assert found.guilty == path
    assert [site.site for site in found.tier.sites if site.verdict is Verdict.FAIL] == [path]
    assert f"'{path}'" in found.tier.message


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_wrong_fold_between_other_units_is_caught(defect: str) -> None:
    """Which of the sites it is, nobody can tell there."""
    reference, candidate, example = pair("preactivation_positive", MAX)
    assert checked(reference, candidate, example, ours=True).unpaired
    path = changed_sites(reference, candidate)[-1]
    wrong = spoilt(reference, candidate, path, defect)
    assert checked(reference, wrong, example, ours=True).tier.verdict is Verdict.FAIL


@pytest.mark.parametrize("name", ["speech", "preactivation_positive"])
def test_programs_are_checked_as_modules_are(name: str) -> None:
    reference, _, example = pair(name, MAX)
    program = exported(reference, (example,))
    folded = bnfold.fold(program).model
    assert checked(program, folded, example, ours=True).tier.verdict is Verdict.PASS
    assert checked(reference, folded, example, ours=True).tier.verdict is Verdict.PASS
    # What a fold leaves as it is, both programs share.
    before, after = program.state_dict, folded.state_dict
    key = next(k for k, v in after.items() if k in before and not torch.equal(v, before[k]))
    after[key] = nn.Parameter(after[key].detach() * 1.001)
    assert checked(program, folded, example, ours=True).tier.verdict is Verdict.FAIL


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bounds_are_those_of_the_stored_type(dtype: torch.dtype) -> None:
    net, example = block(dtype=dtype)
    folded = bnfold.fold(net, example).model
    assert checked(net, folded, example, ours=True).tier.verdict is Verdict.PASS
    # About eight roundings of a channel's weights.
    folded[3].weight.data[2] *= 1 + 64 * torch.finfo(dtype).eps
    folded[3].bias.data[2] *= 1 + 64 * torch.finfo(dtype).eps
    assert checked(net, folded, example, ours=True).guilty == "3"


def test_the_smallest_error_that_would_be_caught_is_caught_and_a_part_of_it_is_not() -> None:
    net, example = block()
    folded = bnfold.fold(net, example).model
    site = next(s for s in checked(net, folded, example, ours=True).tier.sites if s.site == "3")
    assert site.caught is not None
    assert site.caught < 1e-4
    scaled = bnfold.fold(net, example).model
    scaled[3].weight.data *= 1 + site.caught
    for ours in (True, False):  # whoever spoils it, it is no longer what bnfold made
        assert checked(net, scaled, example, ours=ours).guilty == "3"
    harmless = bnfold.fold(net, example).model
    harmless[3].weight.data *= 1 + site.caught / 64
    assert checked(net, harmless, example, ours=True).tier.verdict is Verdict.PASS


@pytest.mark.parametrize(("name", "how"), [("speech", MAX), ("unet", FUSE)])
def test_every_weight_that_is_off_by_what_is_caught_is_caught(name: str, how: str) -> None:
    reference, candidate, example = pair(name, how)
    found = checked(reference, candidate, example, ours=how != FUSE).tier
    known = {site.site: site.caught for site in found.sites}
    assert found.caught == max(caught for caught in known.values() if caught)
    for path, caught in known.items():
        assert caught is not None
        wrong = copy.deepcopy(candidate)
        wrong.get_parameter(f"{path}.weight").data *= 1 + caught
        assert checked(reference, wrong, example, ours=False).guilty == path


def test_what_would_be_caught_is_not_told_where_it_is_not_sure() -> None:
    """In other units, or in narrow types, what is a little off may be right."""
    cases = [(*pair("preactivation_positive", MAX), True)]
    net, example = block(dtype=torch.bfloat16)
    cases.append((net, bnfold.fold(net, example).model, example, True))
    for reference, candidate, sample, ours in cases:
        tier = checked(reference, candidate, sample, ours=ours).tier
        assert tier.verdict is Verdict.PASS
        assert tier.caught is None
        assert {site.caught for site in tier.sites} == {None}


def test_a_fault_that_a_relu_takes_away_is_still_a_fault() -> None:
    net, example = block()
    net.get_parameter("1.bias").data[3] = -100.0  # this channel is dead on every sample
    folded = bnfold.fold(net, example).model
    assert checked(net, folded, example, ours=True).tier.verdict is Verdict.PASS
    folded[0].bias.data[3] *= 1.001
    assert checked(net, folded, example, ours=True).guilty == "0"


def in_place(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    z = nn.functional.relu_(self.norm(y))
    z += y.mean()
    return z.flatten(1).chunk(2, dim=1)[0]


def test_what_is_changed_in_place_is_followed() -> None:
    parts = block()[0]
    net = made(in_place, conv=parts[0], norm=parts[1]).eval()
    folded = made(in_place, conv=parts[0], norm=parts[1]).eval()
    example = block()[1]
    right = bnfold.fold(nn.Sequential(parts[0], parts[1]), example).model
    folded.conv, folded.norm = right[0], right[1]
    # The mean is of what the Conv says before the norm, so that this fold is none.
    assert checked(net, folded, example, ours=False).tier.verdict is Verdict.FAIL
    assert checked(net, bnfold.fold(net, example).model, example, ours=True).tier.verdict in (
        Verdict.PASS, Verdict.INCONCLUSIVE,
    )  # fmt: skip


def test_what_folds_nothing_is_inconclusive() -> None:
    net, example = block()
    found = checked(net, net, example, ours=False)
    assert found.tier.verdict is Verdict.INCONCLUSIVE
    assert "no weight" in found.tier.message


def test_without_samples_nothing_is_told() -> None:
    net, example = block()
    folded = subject(bnfold.fold(net, example).model, example)
    assert torch_sites(subject(net, example), folded, []).tier.verdict is Verdict.INCONCLUSIVE


def fails(self: Any, x: Tensor) -> Tensor:
    raise RuntimeError("no\nreason")


def test_a_model_that_can_not_be_run_is_inconclusive() -> None:
    net = made(fails).eval()
    sample = {"x": torch.zeros(1).numpy()}
    found = torch_sites(subject(net, torch.zeros(1)), subject(net, torch.zeros(1)), [sample])
    assert found.tier.verdict is Verdict.INCONCLUSIVE
    assert found.tier.message == "torch can't run the model: no"
