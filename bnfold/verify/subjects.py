"""Whatever a caller hands in, as subjects, and the samples drawn for them."""

from __future__ import annotations

import sys
from typing import Any

from bnfold.errors import InconclusiveError
from bnfold.verify.ends import Pair
from bnfold.verify.models import load_model, same_graph
from bnfold.verify.onnx_inputs import drawn_for
from bnfold.verify.onnx_subject import OnnxSubject
from bnfold.verify.samples import Samples
from bnfold.verify.subject import RunOptions, Subject
from bnfold.verify.synthetic import synthetic


def is_torch(model: object) -> bool:
    """Whether ``model`` is one of torch's kinds; who has one has loaded torch."""
    if "torch" not in sys.modules:
        return False
    from bnfold.torch_api import KINDS

    return isinstance(model, KINDS)


def load_pair(reference: Any, candidate: Any, example_inputs: Any) -> tuple[Subject, Subject]:
    """Both models as subjects."""
    return (
        _subject(reference, "<reference>", example_inputs),
        _subject(candidate, "<candidate>", example_inputs),
    )


def _subject(model: Any, name: str, example_inputs: Any) -> Subject:
    if is_torch(model):
        from bnfold.verify.torch_subject import torch_subject

        return torch_subject(model, name, example_inputs=example_inputs)
    return OnnxSubject(load_model(model, name))


def same_model(pair: Pair) -> bool:
    """Whether the two are the same graph with the same weights, so that agreeing proves nothing."""
    one, other = pair.reference, pair.candidate
    if isinstance(one, OnnxSubject) and isinstance(other, OnnxSubject):
        return same_graph(one.model.proto, other.model.proto)
    return getattr(one, "model", one) is getattr(other, "model", other)


def drawn_samples(
    pair: Pair, samples: int, seed: int, provider: str, options: RunOptions
) -> Samples:
    """Samples for the reference, in the second sizes too where it takes these.

    Args:
        pair: The two models.
        samples: How many.
        seed: Their seed.
        provider: Where the reference has to take them; empty where nothing will be run.
        options: How it is run there.
    """
    subject = pair.reference
    if isinstance(subject, OnnxSubject):
        drawn = drawn_for(subject.model.proto, samples, seed)
    else:
        from bnfold.verify.torch_statistics import torch_facts

        facts = torch_facts(subject)  # type: ignore[arg-type]
        drawn = synthetic(subject.inputs, samples, seed, statistics=facts.statistics,
                          limits=facts.limits)  # fmt: skip
    if not drawn.has_second_sizes or _takes(pair, drawn, provider, options):
        return drawn
    return drawn.without_second_sizes()


def _takes(pair: Pair, drawn: Samples, provider: str, options: RunOptions) -> bool:
    """Whether the reference takes a sample in the second sizes."""
    feed = drawn.feeds[drawn.second.index(True)]
    try:
        if provider:
            pair.reference.runner(provider, options).run(feed)
        pair.reference.oracle()(feed)
    except InconclusiveError:
        return False
    return True
