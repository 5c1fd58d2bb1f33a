"""Which picture is which camera: names resolved, missing and unknown ones refused, slots laid out."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from vlac.errors import InputError
from vlac.io import IO


def describe(io: IO) -> str:
    """The expected cameras, for messages: "top (observation.images.top), wrist (...)"."""
    return ", ".join(f"{c.name} ({c.key})" if c.name != c.key else c.key for c in io.cameras)


def resolve(io: IO, name: Any) -> str:
    """The feature key that a caller's name means: the key itself or its last part, after the policy's own renaming.

    Raises InputError for a name that fits no camera, or several.
    """
    keys = [c.key for c in io.cameras]
    renamed = _renamed(io, name)
    found = [renamed] if renamed in keys else [c.key for c in io.cameras if c.name == renamed]
    if len(found) == 1:
        return str(found[0])
    if found:
        raise InputError(
            f"camera {name!r} may be {' or '.join(found)}", remedy="name it by its whole key; `vlac inspect` shows them"
        )
    raise InputError(
        f"camera {name!r} is unknown to this policy; it has {describe(io)}", remedy=_suggest(io, str(name))
    )


def _renamed(io: IO, name: Any) -> Any:
    """What the policy's own renaming makes of a key, or of a key's last part; else the name itself."""
    if name in io.rename:
        return io.rename[name]
    by_part = {new for old, new in io.rename.items() if old.rsplit(".", 1)[-1] == name}
    return by_part.pop() if len(by_part) == 1 else name


def _suggest(io: IO, name: str) -> str:
    known = [c.name for c in io.cameras] + [c.key for c in io.cameras] + list(io.rename)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "name pictures by these cameras, and give no others"


def match(io: IO, images: Any) -> dict[str, Any]:
    """Feature key -> picture for the cameras given, in declared order.

    Raises InputError when `images` is no mapping, a camera is unknown or given twice, all are absent, or more are
    absent than the policy allows (`io.max_missing_cameras`).
    """
    if images is None:
        images = {}
    if not isinstance(images, Mapping):
        raise InputError(
            f"images is a {type(images).__name__}, expected a mapping from camera to picture",
            remedy=f"give images={{{', '.join(f'{c.name!r}: ...' for c in io.cameras)}}}",
        )
    given: dict[str, Any] = {}
    names: dict[str, Any] = {}
    for name, picture in images.items():
        key = resolve(io, name)
        if key in given:
            raise InputError(f"camera {key} is given twice, as {names[key]!r} and as {name!r}", remedy="give it once")
        given[key], names[key] = picture, name
    _check_missing(io, given)
    return {c.key: given[c.key] for c in io.cameras if c.key in given}


def _check_missing(io: IO, given: Mapping[str, Any]) -> None:
    missing = [c.key for c in io.cameras if c.key not in given]
    if io.cameras and not given:
        raise InputError(f"no camera is given; this policy has {describe(io)}", remedy="give at least one picture")
    if len(missing) > io.max_missing_cameras:
        allowed = f"at most {io.max_missing_cameras} may be" if io.max_missing_cameras else "none may be"
        raise InputError(
            f"{'cameras' if len(missing) > 1 else 'camera'} {', '.join(missing)} {'are' if len(missing) > 1 else 'is'} "
            f"missing, {allowed}; this policy has {describe(io)}, given: {', '.join(given)}",
            remedy="give a picture for each",
        )


def slots(io: IO, given: Sequence[str]) -> tuple[str, ...]:
    """Every camera slot that takes part: cameras given in declared order, then those absent."""
    return (*given, *(c.key for c in io.cameras if c.key not in given))
