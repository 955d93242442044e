"""The command in a script (.bat, .cmd, .ps1, .sh), as the shell would take it apart."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from fluxq.errors import WrongRequest

CONTINUES = {".bat": "^", ".cmd": "^", ".ps1": "`"}
COMMENTS = {".bat": r"(?i)\s*@?(rem\b|::)", ".cmd": r"(?i)\s*@?(rem\b|::)"}
ASSIGNMENTS = {
    ".bat": r'(?i)\s*@?set\s+"?(?P<name>\w+)=(?P<value>[^"]*)"?\s*$',
    ".ps1": r"\s*\$(?P<name>\w+)\s*=\s*(?P<value>.*)$",
    ".sh": r"\s*(export\s+)?(?P<name>\w+)=(?P<value>.*)$",
}
VARIABLES = {".bat": r"%(?P<name>\w+)%", ".ps1": r"\$\{?(?P<name>\w+)\}?", ".sh": r"\$\{?(?P<name>\w+)\}?"}


def words(text: str, kind: str = ".sh") -> list[str]:
    """The words of a command, without line ends. kind: the suffix of the script that it is from.

    Raises WrongRequest for quotes that do not end.
    """
    mark = CONTINUES.get(kind, "\\")
    text = re.sub(rf"{re.escape(mark)}[ \t]*\r?(\n|$)", " ", text)
    if kind not in CONTINUES:
        text = re.sub(r"(?<=\s)[\^`][ \t]*\r?(\n|$)", " ", text)
        try:
            return shlex.split(text)
        except ValueError as error:
            raise WrongRequest(f"the command has a quote that does not end: {text[:80]}") from error
    quotes = r'"[^"]*"' if mark == "^" else r"\"[^\"]*\"|'[^']*'"
    text = re.sub(rf"({quotes})|{re.escape(mark)}(.)", lambda m: m[1] or m[2], text)  # ^- is -, but not in quotes
    return [re.sub(quotes, lambda m: m[0][1:-1], word) for word in re.findall(rf"(?:{quotes}|[^\s\"])+", text)]


def script_command(path: Path, program: str) -> list[str]:
    """The words of the one command in the script `path` that runs `program`, with the script's own variables filled in.

    Lines that only begin with an option belong to the command before them. Raises WrongRequest if there is no such
    command or more than one, or for variables that the script does not set.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise WrongRequest(f"--script {path} cannot be read ({error})") from error
    kind = path.suffix.lower()
    mark, family = CONTINUES.get(kind, "\\"), {".cmd": ".bat"}.get(kind, kind if kind in VARIABLES else ".sh")
    lines: list[str] = []
    for line in text.splitlines():
        if re.match(COMMENTS.get(kind, r"\s*#"), line):
            continue
        if lines and (lines[-1].rstrip().endswith(mark) or line.lstrip().startswith("--")):
            lines[-1] = lines[-1].rstrip().removesuffix(mark) + " " + line.strip()
        else:
            lines.append(line)
    known: dict[str, str] = {}
    commands = []
    for line in lines:
        if program in line:
            commands.append(_filled(line, family, known, path))
        elif match := re.match(ASSIGNMENTS[family], line):
            known[match["name"].lower()] = _filled(match["value"].strip().strip("\"'"), family, known, None)
    if len(commands) != 1:
        count = f"runs it {len(commands)} times; leave one of them" if commands else "does not run it"
        raise WrongRequest(f"--script {path} must run {program} once, and it {count}")
    return words(commands[0], kind)


def _filled(text: str, family: str, known: dict[str, str], path: Path | None) -> str:
    """`text` with its variables' values. path: of the script, for the error; None leaves unknown variables."""

    def value(match: re.Match[str]) -> str:
        if (found := known.get(match["name"].lower())) is None:
            if path is None:
                return match[0]
            raise WrongRequest(f"--script {path} uses {match[0]} and does not set it; write its value in its place")
        return found

    return re.sub(VARIABLES[family], value, text)
