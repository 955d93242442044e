"""Kernel tests run on the GPU if there is one, else in Triton's interpreter, fixed for bf16 and extended by scaled
products.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from programs import Programs

from fluxq.kernels import backend


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton_ops(device):
    """The Triton backend's module, active during the test."""
    pytest.importorskip("triton")
    if device.type == "cpu":
        mend_interpreted_dot()
        round_interpreted_bf16()
        add_interpreted_dot_scaled()
        patch_once_a_launch()
        make_types_once()
    with backend("triton"):
        from fluxq.kernels import triton

        yield triton


@pytest.fixture
def recorded(device, triton_ops, monkeypatch):
    """Checks every interpreted launch for memory that its programs share (tests/programs.py); None on a GPU."""
    return Programs(monkeypatch) if device.type == "cpu" else None


@pytest.fixture(params=["reference", "triton"])
def either_backend(request):
    """Runs the test twice, on the reference and on Triton."""
    if request.param == "triton":
        request.getfixturevalue("triton_ops")
        yield request.param
    else:
        with backend("reference"):
            yield request.param


def mend_interpreted_dot() -> None:
    """Triton's interpreter multiplies the bits of bf16 as if they were integers; convert them to fp32 first."""
    import triton.language as tl
    from triton.runtime import interpreter

    if getattr(interpreter.InterpreterBuilder.create_dot, "mended", False):
        return
    original = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        bits = handle.data
        return (bits.astype(np.uint32) << 16).view(np.float32) if handle.dtype.scalar == tl.bfloat16 else bits

    def create_dot(self, a, b, d, *rest):
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return original(self, a, b, d, *rest)
        product = np.matmul(widened(a), widened(b), dtype=np.float32)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    create_dot.mended = True
    interpreter.InterpreterBuilder.create_dot = create_dot


def round_interpreted_bf16() -> None:
    """Triton's interpreter cuts off the lower half of an fp32 number that becomes bf16; round it, half to even."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.cast_impl
    if getattr(original, "mended", False):
        return

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return original(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return interpreter.TensorHandle(np.where(np.isnan(src.data), np.uint16(0x7FC0), nearest), tl.bfloat16)

    cast_impl.mended = True
    interpreter.InterpreterBuilder.cast_impl = cast_impl


def add_interpreted_dot_scaled() -> None:
    """Triton's interpreter has `tl.dot_scaled` from 3.8 on; here for e4m3 on both sides, each 32 numbers along K times
    two to the power of their scale less 127, summed in fp32.
    """
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    if hasattr(interpreter.InterpreterBuilder, "create_dot_scaled"):
        return
    original = TritonSemantic.dot_scaled

    def with_constant_formats(self, a, a_scale, a_format, b, b_scale, b_format, *rest):
        a_format, b_format = tl.constexpr(a_format), tl.constexpr(b_format)  # as the compiler hands them on
        return original(self, a, a_scale, a_format, b, b_scale, b_format, *rest)

    def widened(handle, scale, axis):
        numbers = torch.from_numpy(handle.data).view(torch.float8_e4m3fn).float().numpy()
        powers = np.exp2(scale.data.astype(np.float32) - 127).repeat(32, axis=1)
        return numbers * (powers if axis == 1 else powers.T)

    def create_dot_scaled(self, a, a_scale, a_format, b, b_scale, b_format, fast_math, a_k_pack, b_k_pack, acc):
        product = widened(a, a_scale, 1) @ widened(b, b_scale, 0)  # b is (K, N), its scales (N, K/32)
        return interpreter.TensorHandle(product + acc.data, acc.dtype.scalar)

    TritonSemantic.dot_scaled = with_constant_formats
    interpreter.InterpreterBuilder.create_dot_scaled = create_dot_scaled


def patch_once_a_launch() -> None:
    """Triton's interpreter replaces all of triton.language anew whenever one device function calls another, which is
    half of its time; here once a launch.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    if getattr(patch, "mended", False):
        return
    patched = set()  # in the launch that is under way

    def once(fn):
        modules = frozenset(id(m) for m in fn.__globals__.values() if m is tl or m is tl.core)
        if modules not in patched:
            patched.add(modules)
            return patch(fn)

    def launched(executor, *args, **kwargs):
        patched.clear()
        return launch(executor, *args, **kwargs)

    once.mended = True
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, launched


def make_types_once() -> None:
    """Triton's interpreter makes the types and shapes of every value anew, which is half of the time that is left; here
    each once. So is each number that meets a tensor, as wide as that; two tensors of one type are not checked. Nor are
    integers for overflow: they wrap around on a GPU.
    """
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    if hasattr(interpreter._get_np_dtype, "cache_info"):
        return
    make_block_type, broadcast = tl.block_type.__init__, TritonSemantic.broadcast_impl_value
    check, numbers = TritonSemantic.binary_op_type_checking_impl, {}

    @cache
    def block_type(element_ty, shape):
        made = object.__new__(tl.block_type)
        make_block_type(made, element_ty, [*shape])
        return vars(made)

    @cache
    def shape_and_size(shape):
        return tl.tuple([tl.constexpr(n) for n in shape]), tl.constexpr(math.prod(shape))

    def init_block_type(self, element_ty, shape):
        vars(self).update(block_type(element_ty, tuple(getattr(n, "value", n) for n in shape)))

    def init_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape_and_size((*type.shape,) if type.is_block() else ())

    def broadcast_value(self, a, b):
        return (a, b) if a.type.is_block() and a.shape is b.shape else broadcast(self, a, b)

    def checked_operands(self, a, b, *options, **more):
        tensors = isinstance(a, tl.tensor) + isinstance(b, tl.tensor)
        if tensors == 2 and a.shape is b.shape and a.dtype == b.dtype and a.dtype in (tl.float32, tl.int32):
            return a, b
        if tensors != 1:
            return check(self, a, b, *options, **more)
        tensor, number = (a, b) if isinstance(a, tl.tensor) else (b, a)
        key = tensor.type, type(number), repr(number), tensor is a, options, *more.items()
        if key not in numbers:
            pair = check(self, a, b, *options, **more)
            kept, made = pair if tensor is a else pair[::-1]
            if kept is not tensor:
                return pair
            made.handle.data.setflags(write=False)
            numbers[key] = made
        return (a, numbers[key]) if tensor is a else (numbers[key], b)

    tl.block_type.__hash__ = tl.pointer_type.__hash__ = tl.dtype.__hash__
    tl.block_type.__init__, tl.tensor.__init__ = init_block_type, init_tensor
    TritonSemantic.broadcast_impl_value = broadcast_value
    TritonSemantic.binary_op_type_checking_impl = checked_operands
    interpreter._get_np_dtype = cache(interpreter._get_np_dtype)
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
