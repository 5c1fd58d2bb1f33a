"""A policy on a robot: `load` picks an engine and checks the artifact, `act` turns an observation into a chunk.

`prepare` (observation -> arrays) and `execute` (arrays -> normalised chunk) are its two halves, used alone by parity
and at compile time for golden answers.
"""

from __future__ import annotations

import dataclasses
import threading
import time
import warnings as python_warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from vlac.artifact import Artifact, open_artifact
from vlac.dims import ROWS
from vlac.engines.base import Engine, EngineSession, get_engine
from vlac.errors import ArtifactError, EngineError, InputError, VlacWarning
from vlac.integrity import Verification
from vlac.io import IO
from vlac.runtime.actions import ACTION_STEPS, apply_action_steps
from vlac.runtime.hand_over import handed_over
from vlac.runtime.inputs import Prepared, bind, observe, prepare, resolve_units, runtime_types
from vlac.runtime.observation import IMAGE_STEPS, STATE_STEPS, Array, apply_steps, check_steps
from vlac.runtime.reuse import Reuse
from vlac.runtime.rtc import HORIZON, MAX_WEIGHT, guidance
from vlac.runtime.schedule import execute, finite_chunk, generated, per_token
from vlac.runtime.tokenizer import check_text_steps, load_tokenizer, max_prompt_tokens
from vlac.runtime.two_rate import Gate, Gated, Observed, age_ms, known_from

__all__ = ["HParams", "Prepared", "Session", "execute", "load", "prepare"]

NpArray = np.ndarray[Any, Any]

ANY_ARTIFACT = ("torch", "numpy")
"""Engines that run any artifact's program, whether its target lists them or not."""


@dataclass(frozen=True)
class HParams(Mapping[str, Any]):
    """What a caller must know about a policy; read as attributes or as a mapping.

    cameras: feature keys in the order the network sees them; camera_names: their last parts, which `act` takes as well.
    chunk_size: rows of a chunk; n_action_steps: how many of them to execute before asking again.
    unnorm_keys: datasets whose statistics `act(unnorm_key=)` can choose; empty where there is no choice.
    units: "robot", or "normalized" for a policy compiled without statistics.
    """

    cameras: tuple[str, ...]
    camera_names: tuple[str, ...]
    max_missing_cameras: int
    image_size: int
    state_dim: int
    action_dim: int
    action_names: tuple[str, ...]
    max_action_dim: int
    chunk_size: int
    n_action_steps: int
    tokenizer_max_length: int
    vocab_size: int
    units: str
    family: str
    name: str
    target: str
    engine: str
    unnorm_keys: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> Any:
        if key not in self.__dataclass_fields__:
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dataclass_fields__)

    def __len__(self) -> int:
        return len(self.__dataclass_fields__)

    def __contains__(self, key: object) -> bool:
        return key in self.__dataclass_fields__


