"""What all commands share: the application, options that several take, refusals, and files written whole."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from vlac import __version__
from vlac.errors import InputError, VlacError

app = typer.Typer(
    name="vlac",
    help="vlac, the VLA compiler: a vision-language-action policy from a checkpoint onto a robot's own computer.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

F = TypeVar("F", bound=Callable[..., None])

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout, nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Engine = Annotated[
    str | None, typer.Option(help="onnxruntime, openvino, ggml, tensorrt, torch or numpy; default: the best.")
]
Device = Annotated[
    str | None, typer.Option(metavar="cpu|cuda|cuda:N", help="Where the torch engine computes; default: cpu.")
]
Dtype = Annotated[
    str | None, typer.Option(metavar="f32|bf16|f16|int8", help="What the torch engine multiplies; default: f32.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of the engine.")]
StatsKey = Annotated[str | None, typer.Option(help="Name under which the checkpoint keeps its statistics.")]
StatsFrom = Annotated[str | None, typer.Option(help="File or checkpoint to take statistics from.")]
NoStats = Annotated[bool, typer.Option("--no-stats", help="Without statistics: normalised units only.")]
Spec = Annotated[list[str] | None, typer.Option("--spec", metavar="K=V", help="A dimension, such as text.head_dim=64.")]
UnnormKey = Annotated[str | None, typer.Option(help="Dataset whose statistics are used, where there are several.")]
Embodiment = Annotated[str | None, typer.Option(help="Robot to compile for, where the checkpoint knows several.")]
TokenizerPath = Annotated[str | None, typer.Option("--tokenizer", help="tokenizer.json or its folder, if not there.")]
DialectOf = Annotated[
    str | None, typer.Option("--dialect", metavar="NAME", help="A file for another engine: qvac or vla.cpp.")
]
Save = Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write the report there as well, for `report`.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Rename = Annotated[
    list[str] | None,
    typer.Option("--rename", metavar="THEIRS=OURS", help="A camera of the data under the policy's name; repeatable."),
]


def guarded(command: F) -> F:
    """Turns refusals into a message with its remedy and exit code 2; anything unexpected is named a bug."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        machine_readable = bool(kwargs.get("json_output"))
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except VlacError as error:
            fail(error.message, error.remedy, machine_readable)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            typer.echo("interrupted; nothing half-written is left", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # the reader (head, less) has gone; leave nothing for the interpreter to flush into the closed pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(0) from None
        except MemoryError:
            fail("out of memory", "use a machine with more, or a smaller target", machine_readable)
        except OSError as error:
            name = f"{error.filename}: " if error.filename else ""
            fail(
                f"{name}{error.strerror or error}", "check the place, its permissions and free space", machine_readable
            )
        except Exception as error:
            _bug(error, machine_readable)

    return run  # type: ignore[return-value]


def fail(message: str, remedy: str, machine_readable: bool) -> NoReturn:
    """Prints a refusal, red on a terminal, and ends with exit code 2."""
    if machine_readable:
        import json

        typer.echo(json.dumps({"error": message, "remedy": remedy}, ensure_ascii=False))
    else:
        typer.secho(f"error: {message}", fg=_colour(typer.colors.RED), err=True)
        if remedy:
            typer.echo(f"  -> {remedy}", err=True)
    raise typer.Exit(2)


def _bug(error: Exception, machine_readable: bool) -> NoReturn:
    if os.environ.get("VLAC_TRACEBACK") == "1":
        import traceback

        traceback.print_exception(error)
    fail(
        f"this is a bug in vlac: {type(error).__name__}: {error}",
        "please report it with the command and the traceback that VLAC_TRACEBACK=1 prints",
        machine_readable,
    )


def _colour(name: str) -> str | None:
    return None if "NO_COLOR" in os.environ else name


def key_values(items: list[str] | None, option: str) -> dict[str, str]:
    """["k=v", "k=v,k=v", ...] -> {k: v}; InputError names the item that is none, or a key given twice."""
    result: dict[str, str] = {}
    parts = [i.split(",") if all("=" in p for p in i.split(",")) else [i] for i in items or ()]
    for item in (p for group in parts for p in group):
        key, eq, value = item.partition("=")
        if not eq or not key or not value:
            raise InputError(f"{option} {item!r} is not KEY=VALUE")
        if key in result:
            raise InputError(f"{option} {key} is given twice")
        result[key] = value
    return result


def columns(text: str, option: str) -> tuple[int, ...]:
    """ "0,1" -> (0, 1); InputError when it is no list of numbers."""
    parts = text.split(",")
    if not all(p.strip().isascii() and p.strip().isdigit() for p in parts):
        raise InputError(f"{option} {text!r}: columns of an action, such as 0,1,2")
    return tuple(int(p) for p in parts)


def on_torch(engine: str | None, device: str | None, dtype: str | None) -> tuple[str | None, dict[str, Any]]:
    """The engine and its options; --device and --dtype mean torch, InputError when another engine is named."""
    given = {name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None}
    if given and engine not in (None, "torch"):
        raise InputError(f"--{next(iter(given))} is for the torch engine, not {engine}", remedy="use --engine torch")
    return ("torch" if given else engine), given


def milliseconds(text: str | None) -> float | str | None:
    """ "measured" and None as they are, else a number; InputError when it is none."""
    if text is None or text == "measured":
        return text
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--delay {text!r}: milliseconds, or 'measured'") from None


def finish(report: Mapping[str, Any], save: Path | None) -> None:
    """Keeps a report in a file when asked to."""
    if save is not None:
        from vlac.tables import as_json

        write_whole(save, as_json(report) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside `path` and renames it, so that an interrupt leaves the earlier one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"vlac {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """vlac, the VLA compiler: a vision-language-action policy from a checkpoint onto a robot's own computer."""
