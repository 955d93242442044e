"""What Triton would compile for a call of an op, on any machine: launches are recorded, and nothing is compiled or run.

Tensors on `meta` are enough. Triton itself derives the signature, the constants and what it may assume of each argument
(divisible by 16, equal to 1), so a recorded launch is the one that a GPU of that generation would compile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget

from fluxq.kernels import backend
from fluxq.kernels.triton import table


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel as it is specialized for one launch.

    signature: argument -> Triton type ("*bf16", "i32", "constexpr"); constants: constexpr arguments and those that are
    None or 1; attributes: what Triton assumes of the others. registers: the most that a thread may have, or None.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    attributes: Mapping[tuple[int, ...], Any]
    warps: int
    stages: int
    registers: int | None
    key: str

    @property
    def name(self) -> str:
        """The kernel's module and function: "matmul._linear"."""
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"


def launch_of(key: str, fn: Any, compile: Mapping[str, Any]) -> Launch:
    """The launch of which Triton tells its hook `jit_cache_hook`, before it compiles."""
    kernel = fn.jit_function
    constants = {kernel.arg_names[i]: value for (i,), value in compile["constants"].items()}
    registers = json.loads(compile["specialization_data"])["options"].get("maxnreg")
    return Launch(
        kernel,
        dict(compile["signature"]),
        constants,
        compile["configs"][0],
        compile["num_warps"],
        compile["num_stages"],
        registers,
        f"{fn.module}.{fn.name} {key}",
    )


class NoGPU:
    """Triton's driver for a GPU that is not there. Each generation is a device of its own: Triton caches by device."""

    def __init__(self, generation: int) -> None:
        self._generation = generation

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._generation, 32)

    def get_current_device(self) -> int:
        return self._generation

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def recording(generation: int) -> Iterator[list[Launch]]:
    """Inside, the Triton backend runs as on a GPU of `generation`, and every launch goes into the list."""
    launches: list[Launch] = []

    def record(*, key: str, fn: Any, compile: Mapping[str, Any], **_: Any) -> bool:
        launches.append(launch_of(key, fn, compile))
        return True  # Triton ends here, and fluxq's own launcher remembers nothing: every launch is recorded

    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(NoGPU(generation))
    try:
        with (
            backend("triton"),
            patch.object(table, "generation", lambda device: generation),
            patch.object(triton.knobs.runtime, "jit_cache_hook", record),
        ):
            yield launches
    finally:
        triton.runtime.driver._active = active
