"""The tables of docs/families.md: lines, ops and runtime steps of every family, counted. --write renews them.

python scripts/families_table.py [--write]

Ops and steps are those of the programs and inputs that the golden checkpoints give.
"""

from __future__ import annotations

import ast
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- counted by scripts/families_table.py -->", "<!-- end -->"
FIRST = "smolvla"
"""The family that the others are compared with: it was there first."""


@dataclass(frozen=True)
class Row:
    """A family: its goldens, and the files that nobody else needs."""

    goldens: tuple[str, ...]
    readers: tuple[str, ...]
    blocks: tuple[str, ...] = ()


FAMILIES = {
    "smolvla": Row(("smolvla_tiny", "smolvla_letterbox"), ("lerobot_smolvla", "smolvlm")),
    "pi0": Row(("pi0_tiny",), ("paligemma", "lerobot_pi", "openpi"), ("blocks_gemma",)),
    "pi05": Row(("pi05_tiny",), ()),
    "pi0_fast": Row(("pi0fast_tiny",), ("fast_tokenizer",), ("blocks_decode",)),
    "openvla": Row(
        ("openvla_tiny", "openvla_oft_tiny"),
        ("prismatic", "prismatic_images", "prismatic_weights"),
        ("blocks_timm", "blocks_heads"),
    ),
    "groot": Row(
        ("groot_n17_tiny",), ("gr00t", "gr00t_lerobot", "gr00t_processor", "gr00t_weights"), ("blocks_groot",)
    ),
    "tinyvla": Row(("tinyvla_tiny", "tinyvla_v1_tiny"), ("tinyvla",)),
}


def lines(path: Path) -> tuple[int, int]:
    """(lines, lines of code: not empty, no comment, no docstring)."""
    text = path.read_text(encoding="utf-8")
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    rows = text.splitlines()
    code = [r for i, r in enumerate(rows, 1) if i not in skipped and r.strip() and not r.strip().startswith("#")]
    return len(rows), len(code)


def total(names: Iterable[str], pattern: str) -> int:
    """To the nearest 50, so that not every edit of a reader is an edit of the document."""
    return round(sum(lines(ROOT / "vlac" / pattern.format(name))[0] for name in names) / 50) * 50


def needs(row: Row) -> tuple[set[str], set[str]]:
    """(ops, runtime steps) that a family's goldens use."""
    sys.path.insert(0, str(ROOT / "tests"))
    from family_cases import CASES

    from vlac.api import draw
    from vlac.checkpoint import read_policy

    ops: set[str] = set()
    steps: set[str] = set()
    for name in row.goldens:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            policy = read_policy(str(CASES[name].checkpoint), CASES[name].read_options)
            ops |= {n.op for s in draw(policy).stages for n in s.nodes}
        io = policy.io
        for part in (io.image_steps, io.state_steps, io.text_steps, io.action_steps):
            steps |= {s.step for s in part}
    return ops, steps


def tables() -> str:
    """The text between the marks."""
    known = {name: needs(row) for name, row in FAMILIES.items()}
    head = [
        "family",
        "file",
        "of code",
        "readers of its own",
        "blocks of its own",
        "ops not in SmolVLA",
        "steps not in SmolVLA",
    ]
    rows = [head, ["---", "---:", "---:", "---:", "---:", "---", "---"]]
    seen_ops, seen_steps = known[FIRST]
    for name, row in FAMILIES.items():
        ops, steps = known[name]
        every, code = lines(ROOT / "vlac" / "families" / f"{name}.py")
        more = [", ".join(f"`{x}`" for x in sorted(found)) or "none" for found in (ops - seen_ops, steps - seen_steps)]
        more = ["(the first)"] * 2 if name == FIRST else more
        own = [total(row.readers, "readers/{}.py"), total(row.blocks, "{}.py")]
        rows.append([f"`{name}`", str(every), str(code), *(str(n) if n else "" for n in own), *more])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def renewed(text: str) -> str:
    """The document with its table as it is now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def main() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    if "--write" in sys.argv[1:]:
        DOCUMENT.write_text(renewed(text), encoding="utf-8")
    elif renewed(text) != text:
        raise SystemExit(f"{DOCUMENT}: not as counted now; python scripts/families_table.py --write")


if __name__ == "__main__":
    main()
