"""Where a checkpoint's files are: a local folder, or the Hugging Face hub through its own client and cache.

HF_HOME, HF_HUB_OFFLINE and HF_TOKEN act as they do everywhere; only JSON, safetensors and tokenizer files are ever
fetched. Everything that can go wrong becomes a VlacError that says what to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlac.errors import CheckpointError, VlacError

PATTERNS = ("*.json", "*.safetensors")
"""Files fetched from a repository, at any depth; pickles and code are not among them."""

NOT_NEEDED = ("training_state/*", "*/training_state/*", "checkpoints/*")
"""A trainer's own state, which may be larger than the policy."""

BUNDLED: Mapping[str, str] = {"push-cubes": "push_cubes"}
"""Checkpoints that come with vlac: name -> folder in vlac/zoo. A local folder of the same name is taken first."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form "owner/repository"."""
    return bool(_HUB_ID.fullmatch(name)) and ".." not in name


def bundled(name: str) -> Path:
    """The folder of a bundled checkpoint; VlacError when this installation lacks it."""
    folder = Path(__file__).resolve().parents[1] / "zoo" / BUNDLED[name]
    if not (folder / "config.json").is_file():
        raise VlacError(
            f"the bundled checkpoint {name} is not in this installation ({folder})", remedy="reinstall vlac"
        )
    return folder


def _fetch(what: str, revision: str | None, call: Callable[[Any], str]) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise VlacError(
            f"{what} is not a local folder and huggingface_hub is not installed",
            remedy="pip install 'vlac-compiler[compile]', or give a local folder",
        ) from None
    at = f" at revision {revision}" if revision else ""
    try:
        return Path(call(huggingface_hub))
    except errors.GatedRepoError:
        raise VlacError(f"{what} is gated on the hub", remedy="accept its terms there and set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise VlacError(
            f"{what} is neither a local folder nor a repository on the hub (or it is private)",
            remedy="check the spelling; for a private repository set HF_TOKEN",
        ) from None
    except errors.RevisionNotFoundError:
        raise VlacError(f"{what} has no revision {revision}", remedy="check --revision") from None
    except errors.LocalEntryNotFoundError:
        raise VlacError(
            f"{what}{at} is not in the hub cache and the hub cannot be reached (offline or HF_HUB_OFFLINE=1)",
            remedy="run once with network, set HF_HOME to a cache that holds it, or give a local folder",
        ) from None
    except errors.EntryNotFoundError:
        raise VlacError(f"{what}{at} does not exist on the hub") from None
    except Exception as error:  # requests', httpx' or the client's own, by version: all mean "not fetched"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise VlacError(
            f"{what}{at} cannot be fetched: {reason}",
            remedy="try again with network, or give a local folder",
        ) from None


def fetch_repository(repo_id: str, revision: str | None = None) -> Path:
    """A hub repository's JSON and safetensors files in the local cache; downloads what is missing."""
    patterns = {"allow_patterns": list(PATTERNS), "ignore_patterns": list(NOT_NEEDED)}
    return _fetch(
        f"checkpoint {repo_id}",
        revision,
        lambda hub: hub.snapshot_download(repo_id, revision=revision, **patterns),
    )


def fetch_file(repo_id: str, filename: str, revision: str | None = None) -> Path:
    """One file of a hub repository, from the cache or downloaded."""
    return _fetch(
        f"{filename} of {repo_id}",
        revision,
        lambda hub: hub.hf_hub_download(repo_id, filename, revision=revision),
    )


def resolve(checkpoint: str, revision: str | None = None) -> Path:
    """The local folder or file that `checkpoint` means: a path, a bundled checkpoint's name or a hub id.

    Raises VlacError when there is none.
    """
    path = Path(checkpoint).expanduser()
    if path.exists():
        return path
    if checkpoint in BUNDLED:
        return bundled(checkpoint)
    if not is_hub_id(checkpoint):
        raise VlacError(
            f"{checkpoint}: no such folder, and not a hub id (owner/name)",
            remedy=f"give a checkpoint folder, a hub id such as lerobot/smolvla_base, or {', '.join(BUNDLED)}",
        )
    return fetch_repository(checkpoint, revision)


def policy_folder(path: Path) -> Path:
    """The folder that holds the policy: a trainer's output has it in `pretrained_model`."""
    inner = path / "pretrained_model"
    return inner if not (path / "config.json").exists() and (inner / "config.json").is_file() else path


def local_companion(folder: Path, name: str, filename: str) -> Path | None:
    """`filename` of something a checkpoint names, if it lies in `folder/name` or `folder/<last part of name>`.

    Names that are absolute or hold `..` are looked for by their last part only: nothing outside the checkpoint is read.
    """
    parts = [p for p in re.split(r"[/\\]+", name) if p]
    if any(c in name for c in "\0:") or not parts or parts[-1] in (".", ".."):
        return None
    inside = not Path(name).is_absolute() and ".." not in parts
    for local in dict.fromkeys(([name] if inside else []) + [parts[-1]]):
        if (folder / local / filename).is_file():
            return folder / local / filename
    return None


def companion(folder: Path, name: str, filename: str, what: str) -> Path:
    """`filename` of something a checkpoint names: a folder inside it, else a hub repository; or CheckpointError."""
    local = local_companion(folder, name, filename)
    if local is not None:
        return local
    tail = re.split(r"[/\\]+", name.rstrip("/\\"))[-1]
    remedy = f"place a folder {tail!r} with {filename} into {folder}"
    if not is_hub_id(name):
        raise CheckpointError(f"{folder}: {what} is named {name!r}, but there is no {filename} for it", remedy=remedy)
    try:
        return fetch_file(name, filename)
    except VlacError as error:
        raise CheckpointError(
            f"{folder}: {what}: {error.message}", remedy=f"{remedy}, or set HF_HOME to a cache that holds {name}"
        ) from None
