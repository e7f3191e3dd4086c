"""Writes ``bnfold/report/schema.json``: the JSON Schema of a report, from the classes in it.

python -m tools.report_schema        write it
python -m tools.report_schema -      print it

Types come from annotations, descriptions from docstrings; what is here is what neither can say.
Run it after a change of a class that a report holds; a test holds that the file is what this says.
"""

from __future__ import annotations

import enum
import json
import re
import sys
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from bnfold.channel_graph import Leftover
from bnfold.planning import How
from bnfold.report.envelope import Envelope
from bnfold.report.model import SCHEMA_VERSION, Report, Step
from bnfold.verify.judge import Gates, Settled, Verdict
from bnfold.verify.result import CheckResult, TierResult

Schema = dict[str, Any]
FILE = Path(__file__).parent.parent / "bnfold" / "report" / "schema.json"
WIDTH = 96

VERSION: Schema = {
    "description": "The version of this schema: it grows when a field changes its meaning or "
    "goes away.",
    "const": SCHEMA_VERSION,
}
NUMBER: Schema = {
    "description": "A number; one that is not finite is a string, because JSON has no word for it.",
    "anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}],
}
COUNT: Schema = {"type": "integer", "minimum": 0}
# What a field holds, where its annotation says less.
VALUES: Mapping[tuple[type, str], Schema] = {
    (Step, "verdict"): {"enum": ["folded", "kept", "apart"]},
    (Step, "how"): {"enum": ["", *(how.value for how in How)]},
    (Step, "form"): {"enum": ["", *(form.value for form in Leftover)]},
    (Step, "code"): {"type": "string", "pattern": "^(BNF[0-9]{3})?$"},
    (TierResult, "tier"): {"enum": list("ABCD")},
}
# What fields are, where the class's docstring says it in prose.
DESCRIPTIONS: Mapping[tuple[type, str], str] = {
    (Settled, "verdict"): "The verdict.",
    (Settled, "message"): "Why, in one sentence.",
    (Settled, "constant"): "Whether the output is the same for every sample.",
    (Gates, "rtol"): "Relative limit; null where none was given.",
    (Gates, "atol"): "Absolute limit; null where none was given.",
}
# What ``to_dict`` writes beside the fields: before them, and after them.
BEFORE: Mapping[type, Schema] = {
    CheckResult: {
        "verdict": {
            "description": "The worst of the tiers' verdicts; inconclusive where there is none.",
            "enum": [verdict.value for verdict in Verdict],
        },
        "exit_code": {
            "description": "The exit code of the command line: 0 pass, 1 fail, 3 inconclusive.",
            "enum": sorted(verdict.exit_code for verdict in Verdict),
        },
        "message": {"description": "What the tier that speaks says.", "type": "string"},
    },
    Report: {"schema_version": VERSION},
}
AFTER: Mapping[type, Schema] = {
    Report: {
        "folded": {"description": "How many steps vanish.", **COUNT},
        "kept": {"description": "How many stay.", **COUNT},
    },
}


def report_schema() -> Schema:
    """The schema of what ``--report FILE.json`` writes."""
    found: dict[str, Schema] = {}
    envelope = _properties(Envelope, found)
    version = {"version": {"type": "string"}}
    tool = _object("What wrote the report.", {"name": {"const": "bnfold"}, **version})
    del envelope["version"]
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:bnfold:report:{SCHEMA_VERSION}",
        "title": f"Report of bnfold, version {SCHEMA_VERSION}",
    }
    said = "What --report FILE.json writes: one envelope for every command."
    body = _object(said, {"schema_version": VERSION, "tool": tool, **envelope})
    return {**head, **body, "$defs": {"number": NUMBER, **dict(sorted(found.items()))}}


def _object(said: str, properties: Schema) -> Schema:
    return {
        "description": said, "type": "object", "properties": properties,
        "required": list(properties), "additionalProperties": False,
    }  # fmt: skip


# ---- classes ----


def _define(kind: type, found: dict[str, Schema]) -> None:
    """Add the schema of a class, and of those that it holds, to ``found``."""
    if kind.__name__ in found:
        return
    found[kind.__name__] = {}  # its place, should it hold itself
    summary = _plain((kind.__doc__ or "").split("\n\n")[0])
    inner = {**BEFORE.get(kind, {}), **_properties(kind, found), **AFTER.get(kind, {})}
    found[kind.__name__] = _object(summary, inner)


def _properties(kind: Any, found: dict[str, Schema]) -> Schema:
    said, hints = _described(kind), get_type_hints(kind)
    silent = [field.name for field in fields(kind) if field.name not in said]
    if silent:
        raise LookupError(f"{kind.__name__}: its docstring has no attribute {', '.join(silent)}")
    return {
        field.name: {
            "description": said[field.name],
            **(VALUES.get((kind, field.name)) or _field(hints[field.name], found)),
        }
        for field in fields(kind)
    }


def _described(kind: type) -> dict[str, str]:
    """What the docstring says of each attribute, in the words of JSON."""
    said = {name: text for (owner, name), text in DESCRIPTIONS.items() if owner is kind}
    listed = (kind.__doc__ or "").partition("Attributes:\n")[2]
    for name, text in re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", listed, re.MULTILINE):
        said[name] = _plain(re.sub(r"\bNone\b", "null", text))
    return said


def _plain(text: str) -> str:
    return " ".join(text.replace("`", "").split())


# ---- types ----


def _field(kind: Any, found: dict[str, Schema]) -> Schema:
    return COUNT if kind is int else _schema(kind, found)


def _schema(kind: Any, found: dict[str, Schema]) -> Schema:
    """The schema of a type, as `bnfold.verify.plain` writes its values."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (one,) = (_schema(option, found) for option in inner if option is not types.NoneType)
        if set(one) == {"type"}:
            return {"type": [one["type"], "null"]}
        return {"anyOf": [one, {"type": "null"}]}
    if origin is tuple:
        return _array(inner, found)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _schema(inner[1], found)}
    if is_dataclass(kind) and isinstance(kind, type):
        _define(kind, found)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {"enum": [member.value for member in kind]}
    if kind is float:
        return {"$ref": "#/$defs/number"}
    return {"type": {str: "string", int: "integer", bool: "boolean"}[kind]}


def _array(inner: tuple[Any, ...], found: dict[str, Schema]) -> Schema:
    if inner[1:] == (Ellipsis,):
        return {"type": "array", "items": _schema(inner[0], found)}
    items = [_schema(kind, found) for kind in inner]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


# ---- the file ----


def written(value: Any, indent: int = 0) -> str:
    """``value`` as JSON, on one line where it fits."""
    flat = json.dumps(value)
    if len(flat) + indent <= WIDTH or not isinstance(value, dict | list):
        return flat
    pad, end = "\n" + " " * (indent + 2), "\n" + " " * indent
    if isinstance(value, list):
        return "[" + ",".join(pad + written(item, indent + 2) for item in value) + end + "]"
    items = (f"{pad}{json.dumps(key)}: {written(v, indent + 2)}" for key, v in value.items())
    return "{" + ",".join(items) + end + "}"


def main(arguments: list[str]) -> None:
    """Write or print the schema."""
    text = written(report_schema()) + "\n"
    if arguments == ["-"]:
        sys.stdout.write(text)
    else:
        FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
