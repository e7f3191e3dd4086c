"""What can go wrong, as a tree; each class carries the exit code of the command line.

BnfoldError                   1
├── UsageError                2   the call itself is wrong (a bad option, output equal to input)
├── InconclusiveError         3   the check could not be computed, so it does not pass
├── ProviderError             4   a runtime or execution provider that was asked for is missing
├── ModelError                5   the model, or reading and writing it, is at fault
│   ├── ReadError             5   the file can't be read as an ONNX model
│   ├── InvalidModelError     5   it can be read, but is not a model that means something
│   └── WriteError            5   the result can't be written
└── MismatchError             1   the folded model does not say the same as the unfolded one

A bug of ours is none of these: it surfaces as the plain exception that it is.
"""

from __future__ import annotations

from typing import ClassVar, Self


class BnfoldError(Exception):
    """Any error that is about the user's call, model or environment; its text is one line.

    Args:
        met: What was met, in one sentence.
        file: The file it was met in, if there is one.
        node: The node or tensor it was met at, if there is one.
        todo: The next step for the user.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, met: str, *, file: str = "", node: str = "", todo: str = "") -> None:
        place = ": ".join(part for part in (file, f"node '{node}'" if node else "") if part)
        text = f"{place}: {met}" if place else met
        super().__init__(" ".join(f"{text}; {todo}".split()) if todo else " ".join(text.split()))
        self.met, self.file, self.node, self.todo = met, file, node, todo

    def at(self, file: str) -> Self:
        """The same error, met in ``file``."""
        return type(self)(self.met, file=file, node=self.node, todo=self.todo)


class UsageError(BnfoldError):
    """The call itself is wrong."""

    exit_code = 2


class InconclusiveError(BnfoldError):
    """The check could not be computed; what could not be computed never passes."""

    exit_code = 3


class ProviderError(BnfoldError):
    """A runtime or an execution provider that was asked for is missing."""

    exit_code = 4


class ModelError(BnfoldError):
    """The model, or reading or writing it, is at fault."""

    exit_code = 5


class ReadError(ModelError):
    """The file can't be read as an ONNX model."""


class InvalidModelError(ModelError):
    """The file is read, but the model in it is not valid."""


class WriteError(ModelError):
    """The result can't be written."""


class MismatchError(BnfoldError):
    """The two models do not say the same."""

    exit_code = 1
