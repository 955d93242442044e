"""What is printed for people."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from fluxq.console import SafeConsole, plural


def test_a_count_has_its_noun_in_the_right_number():
    assert [plural(n, "image") for n in (0, 1, 2, 3000)] == ["0 images", "1 image", "2 images", "3,000 images"]


def test_control_characters_in_a_name_are_shown_and_not_sent():
    console = SafeConsole(file=(file := io.StringIO()), soft_wrap=True, markup=False)
    console.print("images/\x1b[2Ja\x07\x9b\u202e.png\nerror: forged", "next", sep="\n")
    assert file.getvalue() == "images/\\x1b[2Ja\\x07\\x9b\\u202e.png\\nerror: forged\nnext\n"


def test_a_console_that_is_gone_ends_nothing():
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    SafeConsole(file=Gone()).print("step 1")


@pytest.mark.slow
def test_what_the_console_cannot_print_is_escaped():
    script = "from fluxq.cli.main import main; main(['lora', 'info', '\\u732b\\udce9.safetensors'])"
    command = [sys.executable, "-X", "utf8=0", "-c", script]
    done = subprocess.run(command, env={"PYTHONIOENCODING": "cp1252"}, capture_output=True, check=False)
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert b"\\u732b\\udce9.safetensors does not exist" in done.stderr
