"""`python -m fluxq`: the same as the command `fluxq`."""

import sys

from fluxq.cli import main

if __name__ == "__main__":
    sys.exit(main())
