"""Compiles the emulated GPU for one installation of PyTorch, once: libraries by the names that CUDA's have.

`libemulated_gpu.so` has everything in it. Each library that it stands for is an empty one of that name that needs it,
so whoever loads `libcuda.so.1` finds the functions here. Functions of CUDA that cpp/ does not have become stubs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

CPP = Path(__file__).parent / "cpp"
COMPUTE = ("compute.cpp", "attention.cpp")
NAMES = ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13", "libcuda.so.1", "libnvidia-ml.so.1")
LIBRARY = "libemulated_gpu.so"
MULTIPLIES = re.compile(r"[Gg]em[mv]|[Aa]xpy|[Dd]ot|[Ss]cal|copy")
NOT_SUPPORTED = {"cuda": 801, "cublas": 15, "nvml": 3}

_FIND = """
import importlib.metadata as metadata, importlib.util as util, json
where = lambda name: (spec := util.find_spec(name)) and list(spec.submodule_search_locations)[0]
print(json.dumps([metadata.version("torch"), *map(where, ("torch", "nvidia", "triton"))]))
"""


@dataclass(frozen=True)
class Installation:
    """A Python whose PyTorch is built for CUDA 13."""

    python: str
    version: str
    torch: Path
    cuda: Path
    triton: Path

    @classmethod
    def of(cls, python: str) -> Installation:
        """Raises SystemExit, with what is missing, if that Python has no such PyTorch."""
        found = subprocess.run([python, "-c", _FIND], capture_output=True, text=True, check=False)
        version, *places = json.loads(found.stdout) if found.returncode == 0 else (None, None, None, None)
        if version is None or None in places or not (Path(places[1]) / "cu13").is_dir():
            raise SystemExit(f"{python} has no PyTorch that is built for CUDA 13; `make emulated` installs one")
        torch, nvidia, triton = map(Path, places)
        return cls(python, version, torch, nvidia / "cu13", triton)

    @property
    def includes(self) -> list[str]:
        """Triton's cuda.h comes first: PyTorch's own CUDA may lack the newest functions of the driver."""
        return [f"-I{self.triton / 'backends' / 'nvidia' / 'include'}", f"-I{self.cuda / 'include'}"]


def cache_folder() -> Path:
    return Path(os.environ.get("EMULATED_GPU_CACHE") or Path.home() / ".cache" / "fluxq" / "emulated_gpu")


def build_gpu(installation: Installation) -> Path:
    """The folder of the libraries that stand for CUDA's."""
    sources = sorted(path for path in CPP.glob("*.cpp") if path.name not in COMPUTE)

    def make(folder: Path) -> None:
        flags = ["-O2", "-g", "-std=c++17", "-fPIC", "-fvisibility=hidden", *installation.includes]
        objects = [folder / f"{source.stem}.o" for source in sources]
        for source, target in zip(sources, objects, strict=True):
            run("g++", *flags, "-c", source, "-o", target)
        own = set().union(*(exported("-g", target) for target in objects))
        stubs = folder / "stubs.c"
        stubs.write_text("\n".join(stub_lines(installation, own)) + "\n", encoding="utf-8")
        run("gcc", "-O1", "-fPIC", "-w", "-c", stubs, "-o", folder / "stubs.o")
        linked = ["-shared", f"-Wl,-soname,{LIBRARY}", *objects, folder / "stubs.o", "-ldl", "-lpthread"]
        run("g++", *linked, "-o", folder / LIBRARY)
        for name in NAMES:
            make_stand_in(folder, name)
        (folder / "libcuda.so").symlink_to("libcuda.so.1")  # the name that Triton links with
        for target in (*objects, folder / "stubs.o"):
            target.unlink()

    return built("gpu", installation, sources, make)


