"""What a run depends on in this machine: memory, the NVIDIA driver, GPUs, and what this torch can do with them.

`read_machine` collects the facts; `notes` and `obstacle` judge them, so they can be tested without a GPU.
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
DEVICES = ("/dev/nvidiactl", "/dev/dxg")  # of the native Linux driver, and of the Windows driver in WSL


@dataclass(frozen=True)
class InstalledGPU:
    """A CUDA GPU that torch can use; `nbytes` is its memory."""

    name: str
    capability: tuple[int, int]
    nbytes: int


@dataclass(frozen=True)
class Machine:
    """What torch was built for, what is installed, and the GPU that a run would use.

    cuda: torch's CUDA version, None for a build without; architectures: what torch has code for ("sm_90",
    "compute_120"); hidden: CUDA_VISIBLE_DEVICES hides all GPUs on purpose; bf16: torch can use bf16 tensors on the GPU,
    native or emulated; triton: the package is installed.
    """

    torch: str
    cuda: str | None
    rocm: bool
    driver: bool
    hidden: bool
    gpu: InstalledGPU | None
    architectures: tuple[str, ...] = ()
    bf16: bool = True
    triton: bool = True


def read_machine() -> Machine:
    """The facts about this machine, from torch."""
    import torch

    gpu, available = None, torch.cuda.is_available()
    if available:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        gpu = InstalledGPU(properties.name, (properties.major, properties.minor), properties.total_memory)
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
    """Whether the NVIDIA driver is installed, judged by its files: no library is loaded."""
    if system == "Windows":
        return exists(os.path.join(os.environ.get("SYSTEMROOT", r"C:\Windows"), "System32", "nvcuda.dll"))
    return any(map(exists, DEVICES)) and (which("nvidia-smi") is not None or any(map(exists, LIBCUDA)))


def obstacle(machine: Machine) -> str | None:
    """Why the GPU cannot be used although torch reports it, in one sentence with the remedy; None if it can."""
    gpu = machine.gpu
    if gpu is None or machine.rocm:
        return None
    if machine.architectures and not any(_runs(code, gpu.capability) for code in machine.architectures):
        return (
            f"torch {machine.torch} has no code for the {gpu.name} ({_sm(gpu.capability)}; it has "
            f"{', '.join(machine.architectures)}); install the build that pytorch.org lists for this GPU, or hide "
            "the GPU with CUDA_VISIBLE_DEVICES=-1"
        )
    if not machine.bf16:
        return (
            f"torch {machine.torch} cannot compute in bf16 on the {gpu.name} ({_sm(gpu.capability)}); use a GPU of "
            "the RTX 20 series or newer, or hide this one with CUDA_VISIBLE_DEVICES=-1"
        )
    return None


def notes(machine: Machine) -> list[str]:
    """What the user should know about this machine, one line each."""
    gpu = machine.gpu
    if gpu is None and machine.driver and not machine.rocm and not machine.hidden:
        if machine.cuda is None:
            return [
                f"an NVIDIA driver is installed, but this torch ({machine.torch}) was built without CUDA, so "
                "everything runs on the CPU; fix it with: pip install --force-reinstall torch --index-url INDEX, where "
                "INDEX is the CUDA address that pytorch.org shows under Get Started"
            ]
        return [
            f"this torch ({machine.torch}) was built for CUDA {machine.cuda} but finds no GPU that it can use, so "
            "everything runs on the CPU; update the NVIDIA driver (nvidia-smi shows the CUDA version it supports)"
        ]
    if gpu is not None and not machine.rocm and gpu.capability < (8, 0):
        return [
            f"the {gpu.name} ({_sm(gpu.capability)}) has no bf16 arithmetic: torch emulates it, which is correct but "
            "several times slower than on the RTX 30 series and newer"
        ]
    if gpu is not None and not machine.rocm and not machine.triton:
        return [
            "Triton is not installed, so the GPU runs plain PyTorch instead of fluxq's "
            "kernels; fix it with: pip install triton (on Windows: pip install triton-windows)"
        ]
    return []


def free_gpu_bytes() -> int | None:
    """Bytes of GPU memory that a run could use: what the driver reports free, plus what torch has reserved but not
    allocated. None without a GPU, or if it cannot be read.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    except RuntimeError:  # another program may use the GPU exclusively
        return None


