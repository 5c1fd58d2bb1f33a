"""The command line: parse, call, print. Nothing heavy is imported before a command runs.

Exit codes: 0 done, 1 a parity limit does not hold, 2 refused (VlacError, usage, or a bug), 130 interrupted.
"""

from __future__ import annotations

from vlac.cli.options import app  # isort: skip
from vlac.cli import artifacts, robot, here  # isort: skip  # in the order in which help lists their commands

__all__ = ["app", "artifacts", "here", "main", "robot"]


def main() -> None:
    """Entry point of the `vlac` command."""
    app()
