"""YAML as configs use it: plain values only, and no document that is small as a file and huge when it is read."""

from __future__ import annotations

import re
from typing import Any

import yaml

from fluxq.errors import WrongRequest

MOST_VALUES = 20_000
"""In a document once its aliases are put in; configs have hundreds."""
MOST_CHARACTERS = 1_000_000


class _Loader(yaml.SafeLoader):
    """Reads 1e-4, which YAML 1.1 takes for text, as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?|\d*\.\d+|\d+\.\d*)[eE][-+]?\d+$"), list("-+0123456789.")
)


def parsed_yaml(text: str, where: str) -> Any:
    """What the document says. Raises WrongRequest, naming `where`, for what is not YAML, for one with a key twice, and
    for one that aliases make endless or larger than MOST_VALUES.
    """
    if len(text) > MOST_CHARACTERS:
        raise WrongRequest(f"{where} has {len(text):,} characters; a config has a few thousand")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            _count(node, where, {})
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise WrongRequest(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise WrongRequest(f"{where} is nested too deeply to be a config") from error


def _count(node: yaml.Node | None, where: str, known: dict[int, int]) -> int:
    """How many values `node` has with its aliases put in. known: those of nodes seen before, 0 for those it is in."""
    if node is None or id(node) in known:
        count = known.get(id(node), 1)
        if not count:
            raise WrongRequest(f"{where} has an alias that contains itself; write out what it stands for")
        return count
    known[id(node)] = 0
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
            raise WrongRequest(f"{where} has {twice} twice, at line {node.start_mark.line + 1} and below; keep one")
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    known[id(node)] = 1 + sum(_count(part, where, known) for part in parts)
    if known[id(node)] > MOST_VALUES:
        raise WrongRequest(f"{where} has more than {MOST_VALUES:,} values with its aliases put in; no config has")
    return known[id(node)]
