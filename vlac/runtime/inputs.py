"""An observation as the arrays that a program's stages read, checked: pixels, validity, tokens, state, noise.

`prepare` is the only door: everything a caller may get wrong is refused here, by name, before any engine runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from vlac.dims import ROWS, Affine, Dim
from vlac.errors import ArtifactError, InputError
from vlac.graph import RUNTIME_INPUTS, Program, Repeat
from vlac.io import IO
from vlac.ops import DTYPES, Type
from vlac.runtime import cameras
from vlac.runtime.actions import needs_state
from vlac.runtime.observation import STATE_STEPS, Array, apply_steps, finite_vector, preprocess_image
from vlac.runtime.prompt import reads_state
from vlac.runtime.reuse import Reuse
from vlac.runtime.tokenizer import Prompt, encode_task, load_tokenizer, max_prompt_tokens, truncation_notice

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from vlac.artifact import Golden

NpArray = np.ndarray[Any, Any]
UNITS = ("robot", "normalized")


@dataclass(frozen=True)
class Prepared:
    """Runtime inputs by their standard names (vlac.graph), the bucket they are made for, and what to tell a person.

    `env["pixels"]` is f32 [C, 3, S, S], one entry per camera slot; absent slots hold zeros and are not to be encoded.
    """

    env: dict[str, NpArray]
    symbols: dict[str, int]
    warnings: tuple[str, ...] = ()
    state: Array | None = None
    """The state as it was given, f32 [state_dim], for actions that are relative to it."""


@dataclass(frozen=True)
class Scene:
    """What of an observation stays while the state changes: pictures and the prompt, as runtime inputs by name.

    `ids` are the prompt's tokens, None where the program reads none or where the prompt holds the state; `asked` is
    what the prompt is made of (arguments of `prepare`).
    """

    env: dict[str, NpArray]
    symbols: dict[str, int]
    slots: int
    ids: NpArray | None
    asked: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def runtime_types(program: Program) -> dict[str, Type]:
    """Types of the runtime inputs that a program reads, by name; a camera stage's `pixels` are one camera's."""
    result: dict[str, Type] = {}
    for step in program.schedule.steps:
        types = dict(program.stage(step.stage).inputs)
        bound: set[str] = set()
        if isinstance(step, Repeat):
            bound = step.own_inputs
            result.update({start: types[into] for _, into, start in step.carry if start in RUNTIME_INPUTS})
        result.update({n: t for n, t in types.items() if n in RUNTIME_INPUTS and n not in bound})
    return result


def samples(program: Program) -> bool:
    """Whether the program starts from noise; one that does not takes none."""
    return "noise" in runtime_types(program)


def resolve_units(io: IO, units: str | None) -> str:
    """The units of one call; None means the artifact's own. InputError when the artifact cannot give them."""
    if units is None:
        return io.units
    if units not in UNITS:
        raise InputError(f"units={units!r}, expected 'robot' or 'normalized'")
    if units == "robot" and io.units != "robot":
        raise InputError(
            "this artifact was compiled without statistics: it knows normalised units only, not the robot's",
            remedy='give units="normalized" and normalise yourself, or compile with --stats-key or --stats-from',
        )
    return units


def prepare(
    io: IO,
    tokenizer: Union[bytes, Tokenizer, None],
    program: Program,
    *,
    images: Mapping[str, Any] | None = None,
    state: Any = None,
    task: str | None = None,
    tokens: Any = None,
    mask: Any = None,
    noise: Any = None,
    seed: int | None = None,
    units: str | None = None,
    strict: bool = False,
    reuse: Reuse | None = None,
    n_actions: int | None = None,
    scene: Scene | None = None,
) -> Prepared:
    """Checks and preprocesses one observation; arguments as in `Session.act`.

    tokenizer: a loaded one, the bytes of tokenizer.json, or None for policies that read no text.
    reuse: what earlier calls made, for pictures and prompts that are the same again.
    n_actions: how many rows of the chunk are wanted; where the program can, only so many are computed, from the first
    rows of the same noise.
    scene: what `observe` made, in place of images, task, tokens, mask and strict.
    Raises InputError naming the camera, the state, the task, the tokens or the noise.
    """
    wanted = runtime_types(program)
    units = resolve_units(io, units)
    env: dict[str, NpArray] = {}
    warnings: tuple[str, ...] = ()
    given = cameras.match(io, images) if scene is None else {}
    asked: Mapping[str, Any] = {"task": task, "tokens": tokens, "mask": mask, "strict": strict}
    asked = asked if scene is None else scene.asked
    raw, normalised = _states(io, state, units, "state" in wanted, asked["tokens"] is None)
    ids: NpArray | None = None
    if scene is not None and scene.ids is not None:
        ids, warnings = scene.ids, scene.warnings
    elif "tokens" in wanted:
        ids, warnings = _prompt(io, tokenizer, **asked, state=normalised, reuse=reuse)
    else:
        _refuse_text(asked)
    slots = _slots(io, given, wanted) if scene is None else scene.slots
    symbols = _symbols(program, slots, 0 if ids is None else len(ids), _rows(io, n_actions))
    if scene is not None:
        env.update(scene.env)
    elif given:
        size = _extent(wanted, "image_valid", symbols, slots)
        env.update(_camera_values(io, given, slots, size, wanted, reuse))
    if ids is not None:
        env.update(_token_values(ids, _extent(wanted, "tokens", symbols, len(ids))))
    if "state" in wanted and normalised is not None:
        env["state"] = normalised
    if "noise" in wanted:
        whole = tuple(bind(d, {s.name: s.max for s in program.symbols}) for d in wanted["noise"].shape)
        env["noise"] = _noise(whole, noise, seed)[: _extent(wanted, "noise", symbols, 0)]
    elif noise is not None:
        raise InputError("this policy samples nothing; it takes no noise", remedy="leave noise out")
    _check(wanted, env, symbols)
    return Prepared(env, symbols, warnings, raw)


