"""docs/tutorial.md is true: its files are written, its commands run, and what they print is what it shows."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.command import ROOT, mixlab

TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
# Minutes as pytest tells them, numbers with unit, what stands where there is none, and the mark of the Pareto set.
MEASURED = re.compile(r"\(\d+:\d\d:\d\d\)|±|●|–|[\d.,]*\d[\d.,]*(?:e-?\d+)? ?(?:[KMG]iB|B|k|M|G|s)?(?![A-Za-z])")


class Block(NamedTuple):
    """A fenced block: its language, the rest of its first line, its text; the page's section in which it is."""

    section: str
    language: str
    file: str
    text: str


def blocks() -> list[Block]:
    found = []
    for part in re.split(r"^## ", TUTORIAL, flags=re.MULTILINE)[1:]:
        section = part.partition("\n")[0]
        for language, file, text in re.findall(r"^```(\w+) ?([^\n]*)\n(.*?)^```$", part, re.MULTILINE | re.DOTALL):
            found.append(Block(section, language, file, text))
    return found


def commands(block: Block) -> list[tuple[str, str]]:
    """Commands of a console, each with the output shown below it (empty: none is shown)."""
    parts = re.split(r"^\$ (.*)\n", block.text, flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


def run(command: str, folder: Path) -> str:
    program, *words = shlex.split(command)
    if program == "mixlab":
        done = mixlab(*words, cwd=folder, COLUMNS="100")
    else:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
    return done.stdout


def words(text: str) -> list[str]:
    """The text without what is measured: numbers differ from machine to machine, and their width moves the columns."""
    return MEASURED.sub(" ", text).split()


def write_files(folder: Path, last_section: str) -> None:
    """All files that the page shows up to a section."""
    for block in blocks():
        if block.file:
            (folder / block.file).write_text(block.text)
        if block.section == last_section and block.language == "console":
            break


SECTIONS = list(dict.fromkeys(block.section for block in blocks() if block.language == "console"))


@pytest.mark.parametrize("section", SECTIONS)
def test_every_command_prints_what_is_shown(tmp_path: Path, section: str) -> None:
    write_files(tmp_path, section)
    printed = ""
    for block in blocks():
        if block.section != section:
            continue
        if block.language == "console":
            for command, shown in commands(block):
                printed = run(command, tmp_path)
                assert not shown or words(printed) == words(shown), f"$ {command}\n{printed}"
        elif block.language == "text":
            # The sweep at its full budget takes minutes: the rehearsal before it has the same arms and columns.
            command, shown = commands(block)[-1]
            assert command.startswith("mixlab compare ")
            assert words(printed)[: len(words(shown))] == words(shown), printed


def test_the_page_is_read_as_it_is_meant() -> None:
    assert len(SECTIONS) == 3
    files = [block.file for block in blocks() if block.file]
    assert files == ["decayed_fwpkm.py", "test_decayed_fwpkm.py", "decayed.toml", "conv_delta.py"]
    shown = [command for block in blocks() if block.language == "console" for command, _ in commands(block)]
    assert len(shown) == TUTORIAL.count("\n$ ") - 2 == 6  # two stand in the block of the full sweep
    assert sum(block.language == "text" for block in blocks()) == 1
    assert TUTORIAL.count("```") == 2 * len(blocks())
    assert words("29 passed in 61.96s (0:01:01)") == ["passed", "in"]
    assert words("fwpkm ● 0.972 ±0.006 3/3 11.3KiB 15.1k 2.5 s in h8.py") == ["fwpkm", "/", "in", "h", ".py"]
