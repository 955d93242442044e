"""A command line of flux_train_network.py as that program reads it, with --config_file.

It may be pasted with what stands before it, like `accelerate launch`, and with the marks that continue its lines.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fluxq.errors import WrongRequest

from .scripts import words
from .table import BY_NAME, FLAG, TABLE
from .texts import parsed, read_text

PROGRAM = "flux_train_network.py"
CONTINUED = ("\\", "^", "`")
"""At the end of a line: the command goes on. In sh, cmd and PowerShell."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise WrongRequest(f"{PROGRAM}: {message}")


def read_command(argv: Sequence[str]) -> dict[str, Any]:
    """Option -> value, of all options, with sd-scripts' names, defaults and types.

    The command line beats --config_file. What that file has is neither checked nor known, as in sd-scripts; unknown
    keys stay in the result. Raises WrongRequest for unknown options and for values that are not allowed.
    """
    argv, parser = pasted(argv), _parser()
    options = _parsed(parser, argv, argparse.Namespace())
    if not options.config_file:
        return vars(options)
    if options.output_config:
        raise WrongRequest(f"--output_config: {BY_NAME['output_config'].refused}")
    options = _parsed(parser, argv, argparse.Namespace(**config_file(options.config_file)))
    options.config_file = os.path.splitext(options.config_file)[0]
    return vars(options)


def config_file(name: str) -> dict[str, Any]:
    """The values of --config_file `name`, to which .toml is added if it lacks it. Its sections mean nothing."""
    path = Path(name if name.endswith(".toml") else f"{name}.toml")
    flat: dict[str, Any] = {}
    for key, value in parsed(read_text(path), str(path)).items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


def pasted(argv: Sequence[str]) -> list[str]:
    """`argv` from behind the name of the program, with lines taken apart and without marks of continued lines."""
    arguments: list[str] = []
    for argument in argv:
        is_command = "\n" in argument and re.search(rf"\n\s*--|{re.escape(PROGRAM)}", argument)
        arguments += (
            words(argument) if is_command else [re.sub(r"^\^(?=--)", "", argument)]
        )  # fluxgym's ^--sample_prompts
    marks = (*CONTINUED, "")
    arguments = [a for a in arguments if not (a.strip() in marks and (a.strip() or "\n" in a or "\r" in a))]
    starts = [i for i, argument in enumerate(arguments) if re.split(r"[/\\]", argument)[-1] == PROGRAM]
    if starts:
        return arguments[starts[-1] + 1 :]
    if other := next((a for a in arguments if a.endswith("train_network.py") or a.endswith("_train.py")), None):
        raise WrongRequest(f"{other} is another program; fluxq reads the options of {PROGRAM}")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, add_help=False)
    for row in TABLE:
        if row.kind is FLAG:
            parser.add_argument(f"--{row.name}", action="store_true")
        else:
            several: dict[str, Any] = {"nargs": "*"} if row.many else {}
            parser.add_argument(
                f"--{row.name}", type=row.kind, default=row.default, choices=row.choices or None, **several
            )
    return parser


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str], known: argparse.Namespace) -> argparse.Namespace:
    options, rest = parser.parse_known_args(argv, known)
    if rest:
        name = rest[0].partition("=")[0].lstrip("-")
        near = difflib.get_close_matches(name, BY_NAME, n=1) if rest[0].startswith("-") else []
        raise WrongRequest(
            f"{PROGRAM} has no {'option' if rest[0].startswith('-') else 'argument'} {rest[0]}"
            + (f"; did you mean --{near[0]}?" if near else "; a value with spaces needs quotes")
        )
    return options
