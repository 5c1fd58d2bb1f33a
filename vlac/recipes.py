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
    table = load_yaml(path, "recipe", FORM)
    if isinstance(table, dict):
        if set(table) != {"passes"}:
            raise VlacError(
                f"recipe {path}: expected the one key `passes`, found {', '.join(map(str, table)) or 'none'}",
                remedy=f"write:\n{FORM}",
            )
        table = table["passes"]
    if not isinstance(table, list):
        raise VlacError(f"recipe {path}: expected a list of passes, found {type(table).__name__}", remedy=FORM)
    return tuple(entry(item, f"recipe {path}, entry {i}") for i, item in enumerate(table, 1))


def load_yaml(path: str | Path, what: str, form: str) -> Any:
    """The values of a small YAML file; VlacError says which `what` it was to be, and shows `form` for an absent one."""
    try:
        import yaml
    except ImportError:
        raise VlacError(f"reading a {what} needs PyYAML", remedy="pip install 'vlac-compiler[compile]'") from None
    path = Path(path)
    if not path.is_file():
        raise VlacError(f"{what} {path} does not exist", remedy=f"write one:\n{form}")
    if path.stat().st_size > MAX_BYTES:
        raise VlacError(f"{what} {path} has {path.stat().st_size} bytes: that is no {what}")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise VlacError(f"{what} {path} is not YAML: {' '.join(str(error).split())}") from None


def entry(item: Any, where: str) -> str:
    """One pass as YAML has it -> "name:key=value,..."; VlacError says `where` it stands."""
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
    if isinstance(value, (int, float, str)) and "," not in str(value):
        return str(value)
    raise VlacError(f"{where} is {value!r:.80}; expected a number, a text without commas, or a list of them")
