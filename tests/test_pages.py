"""docs/settings.md, its JSON schema and docs/coming-from.md are what the settings say, and the schema accepts what the
reader of config files accepts. `PYTHONPATH=. python tests/test_pages.py` writes them.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from fluxq.cli.main import main
from fluxq.config import keys
from fluxq.config_files import config_from_dict, read_toml
from fluxq.errors import WrongRequest
from fluxq.names import table
from fluxq.pages import json_schema, names_page, settings_page
from fluxq.settings import DEFAULTS

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {
    "settings.md": settings_page,
    "coming-from.md": names_page,
    "settings.schema.json": lambda: json.dumps(json_schema(), indent=1) + "\n",
}
CONFIGS = sorted((DOCS.parent / "configs").glob("*.toml"))
SCHEMA = json_schema()
KINDS = {"integer": int, "number": int | float, "boolean": bool, "string": str, "array": list, "object": dict}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_in_docs_is_up_to_date(page):
    assert (DOCS / page).read_text(encoding="utf-8") == PAGES[page](), "PYTHONPATH=. python tests/test_pages.py"


def test_the_command_prints_the_pages():
    for option, page in ([], "settings.md"), (["--names"], "coming-from.md"), (["--schema"], "settings.schema.json"):
        assert CliRunner().invoke(main, ["settings", *option]).stdout == PAGES[page]()


def test_every_key_default_and_name_is_on_a_page():
    page, names = settings_page(), names_page()
    parts = (part.partition("\n") for part in page.split("\n## ")[1:])
    sections = {title.strip("[]"): text for title, _, text in parts}
    for key, field in keys().items():
        section, _, name = key.rpartition(".")
        if section != "data.folders":
            (line,) = [line for line in sections[section].splitlines() if line.startswith(f"| `{name}` |")]
            assert (f"`{field.metadata['flag']}`" in line) == bool(field.metadata["flag"]), key
            assert section != "data" or name not in DEFAULTS or f"| {str(DEFAULTS[name])}".lower() in line.lower(), key
    assert all(f"`{name}`" in names for row in table() for trainer in row.names for name in trainer)
    assert re.findall(r"\[(\S+)\]\((\S+)\)", page) == [(file, file) for file in re.findall(r"\]\((\S+)\)", page)]
    assert all((DOCS / file).exists() for file in re.findall(r"\]\((\S+)\)", page + names))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_the_schema_that_a_config_names_accepts_it(config):
    first = config.read_text(encoding="utf-8").splitlines()[0]
    named = config.parent / first.removeprefix("#:schema ")
    assert first.startswith("#:schema ") and named.resolve() == DOCS / "settings.schema.json"
    assert accepts(json.loads(named.read_text(encoding="utf-8")), read_toml(config))


def test_the_example_on_the_page_is_read():
    (example,) = re.findall(r"```toml\n(.*?)```", settings_page(), re.DOTALL)
    assert reads(tomllib.loads(example)) and accepts(SCHEMA, tomllib.loads(example))


def accepts(schema: dict, value) -> bool:
    """Whether `schema` accepts `value`: the part of JSON schema that ours is made of."""
    if "anyOf" in schema:
        return any(accepts(one, value) for one in schema["anyOf"])
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(isinstance(value, KINDS[t]) and (t == "boolean" or not isinstance(value, bool)) for t in types):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if isinstance(value, int | float) and not schema.get("minimum", -math.inf) <= value <= schema.get(
        "maximum", math.inf
    ):
        return False
    if isinstance(value, list):
        return all(accepts(schema.get("items", {"type": list(KINDS)}), item) for item in value)
    if isinstance(value, dict):
        required, known = {*schema.get("required", ())}, schema.get("properties", {})
        return required <= value.keys() <= known.keys() and all(accepts(known[k], item) for k, item in value.items())
    return True


def reads(values: dict) -> bool:
    try:
        config_from_dict(values, "a test")
    except WrongRequest:
        return False
    return True


def test_the_schema_accepts_what_the_reader_accepts():
    """Of every key, values of every type and around its bounds. What `parse` reads is only checked for its type."""
    several = [["a"], ["a", 1], [1.5], [[16, 16]], [], [{"path": "a"}], [{"path": 1}]]
    for key, field in keys().items():
        section, _, name = key.rpartition(".")
        about = field.metadata
        around = [] if about["minimum"] is None else [n for n in (about["minimum"], about["maximum"]) if n != math.inf]
        near = [n + d for n in around for d in (-1, -0.5, 0, 0.25, 1)]
        for value in (True, -1, 0, 1, 16, 1000, 0.5, -0.5, "a", "", *about["choices"], *several, *near, {}, {"b": 1}):
            values: dict = {section: {name: value}}
            if section == "data.folders":
                values = {"data": {"folders": [{"path": "a", name: value}]}}
            right, accepted = reads(values), accepts(SCHEMA, values)
            assert accepted or not right, (key, value)
            assert right or not accepted or about["parse"], (key, value)


def test_the_schema_knows_sections_former_names_and_what_is_required():
    assert accepts(SCHEMA, {}) and accepts(SCHEMA, {"data": {"size": 512}, "training": {"rate": 1e-4}})
    assert SCHEMA["properties"]["training"]["properties"]["rate"]["deprecated"]
    for wrong in ({"lor": {}}, {"lora": 1}, {"lora": {"rnak": 1}}, {"data": {"folders": [{"repeats": 2}]}}):
        assert not accepts(SCHEMA, wrong) and not reads(wrong)


if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8", newline="\n")
