"""`python cli.py ...` from a clone: the same as the installed command `fluxq ...`.

Where fluxq's packages are not installed, they are installed into .venv beside this file first, and the command runs
there.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV_PYTHON = ROOT / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
INSTALLED = ROOT / ".venv" / "installed"


def main() -> int:
    try:
        import torch  # noqa: F401

        from fluxq.cli import main as fluxq
    except ModuleNotFoundError as error:
        if Path(sys.prefix) == VENV_PYTHON.parent.parent:
            raise SystemExit(f"error: {error}; delete {ROOT / '.venv'} and run this again") from error
        install()
        return subprocess.run([VENV_PYTHON, ROOT / "cli.py", *sys.argv[1:]], check=False).returncode
    return fluxq()


def install() -> None:
    """Make .venv and install fluxq into it, unless that was done before."""
    if INSTALLED.exists():
        return
    print(f"installing fluxq into {ROOT / '.venv'} (once, some minutes) ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", ROOT / ".venv"], check=True)
    pip = [VENV_PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", "-e", ROOT], check=True)
    INSTALLED.touch()


if __name__ == "__main__":
    sys.exit(main())
