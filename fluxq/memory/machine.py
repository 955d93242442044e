"""What this machine has that a run depends on: memory, the NVIDIA driver, GPUs, and what this torch can do with them.

`read_machine` looks; `notes` and `obstacle` judge what it saw, so that they are tested without any GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

LIBCUDA = tuple(f"{folder}/libcuda.so.1" for folder in ("/usr/lib/wsl/lib", "/usr/lib/x86_64-linux-gnu", "/usr/lib64"))
DEVICES = ("/dev/nvidiactl", "/dev/dxg")  # of Linux' own driver, and of Windows' in WSL


@dataclass(frozen=True)
class GPU:
    """A CUDA GPU that torch can use; `nbytes` is its memory."""

    name: str
    capability: tuple[int, int]
    nbytes: int


@dataclass(frozen=True)
class Machine:
    """What torch was built for, what is there, and the GPU that a run would use.

    cuda is torch's CUDA version, None for a build without; architectures what it has code for ("sm_90",
    "compute_120"); hidden says that CUDA_VISIBLE_DEVICES takes all GPUs away on purpose; bf16, that torch makes bf16
    tensors on the GPU, be their arithmetic emulated or not; triton, that the package is installed.
    """

    torch: str
    cuda: str | None
    rocm: bool
    driver: bool
    hidden: bool
    gpu: GPU | None
    architectures: tuple[str, ...] = ()
    bf16: bool = True
    triton: bool = True


def read_machine() -> Machine:
    """This machine, through torch."""
    import torch

    gpu, available = None, torch.cuda.is_available()
    if available:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        gpu = GPU(properties.name, (properties.major, properties.minor), properties.total_memory)
    return Machine(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        rocm=torch.version.hip is not None,
        driver=has_nvidia_driver(platform.system()),
        hidden=os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"),
        gpu=gpu,
        architectures=tuple(torch.cuda.get_arch_list()) if available else (),
        bf16=not available or torch.cuda.is_bf16_supported(including_emulation=True),
        triton=importlib.util.find_spec("triton") is not None,
    )


def has_nvidia_driver(
    system: str,
    exists: Callable[[str], bool] = os.path.exists,
    which: Callable[[str], str | None] = shutil.which,
) -> bool:
    """Whether the NVIDIA driver is installed, told without loading anything of it."""
    if system == "Windows":
        return exists(os.path.join(os.environ.get("SYSTEMROOT", r"C:\Windows"), "System32", "nvcuda.dll"))
    return any(map(exists, DEVICES)) and (which("nvidia-smi") is not None or any(map(exists, LIBCUDA)))


def obstacle(machine: Machine) -> str | None:
    """Why the GPU cannot be used although torch offers it, in one sentence with the way out; None if it can."""
    gpu = machine.gpu
    if gpu is None or machine.rocm:
        return None
    if machine.architectures and not any(_runs(code, gpu.capability) for code in machine.architectures):
        return (
            f"torch {machine.torch} has no code for the {gpu.name} ({_sm(gpu.capability)}; it has "
            f"{', '.join(machine.architectures)}); install the build that pytorch.org names for this GPU, or hide "
            "the GPU with CUDA_VISIBLE_DEVICES=-1"
        )
    if not machine.bf16:
        return (
            f"torch {machine.torch} cannot compute in bf16 on the {gpu.name} ({_sm(gpu.capability)}); use a GPU of "
            "the RTX 20 series or newer, or hide this one with CUDA_VISIBLE_DEVICES=-1"
        )
    return None


def notes(machine: Machine) -> list[str]:
    """What the user of this machine should know, a line each."""
    gpu = machine.gpu
    if gpu is None and machine.driver and not machine.rocm and not machine.hidden:
        if machine.cuda is None:
            return [
                f"an NVIDIA driver is installed, but this torch ({machine.torch}) was built without CUDA, so all of it "
                "runs on the CPU; mend it with: pip install --force-reinstall torch --index-url INDEX, where "
                "INDEX is the CUDA address that pytorch.org shows under Get Started"
            ]
        return [
            f"this torch ({machine.torch}) was built for CUDA {machine.cuda} but finds no GPU that it can use, so "
            "everything runs on the CPU; update the NVIDIA driver (nvidia-smi shows the CUDA version it reaches)"
        ]
    if gpu is not None and not machine.rocm and gpu.capability < (8, 0):
        return [
            f"the {gpu.name} ({_sm(gpu.capability)}) has no bf16 arithmetic: torch emulates it, which is right but "
            "several times slower than on the RTX 30 series and newer"
        ]
    if gpu is not None and not machine.rocm and not machine.triton:
        return [
            "Triton is not installed, so the GPU runs plain PyTorch in place of fluxq's "
            "kernels; mend it with: pip install triton (on Windows: pip install triton-windows)"
        ]
    return []


def free_gpu_bytes() -> int | None:
    """Bytes of the GPU that a run could use: the driver's free ones, and those that torch has taken and does not use;
    None without a GPU, or where it does not say.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    except RuntimeError:  # another program may have it for itself
        return None


