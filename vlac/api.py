"""What `import vlac` gives: compile, load, inspect. The command line only calls these.

`compile` is the whole way through the house: read, passes, draw, lower, formats, golden answers, emit, put in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlac.errors import Inapplicable, Unsupported, VlacError
from vlac.registry import Dialect, Pass, Progress, Target, silent

if TYPE_CHECKING:
    from vlac.graph import Program
    from vlac.policy import Policy
    from vlac.runtime.session import Session


RECORDED_GOLDENS = 8
"""Golden answers at least, where recorded observations lie beside the checkpoint."""


@dataclass(frozen=True)
class CompileResult:
    """Where the artifact is (a folder, or the .gguf file inside it) and its manifest; path is None for a dry run."""

    path: Path | None
    manifest: Mapping[str, Any]


def parse_pass(text: str) -> tuple[str, dict[str, str]]:
    """ "name:key=value,key=value" -> (name, {key: value}); VlacError shows the form."""
    name, _, rest = text.partition(":")
    params: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        key, eq, value = part.partition("=")
        if key.endswith("<"):  # size<=300MB
            key, value = key[:-1], f"<={value}"
        if not eq or not key:
            raise VlacError(
                f"--pass {text!r}: {part!r} is not key=value", remedy="write --pass name:key=value,key=value"
            )
        if key in params:
            raise VlacError(f"--pass {text!r}: {key} is given twice")
        params[key] = value
    return name.strip(), params


def _typed(entry: Pass, given: Mapping[str, str]) -> dict[str, Any]:
    given = {k.replace("-", "_"): v for k, v in given.items()}
    unknown = set(given) - set(entry.params)
    if unknown:
        raise VlacError(
            f"pass {entry.name} has no parameter {sorted(unknown)[0]!r}; there are: {', '.join(entry.params) or 'none'}"
        )
    values: dict[str, Any] = {}
    for key, (kind, default, text) in entry.params.items():
        if key not in given:
            if default is None:
                raise VlacError(f"pass {entry.name} needs {key}= ({text})")
            values[key] = default
            continue
        try:
            values[key] = _truth(given[key]) if kind is bool else kind(given[key])
        except ValueError:
            legal = "true or false" if kind is bool else kind.__name__
            raise VlacError(f"pass {entry.name}: {key}={given[key]!r} is not {legal} ({text})") from None
    return values


def _truth(text: str) -> bool:
    if text.lower() not in ("1", "true", "yes", "0", "false", "no"):
        raise ValueError(text)
    return text.lower() in ("1", "true", "yes")


def typed_passes(recipe: Sequence[str]) -> list[tuple[Pass, dict[str, Any]]]:
    """Each pass of a recipe with the values of all its parameters; VlacError names an unknown pass, key or value."""
    from vlac.registry import passes

    steps = [(passes.get(name), given) for name, given in map(parse_pass, recipe)]
    return [(entry, _typed(entry, given)) for entry, given in steps]


def apply_passes(policy: Policy, recipe: Sequence[str]) -> Policy:
    """The recipe applied in order, each pass checked before (requires) and after (ensures) and noted in the history."""
    from vlac.policy import Applied

    for entry, values in typed_passes(recipe):
        if entry.requires is not None:
            try:
                entry.requires(policy, **values)
            except Inapplicable as error:
                raise Inapplicable(f"pass {entry.name}: {error.message}", remedy=error.remedy) from None
        after, figures = entry.apply(policy, **values)
        if entry.ensures is not None:
            entry.ensures(policy, after, **values)
        policy = after.replace(history=(*policy.history, Applied(entry.name, values, figures)))
    return policy


def apply_own_passes(policy: Policy, target: Target) -> Policy:
    """What a target wants done to every policy, where it applies; a pass that changed nothing is not noted.

    Not after passes that chose codes or scales: these belong to the weights and inputs as they are then.
    """
    rounded = policy.precision or policy.activations or policy.importance or policy.rotations
    for step in () if rounded else target.passes:
        try:
            after = apply_passes(policy, [step])
        except Inapplicable:
            continue
        if after.weights is not policy.weights:
            policy = after
    return policy


def draw(policy: Policy) -> Program:
    """The program as the family draws it, checked, with weights that agree in shape."""
    from vlac import calibrate

    return calibrate.draw(policy)


def lower_for(
    policy: Policy, target: Target, options: Mapping[str, Any]
) -> tuple[Program, dict[str, str], dict[str, str]]:
    """The program ready to emit, the format requested for each tensor, and each tensor's role."""
    from vlac.graph import check
    from vlac.lower import assign_formats, lower, roles
    from vlac.rewrites.cache import quantize_cache
    from vlac.rewrites.corrections import round_inputs, with_importance
    from vlac.rewrites.rotate import rotate_inputs

    program = quantize_cache(lower(draw(policy)), policy.kv)
    _holds(target, policy.precision)
    program = assign_formats(program, target.plan, policy.precision, target.containers)
    program = rotate_inputs(program, policy.rotations)
    program = with_importance(round_inputs(program, policy.activations), policy.importance)
    requested = {name: p.format for name, p in program.params.items()}
    fitted = check(target.lower(program, options))
    return fitted, requested, {**roles(fitted), **roles(program)}


