"""The command line: parse, call, print. Nothing heavy is imported before a command runs.

Exit codes: 0 done, 1 a parity limit does not hold, 2 refused (VlacError, usage, or a bug), 130 interrupted.
"""

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
Engine = Annotated[str | None, typer.Option(help="onnxruntime, openvino, ggml, torch or numpy; default: the best.")]
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


@app.command("inspect")
@guarded
def inspect_command(
    path: Annotated[
        str, typer.Argument(metavar="CKPT|FILE.gguf|out/", help="A checkpoint (folder or hub id) or an artifact.")
    ],
    program: Annotated[bool, typer.Option("--program", help="Print the program instead.")] = False,
    after: Annotated[
        str | None, typer.Option(metavar="REWRITE", help="With --program: as it stands after this rewrite.")
    ] = None,
    revision: Revision = None,
    stats_key: StatsKey = None,
    stats_from: StatsFrom = None,
    no_stats: NoStats = False,
    spec: Spec = None,
    unnorm_key: UnnormKey = None,
    embodiment: Embodiment = None,
    tokenizer: TokenizerPath = None,
    dialect: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The engine whose layout a GGUF file must have: qvac, vla.cpp or auto."),
    ] = None,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a checkpoint or an artifact is.

    Features, cameras, statistics and what they cover, tokenizer, dimensions, formats, warnings.
    """
    from vlac import facts, facts_text, progress
    from vlac.registry import ReadOptions
    from vlac.tables import as_json

    options = ReadOptions(
        *(revision, stats_key, stats_from, no_stats, key_values(spec, "--spec")),
        unnorm_key=unnorm_key,
        embodiment=embodiment,
        tokenizer=tokenizer,
    )
    with progress.progress(json_output or quiet) as show:
        if program or after:
            text = facts.program_text(path, after=after, options=options, progress=show)
            found = {"program": text}
        else:
            found = facts.inspect(path, options=options, dialect=dialect, progress=show)
            text = facts_text.text(found)
    typer.echo(as_json(found) if json_output else text.rstrip("\n"))


@app.command("compile")
@guarded
def compile_command(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="A local folder or a hub id.")],
    target: Annotated[str, typer.Option(help="What to write; `vlac list` names them.")] = "gguf-q8",
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder to write, or a .gguf file.")] = Path("out/"),
    passes: Annotated[
        list[str] | None,
        typer.Option("--pass", metavar="NAME:K=V,...", help="A pass to apply; repeatable, in order."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Passes from a file, applied before those of --pass.")
    ] = None,
    spec: Spec = None,
    unnorm_key: UnnormKey = None,
    embodiment: Embodiment = None,
    tokenizer: TokenizerPath = None,
    stats_key: StatsKey = None,
    stats_from: StatsFrom = None,
    no_stats: NoStats = False,
    revision: Revision = None,
    observations: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz|DIR", help="Observations for the golden answers; default: seeded ones."),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Recorded data (LeRobotDataset) for the passes that calibrate."),
    ] = None,
    rename: Rename = None,
    allow_promote: Annotated[
        bool, typer.Option("--allow-promote", help="Accept tensors that end in another format than asked for.")
    ] = False,
    single_file: Annotated[bool, typer.Option("--single-file", help="One ONNX file with a Loop.")] = False,
    dialect: DialectOf = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the census; write nothing.")
    ] = False,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compile a checkpoint to an artifact that acts without it."""
    import vlac
    from vlac import facts_text, progress
    from vlac.tables import as_json

    with progress.progress(json_output or quiet) as show:
        result = vlac.compile(
            checkpoint,
            target=target,
            out=out,
            passes=passes or (),
            recipe=recipe,
            spec=key_values(spec, "--spec"),
            unnorm_key=unnorm_key,
            embodiment=embodiment,
            tokenizer=tokenizer,
            stats_key=stats_key,
            stats_from=stats_from,
            no_stats=no_stats,
            revision=revision,
            observations=observations,
            calibrate=calibrate,
            rename=key_values(rename, "--rename"),
            allow_promote=allow_promote,
            single_file=single_file,
            dialect=dialect,
            dry_run=dry_run,
            progress=show,
        )
    if json_output:
        typer.echo(as_json({"path": None if result.path is None else str(result.path), "manifest": result.manifest}))
    else:
        typer.echo(facts_text.compiled_text(result.path, result.manifest))