SPILL_LEAST = 256 << 20
"""Less than so many bytes beyond what the GPU had free may be rounding, and the driver's own."""


class GPUBytes(NamedTuple):
    """Of a GPU: its own memory, what of it is free, and what torch has taken from the driver."""

    total: int
    free: int
    reserved: int


def spilled(before: GPUBytes, now: GPUBytes) -> int:
    """Bytes that torch has taken since `before` and that cannot lie on the GPU: more than was free, or on a GPU that
    is full more than its free memory went down by. 0 where they are few.
    """
    taken = now.reserved - before.reserved
    beyond = taken - before.free
    if now.free < now.total // 20:
        beyond = max(beyond, taken - (before.free - now.free))
    return beyond if beyond > SPILL_LEAST else 0


class SpillWatch:
    """Tells once when the driver has put into system memory what should be on the GPU, which on Windows and in WSL it
    does without a word, instead of running out. To be made before a run puts anything on the GPU.
    """

    def __init__(self, read: Callable[[], GPUBytes | None] | None = None) -> None:
        self._read = read or _gpu_bytes
        self._before = self._read()

    def note(self) -> str | None:
        """What to tell the user, if it has happened and was not told yet."""
        if self._before is None or (now := self._read()) is None or not (nbytes := spilled(self._before, now)):
            return None
        self._before = None
        return (
            f"about {nbytes / 2**30:.1f} GiB that should be on the GPU lie in system memory, where the driver has put "
            "them without a word: steps take many times as long. Lower --vram by as much or close what else uses the "
            'GPU; "CUDA - Sysmem Fallback Policy: Prefer No Sysmem Fallback" in the NVIDIA Control Panel turns it off'
        )


def _gpu_bytes() -> GPUBytes | None:
    """Those of the GPU in use, where its driver may spill."""
    import torch

    if not torch.cuda.is_available() or not may_spill(platform.system(), platform.release()):
        return None
    free, total = torch.cuda.mem_get_info()
    return GPUBytes(total, free, torch.cuda.memory_reserved())


def may_spill(system: str, release: str) -> bool:
    """Whether the NVIDIA driver of this system lends system memory to programs that need more than the GPU has."""
    return system == "Windows" or "microsoft" in release.lower()


def memory() -> tuple[int, int] | None:
    """(all, available) bytes of RAM, within the limit of a container; None where the system does not say."""
    if platform.system() == "Windows":
        return _windows_memory()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        about = {name: int(value.split()[0]) << 10 for name, value in (line.split(":", 1) for line in lines)}
        total, available = about["MemTotal"], about["MemAvailable"]
    except (OSError, KeyError, ValueError):
        return None
    try:  # cgroup v2; "max" where there is no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return min(total, limit), min(available, max(limit - used, 0))
    except (OSError, ValueError):
        return total, available


def _windows_memory() -> tuple[int, int] | None:
    """By GlobalMemoryStatusEx. Its struct is two 32-bit numbers, the first its size, and seven of 64 bits."""
    status = (ctypes.c_uint64 * 8)()
    ctypes.cast(status, ctypes.POINTER(ctypes.c_uint32))[0] = ctypes.sizeof(status)
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(status):  # type: ignore[attr-defined]
        return None
    return status[1], status[2]


def _runs(code: str, capability: tuple[int, int]) -> bool:
    """Whether code built for "sm_86" or "compute_120" runs on such a GPU: the same generation, or PTX of an older."""
    kind, _, digits = code.rstrip("af").partition("_")
    if not digits.isdigit():
        return True
    built = (int(digits[:-1]), int(digits[-1]))
    return built <= capability and (kind == "compute" or built[0] == capability[0])


def _sm(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"
