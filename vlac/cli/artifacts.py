"""Commands that make and judge artifacts: inspect, compile, parity, prepare, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlac.cli.options import (
    Device,
    DialectOf,
    Dtype,
    Embodiment,
    Engine,
    Json,
    NoStats,
    Quiet,
    Rename,
    Revision,
    Save,
    Spec,
    StatsFrom,
    StatsKey,
    Threads,
    TokenizerPath,
    UnnormKey,
    app,
    finish,
    guarded,
    key_values,
    on_torch,
)
from vlac.errors import InputError


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
    trt: Annotated[
        str | None,
        typer.Option("--trt", metavar="10.3|10.16", help="Operators of the tensorrt targets; default: 10.3."),
    ] = None,
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
            trt=trt,
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
    device: Device = None,
    dtype: Dtype = None,
    on: Annotated[
        list[str] | None,
        typer.Option(
            "--on", metavar="ENGINE[:DEVICE][:DTYPE]", help="A row of one table, such as torch:cuda; repeatable."
        ),
    ] = None,
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
    With --on: several engines and devices in one table; one that is absent says why and fails nothing.
    """
    from vlac import progress
    from vlac.adopt import runnable
    from vlac.parity import parity
    from vlac.parity_table import compare, compare_text
    from vlac.recorded import Recorded
    from vlac.registry import ReadOptions
    from vlac.report import parity_text
    from vlac.tables import as_json

    if dataset is not None and (observations is not None or ablate):
        raise InputError(
            f"--dataset together with {'--ablate' if ablate else '--observations'}", remedy="give one of them"
        )
    if ablate and (device or dtype):
        raise InputError("--device and --dtype do not go with --ablate", remedy="leave them out")
    if on and (engine or device or dtype or ablate):
        raise InputError("--on stands instead of --engine, --device, --dtype and --ablate", remedy="leave those out")
    engine, options = on_torch(engine, device, dtype)
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
    asked: dict[str, Any] = {
        "reference": reference,
        "observations": given,
        "frames": frames,
        "threads": threads,
        "limits": limit or (),
        "read": read if how else None,
    }
    with progress.progress(json_output or quiet) as show, runnable(path, read, goldens=2, progress=show) as artifact:
        if on:
            report = compare(artifact, on, **asked, progress=show)
        else:
            report = parity(artifact, engine=engine, options=options, **asked, progress=show)
    report["artifact"] = path
    finish(report, save)
    as_text = compare_text if on else parity_text
    typer.echo(as_json(report) if json_output else as_text(report))
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


@app.command("build")
@guarded
def build_command(
    path: Annotated[str, typer.Argument(metavar="out/", help="An artifact of a tensorrt target.")],
    force: Annotated[bool, typer.Option("--force", help="Build again what is there.")] = False,
    workspace: Annotated[int, typer.Option(min=1, metavar="MB", help="Memory that TensorRT's builder may use.")] = 2048,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build TensorRT plans on the machine that will run them.

    Keeps them beside the artifact, named by GPU and TensorRT version; made again when either changes.
    """
    from vlac import plans, progress
    from vlac.tables import as_json

    with progress.progress(json_output or quiet) as show:
        report = plans.build(path, force=force, workspace_mb=workspace, progress=show)
    typer.echo(as_json(report) if json_output else plans.text(report))


@app.command("bench")
@guarded
def bench_command(
    path: Annotated[str, typer.Argument(metavar="out/|FILE.gguf", help="An artifact.")],
    stats_from: StatsFrom = None,
    engine: Engine = None,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
    runs: Annotated[
        int | None, typer.Option(min=1, help="Chunks to measure; default: 30, or a minute's worth.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(metavar="HZ", help="The robot's control rate: how many chunks would come too late.")
    ] = None,
    sustain: Annotated[
        bool, typer.Option("--sustain", help="Run until latency has settled, ten minutes at most.")
    ] = False,
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
    if (sustain or rate is not None) and (peers is not None or profile):
        raise InputError("--sustain and --rate measure one artifact alone", remedy="leave --peers and --profile away")
    engine, options = on_torch(engine, device, dtype)
    if options and (peers is not None or profile):
        raise InputError("--device and --dtype measure one artifact alone", remedy="leave --peers and --profile away")
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
        report = bench(
            artifact,
            engine=engine,
            threads=threads,
            options=options,
            runs=runs,
            rate=rate,
            sustain=sustain,
            progress=show,
        )
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