def build_compute(installation: Installation, gpu: Path) -> Path:
    """The library that runs PyTorch's operators; it takes a minute or two to compile."""
    sources = [CPP / name for name in COMPUTE]

    def make(folder: Path) -> None:
        includes = [installation.torch / "include", installation.torch / "include/torch/csrc/api/include"]
        flags = ["-O1", "-std=c++20", "-fPIC", "-w", *(f"-I{path}" for path in includes), *installation.includes]
        objects = [folder / f"{source.stem}.o" for source in sources]
        for source, target in zip(sources, objects, strict=True):
            run("g++", *flags, "-c", source, "-o", target)
        libraries = ["-ltorch_cpu", "-ltorch_cuda", "-lc10", "-lc10_cuda", "-lemulated_gpu"]
        places = [f"-L{installation.torch / 'lib'}", f"-L{gpu}", "-Wl,--no-as-needed"]
        unresolved = "-Wl,--unresolved-symbols=ignore-in-shared-libs"
        run("g++", "-shared", *objects, "-o", folder / "libcompute.so", *places, *libraries, unresolved)
        for target in objects:
            target.unlink()

    return built("compute", installation, sources, make) / "libcompute.so"


def built(part: str, installation: Installation, sources: Sequence[Path], make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills, kept for as long as sources and PyTorch stay what they are."""
    text = b"".join(path.read_bytes() for path in (*sources, *sorted(CPP.glob("*.h")), Path(__file__)))
    digest = hashlib.sha256(text + str(installation.torch).encode()).hexdigest()[:12]
    folder = cache_folder() / f"{part}-torch-{installation.version}-{digest}"
    if not folder.is_dir():
        print(
            f"emulated GPU: compiling {part} ({', '.join(path.name for path in sources)})", file=sys.stderr, flush=True
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
        try:
            make(temporary)
            if not folder.is_dir():  # another process may have been faster
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def make_stand_in(folder: Path, name: str) -> None:
    """An empty library `name` that needs ours; CUDA 13's own have their symbols under a version of that name."""
    source = folder / "stand_in.c"
    source.write_text(f"char stand_in_{re.sub('[.-]', '_', name)};\n", encoding="utf-8")
    flags = [f"-Wl,-soname,{name}", "-Wl,--no-as-needed", f"-L{folder}", "-lemulated_gpu", "-Wl,-rpath,$ORIGIN"]
    if name.endswith(".13"):
        versions = folder / "versions"
        versions.write_text(f"{name} {{ }};\n", encoding="utf-8")
        flags.append(f"-Wl,--version-script={versions}")
    run("gcc", "-shared", "-fPIC", source, "-o", folder / name, *flags)


def stub_lines(installation: Installation, own: set[str]) -> list[str]:
    """C for every function that CUDA has and cpp/ has not."""
    library = installation.cuda / "lib"
    runtime = {name for name in exported("-D", library / "libcudart.so.13") if re.match(r"(__)?cuda", name)}
    cublas = exported("-D", library / "libcublas.so.13") | exported("-D", library / "libcublasLt.so.13")
    header = run("gcc", "-E", "-include", "cuda.h", "-x", "c", os.devnull, *installation.includes)
    driver = set(re.findall(r"\b(cu[A-Z]\w*) *\(", header))
    asked = (installation.torch / "include" / "c10" / "cuda" / "driver_api.h").read_text(encoding="utf-8")
    nvml = set(re.findall(r"\bnvml[A-Z]\w*", asked))
    lines = ["int emulated_gpu_stub(const char *, int);", "int emulated_gpu_product(const char *, void *);"]
    lines += [stub(name, NOT_SUPPORTED["cuda"]) for name in sorted((runtime | driver) - own)]
    for name in sorted(name for name in cublas - own if re.match("cublas|nvblas", name)):
        if MULTIPLIES.search(name):
            lines.append(f'int {name}(void *handle) {{ return emulated_gpu_product("{name}", handle); }}')
        else:
            lines.append(stub(name, NOT_SUPPORTED["cublas"]))
    lines += [f"int {name}(void) {{ return {NOT_SUPPORTED['nvml']}; }}" for name in sorted(nvml - own)]
    return lines


def stub(name: str, code: int) -> str:
    return f'int {name}(void) {{ return emulated_gpu_stub("{name}", {code}); }}'


def exported(kind: str, path: Path) -> set[str]:
    """Names of the functions that a library ("-D") or an object ("-g") defines for others."""
    found = set()
    for line in run("nm", kind, "--defined-only", path).splitlines():
        *_, letter, name = line.split()
        if letter in "TWi":
            found.add(name.split("@")[0])
    return found


def run(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"emulated GPU: {' '.join(map(str, command))}\n{done.stderr[-4000:]}")
    return done.stdout
