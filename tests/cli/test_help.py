"""--help has what matters on one page, in groups, and --help-all every key; the examples can be run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from fluxq.cli.help import SHARED
from fluxq.cli.main import EXAMPLES, FIRST, main
from fluxq.config import keys

TITLES = ["Model", "Images", "LoRA", "Training", "Memory", "Previews", "Output"]
UNUSED = {  # what these commands have no use for, though a file may have it
    "cache": {f"memory.{name}" for name in ("policy", "ram", "offload", "resident_units", "blocks_to_swap", "slots")},
    "sample": {"memory.policy", "memory.ram", "memory.offload", "samples.every"},
}
TRAIN = main.commands["train"]


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0
    return result.stdout


def test_help_is_a_page_that_names_every_option_and_explains_a_dozen():
    page = shown("train", "--help")
    first, rest = page.split("What matters most:\n")[1].split("All options")
    assert 10 <= len(FIRST) <= 14 and len(page.splitlines()) <= 80
    for parameter in TRAIN.params:
        if parameter.param_type_name == "option":
            flag = parameter.opts[0]
            assert flag in rest.split() and (f"\n  {flag} " in f"\n{first}") == (flag in FIRST)
    named = [line.split("  ")[1] for line in rest.splitlines() if line.startswith("  ") and line[2] != " "]
    assert named == [*TITLES, "This command", "Examples:"] and len(page.split("Examples:\n")[1].splitlines()) == 2


def test_the_examples_can_be_run(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    for line in EXAMPLES.split("Examples:\n")[1].splitlines():
        program, command, *arguments = shlex.split(line)
        context = main.commands[command].make_context(command, arguments)
        assert program == "fluxq" and context.params["folders"]
        assert context.params["config_file"] is None or context.params["config_file"].is_file()


@pytest.mark.parametrize("command", ["train", "cache", "sample", "check"])
def test_help_all_has_every_key_of_the_commands_sections(command):
    page, unused = shown(command, "--help-all"), UNUSED.get(command, ())
    for key in keys():
        known = key.split(".")[0] in main.commands[command].sections and key not in (*SHARED, *unused)
        name = key.removeprefix("data.folders.")
        assert (f"\n  {name} " in page or f"[{key}]" in page) == known, key
    assert ("\nSampling:\n" in page, "\nPreviews:\n" in page) == (command == "sample", command == "train")


def test_an_option_outside_the_commands_sections_is_its_own():
    page = shown("sample", "--help")
    assert "\nImages:\n" not in page and "\n  --cache PATH " in page.split("\nThis command:\n")[1]


def test_help_all_has_the_defaults_and_titles():
    page = shown("train", "--help-all")
    assert [line[:-1] for line in page.splitlines() if line[:-1] in TITLES] == TITLES
    assert "[default: 3.1582]" in page and "[default: 1.29]" in page and "--noise" not in page
