"""Launches Triton kernels with little work on the CPU.

`kernel[grid](...)` binds the arguments, works out how each specializes the kernel, and looks the compiled kernel up by
all of that: 10 to 20 us, thousands of times a step. A `Launch` has everything but the tensors bound: each op makes it
once for a shape (`shaped`), and it keeps what Triton compiled for the tensors' dtypes and alignment. Triton decides
what to compile, as before: it sees every kind of launch once.
"""

# Triton chooses its driver at run time, and finds its functions there; kernels are called with constexpr arguments as
# plain values:
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

Made = TypeVar("Made")


def ceildiv(n: int, by: int) -> int:
    """n / by, rounded up. triton.cdiv does the same on the host in 2 us."""
    return -(-n // by)


def power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def shaped(make: Callable[..., Made]) -> Callable[..., Made]:
    """A function of shapes, strides, dtypes and tiles, whose results are kept: training repeats a few hundred."""
    return lru_cache(maxsize=4096)(make)


class Launch:
    """A kernel with everything but its tensors, which come first among its arguments: the grid, the numbers that follow
    them, and by name the constants and Triton's options.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *numbers: float, **options: Any) -> None:
        self.kernel, self.grid, self.numbers, self.options = kernel, grid, numbers, options
        self._blocks = (*grid, 1, 1)[:3]
        self._known: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        if not isinstance(self.kernel, JITFunction):  # Triton's interpreter
            self.kernel[self.grid](*tensors, *self.numbers, **self.options)
            return
        active = driver.active
        device = active.get_current_device()
        key = device, *[t if t is None else (t.dtype, not t.data_ptr() % 16) for t in tensors]
        known = self._known.get(key)
        if known is None:
            compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.options)
            if compiled is not None:  # a hook may stop Triton before it compiles
                constants = [self.options[name] for name in self.kernel.arg_names if name in self.options]
                self._known[key] = compiled, (*self.numbers, *constants)
            return
        compiled, rest = known
        stream, hooks = active.get_current_stream(device), knobs.runtime
        about, enter, leave = None, _active(hooks.launch_enter_hook), _active(hooks.launch_exit_hook)
        if enter is not None:
            about = compiled.launch_metadata(self._blocks, stream, *tensors, *rest)
        compiled.run(
            *self._blocks, stream, compiled.function, compiled.packed_metadata, about, enter, leave, *tensors, *rest
        )


def _active(hook: Any) -> Any:
    """A profiler's hook, or None if there is none; since Triton 3.5 it is a list of them that may be empty."""
    return hook if getattr(hook, "calls", hook) else None
