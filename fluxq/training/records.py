"""The steps of a run in memory, which the plot and the checks of a step read: 40 bytes each, so that a run of a million
steps needs no more memory than one of a thousand, within a few percent.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

COLUMNS = ("step", "loss", "grad", "seconds", "peak_bytes")


class Records(Sequence[Mapping[str, Any]]):
    """Steps in order, as log.jsonl has them; "seconds" and "peak_bytes" are 0 where they are not known.

    Raises LookupError, TypeError, ValueError or OverflowError for a step that lacks a number, or has something else
    there: only losses and gradients may be infinite or NaN.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self._columns = {name: array("d") for name in COLUMNS}  # integers are exact up to 2**53
        for record in records:
            self.append(record)

    def append(self, record: Mapping[str, Any]) -> None:
        step, seconds, peak = record["step"], record.get("seconds") or 0, record.get("peak_bytes") or 0
        if not all(map(math.isfinite, (step, seconds, peak))):
            raise ValueError("a step's number, seconds and peak_bytes must be finite")
        values = array("d", [step, record["loss"], record["grad"], seconds, peak])
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)

    def column(self, name: str) -> array[float]:
        return self._columns[name]

    def __len__(self) -> int:
        return len(self._columns["step"])

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        step, loss, grad, seconds, peak = (column[index] for column in self._columns.values())
        return {"step": int(step), "loss": loss, "grad": grad, "seconds": seconds, "peak_bytes": int(peak)}
