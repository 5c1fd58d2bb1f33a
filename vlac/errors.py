"""The one family of errors: what was found, where, what was expected, what to do.

Everything vlac refuses is a `VlacError`; the command line prints it and exits with code 2.
"""

from __future__ import annotations


class VlacError(Exception):
    """A refusal a person can act on.

    Args:
        message: what was found and where (file, tensor, key), and what was expected.
        remedy: what to do about it, one sentence; printed on its own line. `usual_remedy` of the class without one.
    """

    usual_remedy = ""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy or self.usual_remedy

    def __str__(self) -> str:
        return f"{self.message}\n  -> {self.remedy}" if self.remedy else self.message


class CheckpointError(VlacError):
    """A checkpoint on disk is broken, incomplete or contradicts itself."""

    usual_remedy = "correct that file, or copy the checkpoint again; `vlac inspect` shows what it holds"


class DatasetError(VlacError):
    """A dataset on disk is broken, incomplete or contradicts itself."""

    usual_remedy = "copy the dataset again; the layout is LeRobotDataset v3 (or v2.1), see docs/datasets.md"


class Unsupported(VlacError):
    """A checkpoint or request that is valid but that vlac does not implement."""

    usual_remedy = "use a checkpoint without it; `vlac list` shows what there is"


class Inapplicable(VlacError):
    """A pass that cannot act on this policy; the message holds the numbers."""


class ArtifactError(VlacError):
    """An artifact is broken, incomplete or was written by another version."""

    usual_remedy = "copy the artifact again, or compile again"


class InputError(VlacError):
    """An observation that does not fit the policy (camera, state, task, tokens, noise)."""


class EngineError(VlacError):
    """An engine is missing, failed its self-test or cannot run this artifact."""


class ProgramError(VlacError):
    """A program breaks a rule of the op table or does not parse."""


class VlacWarning(UserWarning):
    """Something the original does as well, and that a person should know (a prompt that was cut)."""
