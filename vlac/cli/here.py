"""Commands about one answer and machines: run, estimate, list, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlac.cli.options import (
    Device,
    Dtype,
    Engine,
    Json,
    Quiet,
    Save,
    StatsFrom,
    Threads,
    app,
    finish,
    guarded,
    key_values,
    on_torch,
)
from vlac.errors import InputError


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
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="chunk.npy", help="Write the chunk there.")] = None,
    json_output: Json = False,
) -> None:
    """Act once on pictures, a state and a task."""
    from vlac.act_once import act_once, save
    from vlac.adopt import runnable
    from vlac.registry import ReadOptions
    from vlac.report import chunk_text
    from vlac.tables import as_json

    engine, options = on_torch(engine, device, dtype)
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
            options=options,
        )
    if out is not None:
        save(out, answer["chunk"])
    typer.echo(as_json(answer) if json_output else chunk_text(answer))


@app.command("estimate")
@guarded
def estimate_command(
    path: Annotated[str, typer.Argument(metavar="out/|FILE.gguf", help="An artifact.")],
    device: Annotated[
        str | None, typer.Option(metavar="pi5|orin-nano|...", help="A device of the table; any other name lists them.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Instead: probe this machine, predict, and measure beside it.")
    ] = False,
    engine: Engine = None,
    threads: Threads = None,
    runs: Annotated[int | None, typer.Option(min=1, help="With --calibrate: chunks to measure; default: 15.")] = None,
    save: Save = None,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Estimate a chunk's latency on a device that is not here.

    A range from the program's own counts and the device's published peaks, and whether it fits in RAM.
    """
    from vlac import progress
    from vlac.tables import as_json

    if calibrate == (device is not None):
        raise InputError("estimate wants one of --device and --calibrate", remedy="`--device pi5`, for instance")
    if calibrate:
        from vlac.estimate.calibrate import calibrate as compare
        from vlac.estimate.calibrate import text as compared_text

        with progress.progress(json_output or quiet) as show:
            report = compare(path, engine=engine, threads=threads, runs=runs, progress=show)
        text = compared_text(report)
    else:
        from vlac.estimate.roofline import estimate
        from vlac.estimate.roofline import text as estimate_text

        if engine is not None or runs is not None:
            raise InputError("--engine and --runs go with --calibrate")
        assert device is not None
        report = estimate(path, device, threads)
        text = estimate_text(report)
    finish(report, save)
    typer.echo(as_json(report) if json_output else text)


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