def _holds(target: Target, precision: Sequence[tuple[str, str]]) -> None:
    """Raises when a pass asked for bits and groups (vlac.formats.GRIDS) that the target has no format for."""
    from vlac.formats import GRIDS

    for _, fmt in precision:
        if fmt in GRIDS and fmt not in target.containers:
            known = ", ".join(f"{name} ({GRIDS[name]})" for name in target.containers) or "none"
            raise Unsupported(f"target {target.name} holds no {GRIDS[fmt]}", remedy=f"of these it holds: {known}")


def fit_for(policy: Policy, target: Target, dialect: str) -> tuple[Program, dict[str, str], dict[str, str]]:
    """Like lower_for, for a file of another engine: the program as drawn, with the formats that the file will hold."""
    from vlac.lower import roles

    program = draw(policy)
    fitted, requested = _dialect(target, dialect).fit(policy, program)
    return fitted, requested, roles(program)


def _dialect(target: Target, name: str) -> Dialect:
    if name not in target.dialects:
        raise VlacError(
            f"target {target.name} has no dialect {name!r}; there are: {', '.join(target.dialects) or 'none'}",
            remedy="dialects belong to the gguf targets",
        )
    return target.dialects[name]


def compile(
    checkpoint: str | Path,
    target: str = "gguf-q8",
    out: str | Path = "out/",
    passes: Sequence[str] = (),
    spec: Mapping[str, Any] | None = None,
    stats_key: str | None = None,
    stats_from: str | None = None,
    no_stats: bool = False,
    *,
    unnorm_key: str | None = None,
    embodiment: str | None = None,
    tokenizer: str | Path | None = None,
    recipe: str | Path | None = None,
    revision: str | None = None,
    observations: str | Path | None = None,
    calibrate: str | Path | None = None,
    rename: Mapping[str, str] | None = None,
    allow_promote: bool = False,
    single_file: bool = False,
    trt: str | None = None,
    dialect: str | None = None,
    dry_run: bool = False,
    goldens: int = 2,
    progress: Progress = silent,
) -> CompileResult:
    """Compiles a checkpoint to an artifact.

    Args:
        checkpoint: a local folder or a hub id.
        target: "onnx-fp32", "gguf-q8", ...; see `vlac list`.
        out: a folder to write (replaced whole if it holds an earlier artifact), or a .gguf file.
        passes: "name:key=value,..." in order.
        recipe: a YAML file of passes (vlac/recipes.py), applied before `passes`.
        spec: dimensions that file and config do not tell ({"text.head_dim": 64}).
        stats_key, stats_from, no_stats: where the statistics are, if not where they should be.
        unnorm_key: whose statistics of a checkpoint that was trained on several datasets (OpenVLA).
        embodiment: which robot of a checkpoint that knows several (GR00T).
        tokenizer: a tokenizer.json, or a folder with one, where the checkpoint holds none.
        observations: .npz, dataset or observations/ folder for the golden answers; default: some of those beside the
            checkpoint, or seeded ones.
        calibrate: the same, for passes that calibrate and name no data of their own; default likewise.
        rename: names of cameras there -> names of the policy's cameras.
        allow_promote: accept tensors that end in another format than the target asked for.
        trt: "10.3" or "10.16": operators of the tensorrt targets.
        dialect: "qvac", "vla.cpp": a file that this other engine loads.
        goldens: how many observations are answered by the fp32 reference and stored.

    Returns: CompileResult. Raises VlacError before anything is written, or with the earlier artifact left whole.
    """
    from vlac import manifest as m
    from vlac.artifact import Sidecars, write_goldens
    from vlac.checkpoint import read_policy
    from vlac.goldens import answer, synthetic
    from vlac.place import check_destination, partial
    from vlac.recorded import Recorded
    from vlac.registry import ReadOptions, families, targets, told
    from vlac.removals import removals

    entry = targets.get(target)
    options: dict[str, Any] = {"single_file": True} if single_file else {}
    if single_file and "single_file" not in entry.options:
        raise VlacError(f"target {target} has no --single-file", remedy="it belongs to the onnx targets")
    if trt is not None:
        if "trt" not in entry.options:
            raise VlacError(f"target {target} has no --trt", remedy="it belongs to the tensorrt targets")
        options["trt"] = trt
    from vlac.recipes import read_recipe

    steps = (*(read_recipe(recipe) if recipe is not None else ()), *passes)
    destination = Path(out)
    if not dry_run:
        check_destination(destination)
    progress("reading the checkpoint", 0, 0)
    original = read_policy(
        str(checkpoint),
        ReadOptions(
            revision,
            stats_key,
            stats_from,
            no_stats,
            dict(spec or {}),
            unnorm_key=unnorm_key,
            embodiment=embodiment,
            tokenizer=None if tokenizer is None else str(tokenizer),
        ),
    )
    given_data = None if calibrate is None else Recorded(Path(calibrate), dict(rename or {}))
    policy = original.replace(recorded=given_data or original.recorded)
    with told(progress):
        policy = apply_passes(policy if dialect else apply_own_passes(policy, entry), steps)
    policy = policy if dialect else apply_own_passes(policy, entry)
    fitted = fit_for(policy, entry, dialect) if dialect else lower_for(policy, entry, options)
    program, requested, role = fitted
    table = m.census(requested, program, role)
    m.refuse_promotion(table, allow_promote)
    title = families.get(policy.family).title or policy.family
    if dry_run:
        return CompileResult(None, m.build(policy, entry, table, role, options, None, "none", title))

    if observations is not None:
        kind, given = "given", Recorded(Path(observations), dict(rename or {})).take(policy.io, max(1, goldens))
    elif original.recorded is not None:
        kind, given = "recorded", original.recorded.take(policy.io, max(RECORDED_GOLDENS, goldens))
    else:
        kind, given = "synthetic", synthetic(policy.io, max(1, goldens))
    observed: Mapping[str, Any] = {}
    if entry.observe is not None:
        progress("calibrating", 0, 0)
        program, observed = entry.observe(policy, program)
    with partial(destination, table["bytes"] + (64 << 20)) as temp:
        answered, floor = answer(original, given, progress)
        manifest = m.build(policy, entry, table, role, options, floor, kind, title)
        if given_data is not None:
            manifest["calibration"] = given_data.describe()
        if observed:
            manifest["activations"] = dict(observed)
        if not dialect:
            manifest = {**manifest, "lowering": removals(draw(policy))}
        sidecars = Sidecars(str(program), policy.io.to_json(), manifest, policy.tokenizer, write_goldens(answered))
        if dialect:
            _dialect(entry, dialect).emit(policy, program, sidecars, temp, progress)
            name, final = _check_foreign(temp, dialect)
        else:
            entry.emit(program, sidecars, temp, options, progress)
            from vlac.artifact import open_artifact

            written = open_artifact(temp)
            final = dict(written.manifest)
            name = written.path.name if written.container == "gguf" else ""
    path = destination if not name or destination.suffix == ".gguf" else destination / name
    return CompileResult(path, final)


def _check_foreign(folder: Path, dialect: str) -> tuple[str, dict[str, Any]]:
    """(file name, manifest) of the one file in a folder, after the strict check of its dialect."""
    from vlac.gguf import read_gguf
    from vlac.gguf_dialects import check_file, read_manifest

    (path,) = folder.glob("*.gguf")
    check_file(path, dialect)
    return path.name, read_manifest(read_gguf(path)) or {}


def load(
    path: str | Path, engine: str | None = None, threads: int | None = None, options: Mapping[str, Any] | None = None
) -> Session:
    """Opens an artifact with an engine ("torch", "onnxruntime", "openvino", "ggml", "numpy"); None = the best here."""
    from vlac.runtime.session import load as load_session

    return load_session(path, engine=engine, threads=threads, options=options)


def inspect(path: str | Path, **options: Any) -> Mapping[str, Any]:
    """Facts of a checkpoint, a .gguf file or an artifact folder; see vlac.facts."""
    from vlac.facts import inspect as look

    return look(path, **options)
