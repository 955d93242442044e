"""Every Python that starts under the emulated GPU imports this: it prepares libraries right after they are imported."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from dataclasses import replace

COMPUTE = os.environ.get("EMULATED_GPU_COMPUTE")
if os.environ.get("EMULATED_GPU_NO_TRITON"):
    sys.modules["triton"] = None


def prepare_torch(torch):
    torch.backends.cudnn.enabled = False  # it brings a runtime of its own; PyTorch's own convolutions take its place
    if COMPUTE:
        torch.ops.load_library(COMPUTE)


def prepare_bitsandbytes(bitsandbytes):
    sys.modules["torch"].ops.emulated_gpu.take_over("bitsandbytes::")


def prepare_gpus(gpus):
    """fluxq plans with the speed of the GPU that is emulated: what it would measure here is the host's."""
    known, measure = gpus.GPUS.get(os.environ.get("EMULATED_GPU_NAME", "rtx3060")), gpus.measure

    def from_table(folder, device="cuda", *arguments, **options):
        if known is None or not device.startswith("cuda"):
            return measure(folder, device, *arguments, **options)
        return replace(known, memory_gib=round(gpus._identity(device)[-1] / gpus.GIB, 2))

    gpus.measure = from_table


def prepare_interpreter(interpreter):
    """Triton's interpreter works on the GPU's own memory, and rounds and multiplies bf16 as a GPU does."""
    import numpy as np
    import torch
    import triton.language as tl

    ours = torch.ops.emulated_gpu
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    init, restore, cast, dot = (
        *(executor._init_args_hst, executor._restore_args_dev),
        *(builder.cast_impl, builder.create_dot),
    )

    def on_gpu(arguments):
        return any(isinstance(each, torch.Tensor) and each.is_cuda for each in arguments)

    def on_host(argument):
        if isinstance(argument, torch.Tensor) and argument.is_cuda:
            return ours.host_view(argument)
        return type(argument)(map(on_host, argument)) if type(argument) is tuple else argument

    def init_arguments(self, args, kwargs):
        """Without the copies to the host and back that the interpreter makes of a GPU's tensors."""
        if not on_gpu((*args, *kwargs.values())):
            return init(self, args, kwargs)
        name = f"triton {self.fn.__name__}"
        ours.kernel(name)
        for each in (*args, *kwargs.values()):
            if isinstance(each, torch.Tensor):
                ours.touch(each, name, False)  # which arguments are written is not known here
        return [on_host(each) for each in args], {key: on_host(each) for key, each in kwargs.items()}

    def restore_arguments(self, args, args_host, kwargs, kwargs_host):
        if not on_gpu((*args, *kwargs.values())):
            restore(self, args, args_host, kwargs, kwargs_host)

    def widened(data):
        return (data.astype(np.uint32) << 16).view(np.float32)

    def rounded(data):
        bits = np.ascontiguousarray(data).view(np.uint32)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(data), np.uint16(0x7FC0), nearest)

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target == tl.float32:
            return interpreter.TensorHandle(widened(src.data), target)
        if source == tl.float32 and target == tl.bfloat16:
            return interpreter.TensorHandle(rounded(src.data), target)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, d, *rest):
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return dot(self, a, b, d, *rest)
        return interpreter.TensorHandle(np.matmul(widened(a.data), widened(b.data)) + d.data, d.dtype.scalar)

    create_dot.mended = True  # fluxq's tests mend the interpreter's products too, unless they are
    executor._init_args_hst, executor._restore_args_dev = init_arguments, restore_arguments
    builder.cast_impl, builder.create_dot = cast_impl, create_dot


PREPARE = {"torch": prepare_torch, "fluxq.offload.gpus": prepare_gpus}
if COMPUTE:
    PREPARE |= {"bitsandbytes": prepare_bitsandbytes, "triton.runtime.interpreter": prepare_interpreter}


class Finder(importlib.abc.MetaPathFinder):
    """Finds modules as usual, and calls what PREPARE has for a module once the module has been executed."""

    def find_spec(self, name, path=None, target=None):
        prepare = PREPARE.pop(name, None)
        spec = prepare and importlib.machinery.PathFinder.find_spec(name, path)
        if not spec or not spec.loader:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            prepare(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
