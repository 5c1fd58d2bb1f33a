"""Files and commands of a machine, or of a copy of one under another root; what is absent says why.

Paths are those of Linux's procfs and sysfs. With a root other than "/" commands are looked for in ROOT/usr/bin only, so
that a folder can stand for a board.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Absent:
    """Something that this machine does not tell this user."""

    why: str

    def __str__(self) -> str:
        return f"not available: {self.why}"


ANSWER_S = 5.0
"""How long a board's own command may take."""


@dataclass(frozen=True)
class Tree:
    """A machine's files and commands. `found` keeps what globs found: sources do not move while a board runs."""

    root: Path = Path("/")
    found: dict[str, list[Path]] = field(default_factory=dict)

    def path(self, name: str | Path) -> Path:
        """An absolute path of the machine under this root."""
        return self.root / str(name).lstrip("/")

    def shown(self, path: Path) -> str:
        """The path as the machine itself knows it."""
        return "/" + str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)

    def glob(self, pattern: str) -> list[Path]:
        """Paths that match, sorted with numbers in order; searched once."""
        if pattern not in self.found:
            self.found[pattern] = sorted(self.root.glob(pattern.lstrip("/")), key=_natural)
        return self.found[pattern]

    def text(self, name: str | Path) -> str | Absent:
        """A small file without NUL and outer blanks."""
        path = name if isinstance(name, Path) else self.path(name)
        try:
            text = path.read_text(encoding="utf-8", errors="replace").replace("\0", "").strip()
        except FileNotFoundError:
            return Absent(f"{self.shown(path)} is missing")
        except PermissionError:
            return Absent(f"{self.shown(path)} is not readable by this user")
        except OSError as error:
            return Absent(f"{self.shown(path)}: {error.strerror or error}")
        return text or Absent(f"{self.shown(path)} is empty")

    def number(self, name: str | Path) -> int | Absent:
        """A file that holds one integer."""
        text = self.text(name)
        if isinstance(text, Absent):
            return text
        try:
            return int(text.split()[0])
        except ValueError:
            return Absent(f"{name} holds {text[:40]!r}, no number")

    def command(self, *words: str) -> str | Absent:
        """What one of the board's commands prints."""
        here = None if self.root == Path("/") else str(self.path("/usr/bin"))
        program = shutil.which(words[0], path=here)
        if program is None:
            return Absent(f"the command {words[0]} is not there")
        try:
            done = subprocess.run(
                [program, *words[1:]], capture_output=True, text=True, timeout=ANSWER_S, check=False, errors="replace"
            )
        except subprocess.TimeoutExpired:
            return Absent(f"{' '.join(words)} gave no answer within {ANSWER_S:.0f} s")
        except OSError as error:
            return Absent(f"{' '.join(words)}: {error.strerror or error}")
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            return Absent(f"{' '.join(words)}: {said[-1] if said else f'exit code {done.returncode}'}")
        return done.stdout.strip() or Absent(f"{' '.join(words)} printed nothing")


def _natural(path: Path) -> list[tuple[int, int, str]]:
    parts: list[tuple[int, int, str]] = []
    word = ""
    for letter in f"{path}\0":
        if word and letter.isdigit() != word[-1].isdigit():
            parts.append((0, int(word), "") if word.isdigit() else (1, 0, word))
            word = ""
        word += letter
    return parts


def first(*readings: T | Absent) -> T | Absent:
    """The first reading that is there; else all reasons."""
    for reading in readings:
        if not isinstance(reading, Absent):
            return reading
    return Absent("; ".join(r.why for r in readings if isinstance(r, Absent)))