def observe(
    io: IO,
    tokenizer: Union[bytes, Tokenizer, None],
    program: Program,
    *,
    images: Mapping[str, Any] | None,
    asked: Mapping[str, Any],
    reuse: Reuse | None = None,
) -> Scene:
    """Checks and preprocesses what does not change with the state; `asked`: task, tokens, mask, strict of `prepare`."""
    wanted = runtime_types(program)
    given = cameras.match(io, images)
    ids: NpArray | None = None
    warnings: tuple[str, ...] = ()
    if "tokens" not in wanted:
        _refuse_text(asked)
    elif asked["tokens"] is not None or not reads_state(io.text_steps):
        ids, warnings = _prompt(io, tokenizer, **asked, reuse=reuse)
    elif not isinstance(asked["task"], str):
        raise InputError("no instruction is given", remedy='give task="pick up the cube", or tokens=')
    slots = _slots(io, given, wanted)
    symbols = _symbols(program, slots, 0 if ids is None else len(ids))
    env: dict[str, NpArray] = {}
    if given:
        size = _extent(wanted, "image_valid", symbols, slots)
        env.update(_camera_values(io, given, slots, size, wanted, reuse))
    if ids is not None:
        env.update(_token_values(ids, _extent(wanted, "tokens", symbols, len(ids))))
    return Scene(env, symbols, slots, ids, asked, warnings)


def _slots(io: IO, given: Mapping[str, Any], wanted: Mapping[str, Type]) -> int:
    """Camera slots that take part."""
    return len(cameras.slots(io, tuple(given)) if "camera_valid" in wanted else given)


def _refuse_text(asked: Mapping[str, Any]) -> None:
    if any(asked[name] is not None for name in ("task", "tokens", "mask")):
        raise InputError("this policy reads no text", remedy="leave task, tokens and mask out")


# --- buckets ---------------------------------------------------------------------------------------------------


def _rows(io: IO, n_actions: int | None) -> int | None:
    if n_actions is None:
        return None
    whole = isinstance(n_actions, (int, np.integer)) and not isinstance(n_actions, bool)
    if not (whole and 1 <= n_actions <= io.chunk_size):
        raise InputError(f"n_actions={n_actions!r}, expected 1..{io.chunk_size}", remedy="leave it out for all of them")
    return int(n_actions)


def _symbols(program: Program, camera_count: int, token_count: int, rows: int | None = None) -> dict[str, int]:
    """The smallest bucket that holds this observation: padding is dropped, which changes no value (it is masked)."""
    needed = {"C": max(1, camera_count), "T": max(1, token_count)}
    if rows is not None:
        needed[ROWS] = rows
    result = {}
    for symbol in program.symbols:
        least = needed.get(symbol.name, symbol.max)
        fits = [b for b in symbol.buckets if b >= least]
        if not fits:
            what = "camera slots" if symbol.name == "C" else "prompt tokens"
            raise InputError(
                f"{least} {what} are given, this artifact holds at most {symbol.max}",
                remedy="shorten the task" if symbol.name == "T" else "give fewer cameras",
            )
        result[symbol.name] = min(fits)
    return result


def bind(dim: Dim, symbols: Mapping[str, int]) -> int:
    """A dimension as a number; every symbol must be given."""
    return dim.const + sum(k * symbols[s] for s, k in dim.terms) if isinstance(dim, Affine) else dim


