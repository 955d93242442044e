"""`python cli.py ...` in a clone: the same as the installed command `fluxq ...`.

If packages that fluxq needs are missing, it first installs fluxq and them into .venv next to this file, and runs there.
A torch that is installed already, like one for CUDA on Windows, is used there too.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
NEEDED = [
    "torch",
    "click",
    "rich",
    "safetensors",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "PIL",
    "numpy",
    "matplotlib",
]


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - an older Python can start this file
        raise SystemExit(f"error: fluxq needs Python 3.11 or newer, not {sys.version.split()[0]}")
    if all(importlib.util.find_spec(name) for name in NEEDED):
        from fluxq.cli.main import main as fluxq

        return fluxq()
    if Path(sys.prefix) == VENV:
        raise SystemExit(f"error: packages are missing in {VENV}; delete that folder and try again")
    if not (VENV / "installed").exists():
        install()
    return subprocess.run([PYTHON, ROOT / "cli.py", *sys.argv[1:]], check=False).returncode


def install() -> None:
    """Create .venv and install fluxq into it."""
    print(f"installing fluxq into {VENV} (once, takes a few minutes) ...", flush=True)
    own_torch = ["--system-site-packages"] if importlib.util.find_spec("torch") else []
    constraints = [] if own_torch else ["-c", ROOT / "constraints.txt"]
    pip = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *constraints]
    try:
        subprocess.run([sys.executable, "-m", "venv", *own_torch, VENV], check=True)
        subprocess.run([*pip, "-e", ROOT], check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit("error: the installation failed (see above); check the network and try again") from error
    (VENV / "installed").touch()


if __name__ == "__main__":
    sys.exit(main())
