"""Runs a program on an emulated NVIDIA GPU. README.md says what that shows, and what it cannot show.

    python tests/emulated_gpu/run.py --gpu rtx4090 -- python -m fluxq demo
    python tests/emulated_gpu/run.py --compute --races --no-triton -- python -m pytest -m gpu tests/test_gpu.py

`python` is then a Python whose PyTorch is built for CUDA: --python, EMULATED_GPU_PYTHON, or .venv-cuda.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from building import LIBRARY, NAMES, Installation, build_compute, build_gpu, cache_folder

HERE = Path(__file__).resolve().parent
OWN_ENVIRONMENT = HERE.parent.parent / ".venv-cuda" / "bin" / "python"
SETTINGS = {  # option -> the variable that the emulated GPU reads
    "gpu": "NAME",
    "total": "TOTAL_MIB",
    "pin_limit": "PIN_LIMIT_MIB",
    "max_product": "MAX_PRODUCT",
    "log": "LOG",
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--gpu", metavar="NAME", help="rtx3060 (default), rtx4060ti, rtx4090, rtx5090, a100, h100 or t4")
    add("--compute", action="store_true", help="operators and kernels compute, on the CPU; copies are done late")
    add("--early", action="store_true", help="with --compute: copies are done at once")
    add("--races", action="store_true", help="with --compute: report accesses that nothing orders; exit code 3 if any")
    add("--no-triton", action="store_true", help="Triton cannot be imported; plain PyTorch takes its place")
    add("--total", metavar="MIB", help="a GPU with so much memory")
    add("--pin-limit", metavar="MIB", help="the driver pins no more of the host's memory than this")
    add("--fail", metavar="KIND:N", action="append", help="the N-th alloc, pin, module, handle or kernel fails")
    add("--max-product", metavar="N", help="with --compute: a product of more multiplications raises (default 3e10)")
    add("--skip-copies", action="store_true", help="copies of 1 MiB and more move nothing: large models, fast")
    add("--log", metavar="FILE", help="write what was launched, copied and refused, as JSON; %%p: the process id")
    add("--python", default=default_python(), help="whose PyTorch is used")
    add("command", nargs="+", help="the program and its arguments, after --")
    return made


def default_python() -> str:
    own = str(OWN_ENVIRONMENT) if OWN_ENVIRONMENT.exists() else "python3"
    return os.environ.get("EMULATED_GPU_PYTHON") or own


def environment(arguments: argparse.Namespace) -> dict[str, str]:
    """The environment in which a program finds the emulated GPU; whatever is not yet compiled is compiled."""
    python = shutil.which(arguments.python)
    if python is None:
        raise SystemExit(f"there is no Python at {arguments.python}; `make emulated` makes one")
    installation = Installation.of(python)
    gpu = build_gpu(installation)
    made = {k: v for k, v in os.environ.items() if not k.startswith("EMULATED_GPU_")}
    for name in ("CACHE", "CONTEXT_MIB", "VERBOSE"):  # set by hand only
        if value := os.environ.get(f"EMULATED_GPU_{name}"):
            made[f"EMULATED_GPU_{name}"] = value
    for option, name in SETTINGS.items():
        if value := getattr(arguments, option):
            made[f"EMULATED_GPU_{name}"] = value
    made |= {
        "EMULATED_GPU_PYTHON": python,
        "EMULATED_GPU_ORDER": "late" if arguments.compute and not arguments.early else "early",
        "EMULATED_GPU_RACES": str(int(arguments.races)),
        "EMULATED_GPU_SKIP_COPIES": str(int(arguments.skip_copies)),
        "EMULATED_GPU_FAIL": ",".join(arguments.fail or ()),
        "EMULATED_GPU_NO_TRITON": "1" if arguments.no_triton else "",
        "PATH": prepended(Path(python).parent, "PATH"),
        "PYTHONPATH": prepended(HERE / "site", "PYTHONPATH"),  # what is imported first of all: sitecustomize.py
        "LD_LIBRARY_PATH": prepended(gpu, "LD_LIBRARY_PATH"),
        "LD_PRELOAD": " ".join(str(gpu / name) for name in (LIBRARY, *NAMES)),
        "TRITON_LIBCUDA_PATH": str(gpu),
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR") or str(cache_folder() / "triton"),
    }
    if arguments.compute:
        made["EMULATED_GPU_COMPUTE"] = str(build_compute(installation, gpu))
        made["TRITON_INTERPRET"] = "1"
    return made


def prepended(path: Path, variable: str) -> str:
    return os.pathsep.join(filter(None, (str(path), os.environ.get(variable))))


def main() -> None:
    arguments = parser().parse_args()
    if (arguments.early or arguments.races) and not arguments.compute:
        raise SystemExit("--early and --races need --compute: without it nothing is computed in any order")
    made = environment(arguments)
    program = shutil.which(arguments.command[0], path=made["PATH"])
    if program is None:
        raise SystemExit(f"there is no program {arguments.command[0]}")
    sys.stdout.flush()
    os.execve(program, arguments.command, made)


if __name__ == "__main__":
    main()
