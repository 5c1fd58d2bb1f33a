"""The families' files and their document: short enough, and counted as they are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import ROOT
from family_cases import CASES

from vlac.registry import families, readers

sys.path.insert(0, str(ROOT / "scripts"))
import families_table


@pytest.mark.parametrize("path", sorted((ROOT / "vlac" / "families").glob("[!_]*.py")), ids=lambda p: p.stem)
def test_a_family_is_a_file_that_fits(path: Path) -> None:
    assert families_table.lines(path)[0] <= 250, "a shared block is missing"


def test_every_family_is_in_the_document() -> None:
    assert set(families_table.FAMILIES) == {f.name for f in families.all()}
    assert {g for row in families_table.FAMILIES.values() for g in row.goldens} == set(CASES)
    known = {path.stem for path in (ROOT / "vlac" / "readers").glob("*.py")}
    assert {name for row in families_table.FAMILIES.values() for name in row.readers} <= known
    assert readers.all()


def test_the_document_counts_what_there_is() -> None:
    pytest.importorskip("torch")
    text = families_table.DOCUMENT.read_text(encoding="utf-8")
    assert families_table.renewed(text) == text, "python scripts/families_table.py --write"