@app.command("parity")
@guarded
def parity_command(
    path: Annotated[str, typer.Argument(metavar="out/|FILE.gguf", help="An artifact.")],
    reference: Annotated[
        str | None,
        typer.Option(metavar="CKPT", help="The untouched checkpoint; default: the answers stored with the data."),
    ] = None,
    observations: Annotated[
        Path | None, typer.Option(metavar="FILE.npz|DIR", help="Observations; default: the artifact's golden ones.")
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Frames of a LeRobotDataset, spread over its episodes.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="How many observations at most; default: 16 of a dataset, else all.")
    ] = None,
    rename: Rename = None,
    engine: Engine = None,
    threads: Threads = None,
    limit: Annotated[
        list[str] | None,
        typer.Option("--limit", metavar="LIMIT", help='Such as "cos>=0.999" or "compiler.max<=1e-4"; repeatable.'),
    ] = None,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Instead: the recipe with each pass left out in turn; wants --reference.")
    ] = False,
    runs: Annotated[int, typer.Option(min=0, help="With --ablate: chunks to time; 0: no latency.")] = 10,
    revision: Revision = None,
    stats_key: StatsKey = None,
    stats_from: StatsFrom = None,
    no_stats: NoStats = False,
    spec: Spec = None,
    unnorm_key: UnnormKey = None,
    embodiment: Embodiment = None,
    tokenizer: TokenizerPath = None,
    save: Save = None,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prove an artifact against its reference.

    Question 1: is the compiler right? Question 2: what did the recipe cost? Exit code 1 when a limit does not hold.
    """
    from vlac import progress
    from vlac.adopt import runnable
    from vlac.parity import parity
    from vlac.recorded import Recorded
    from vlac.registry import ReadOptions
    from vlac.report import parity_text
    from vlac.tables import as_json

    if dataset is not None and (observations is not None or ablate):
        raise InputError(
            f"--dataset together with {'--ablate' if ablate else '--observations'}", remedy="give one of them"
        )
    data = dataset or observations
    given = None if data is None else Recorded(data, key_values(rename, "--rename"))

    how = any((revision, stats_key, stats_from, no_stats, spec, unnorm_key, embodiment, tokenizer))
    read = ReadOptions(
        *(revision, stats_key, stats_from, no_stats, key_values(spec, "--spec")),
        unnorm_key=unnorm_key,
        embodiment=embodiment,
        tokenizer=tokenizer,
    )
    if ablate:
        from vlac.sweep.ablate import ablate as leave_out
        from vlac.sweep.ablate import ablation_text

        with progress.progress(json_output or quiet) as show:
            found = leave_out(
                path,
                reference,
                observations=observations,
                engine=engine,
                threads=threads,
                runs=runs,
                read={k: v for k, v in vars(read).items() if k != "headers_only"} if how else None,
                progress=show,
            )
        finish(found, save)
        typer.echo(as_json(found) if json_output else ablation_text(found))
        return
    with progress.progress(json_output or quiet) as show, runnable(path, read, goldens=2, progress=show) as artifact:
        report = parity(
            artifact,
            reference=reference,
            observations=given,
            frames=frames,
            engine=engine,
            threads=threads,
            limits=limit or (),
            read=read if how else None,
            progress=show,
        )
    report["artifact"] = path
    finish(report, save)
    typer.echo(as_json(report) if json_output else parity_text(report))
    if not report["ok"]:
        raise typer.Exit(1)


@app.command("prepare")
@guarded
def prepare_command(
    path: Annotated[str, typer.Argument(metavar="out/", help="An artifact of an onnx or openvino target.")],
    engine: Engine = None,
    threads: Threads = None,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prepare an artifact for this machine: faster to load, less private memory.

    Keeps beside it what the engine makes of its weights; made again when the engine or the CPU changes.
    """
    from vlac import progress
    from vlac.prepare import prepare, text
    from vlac.tables import as_json

    with progress.progress(json_output or quiet) as show:
        report = prepare(path, engine, threads, progress=show)
    typer.echo(as_json(report) if json_output else text(report))


