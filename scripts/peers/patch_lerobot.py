"""Makes an installed LeRobot 0.6.1 importable under Python 3.11 and torch 2.13 without CUDA.

Run with the Python of the environment that holds it. Running it again changes nothing.
"""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

SITE = Path(sysconfig.get_paths()["purelib"])


def edit(relative: str, *replacements: tuple[str, str], header: str = "") -> None:
    """Replaces regular expressions in a file, and puts `header` in front of its first ordinary import."""
    path = SITE / relative
    text = original = path.read_text(encoding="utf-8")
    for pattern, new in replacements:
        text = re.sub(pattern, new, text, flags=re.MULTILINE)
    if text != original and header:
        first = re.search(r"^(?:import |from (?!__future__))", text, flags=re.MULTILINE)
        assert first is not None, f"{path}: no import to put the type variables before"
        text = text[: first.start()] + header + text[first.start() :]
    path.write_text(text, encoding="utf-8")
    print(f"{relative}: {'patched' if text != original else 'as it should be'}")


def main() -> None:
    type_alias = (r"^type (\w+)(?:\[[^\]]*\])? = ", r"\1 = ")
    edit("lerobot/datasets/aggregate.py", type_alias)
    edit("lerobot/motors/motors_bus.py", type_alias)
    edit(
        "lerobot/datasets/streaming_dataset.py",
        (r"^class Backtrackable\[T\]:", "class Backtrackable(Generic[T]):"),
        header='from typing import Generic, TypeVar\n\nT = TypeVar("T")\n',
    )
    edit(
        "lerobot/processor/pipeline.py",
        (
            r"^class DataProcessorPipeline\[TInput, TOutput\]\(HubMixin\):",
            "class DataProcessorPipeline(HubMixin, Generic[TInput, TOutput]):",
        ),
        header='from typing import Generic, TypeVar\n\nTInput = TypeVar("TInput")\nTOutput = TypeVar("TOutput")\n',
    )
    edit(
        "lerobot/utils/io_utils.py",
        (r"^def deserialize_json_into_object\[T: JsonLike\]\(", "def deserialize_json_into_object("),
        header='from typing import TypeVar\n\nT = TypeVar("T")\n',
    )
    # torchvision's wheel is built for CUDA: its C++ operators do not load, so their fakes have nothing to describe.
    edit(
        "torchvision/_meta_registrations.py",
        (
            r'^@torch\.library\.register_fake\("(torchvision::q?nms)"\)',
            r'@(torch.library.register_fake("\1") if torchvision.extension._has_ops() else (lambda f: f))',
        ),
    )


if __name__ == "__main__":
    main()
