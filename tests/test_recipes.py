"""Recipes: passes from a YAML file, the same as from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import GoldenFolder
from typer.testing import CliRunner

from vlac.cli import app
from vlac.errors import VlacError
from vlac.recipes import read_recipe

pytest.importorskip("yaml")

RECIPE = """
# a comment
passes:
  - truncate-layers: {select: list, layers: [0, 2-3], mode: kv-tap}
  - quantize-kv: {k: 8, center: false}
  - "flow-steps:steps=4,solver=ab2"
  - smooth-norms:
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_entries_become_passes_in_order(tmp_path: Path) -> None:
    expected = (
        "truncate-layers:select=list,layers=0+2-3,mode=kv-tap",
        "quantize-kv:k=8,center=false",
        "flow-steps:steps=4,solver=ab2",
        "smooth-norms",
    )
    assert read_recipe(written(tmp_path, RECIPE)) == expected
    bare = "\n".join(line[2:] for line in RECIPE.splitlines() if line.startswith("  "))
    assert read_recipe(written(tmp_path, bare)) == expected


def test_a_recipe_compiles_before_the_passes_of_the_command_line(
    golden: Callable[[str], GoldenFolder], tmp_path: Path
) -> None:
    import json

    pytest.importorskip("torch")
    checkpoint = str(golden("smolvla_tiny").checkpoint)
    path = written(tmp_path, RECIPE)
    arguments = ["compile", checkpoint, "--target", "gguf-f32", "--recipe", str(path), "--dry-run", "--json"]
    done = CliRunner().invoke(app, [*arguments, "--pass", "rotate-values"])
    assert done.exit_code == 0, done.output
    names = [h["name"] for h in json.loads(done.stdout)["manifest"]["history"]]
    assert names == ["truncate-layers", "quantize-kv", "flow-steps", "smooth-norms", "rotate-values"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("passes: flow-steps", "expected a list of passes, found str"),
        ("stages: []", "the one key `passes`, found stages"),
        ("- {a: {}, b: {}}", "entry 1: expected one pass"),
        ("- flow-steps: 4", "parameters of flow-steps are 4"),
        ("- flow-steps: {grid: 'a,b'}", "expected a number, a text without commas"),
        ("- flow-steps: {steps: {a: 1}}", "flow-steps: steps is"),
        ("- [", "is not YAML"),
        ("- !!python/object/apply:os.system ['true']", "is not YAML"),
        ("", "found NoneType"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(VlacError) as raised:
        read_recipe(written(tmp_path, text))
    assert says in str(raised.value) and "recipe.yaml" in str(raised.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(VlacError, match="does not exist"):
        read_recipe(tmp_path / "none.yaml")