@app.command("bench")
@guarded
def bench_command(
    path: Annotated[str, typer.Argument(metavar="out/|FILE.gguf", help="An artifact.")],
    stats_from: StatsFrom = None,
    engine: Engine = None,
    threads: Threads = None,
    runs: Annotated[
        int | None, typer.Option(min=1, help="Chunks to measure; default: 30, or a minute's worth.")
    ] = None,
    form: Annotated[
        str, typer.Option("--output", "-o", metavar="md|json|csv|jsonl", help="Form of the report.")
    ] = "md",
    profile: Annotated[
        bool, typer.Option("--profile", help="Time per stage and kind of op, and what this machine could do.")
    ] = False,
    peers: Annotated[
        Path | None,
        typer.Option(metavar="CKPT", help="Beside LeRobot on this checkpoint, and other engines that are set up."),
    ] = None,
    beside: Annotated[
        list[Path] | None, typer.Option(metavar="ARTIFACT", help="With --peers: another of ours; repeatable.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="With --peers: latency, drift and size as a picture.")
    ] = None,
    save: Save = None,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure an artifact on this machine.

    In a fresh process: cold load, first inference, steady state, memory, and what the board tells meanwhile.
    With --peers: interleaved with LeRobot in float32, bfloat16 and compiled, on the same inputs and noise, with drift.
    """
    if peers is not None:
        if form not in ("md", "json"):
            raise InputError(f"-o {form!r} together with --peers: there are md, json")
        _beside_peers([Path(path), *(beside or ())], peers, engine, threads, runs, plot, save, form, json_output, quiet)
        return
    if profile:
        _profile(path, engine, threads, runs, save, form, json_output, quiet)
        return
    if beside or plot:
        raise InputError("--beside and --plot go with --peers", remedy="name LeRobot's checkpoint with --peers")
    from vlac import progress
    from vlac.adopt import runnable
    from vlac.bench import bench
    from vlac.registry import ReadOptions
    from vlac.report import bench_text

    if form not in ("md", "json", "csv", "jsonl"):
        raise InputError(f"-o {form!r}: there are md, json, csv, jsonl")
    form = "json" if json_output else form
    silent, read = json_output or quiet or form != "md", ReadOptions(stats_from=stats_from)
    with progress.progress(silent) as show, runnable(path, read, goldens=1, progress=show) as artifact:
        report = bench(artifact, engine=engine, threads=threads, runs=runs, progress=show)
    finish(report, save)
    typer.echo(bench_text(report, form))


def _profile(
    path: str,
    engine: str | None,
    threads: int | None,
    runs: int | None,
    save: Path | None,
    form: str,
    json_output: bool,
    quiet: bool,
) -> None:
    from vlac import progress
    from vlac.profile import profile, text
    from vlac.tables import as_json

    if form not in ("md", "json"):
        raise InputError(f"-o {form!r} together with --profile: there are md, json")
    machine_readable = json_output or form == "json"
    with progress.progress(machine_readable or quiet) as show:
        report = profile(path, engine=engine, threads=threads, runs=runs, progress=show)
    finish(report, save)
    typer.echo(as_json(report) if machine_readable else text(report))


def _beside_peers(
    paths: list[Path],
    checkpoint: Path,
    engine: str | None,
    threads: int | None,
    runs: int | None,
    plot: Path | None,
    save: Path | None,
    form: str,
    json_output: bool,
    quiet: bool,
) -> None:
    from vlac import progress
    from vlac.peers.compare import compare, ours
    from vlac.peers.figures import save_plot, table
    from vlac.tables import as_json

    machine_readable = json_output or form == "json"
    mine = [ours(p, (engine or "") if i == 0 else "") for i, p in enumerate(paths)]
    with progress.progress(machine_readable or quiet) as show:
        report = compare(mine, checkpoint.resolve(), rounds=runs or 5, threads=threads, progress=show)
    finish(report, save)
    if plot is not None:
        save_plot(report["rows"], f"{paths[0].name} on {report['machine']['cpu']}", plot)
    typer.echo(as_json(report) if machine_readable else table(report["rows"]))


@app.command("serve")
@guarded
def serve_command(
    path: Annotated[str, typer.Argument(metavar="out/|FILE.gguf|CKPT", help="An artifact; a checkpoint runs in fp32.")],
    protocol: Annotated[str, typer.Option(metavar="openpi|lerobot|http", help="What the clients speak.")] = "http",
    host: Annotated[str, typer.Option(help="Address to listen on; others can reach it unless it is loopback.")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Default: 8000, lerobot 8080; 0 takes a free one.")
    ] = None,
    token: Annotated[
        str | None, typer.Option(envvar="VLAC_TOKEN", help="What a client must send; default: nothing.")
    ] = None,
    max_bytes: Annotated[int, typer.Option(min=1024, help="Largest message that is read.")] = 32 << 20,
    max_clients: Annotated[int, typer.Option(min=1, help="How many may be connected.")] = 64,
    fps: Annotated[int, typer.Option(min=1, help="The robot's control rate: deadlines and recordings.")] = 30,
    record: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write observations and chunks there as a LeRobotDataset.")
    ] = None,
    dashboard: Annotated[bool, typer.Option("--dashboard", help="A page that shows what happens.")] = False,
    shadow: Annotated[
        str | None, typer.Option(metavar="REFERENCE", help="Compare chunks with another policy, in its own process.")
    ] = None,
    shadow_every: Annotated[int, typer.Option(min=1, help="With --shadow: every Nth chunk.")] = 10,
    limit: Annotated[
        list[str] | None, typer.Option("--limit", help='Such as "range<=0.05", "jerk<=2", "drift<=0.1"; repeatable.')
    ] = None,
    hold: Annotated[
        str | None, typer.Option(metavar="last|zero", help="What is answered when a limit does not hold.")
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option("--rename", metavar="THEIRS=OURS", help="A client's key under the policy's name; repeatable."),
    ] = None,
    engine: Engine = None,
    threads: Threads = None,
) -> None:
    """Serve a policy to robots, for clients that exist: openpi's, LeRobot's, or plain HTTP.

    SIGTERM ends it after what waits is answered. See docs/serve.md.
    """
    from vlac.serve.run import Options, serve

    options = Options(
        protocol=protocol,
        host=host,
        port=port,
        token=token,
        max_bytes=max_bytes,
        max_clients=max_clients,
        fps=fps,
        record=record,
        dashboard=dashboard,
        shadow=shadow,
        shadow_every=shadow_every,
        limits=tuple(limit or ()),
        hold=hold,
        rename=key_values(rename, "--rename"),
    )
    serve(path, options, engine=engine, threads=threads, say=lambda text: typer.echo(text, err=True))


@app.command("eval")
@guarded
def eval_command(
    environment: Annotated[
        str, typer.Argument(metavar="push-cubes|gym:ENV_ID", help="The bundled task, or any Gymnasium environment.")
    ],
    path: Annotated[str, typer.Argument(metavar="out/|FILE.gguf|CKPT", help="An artifact; a checkpoint runs in fp32.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="OTHER", help="An artifact or checkpoint on the same episodes, for a paired difference."),
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="How many.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first episode; the others follow.")] = 0,
    n_action_steps: Annotated[
        int | None, typer.Option(min=1, help="Actions executed of each chunk; default: as the policy says.")
    ] = None,
    delay: Annotated[
        str | None,
        typer.Option(metavar="MS|measured", help="What an inference takes on the robot's clock; default: no time."),
    ] = None,
    rtc: Annotated[
        bool, typer.Option("--rtc", help="Real-time chunking: each chunk goes on from what is left of the last.")
    ] = False,
    control: Annotated[
        str, typer.Option(metavar="none|shuffled|blank", help="Tell wrong instructions, or show black pictures.")
    ] = "none",
    adapter: Annotated[
        Path | None, typer.Option(metavar="FILE.json|yaml", help="Which keys of a gym: environment are what.")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A GIF and a strip of one success and one failure go there.")
    ] = None,
    engine: Engine = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of each engine; default: 1.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: as many as cores.")] = None,
    save: Save = None,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Let a policy act in closed loop and count its successes.

    With a 95 % interval; with --against also the paired difference on the same episodes and its p-value.
    """
    from vlac import machine, progress
    from vlac.environments import named
    from vlac.eval_text import eval_text
    from vlac.evaluate import evaluate
    from vlac.tables import as_json

    with progress.progress(json_output or quiet) as show:
        report = evaluate(
            path,
            named(environment, adapter),
            against=against,
            episodes=episodes,
            seed=seed,
            n_action_steps=n_action_steps,
            delay=milliseconds(delay),
            rtc=rtc,
            control=control,
            engine=engine,
            threads=threads,
            workers=workers or machine.usable_cores(),
            pictures=pictures,
            progress=show,
        )
    finish(report, save)
    typer.echo(as_json(report) if json_output else eval_text(report))


@app.command("sweep")
@guarded
def sweep_command(
    grid: Annotated[Path, typer.Argument(metavar="GRID.yaml", help="Targets, engines and passes to combine.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for rows, table and picture.")] = Path("sweep/"),
    workers: Annotated[int, typer.Option(min=1, help="Points at a time on this machine.")] = 1,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Only the I-th of N parts, for job arrays.")] = "1/1",
    executor: Annotated[str, typer.Option(metavar="processes|ray", help="Where points run.")] = "processes",
    address: Annotated[
        str | None, typer.Option(help="With ray: the cluster; default: RAY_ADDRESS, or one here.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the artifacts in OUT/artifacts.")] = False,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compile and measure a grid of recipes, and show which are worth having.

    Points measured before are left as they are: start a killed run again with the same command.
    """
    from vlac import progress
    from vlac.sweep.run import sweep
    from vlac.tables import as_json

    with progress.progress(json_output or quiet) as show:
        found = sweep(
            grid, out, workers=workers, shard=shard, executor=executor, address=address, keep=keep, progress=show
        )
    if json_output:
        typer.echo(as_json(found))
    else:
        typer.echo((out / "sweep.md").read_text(encoding="utf-8").rstrip("\n"))
        typer.echo(f"{found['measured']} measured now, {found['found']} before; {found['path']}")
    if found["failed"]:
        raise typer.Exit(1)


@app.command("report")
@guarded
def report_command(
    paths: Annotated[list[str], typer.Argument(metavar="out1/ [out2/ ...]", help="Artifacts.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.html", help="The page.")] = Path("report.html"),
    results: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="FILE.json", help="What parity, bench or eval saved; repeatable."),
    ] = None,
    environment: Annotated[
        str | None,
        typer.Option("--eval", metavar="push-cubes", help="Measure success where no saved result tells it."),
    ] = None,
    against: Annotated[str | None, typer.Option(metavar="OTHER", help="With --eval: as in `vlac eval`.")] = None,
    episodes: Annotated[int, typer.Option(min=1, help="With --eval: how many.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="With --eval: seed of the first episode.")] = 0,
    no_bench: Annotated[
        bool, typer.Option("--no-bench", help="Leave latency out where no saved result tells it.")
    ] = False,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put artifacts side by side on one HTML page.

    Size, latency, drift and success; what is not handed in by --with is measured now. The page needs no network.
    """
    import shlex
    from datetime import datetime, timezone

    from vlac import machine, progress
    from vlac.environments import named
    from vlac.report_data import ClosedLoop, collect
    from vlac.report_page import render, summary_text
    from vlac.tables import as_json

    loop = None
    if environment is not None:
        loop = ClosedLoop(named(environment, None), episodes, seed, against, machine.usable_cores())
    with progress.progress(json_output or quiet) as show:
        entries = collect(paths, results or (), loop=loop, timed=not no_bench, progress=show)
    made = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    page = render(entries, made, "vlac " + shlex.join(sys.argv[1:]))
    write_whole(out, page)
    if json_output:
        typer.echo(as_json({"path": str(out), "artifacts": [vars(e) for e in entries]}))
    else:
        typer.echo(f"{summary_text(entries)}\n\nreport: {out.resolve()}")


@app.command("export")
@guarded
def export_command(
    path: Annotated[str, typer.Argument(metavar="out/", help="An artifact of one ONNX graph (--single-file).")],
    policy_package: Annotated[
        Path,
        typer.Option("--policy-package", metavar="DIR", help="A new folder: model, manifest and the steps around it."),
    ],
    backend: Annotated[
        str | None, typer.Option(metavar="onnx|openvino", help="What runs the model; default: by the target.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Write an artifact as a package that other runtimes load, such as Intel's physicalai."""
    from vlac.policy_package import write_package
    from vlac.tables import as_json

    written = write_package(path, policy_package, backend)
    typer.echo(as_json({"path": str(written)}) if json_output else f"wrote {written}")


@app.command("run")
@guarded
def run_command(
    path: Annotated[str, typer.Argument(metavar="out/|FILE.gguf", help="An artifact.")],
    image: Annotated[
        list[str] | None, typer.Option("--image", metavar="CAMERA=FILE", help="A picture per camera; repeatable.")
    ] = None,
    state: Annotated[
        str | None, typer.Option(metavar="0,0,...", help="The robot's state, raw, comma-separated.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="The instruction.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the sampler's noise.")] = None,
    units: Annotated[
        str | None,
        typer.Option(metavar="robot|normalized", help="Units of state and actions; default: the artifact's."),
    ] = None,
    stats_from: StatsFrom = None,
    engine: Engine = None,
    threads: Threads = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="chunk.npy", help="Write the chunk there.")] = None,
    json_output: Json = False,
) -> None:
    """Act once on pictures, a state and a task."""
    from vlac.act_once import act_once, save
    from vlac.adopt import runnable
    from vlac.registry import ReadOptions
    from vlac.report import chunk_text
    from vlac.tables import as_json

    with runnable(path, ReadOptions(stats_from=stats_from)) as artifact:
        answer = act_once(
            artifact,
            images=key_values(image, "--image"),
            state=state,
            task=task,
            seed=seed,
            units=units,
            engine=engine,
            threads=threads,
        )
    if out is not None:
        save(out, answer["chunk"])
    typer.echo(as_json(answer) if json_output else chunk_text(answer))


@app.command("list")
@guarded
def list_command(json_output: Json = False) -> None:
    """List what is plugged in.

    Families, readers, passes, targets and engines.
    """
    from vlac import doctor, report
    from vlac.tables import as_json

    found = doctor.plugged_in()
    typer.echo(as_json(found) if json_output else report.list_text(found))


@app.command("doctor")
@guarded
def doctor_command(json_output: Json = False) -> None:
    """Test this machine and its engines.

    What it has, which engines work here, and what to install.
    """
    from vlac import doctor
    from vlac.tables import as_json

    findings = doctor.examine()
    typer.echo(as_json(findings) if json_output else doctor.text(findings))


def main() -> None:
    """Entry point of the `vlac` command."""
    app()


if __name__ == "__main__":
    main()
