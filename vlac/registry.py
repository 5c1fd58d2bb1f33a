"""What can be plugged in: families, readers, passes, targets. Each registers with a decorator where it is defined.

Built-in ones are found by importing the packages vlac.families, vlac.readers, vlac.passes, vlac.targets; third
parties' through entry points of the same group names. Nothing is imported before the first look-up.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from vlac.errors import Unsupported, VlacError
from vlac.spec import full_name

if TYPE_CHECKING:
    from vlac.artifact import Sidecars
    from vlac.graph import Program
    from vlac.policy import Policy

Progress = Callable[[str, int, int], None]
"""progress(what, done, total): called as work proceeds; total 0 = unknown."""


def silent(what: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""


_TOLD: ContextVar[Progress] = ContextVar("progress of passes", default=silent)


def telling() -> Progress:
    """Where a pass that takes minutes reports how far it is."""
    return _TOLD.get()


@contextmanager
def told(progress: Progress) -> Iterator[None]:
    """Passes within report to `progress`."""
    token = _TOLD.set(progress)
    try:
        yield
    finally:
        _TOLD.reset(token)


@dataclass(frozen=True)
class Family:
    """How a model family is drawn. `from_lerobot` is used by the LeRobot reader (see vlac/readers/lerobot.py);
    `title` is how people write its name ("SmolVLA"); `spec` is its frozen dataclass of dimensions, for readers of files
    that hold every one of them."""

    name: str
    build: Callable[[Policy], Program]
    from_lerobot: Callable[..., Any] | None = None
    doc: str = ""
    title: str = ""
    spec: type[Any] | None = None


@dataclass(frozen=True)
class ReadOptions:
    """What the user said about reading: --revision, --stats-key, --stats-from, --no-stats, --spec, --unnorm-key,
    --embodiment, --tokenizer.

    `headers_only` = inspect: problems become warnings instead of errors and no tensor data is read.
    """

    revision: str | None = None
    stats_key: str | None = None
    stats_from: str | None = None
    no_stats: bool = False
    spec: Mapping[str, Any] = field(default_factory=dict)
    headers_only: bool = False
    unnorm_key: str | None = None
    embodiment: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", {full_name(k): v for k, v in self.spec.items()})


@dataclass(frozen=True)
class Reader:
    """Bytes on disk -> Policy. `detect(path)` is cheap and says whether this reader knows the folder or file."""

    name: str
    detect: Callable[[Path], bool]
    read: Callable[[Path, ReadOptions], Policy]
    doc: str = ""


@dataclass(frozen=True)
class Pass:
    """Policy -> Policy. `params` maps parameter name -> (type, default or None if required, help).

    `requires(policy, **params)` raises Inapplicable with the numbers; `apply` returns the new policy and its figures;
    `ensures(before, after, **params)` raises if a promise was broken.
    """

    name: str
    apply: Callable[..., tuple[Policy, Mapping[str, Any]]]
    params: Mapping[str, tuple[type, Any, str]] = field(default_factory=dict)
    requires: Callable[..., None] | None = None
    ensures: Callable[..., None] | None = None
    doc: str = ""


@dataclass(frozen=True)
class Dialect:
    """How a target writes files for another engine: from the policy's own tensors, nothing fused or padded.

    `fit(policy, drawn program)` gives the program with the formats that the file will hold and the formats asked
    for, or raises Unsupported with everything that engine cannot express; `emit(policy, fitted program, sidecars,
    temporary folder, progress)` writes the file.
    """

    name: str
    fit: Callable[[Policy, Program], tuple[Program, dict[str, str]]]
    emit: Callable[[Policy, Program, Sidecars, Path, Progress], None]


@dataclass(frozen=True)
class Target:
    """A file layout with a precision.

    Attributes:
        name: "onnx-int8", "gguf-q8", ...
        plan: (param name, shape, role) -> format asked for; role is "linear", "embed",
            "head" (touches raw state, flow state or velocity) or "other" (norms, biases, tables).
        lower: last rewrites this layout needs (legalise), after the common list.
        emit: (program with weights and formats, sidecars, temporary folder, options, progress) -> nothing; writes the
            layout's files into the folder. The caller renames the folder into place.
        engines: names of engines that can run the result, best first.
        options: option name -> help (e.g. "single_file").
        passes: what is applied after all passes asked for, where it applies and changes something ("smooth-norms").
        dialects: name -> how files for another engine are written, for --dialect.
        containers: grid that a pass asks for by bits and group ("w4g32", vlac.formats.GRIDS) -> format that holds it.
        observe: (policy, lowered program) -> the program with what had to be measured, figures for the manifest.
    """

    name: str
    plan: Callable[[str, tuple[int, ...], str], str]
    lower: Callable[[Program, Mapping[str, Any]], Program]
    emit: Callable[[Program, Sidecars, Path, Mapping[str, Any], Progress], None]
    engines: tuple[str, ...]
    options: Mapping[str, str] = field(default_factory=dict)
    doc: str = ""
    passes: tuple[str, ...] = ()
    dialects: Mapping[str, Dialect] = field(default_factory=dict)
    containers: Mapping[str, str] = field(default_factory=dict)
    observe: Callable[[Policy, Program], tuple[Program, Mapping[str, Any]]] | None = None


E = TypeVar("E", Family, Reader, Pass, Target)


class Registry(Generic[E]):
    """Name -> entry, filled on first look-up from a package's modules and from entry points."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, E] = {}
        self._loaded = False

    def add(self, entry: E) -> E:
        self._entries[entry.name] = entry
        return entry

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # before the imports: what they define may look something up
        try:
            package = importlib.import_module(self.package)
            for info in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self.package}.{info.name}")
            for point in metadata.entry_points(group=self.package):
                _load_point(point)
        except BaseException:
            self._loaded = False  # the next look-up says the same instead of finding half a table
            raise

    def get(self, name: str) -> E:
        """The entry; Unsupported names what there is."""
        self._load()
        if name not in self._entries:
            raise Unsupported(f"no {self.kind} {name!r}; there are: {', '.join(sorted(self._entries))}")
        return self._entries[name]

    def all(self) -> list[E]:
        self._load()
        return [self._entries[k] for k in sorted(self._entries)]


def _load_point(point: metadata.EntryPoint) -> None:
    try:
        point.load()
    except Exception as error:
        owner = point.dist.name if point.dist else "an unknown package"
        raise VlacError(
            f"plug-in {point.name} ({point.value}, from {owner}) cannot be loaded: {type(error).__name__}: {error}",
            remedy=f"repair or uninstall {owner}",
        ) from error


families: Registry[Family] = Registry("family", "vlac.families")
readers: Registry[Reader] = Registry("reader", "vlac.readers")
passes: Registry[Pass] = Registry("pass", "vlac.passes")
targets: Registry[Target] = Registry("target", "vlac.targets")