def _extent(wanted: Mapping[str, Type], name: str, symbols: Mapping[str, int], default: int) -> int:
    return bind(wanted[name].shape[0], symbols) if name in wanted else default


def _check(wanted: Mapping[str, Type], env: Mapping[str, NpArray], symbols: Mapping[str, int]) -> None:
    for name, kind in wanted.items():
        shape = tuple(bind(d, symbols) for d in kind.shape)
        have = env[name] if name in env else np.zeros(0)
        have = have[0] if name == "pixels" else have
        if have.shape == shape and have.dtype == DTYPES[kind.dtype]:
            continue
        found = f"{name} is {have.dtype}{list(have.shape)}, the network wants {kind.dtype}{list(shape)}"
        if name == "pixels":
            raise InputError(f"after preprocessing, {found}", remedy="this policy does not resize; give that size")
        raise ArtifactError(f"{found}: io and program disagree", remedy="compile again")


# --- parts -----------------------------------------------------------------------------------------------------


def _camera_values(
    io: IO,
    given: Mapping[str, Any],
    slot_count: int,
    size: int,
    wanted: Mapping[str, Type],
    reuse: Reuse | None,
) -> Iterator[tuple[str, NpArray]]:
    if len(given) > size or slot_count > size:
        raise InputError(f"{slot_count} camera slots, this artifact holds {size}", remedy="give fewer cameras")
    if size > len(given) and "image_valid" not in wanted:
        raise InputError(f"this network wants every camera: {cameras.describe(io)}", remedy="give a picture for each")
    pictures = [_picture(io, key, picture, reuse) for key, picture in given.items()]
    pixels = np.zeros((size, *pictures[0].shape), dtype=np.float32)
    for slot, (key, picture) in enumerate(zip(given, pictures, strict=True)):
        if picture.shape != pixels.shape[1:]:
            raise InputError(
                f"camera {key}: {list(picture.shape)} after preprocessing, others are {list(pixels.shape[1:])}",
                remedy=f"give pictures of {io.image_size}x{io.image_size} pixels; this policy does not resize",
            )
        pixels[slot] = picture
    yield "pixels", pixels
    yield "image_valid", np.arange(size) < len(given)
    if "camera_valid" in wanted:
        yield "camera_valid", np.arange(size) < slot_count


def _picture(io: IO, key: str, picture: Any, reuse: Reuse | None) -> Array:
    def make() -> Array:
        return preprocess_image(picture, io.image_steps, camera=key)

    return make() if reuse is None else reuse.picture(key, picture, make)


def _token_values(ids: NpArray, size: int) -> Iterator[tuple[str, NpArray]]:
    if len(ids) > size:
        raise InputError(f"{len(ids)} prompt tokens, this artifact holds {size}", remedy="shorten the task")
    tokens = np.zeros(size, dtype=np.int32)
    tokens[: len(ids)] = ids
    yield "tokens", tokens
    yield "token_valid", np.arange(size) < len(ids)


def _prompt(
    io: IO,
    tokenizer: Union[bytes, Tokenizer, None],
    task: Any,
    tokens: Any,
    mask: Any,
    strict: bool,
    state: Array | None = None,
    reuse: Reuse | None = None,
) -> tuple[NpArray, tuple[str, ...]]:
    """The valid token ids i32[n] of a task or of given tokens, and warnings."""
    if task is not None and tokens is not None:
        raise InputError("task and tokens are both given", remedy="give one of them")
    if tokens is not None:
        return _given_tokens(io, tokens, mask), ()
    if task is None:
        raise InputError("no instruction is given", remedy='give task="pick up the cube", or tokens=')
    if mask is not None:
        raise InputError("mask is given without tokens", remedy="mask belongs to tokens=; leave it out with task=")
    if tokenizer is None:
        raise InputError("this artifact carries no tokenizer", remedy="give tokens= and mask= instead of task=")
    if isinstance(tokenizer, bytes):
        tokenizer = load_tokenizer(tokenizer)
    loaded = tokenizer

    def make() -> Prompt:
        return encode_task(io.text_steps, loaded, task, strict=strict, state=state)

    if reuse is None or not isinstance(task, str):
        prompt = make()
    else:
        seen = state.tobytes() if state is not None and reads_state(io.text_steps) else b""
        prompt = reuse.prompt((task, strict, seen), make)
    ids = prompt.ids[prompt.valid]
    _check_ids(io, ids, "the tokenizer gives")
    return ids, (truncation_notice(prompt),) if prompt.lost else ()


