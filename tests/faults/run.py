"""Every call of libc by which a run changes files fails once, and once the process ends there: nothing is lost.

    python tests/faults/run.py [--seconds S] [--out FOLDER]     all of them, or as many as fit; the next call goes on
    python tests/faults/run.py --draw [HASH] --seconds 100      some, drawn by commit; writes nothing
    python tests/faults/run.py "train 37 EIO" ...               these, with what they print
    python tests/faults/run.py --strace                         strace counts an undisturbed run too

README.md says what is tried and what has to hold. This compiles interpose.c and starts trials.py with it before libc.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        library = Path(folder) / "interpose.so"
        compiler = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-o", library, HERE / "interpose.c", "-ldl"]
        subprocess.run([*compiler, "-lpthread"], check=True)
        shim = {"LD_PRELOAD": str(library), "FAULTS_SHIM": str(library)}
        shim |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
        environment = os.environ | {"PYTHONPATH": str(HERE.parent.parent)} | shim
        return subprocess.run(
            [sys.executable, HERE / "trials.py", *sys.argv[1:]], env=environment, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
