"""``Loop`` of the oracle: without a condition the reference implementation never starts.

Source: the operator's specification (``M`` and ``cond`` are optional; scan outputs are stacked
along a new first axis).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx.reference.ops.op_loop import Loop as ReferenceLoop


class Loop(ReferenceLoop):
    """Runs its body until the condition is false, or as often as it is told."""

    body: Any
    _run_body: Any

    def _run(  # type: ignore[override]
        self, trips: Any, going: Any, *state: Any, context: Mapping[str, Any] | None = None,
        attributes: Any = None, **_: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        count_name, going_name, *names = self.body.input_names
        carried = list(state)
        scans: list[list[Any]] = [[] for _ in range(self.K)]
        more = True if going is None else bool(np.asarray(going).item())
        count, most = 0, None if trips is None else int(np.asarray(trips).item())
        while more and (most is None or count < most):
            inputs = dict(context or {}) | dict(zip(names, carried, strict=True))
            inputs |= {count_name: np.array(count, np.int64), going_name: np.array(more)}
            first, *rest = self._run_body(inputs, attributes=attributes)
            more = bool(np.asarray(first).item())
            carried = rest[: self.N]
            for scan, value in zip(scans, rest[self.N :], strict=True):
                scan.append(value)
            count += 1
        stacked = [np.stack(scan) if scan else np.empty((0,)) for scan in scans]
        return (*carried, *stacked)
