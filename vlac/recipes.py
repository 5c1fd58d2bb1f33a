"""Recipes: the passes of a compile as a YAML file, to be kept beside the results they gave.

A recipe is a list, or a mapping with a list under `passes`. An entry is "name:key=value,..." as for --pass, or
{name: {key: value, ...}}; a list as a value means the same as its parts joined by "+".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlac.errors import VlacError

FORM = "passes:\n  - flow-steps: {steps: 5, solver: ab2}\n  - quantize-weights: {format: q8_0, match: 'vision.*'}"
MAX_BYTES = 1 << 20


def read_recipe(path: str | Path) -> tuple[str, ...]:
    """The passes of a YAML file in the form of --pass, in order. VlacError names the file and the entry."""
    try:
        import yaml
    except ImportError:
        raise VlacError("reading a recipe needs PyYAML", remedy="pip install pyyaml, or give --pass") from None
    path = Path(path)
    if not path.is_file():
        raise VlacError(f"recipe {path} does not exist", remedy=f"write one:\n{FORM}")
    if path.stat().st_size > MAX_BYTES:
        raise VlacError(f"recipe {path} has {path.stat().st_size} bytes: that is no recipe")
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise VlacError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if isinstance(table, dict):
        if set(table) != {"passes"}:
            raise VlacError(
                f"recipe {path}: expected the one key `passes`, found {', '.join(map(str, table)) or 'none'}",
                remedy=f"write:\n{FORM}",
            )
        table = table["passes"]
    if not isinstance(table, list):
        raise VlacError(f"recipe {path}: expected a list of passes, found {type(table).__name__}", remedy=FORM)
    return tuple(_entry(item, f"recipe {path}, entry {i}") for i, item in enumerate(table, 1))


def _entry(item: Any, where: str) -> str:
    if isinstance(item, str):
        return item
    if not isinstance(item, dict) or len(item) != 1:
        raise VlacError(f"{where}: expected one pass, found {item!r:.80}", remedy=f"write:\n{FORM}")
    ((name, params),) = item.items()
    if params is None:
        return str(name)
    if not isinstance(params, dict):
        raise VlacError(f"{where}: parameters of {name} are {params!r:.80}, expected key: value", remedy=FORM)
    return f"{name}:" + ",".join(f"{k}={_value(v, f'{where}: {name}: {k}')}" for k, v in params.items())


def _value(value: Any, where: str) -> str:
    if isinstance(value, list):
        return "+".join(_value(v, where) for v in value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float, str)) and not {",", "="} & set(str(value)):
        return str(value)
    raise VlacError(f"{where} is {value!r:.80}; expected a number, a text without , and =, or a list of them")
