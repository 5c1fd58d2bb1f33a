"""Commands that documents show exist, with every option they are shown with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = re.compile(r"(?:^|`)vlac ([a-z]+(?:\|[a-z]+)*)((?: [^`\n]*)?)", re.MULTILINE)
"""At the beginning of a line or of a code span: "vlac run|bench FILE --option"."""


def options() -> dict[str, set[str]]:
    """Command -> its options, as tests/cli_surface.txt has them (tests/test_cli.py holds that against the code)."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "tests" / "cli_surface.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("vlac "):
            found[line.split(":")[0].removeprefix("vlac ")] = own = {"--help"}
        elif line.startswith("  -"):
            own.update(re.findall(r"--?[a-z][a-z-]*", line.split(":")[0]))
    return found


def shown(text: str) -> list[tuple[str, str]]:
    """(command, option or "") of everything a document shows; prose that begins with the name is no command."""
    found = []
    for commands, rest in SHOWN.findall(text):
        code = rest.split("  #")[0]
        for command in commands.split("|"):
            found.append((command, ""))
            found += [(command, o) for o in re.findall(r"(?<= )--[a-z][a-z-]*", code)]
    return found


PROSE = {"reads", "writes", "takes", "is", "runs", "has"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_commands_of_documents_exist(document: Path) -> None:
    known = options()
    assert {"compile", "inspect", "parity", "eval"} <= set(known)
    for command, option in shown(document.read_text(encoding="utf-8")):
        if command not in known and command in PROSE:
            continue
        assert command in known, f"{document.name} shows `vlac {command}`"
        assert not option or option in known[command], f"{document.name} shows `vlac {command} {option}`"


def test_what_is_not_there_is_found() -> None:
    assert ("compile", "--never") in shown("say `vlac compile CKPT --never` or\nvlac nothing")
    assert ("nothing", "") in shown("say `vlac compile CKPT --never` or\nvlac nothing")