MIN_SPILL = 256 << 20
"""Fewer bytes than this beyond the GPU's free memory may be rounding or the driver's own use."""


class GPUBytes(NamedTuple):
    """A GPU's memory: in total, free, and reserved by torch."""

    total: int
    free: int
    reserved: int


def spilled(before: GPUBytes, now: GPUBytes) -> int:
    """Bytes that torch has reserved since `before` and that cannot be on the GPU; 0 if there are fewer than MIN_SPILL.

    That is what exceeds the memory that was free or, on a nearly full GPU, the drop in its free memory.
    """
    reserved = now.reserved - before.reserved
    beyond = reserved - before.free
    if now.free < now.total // 20:
        beyond = max(beyond, reserved - (before.free - now.free))
    return beyond if beyond > MIN_SPILL else 0


class SpillWatch:
    """Notices, once, that the driver has put data into system memory that should be on the GPU.

    On Windows and in WSL the driver does so silently instead of running out of memory. Create the watch before the run
    puts anything on the GPU.
    """

    def __init__(self, read: Callable[[], GPUBytes | None] | None = None) -> None:
        self._read = read or _gpu_bytes
        self._before = self._read()

    def note(self) -> str | None:
        """A warning for the user, if the driver has spilled and this was not reported before."""
        if self._before is None or (now := self._read()) is None or not (nbytes := spilled(self._before, now)):
            return None
        self._before = None
        return (
            f"about {nbytes / 2**30:.1f} GiB that should be on the GPU are in system memory; the driver moved them "
            "there silently: steps take many times as long. Lower --vram by as much, or close other programs on the "
            'GPU; "CUDA - Sysmem Fallback Policy: Prefer No Sysmem Fallback" in the NVIDIA Control Panel turns it off'
        )


def _gpu_bytes() -> GPUBytes | None:
    """The memory of the GPU in use; None if its driver cannot spill."""
    import torch

    if not torch.cuda.is_available() or not may_spill(platform.system(), platform.release()):
        return None
    free, total = torch.cuda.mem_get_info()
    return GPUBytes(total, free, torch.cuda.memory_reserved())


def may_spill(system: str, release: str) -> bool:
    """Whether this system's NVIDIA driver gives system memory to programs that need more than the GPU has."""
    return system == "Windows" or "microsoft" in release.lower()


def ram_bytes() -> tuple[int, int] | None:
    """(total, available) bytes of RAM, within a container's limit; None if the system does not report them."""
    if platform.system() == "Windows":
        return _windows_memory()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = {name: int(value.split()[0]) << 10 for name, value in (line.split(":", 1) for line in lines)}
        total, available = fields["MemTotal"], fields["MemAvailable"]
    except (OSError, KeyError, ValueError):
        return None
    try:  # cgroup v2; the limit is "max" if there is none
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return min(total, limit), min(available, max(limit - used, 0))
    except (OSError, ValueError):
        return total, available


def _windows_memory() -> tuple[int, int] | None:
    """From GlobalMemoryStatusEx, whose struct is two 32-bit numbers (the first is its size) and seven 64-bit ones."""
    status = (ctypes.c_uint64 * 8)()
    ctypes.cast(status, ctypes.POINTER(ctypes.c_uint32))[0] = ctypes.sizeof(status)
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(status):  # type: ignore[attr-defined]
        return None
    return status[1], status[2]


def _runs(code: str, capability: tuple[int, int]) -> bool:
    """Whether code for `code` ("sm_86", "compute_120") runs on such a GPU: same generation, or PTX of an older one."""
    kind, _, digits = code.rstrip("af").partition("_")
    if not digits.isdigit():
        return True
    built = (int(digits[:-1]), int(digits[-1]))
    return built <= capability and (kind == "compute" or built[0] == capability[0])


def _sm(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"
