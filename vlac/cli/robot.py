"""Commands that let a policy work or show how it did: serve, eval, sweep, report, export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vlac.cli.options import (
    Engine,
    Json,
    Quiet,
    Save,
    Threads,
    app,
    columns,
    finish,
    guarded,
    key_values,
    milliseconds,
    write_whole,
)


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
    rtc: Annotated[
        bool, typer.Option("--rtc", help="Real-time chunking: a client's chunk goes on from the one before.")
    ] = False,
    execution_horizon: Annotated[
        int | None, typer.Option(min=0, help="With --rtc: from this row on a chunk is free; default: the delay.")
    ] = None,
    inference_delay: Annotated[
        int | None, typer.Option(min=0, help="With --rtc: control steps until a chunk is there; default: measured.")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(metavar="linear|exp|ones|zeros", help="With --rtc: how the weight falls; default: linear."),
    ] = None,
    max_guidance_weight: Annotated[
        float | None, typer.Option(help="With --rtc: how hard a chunk is drawn at most; default: 2.")
    ] = None,
    executed: Annotated[
        int | None,
        typer.Option(min=1, help="With --rtc: actions between observations, of clients that do not say."),
    ] = None,
    displacements: Annotated[
        str | None,
        typer.Option(metavar="0,1,...", help="With --rtc: columns of an action that move the robot by so much."),
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
    from vlac.serve.chunking import rtc_of
    from vlac.serve.run import Options, serve

    chunking = {
        "horizon": execution_horizon,
        "delay": inference_delay,
        "schedule": schedule,
        "most": max_guidance_weight,
        "executed": executed,
        "displacements": None if displacements is None else columns(displacements, "--displacements"),
    }
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
        rtc=rtc_of(rtc, chunking),
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
        int | None,
        typer.Option(min=1, help="Actions executed of each chunk; default: as the policy says, with --rtc the delay."),
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