def load(
    path: str | Path,
    engine: str | None = None,
    threads: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Session:
    """Opens an artifact for acting.

    Args:
        path: the folder that `vlac compile` wrote, or a .gguf file.
        engine: "onnxruntime", "openvino", "ggml", "torch", "numpy"; None takes the artifact's best that is installed.
        threads: CPU threads; None lets the engine choose.
        options: for the engine; and "reuse": False, so that every `act` computes everything anew.

    Raises:
        ArtifactError: the artifact is broken. EngineError: the engine is missing or cannot run it.
    """
    return Session(open_artifact(path), engine=engine, threads=threads, options=options)


def choose_engine(artifact: Artifact, name: str | None) -> Engine:
    """The engine asked for, or the first of the artifact's own that is installed; EngineError tells what to install."""
    where = f"{artifact.path} ({artifact.manifest.get('target', 'unknown target')})"
    if name is not None:
        able = tuple(dict.fromkeys((*artifact.engines, *artifact.host_engines, *ANY_ARTIFACT)))
        if name not in able:
            raise EngineError(f"{where} does not run on engine {name!r}", remedy=f"choose one of {', '.join(able)}")
        engine = get_engine(name)
        if why := engine.missing():
            raise EngineError(f"engine {name} cannot be used here: {why}", remedy=f"install it to run {where}")
        return engine
    reasons = []
    for candidate in artifact.engines:
        engine = get_engine(candidate)
        why = engine.missing()
        if not why:
            return engine
        reasons.append(f"{candidate}: {why}")
    raise EngineError(
        "\n  ".join([f"no engine for {where} is installed", *reasons]),
        remedy="install one of them; engine='numpy' needs nothing and is far too slow for a robot",
    )


def check_io(artifact: Artifact) -> None:
    """The io description against itself and against the program, so that nothing of it fails later on a robot.

    Raises ArtifactError naming the list and step.
    """
    for key in (None, *artifact.io.choices):
        _check_io(artifact, artifact.io.chosen(key), f"{artifact.path}: io{f' of {key}' if key else ''}")


def _check_io(artifact: Artifact, io: IO, where: str) -> None:
    check_steps(IMAGE_STEPS, io.image_steps, f"{where}.image_steps", 3)
    check_steps(STATE_STEPS, io.state_steps, f"{where}.state_steps", io.state_dim)
    check_steps(ACTION_STEPS, io.action_steps, f"{where}.action_steps", io.action_dim)
    check_steps(ACTION_STEPS, io.normalised_action_steps, f"{where}.normalised_action_steps", io.action_dim)
    check_text_steps(io.text_steps, f"{where}.text_steps")
    wanted = runtime_types(artifact.program)
    sizes: dict[str, tuple[int, ...]] = {"noise": io.noise_shape}
    try:
        if io.state_dim:
            made = apply_steps(STATE_STEPS, io.state_steps, np.zeros(io.state_dim, np.float32))
            sizes["state"] = (1, *made.shape)
        for steps in (io.action_steps, io.normalised_action_steps):
            with python_warnings.catch_warnings():  # zeros need be no action tokens
                python_warnings.simplefilter("ignore", VlacWarning)
                given = next(iter(steps[0].params.get("ids", ())), 0) if steps else 0
                probe = np.full((1, io.max_action_dim), given, np.float32)
                rows = apply_action_steps(steps, probe, np.zeros(io.state_dim, np.float32))
            if rows.shape[1] != io.action_dim:
                raise InputError(f"actions come out with {rows.shape[1]} columns, action_dim is {io.action_dim}")
    except (InputError, ValueError) as error:
        raise ArtifactError(f"{where}: the steps do not fit: {error}", remedy="compile again") from None
    for name, size in sizes.items():
        if name in wanted and tuple(bind(d, artifact.program.max_symbols()) for d in wanted[name].shape) != size:
            raise ArtifactError(f"{where}: {name} is {list(size)}, the program reads {wanted[name]}")


class Session:
    """An artifact on an engine. Calls from several threads wait for one another.

    Attributes:
        hparams: see HParams. info: engine, versions, threads, as a bench report should name them.
        stats: milliseconds of the last `act`: preprocess_ms, one entry per stage (vision_ms, prefix_ms, flow_ms),
            total_ms; flow_held_bytes: results of earlier stages that the loop reads in every turn (keys and values,
            above all); rows_computed: rows of the chunk that were; and "reused": what was taken from earlier calls
            because its inputs were the same bit for bit, e.g. ("prompt", "picture observation.images.top",
            "vision[0]"). Empty before.
        tokens: the ids that the last `act` generated, i32 [n], up to and with the one that ended it; None before, and
            for a policy that generates none.
    """

    def __init__(
        self,
        artifact: Artifact,
        engine: str | None = None,
        threads: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise EngineError(f"threads={threads!r}, expected a number of at least 1", remedy="leave it out")
        check_io(artifact)
        self.artifact = artifact
        self._tokenizer = (
            load_tokenizer(artifact.tokenizer, f"{artifact.path}: tokenizer") if artifact.tokenizer else None
        )
        options = dict(options or {})
        self._reuse = Reuse() if _switch(options.pop("reuse", True)) else None
        chosen = choose_engine(artifact, engine)
        self._engine: EngineSession | None = chosen.open(artifact, threads=threads, options=options)
        self._verification = Verification(artifact)
        self._lock, self._observing, self._gate = threading.Lock(), threading.Lock(), Gate()
        self._observed: dict[str, Observed] = {}
        self._frames = Reuse()
        self._noted: tuple[str, ...] = ()
        self._last: tuple[IO, NpArray] | None = None
        self.stats: dict[str, Any] = {}
        self.tokens: NpArray | None = None
        self.hparams = _hparams(artifact, chosen.name)
        self.info: dict[str, Any] = {
            **self._engine.info,
            "engine": chosen.name,
            "artifact": str(artifact.path),
            "container": artifact.container,
            "target": self.hparams.target,
        }

    @property
    def io(self) -> IO:
        """What goes in and comes out, as data."""
        return self.artifact.io

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should know: from compiling, and from the last `act`."""
        return (*(str(w) for w in self.artifact.manifest.get("warnings", ())), *self._noted)

    @property
    def normalised(self) -> Array | None:
        """The last chunk before it was brought to the robot's units, f32 [rows, action_dim], for `act(prev_chunk=)`."""
        last = self._last
        return None if last is None else apply_action_steps(last[0].normalised_action_steps, last[1])

    def act(
        self,
        images: Mapping[str, Any] | None = None,
        state: Any = None,
        task: str | None = None,
        tokens: Any = None,
        mask: Any = None,
        noise: Any = None,
        seed: int | None = None,
        units: str | None = None,
        strict: bool = False,
        unnorm_key: str | None = None,
        reuse: bool = True,
        n_actions: int | None = None,
        prev_chunk: Any = None,
        inference_delay: int = 0,
        execution_horizon: int = HORIZON,
        schedule: str = "linear",
        max_guidance_weight: float = MAX_WEIGHT,
        displacements: Sequence[int] = (),
        source: str = "",
    ) -> Array:
        """One observation -> one action chunk, float32 [chunk_size, action_dim], or its first `n_actions` rows.

        Args:
            images: camera (feature key or its last part) -> uint8 [H, W, 3] RGB of any size; also float [H, W, 3] in
                [0, 1], or an RGB PIL.Image. Without images and task: what `observe` was given last.
            state: [state_dim], raw, in the robot's units; with units="normalized" already normalised.
            task: the instruction. Or tokens: ids [T], with mask: bool [T], true = real token.
            noise: [chunk_size, max_action_dim] float32 to start the sampler from (a leading 1 is allowed); or seed: of
                a PCG64 generator that draws it; neither: fresh noise.
            units: "robot" or "normalized", for state and chunk; None = the artifact's own (`hparams.units`).
            strict: refuse a task that is longer than the policy's prompt instead of cutting it as the original does.
            unnorm_key: whose statistics, where the artifact holds several (`hparams.unnorm_keys`); None = the first
                that was named when compiling.
            reuse: False computes everything anew and remembers nothing; see `stats["reused"]`.
            n_actions: how many actions are wanted, from the first on. Where no action looks at a later one, only so
                many (or a few more, the next size there is) are computed: `stats["rows_computed"]`.
            prev_chunk: what is left of the chunk that the robot is executing, for real-time chunking: the rows of
                `normalised` from this observation's control step on, [T, action_dim]; None or no rows: no guidance.
            inference_delay: its first rows, which will be executed before this chunk is there; the new chunk keeps
                them. execution_horizon: up to this row the new chunk is drawn to the old one, less and less, as
                `schedule` says: "zeros", "ones", "linear", "exp"; 0: it is not. max_guidance_weight: how hard at most.
            displacements: columns of an action that move the robot by so much. With `prev_chunk` (no rows: the robot
                stands) the rows after `inference_delay` make up for what the late ones would have moved otherwise
                (vlac.runtime.hand_over).
            source: whose `observe` counts.

        Raises:
            InputError: names the camera, state, task, tokens or noise that does not fit.
            EngineError: the engine failed, or the chunk has NaN or Inf (it is never returned).
        """
        started = time.perf_counter()
        with self._lock, self._gate.act():
            if self._engine is None:
                raise EngineError("this session is closed", remedy="load the artifact again")
            known = self._reuse if reuse else None
            seen = self._observed.get(source) if images is None else None
            if seen is not None and not (task is None and tokens is None and mask is None):
                raise InputError("the instruction belongs to observe()", remedy="give it there, or images= as well")
            if known is not None:
                known.begin()
            units = resolve_units(self.io, units)
            io = self.io.chosen(unnorm_key)
            ready = prepare(
                io,
                self._tokenizer,
                self.artifact.program,
                images=images,
                state=state,
                task=task,
                tokens=tokens,
                mask=mask,
                noise=noise,
                seed=seed,
                units=units,
                strict=strict,
                reuse=known,
                n_actions=n_actions,
                scene=None if seen is None else seen.scene,
            )
            guide = None
            if prev_chunk is not None and len(prev_chunk) and not (displacements and execution_horizon == 0):
                guide = guidance(
                    self.artifact.program,
                    io,
                    lambda name: self.artifact.tensors[name].decode(),
                    prev_chunk,
                    len(ready.env["noise"]) if "noise" in ready.env else 0,
                    delay=inference_delay,
                    horizon=execution_horizon,
                    schedule=schedule,
                    most=max_guidance_weight,
                )
            stats: dict[str, Any] = {"preprocess_ms": (time.perf_counter() - started) * 1e3}
            collected: dict[str, NpArray] = {}
            x = execute(
                self.artifact.program,
                self._engine,
                ready.env,
                ready.symbols,
                stats=stats,
                collected=collected,
                reuse=known,
                known=None if seen is None else seen.values,
                guide=guide,
            )
            if displacements and prev_chunk is not None:
                x = handed_over(io, x, prev_chunk, inference_delay, displacements)
            self._last = (io, x[:n_actions])
            steps = io.action_steps if units == "robot" else io.normalised_action_steps
            # a copy: the steps may be none, and what a stage returned is kept for the next call
            chunk = finite_chunk(apply_action_steps(steps, x, ready.state)[:n_actions], self._engine.engine).copy()
            self._verification.wait()  # before the first chunk leaves: a damaged weight must not move an arm
            stats["reused"] = () if known is None else tuple(known.used)
            if seen is not None:
                stats.update(observation=seen.number, observation_age_ms=age_ms(seen))
            stats["rows_computed"] = ready.symbols.get(ROWS, io.noise_shape[0])
            stats["total_ms"] = (time.perf_counter() - started) * 1e3
            self.stats, self._noted = stats, ready.warnings
            self.tokens = generated(self.artifact.program, collected)
            stats.update(per_token(self.artifact.program, stats, self.tokens))
        for text in ready.warnings:
            python_warnings.warn(text, VlacWarning, stacklevel=2)
        return chunk

    def observe(
        self,
        images: Mapping[str, Any] | None = None,
        task: str | None = None,
        tokens: Any = None,
        mask: Any = None,
        strict: bool = False,
        source: str = "",
    ) -> int:
        """Takes new frames and the instruction, for every later `act(state=...)` without images; returns their number.

        Arguments as in `act`; source: whose frames they are, where several robots share the policy. Everything that
        does not depend on the state is computed here, in the caller's thread, and counts when it is complete: an `act`
        meanwhile uses the observation before (`stats["observation"]`, "observation_age_ms"), and does not wait for more
        than two stages of this one. May be called from another thread than `act`. After a failure the observation
        before stays.

        Raises: as `act`.
        """
        with self._observing:
            engine = self._engine
            if engine is None:
                raise EngineError("this session is closed", remedy="load the artifact again")
            known = None if self._reuse is None else self._frames
            self._frames.begin()
            asked = {"task": task, "tokens": tokens, "mask": mask, "strict": strict}
            scene = observe(self.io, self._tokenizer, self.artifact.program, images=images, asked=asked, reuse=known)
            values = known_from(self.artifact.program, Gated(engine, self._gate), scene, known)
            before = self._observed.get(source)
            number = 1 if before is None else before.number + 1
            self._observed[source] = Observed(number, scene, values, time.perf_counter())
        for text in scene.warnings:
            python_warnings.warn(text, VlacWarning, stacklevel=2)
        return number

    def forget(self, source: str = "") -> None:
        """Drops what `source` observed."""
        with self._observing:
            self._observed.pop(source, None)

    def close(self) -> None:
        """Frees the engine's memory; `act` fails afterwards. Closing twice is fine."""
        with self._observing, self._lock:
            engine, self._engine = self._engine, None
            if self._reuse is not None:
                self._reuse.clear()
            self._frames.clear()
            self._observed.clear()
        self._verification.cancel()
        if engine is not None:
            engine.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        h = self.hparams
        return f"Session({h.name}, {h.target} on {h.engine}, chunk {h.chunk_size} x {h.action_dim})"


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise EngineError(f"option reuse={value!r}, expected True or False")
    return value


def _hparams(artifact: Artifact, engine: str) -> HParams:
    io, manifest = artifact.io, artifact.manifest
    same = {f.name for f in dataclasses.fields(HParams)} & {f.name for f in dataclasses.fields(IO)} - {"cameras"}
    return HParams(
        cameras=tuple(c.key for c in io.cameras),
        camera_names=tuple(c.name for c in io.cameras),
        tokenizer_max_length=max_prompt_tokens(io.text_steps),
        family=str(manifest.get("family", "")),
        name=str(manifest.get("name", artifact.program.name)),
        target=str(manifest.get("target", "")),
        engine=engine,
        unnorm_keys=tuple(io.choices),
        **{name: getattr(io, name) for name in same},
    )
