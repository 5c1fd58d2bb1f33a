"""Commands about one answer and this machine: run, list, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlac.cli.options import (
    Device,
    Dtype,
    Engine,
    Json,
    StatsFrom,
    Threads,
    app,
    guarded,
    key_values,
    on_torch,
)


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
