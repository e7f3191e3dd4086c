"""The cases of one model: folds that must pass, and folds that must not."""

from __future__ import annotations

import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from numpy.random import Generator

from bnfold.errors import InconclusiveError
from tools.sabotage_defects import DEFECTS, HARD_DEFECTS, Defect
from tools.sabotage_graph import (
    F64,
    Draft,
    Feed,
    NoSiteError,
    changed,
    distance,
    jiggled,
    outputs,
    sample,
)
from tools.sabotage_matrix import Case, Said, Skipped
from tools.sabotage_peers import TOOLS, TORCH, by_bnfold
from tools.sabotage_rewrites import HARD_REWRITES, REWRITES

# A defect must move the outputs by so many times what half an ulp on the same weights does.
FELT = 32.0
# A right fold may, by so many times what half an ulp on all weights does.
RIGHT = 64.0
# Float64 itself, with room to spare; where a defect changes no weight it is held against this.
FLOOR = 2.0**-40
TRIES = 12
IN_REFERENCE = "-in-reference"
HARD = {*HARD_REWRITES, *(defect.name for defect in HARD_DEFECTS)}
PEERS = ("onnxsim", "onnxruntime-basic")


Judge = Callable[[onnx.ModelProto, onnx.ModelProto], Said]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to be folded rightly and wrongly.

    Attributes:
        name: For the table.
        model: The unfolded model, weights inside.
        net: Its name in ``models``, if it is one of these.
    """

    name: str
    model: onnx.ModelProto
    net: str = ""


@dataclass(frozen=True, slots=True)
class Base:
    """A right fold that defects are planted in.

    Attributes:
        origin: The tool that made it.
        model: The folded model.
        clean: Its outputs in float64.
    """

    origin: str
    model: onnx.ModelProto
    clean: list[F64]

    @classmethod
    def by(cls, origin: str, model: onnx.ModelProto, feed: Feed) -> Base:
        """The fold of ``model`` by a tool."""
        folded = TOOLS[origin](model)
        return cls(origin, folded, outputs(folded, feed))

    def felt(self, planted: onnx.ModelProto, feed: Feed, rng: Generator) -> float:
        """How far the outputs move, in units of half an ulp on the weights that differ."""
        off = distance(self.clean, outputs(planted, feed))
        moved = jiggled(self.model, changed(self.model, planted), rng)
        return off / max(distance(self.clean, outputs(moved, feed)), FLOOR)


@dataclass(frozen=True, slots=True)
class Sabotage:
    """The sabotage of one model.

    Attributes:
        subject: The model.
        judge: Who is tested.
        seed: For the sites.
        only: Names of tools, rewrites and defects; all where empty.
        save: Where to keep the pairs that were not told; None for nowhere.
        hard: Also what the check does not promise to tell.
    """

    subject: Subject
    judge: Judge
    seed: int = 0
    only: tuple[str, ...] = ()
    save: Path | None = None
    hard: bool = False

    def run(self) -> Iterator[Case | Skipped]:
        """All cases of the model."""
        feed = sample(self.subject.model, self.seed)
        yield from self._right_folds(feed)
        yield from self._rewrites()
        every = (*DEFECTS, *HARD_DEFECTS)
        wanted = [defect for defect in every if self._wanted(defect.name)]
        yield from self.wrong_folds("bnfold", wanted, feed)
        # Half of them into each peer's fold, and with the next seed into the other's.
        for turn, origin in enumerate(PEERS, start=self.seed):
            yield from self.wrong_folds(origin, wanted[turn % 2 :: 2], feed)

    def _wanted(self, name: str) -> bool:
        if self.only:
            return name in self.only
        return self.hard or name.removesuffix(IN_REFERENCE) not in HARD

    def _skip(self, name: str, origin: str, why: object) -> Skipped:
        return Skipped(self.subject.name, name, origin, _line(why))

    # ---- right folds ----

    def _right_folds(self, feed: Feed) -> Iterator[Case | Skipped]:
        model, net = self.subject.model, self.subject.net
        makers: dict[str, Callable[[], onnx.ModelProto]] = {
            name: partial(tool, model) for name, tool in TOOLS.items()
        }
        if net:
            makers |= {name: partial(fold.export, net) for name, fold in TORCH.items()}
        for name, make in makers.items():
            if self._wanted(name):
                yield self.right_fold(name, make, feed)

    def right_fold(
        self, name: str, make: Callable[[], onnx.ModelProto], feed: Feed
    ) -> Case | Skipped:
        """The fold that ``make`` gives, which the oracle may find wrong."""
        try:
            folded = make()
        except Exception as error:
            return self._skip(name, "", error)
        if _graph(folded) == _graph(self.subject.model):
            return self._skip(name, "", "folds nothing")
        right, off = self._is_right(folded, feed)
        return self._judged(name, "", self.subject.model, folded, right=right, felt=off)

    def _is_right(self, folded: onnx.ModelProto, feed: Feed) -> tuple[bool, float]:
        """By the oracle; what it can't run (onnxruntime's own operators) is taken to be right."""
        model, rng = self.subject.model, self._rng("right")
        every = [tensor.name for tensor in model.graph.initializer]
        try:
            clean = outputs(model, feed)
            noise = distance(clean, outputs(jiggled(model, every, rng), feed))
            off = distance(clean, outputs(folded, feed)) / max(noise, FLOOR)
        except InconclusiveError:
            return True, float("nan")
        return off <= RIGHT, off

    def _rewrites(self) -> Iterator[Case | Skipped]:
        """Of the fold, and of the unfolded model: what one side has the other may lack."""
        reference = self.subject.model
        folded = by_bnfold(reference)
        for name, rewrite in {**REWRITES, **HARD_REWRITES}.items():
            for side in ("", IN_REFERENCE):
                if not self._wanted(name + side):
                    continue
                draft = Draft(reference if side else folded)
                try:
                    rewrite(draft, self._rng(name))
                except NoSiteError as error:
                    yield self._skip(name + side, "bnfold", error)
                    continue
                pair = (draft.model, folded) if side else (reference, draft.model)
                yield self._judged(name + side, "bnfold", *pair, right=True)

    # ---- wrong folds ----

    def wrong_folds(
        self, origin: str, defects: Sequence[Defect], feed: Feed
    ) -> Iterator[Case | Skipped]:
        """Each defect in the fold by ``origin``."""
        try:
            base = Base.by(origin, self.subject.model, feed)
        except Exception as error:
            yield from (self._skip(defect.name, origin, error) for defect in defects)
            return
        for defect in defects:
            yield self._wrong_fold(defect, base, feed)

    def _wrong_fold(self, defect: Defect, base: Base, feed: Feed) -> Case | Skipped:
        rng = self._rng(f"{defect.name}/{base.origin}")
        why = "the outputs don't feel it"
        for _ in range(TRIES):
            try:
                planted, site = self._planted(defect, base, rng)
                felt = base.felt(planted, feed, rng)
            except NoSiteError as error:
                why = str(error)
            except InconclusiveError as error:
                why = f"the model does not run with it: {_line(error)}"
            else:
                if felt >= FELT:
                    return self._judged(defect.name, base.origin, self.subject.model, planted,
                                        right=False, site=site, felt=felt)  # fmt: skip
        return self._skip(defect.name, base.origin, why)

    def _planted(self, defect: Defect, base: Base, rng: Generator) -> tuple[onnx.ModelProto, str]:
        draft = Draft(self.subject.model if defect.before_folding else base.model)
        site = defect.plant(draft, rng)
        if not defect.before_folding:
            return draft.model, site
        try:
            return TOOLS[base.origin](draft.model), site
        except Exception as error:
            raise NoSiteError(f"{base.origin} can't fold it: {_line(error)}") from error

    # ---- both ----

    def _rng(self, name: str) -> Generator:
        return np.random.default_rng(
            [self.seed, zlib.crc32(f"{self.subject.name}/{name}".encode())]
        )

    def _judged(
        self, name: str, origin: str, reference: onnx.ModelProto, candidate: onnx.ModelProto, *,
        right: bool, site: str = "", felt: float = 0.0,
    ) -> Case:  # fmt: skip
        start = time.perf_counter()
        try:
            said = self.judge(reference, candidate)
        except Exception as error:
            said = Said("error", f"{type(error).__name__} {_place(error)}: {_line(error)}")
        seconds = time.perf_counter() - start
        case = Case(
            self.subject.name, name, origin, right, site, felt, said, seconds, self.seed
        )  # fmt: skip
        if self.save is not None and case.outcome != "good":
            place = self.save / f"{self.subject.name}.{name}.{origin or 'own'}.{self.seed}"
            place.mkdir(parents=True, exist_ok=True)
            onnx.save(reference, place / "reference.onnx")
            onnx.save(candidate, place / "candidate.onnx")
        return case


def _graph(model: onnx.ModelProto) -> list[bytes]:
    parts = [*model.graph.node, *model.graph.initializer]
    return [part.SerializeToString() for part in parts]


def _line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _place(error: BaseException) -> str:
    """Where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"({Path(frame.filename).name}:{frame.lineno})"
