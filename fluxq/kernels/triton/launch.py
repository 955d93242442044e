"""Launches Triton kernels with less work on the CPU.

`kernel[grid](...)` binds the arguments, works out how each specializes the kernel, and looks the compiled kernel up by
all of that: 10 to 20 us, thousands of times a step. A `launched` kernel keeps what Triton compiled under a shorter
key, and launches it directly. Triton decides what to compile, as before: it sees every key once.
"""

# Triton chooses its driver at run time, and finds its functions there:
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

WIDE = 2**31


def ceildiv(n: int, by: int) -> int:
    """n / by, rounded up. triton.cdiv does the same on the host in 2 us."""
    return -(-n // by)


def power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def launched(do_not_specialize: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """triton.jit for a kernel that the host launches. In Triton's interpreter it is triton.jit itself."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return triton.jit(do_not_specialize=do_not_specialize)
    return lambda function: _Launched(function, do_not_specialize=do_not_specialize)


class _Launched(JITFunction):
    """A kernel that remembers what Triton compiled for it, by key, with the constants that follow the arguments."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        super().__init__(function, **options)
        self._known: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def run(self, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Any:
        """Launch with `args` and, by name, the constants that follow them and Triton's options."""
        if warmup:
            return super().run(*args, grid=grid, warmup=True, **options)
        device = driver.active.get_current_device()
        key = (device, *specializations(args), *options.items())
        if key not in self._known:
            compiled = super().run(*args, grid=grid, warmup=False, **options)
            if compiled is not None:  # a hook may stop Triton before it compiles
                self._known[key] = compiled, tuple(options[name] for name in self.arg_names if name in options)
            return compiled
        compiled, constants = self._known[key]
        x, y, z = (*grid, 1, 1)[:3]
        stream, hooks = driver.active.get_current_stream(device), knobs.runtime
        about = compiled.launch_metadata((x, y, z), stream, *args, *constants)
        compiled.run(
            x, y, z, stream, compiled.function, compiled.packed_metadata, about,
            hooks.launch_enter_hook, hooks.launch_exit_hook, *args, *constants,
        )  # fmt: skip
        return compiled


def specializations(args: tuple[Any, ...]) -> list[Any]:
    """What Triton may compile in, by argument: a tensor's dtype and alignment; whether an integer is 1, a multiple of
    16, or wider than 32 bits; the type of anything else.
    """
    found: list[Any] = []
    for value in args:
        kind = type(value)
        if kind is int:
            found.append((value == 1, value % 16 == 0, -WIDE <= value < WIDE))
        elif isinstance(value, Tensor):
            found.append(value.dtype)
            found.append(value.data_ptr() % 16 == 0)
        else:
            found.append(kind)
    return found
