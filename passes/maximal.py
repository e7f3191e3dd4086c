"""v = s u + t: units for every tensor, so that as many steps as can be become u -> u.

What is linear as a whole is one operator from the start (`joining`), and so are those that lie side
by side in a Concat (`side_by_side`).

Direct neighbours first, as at level "local": such folds ask nothing of anybody else, and an
ordinary network is done with them. For the steps that are left the units of all tensors that they
can reach are solved for together.
"""

from __future__ import annotations

from collections.abc import Mapping

from bnfold.channel_graph import ChannelGraph, Linear, Weight
from bnfold.passes.constraints import bytes_of
from bnfold.passes.draft import Draft
from bnfold.passes.extra_adds import solve
from bnfold.passes.joining import join_linear, pads_before_kept
from bnfold.passes.local import evaluated, fold_neighbours, kept_steps, plan_local
from bnfold.passes.side_by_side import join_beside
from bnfold.passes.witness import explain
from bnfold.passes.write_plan import write_plan
from bnfold.planning import Kept, Plan, Units


def plan_max(
    graph: ChannelGraph, refused: Mapping[int, Kept] | None = None, *, unshare_bytes: int = 0,
    horizontal: bool = False,
) -> Plan:  # fmt: skip
    """Decide every affine step of ``graph`` by the units of all tensors that it can reach.

    Args:
        graph: The facts, from a front end.
        refused: Steps that must stay, with the reason.
        unshare_bytes: How many bytes of weights that several operators share may be stored again,
            so that each of these can have its own.
        horizontal: Whether operators side by side become one also where that takes a copy.

    Returns:
        A plan in which every affine step is folded or kept with a reason.
    """
    given = refused or {}

    def planned(left_alone: frozenset[int]) -> Plan:
        joined = join_linear(graph, Draft(graph, given), left_alone)
        joined = join_beside(joined, given, copies=horizontal)
        return joined.with_merges(_solved(joined.graph, given, unshare_bytes))

    plan = planned(frozenset())
    barred = pads_before_kept(graph, plan)
    if not barred:
        return plan
    other, draft = planned(barred), Draft(graph, given)
    return other if _left(draft, other) < _left(draft, plan) else plan


def _solved(graph: ChannelGraph, refused: Mapping[int, Kept], unshare_bytes: int) -> Plan:
    cloned = _to_clone(graph, unshare_bytes)
    plan, draft = _planned(graph, refused, cloned, joining=False)
    # Beside scales next to 0 it may take a merge of neighbours to go on, which is not solved for.
    if plan.kept and _left(draft, plan_local(graph, refused)) < _left(draft, plan):
        plan, _ = _planned(graph, refused, cloned, joining=True)
    return plan


def _planned(
    graph: ChannelGraph, refused: Mapping[int, Kept], cloned: frozenset[str], *, joining: bool
) -> tuple[Plan, Draft]:
    """Neighbours first, merged with each other if so asked, and the rest solved for."""
    draft = Draft(graph, refused)
    why = {index: r.kept(index) for index, r in fold_neighbours(draft, joining=joining).items()}
    units: Mapping[int, Units] = draft.restored
    if any(True for _ in draft.steps()):
        outcome = solve(draft, cloned)
        why |= explain(outcome.channels.constraints, outcome.found, why)
        why |= outcome.held
        units = write_plan(draft, outcome)
    folds = (*draft.folds.values(), *evaluated(draft))
    return Plan("max", folds, kept_steps(draft, why), draft.absorptions, units), draft


def _left(draft: Draft, plan: Plan) -> int:
    """The bytes that the steps move which a plan keeps."""
    return sum(bytes_of(draft, draft.output(kept.step)) for kept in plan.kept)


def _to_clone(graph: ChannelGraph, budget: int) -> frozenset[str]:
    """The shared weights that fit into ``budget``, the smallest first."""
    shared: dict[str, tuple[int, Weight]] = {}
    for operator in graph.operators:
        if isinstance(operator, Linear) and operator.weight and len(operator.weight.readers) > 1:
            weight = operator.weight
            shared[weight.storage] = (weight.nbytes * (len(weight.readers) - 1), weight)
    chosen = []
    for cost, weight in sorted(shared.values(), key=lambda pair: pair[0]):
        budget -= cost
        if budget < 0:
            break
        chosen.append(weight.storage)
    return frozenset(chosen)
