"""`python cli.py ...` from a clone: the same as the installed command `fluxq ...`."""

from fluxq.cli import main

if __name__ == "__main__":
    main()