def _given_tokens(io: IO, tokens: Any, mask: Any) -> NpArray:
    ids = _flat(tokens, "tokens")
    if ids.dtype.kind not in "iu" or ids.size == 0:
        raise InputError(
            f"tokens is {ids.dtype}{list(ids.shape)}, expected integer ids [T]", remedy="give a list of ints"
        )
    longest = max_prompt_tokens(io.text_steps)
    if longest and ids.size > longest:
        raise InputError(
            f"{ids.size} tokens are given, this policy takes at most {longest}", remedy="keep the first ones"
        )
    if mask is not None:
        valid = _flat(mask, "mask")
        if valid.shape != ids.shape or valid.dtype.kind not in "biu" or not np.isin(valid, (0, 1)).all():
            raise InputError(
                f"mask is {valid.dtype}{list(valid.shape)}, expected bool{list(ids.shape)} like tokens",
                remedy="true = real token, false = padding",
            )
        ids = ids[valid.astype(np.bool_)]
        if ids.size == 0:
            raise InputError("mask leaves no token", remedy="true = real token, false = padding")
    _check_ids(io, ids, "tokens holds")
    return ids.astype(np.int32)


def _flat(values: Any, what: str) -> NpArray:
    try:
        x = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} is not an array: {error}", remedy="give a list of numbers") from None
    x = x[0] if x.ndim == 2 and x.shape[0] == 1 else x
    if x.ndim != 1:
        raise InputError(f"{what} has shape {list(x.shape)}, expected [T]", remedy="one prompt at a time")
    return x


def _check_ids(io: IO, ids: NpArray, who: str) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (io.vocab_size and high >= io.vocab_size):
        raise InputError(
            f"{who} id {low if low < 0 else high}, the embedding has rows 0..{io.vocab_size - 1}",
            remedy="tokens come from another tokenizer than the policy's",
        )


def _states(io: IO, state: Any, units: str, in_network: bool, in_prompt: bool) -> tuple[Array | None, Array | None]:
    """(raw, normalised) state; (None, None) where neither network, prompt nor actions want it and none is given.

    in_network: the program reads it. in_prompt: the prompt is made from a task, so that it would hold the state.
    """
    needed = in_network or needs_state(io.action_steps) or (in_prompt and reads_state(io.text_steps))
    if needed or (reads_state(io.text_steps) and state is not None):
        normalised = _state(io, state, units)
        return np.array(state, dtype=np.float32).reshape(-1), normalised
    if state is not None and np.size(state):
        raise InputError("this policy reads no state", remedy="leave state out")
    return None, None


def _state(io: IO, state: Any, units: str) -> Array:
    if state is None:
        raise InputError(f"no state is given; this policy reads {io.state_key} [{io.state_dim}]", remedy="give state=")
    x = finite_vector(state, f"state ({io.state_key})")
    x = x[0] if x.ndim == 2 and x.shape[0] == 1 else x
    if x.shape != (io.state_dim,):
        raise InputError(
            f"state ({io.state_key}) has shape {list(x.shape)}, expected [{io.state_dim}]",
            remedy="give one value per joint, in the order of the training data",
        )
    steps = [s for s in io.state_steps if s.step != "normalise" or units == "robot"]
    with np.errstate(over="ignore"):  # answered below, with names
        x = apply_steps(STATE_STEPS, steps, x).reshape(1, -1)
    if not np.isfinite(x).all():
        raise InputError(
            f"state ({io.state_key}) overflows when normalised, at {np.flatnonzero(~np.isfinite(x[0])).tolist()}",
            remedy="check its units against the statistics (`vlac inspect`)",
        )
    return np.ascontiguousarray(x, dtype=np.float32)


def _noise(size: tuple[int, ...], noise: Any, seed: int | None) -> Array:
    """Given noise, or standard normal float32 of PCG64(seed); seed None draws fresh entropy."""
    if noise is None:
        if seed is not None and (not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or seed < 0):
            raise InputError(f"seed is {seed!r}, expected an int >= 0 or None")
        return np.random.Generator(np.random.PCG64(seed)).standard_normal(size, dtype=np.float32)
    if seed is not None:
        raise InputError("noise and seed are both given", remedy="give one of them")
    x = finite_vector(noise, "noise")
    x = x[0] if x.ndim == len(size) + 1 and x.shape[0] == 1 else x
    if x.shape != size:
        raise InputError(
            f"noise has shape {list(x.shape)}, expected {list(size)} (chunk_size, max_action_dim)",
            remedy="draw it with numpy.random.Generator.standard_normal, or give seed=",
        )
    return np.ascontiguousarray(x)


def prepared(io: IO, tokenizer: bytes | None, program: Program, obs: Golden) -> Prepared:
    """What the program reads of an observation; a task and noise only where it takes them."""
    return prepare(
        io,
        tokenizer,
        program,
        images=dict(obs.images),
        state=obs.state,
        task=obs.task if io.text_steps else None,
        noise=obs.noise if samples(program) else None,
    )
