"""Keys and values that cross from a stage to a loop, packed: what the loop reads holds few bits per number.

Works on the lowered program, where projections that do not change have left the loop, so that whatever attention in the
loop reads as keys or values of an earlier stage is found, however the family drew it.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlac.errors import Unsupported
from vlac.graph import Call, Node, Program, Repeat
from vlac.ops import Attr, Type
from vlac.rewrites.draft import Draft, StageDraft, node, unique


@dataclass(frozen=True)
class CacheFormat:
    """Bits of keys and values, whether the keys' mean over the prefix is taken off first, how many of the first and of
    the last attentions keep float32, the seed of the rotations, the form of the codes (vlac.kv_codes.FORMS), and
    whether the weights hold the rotation of the values already. str(format) is what Policy.kv holds."""

    k: int = 4
    v: int = 4
    center: bool = True
    protect: int = 0
    seed: int = 0
    form: str = "groups"
    folded: bool = False

    def __str__(self) -> str:
        return (
            f"codes k={self.k} v={self.v} center={int(self.center)} protect={self.protect} seed={self.seed} "
            f"form={self.form} folded={int(self.folded)}"
        )

    @staticmethod
    def parse(text: str) -> CacheFormat | None:
        """None for "f32"; Unsupported for what is no format."""
        if text == "f32":
            return None
        kind, *parts = text.split()
        values = dict(part.partition("=")[::2] for part in parts)
        if kind != "codes" or sorted(values) != ["center", "folded", "form", "k", "protect", "seed", "v"]:
            raise Unsupported(f"cache format {text!r}; known: f32, {CacheFormat()}")
        form = values.pop("form")
        n = {key: int(value) for key, value in values.items()}
        return CacheFormat(n["k"], n["v"], bool(n["center"]), n["protect"], n["seed"], form, bool(n["folded"]))


@dataclass(frozen=True)
class Crossing:
    """A value that a loop's attention reads as "k" or "v": its name, type and the size of a head; `at` counts the
    attentions of the loop."""

    name: str
    kind: str
    type: Type
    head_dim: int
    at: int


def crossings(program: Program) -> tuple[Repeat | None, tuple[Crossing, ...]]:
    """The last loop, and the keys and values that its attentions read from stages called before it."""
    loops = [s for s in program.schedule.steps if isinstance(s, Repeat)]
    if not loops:
        return None, ()
    step = loops[-1]
    stage = program.stage(step.stage)
    own = {step.index, *(into for _, into, _ in step.carry)}
    outside = {n: t for n, t in stage.inputs if n not in own and t.dtype == "f32" and len(t.shape) == 2}
    made = {n.name: n for n in stage.nodes}
    found: dict[str, Crossing] = {}
    for at, n in enumerate(n for n in stage.nodes if n.op == "attention"):
        for kind, i in zip("kv", n.inputs[1:3], strict=True):
            source = made.get(i)
            reads = source.inputs if source is not None and source.op == "concat" and source.attr["axis"] == 0 else (i,)
            for name in (r for r in reads if r in outside):
                width = outside[name].shape[1]
                assert isinstance(width, int)
                found.setdefault(name, Crossing(name, kind, outside[name], width // n.attr["kv_heads"], at))
    return step, tuple(found.values())


def quantize_cache(program: Program, kv: str) -> Program:
    """Packs every crossing (save for protected ones) in the stage that makes it, and unpacks it in the loop, where it
    is first read: neither holds more than it works on in float32."""
    form = CacheFormat.parse(kv)
    step, found = crossings(program)
    if form is None:
        return program
    last = max((c.at for c in found), default=-1)
    chosen = [c for c in found if form.protect <= c.at <= last - form.protect]
    if step is None or not chosen:
        raise Unsupported(f"cache format {kv!r}: no keys and values cross into a loop")
    draft = Draft.of(program)
    taken = {n for s in draft.stages for n in (s.name, *(i for i, _ in s.inputs), *(m.name for m in s.nodes))}
    for c in chosen:
        _pack_one(draft, _maker(draft, c), draft.stage(step.stage), c, form, taken)
    return draft.build()


def _maker(draft: Draft, c: Crossing) -> StageDraft:
    """The stage that is called once and makes the value; Unsupported where there is none."""
    once = [s.stage for s in draft.steps if isinstance(s, Call) and not s.each]
    for stage in draft.stages:
        if stage.name in once and any(n.name == c.name for n in stage.nodes):
            return stage
    raise Unsupported(f"{c.name}, which the loop reads as {c.kind}, comes from no stage that is called once")


def _pack_one(
    draft: Draft, maker: StageDraft, loop: StageDraft, c: Crossing, form: CacheFormat, taken: set[str]
) -> None:
    bits = form.k if c.kind == "k" else form.v
    seed = -1 if form.folded and c.kind == "v" else form.seed + c.at
    how: dict[str, Attr] = {"bits": bits, "head_dim": c.head_dim, "seed": seed, "form": form.form}
    means: tuple[str, ...] = ()
    nodes = []
    if c.kind == "k" and form.center:
        valid = _validity(draft, maker, c)
        means = (unique(f"{c.name}.mean", taken),)
        nodes.append(node(means[0], "column_mean", c.name, *valid))
    codes = unique(f"{c.name}.codes", taken)
    scale = "raw" if form.form == "inner" else "norm" if c.kind == "k" else "least_squares"
    nodes.append(node(codes, "pack_codes", c.name, *means, **how, scale=scale))
    made = max(i for i, n in enumerate(maker.nodes) if n.name in (c.name, *nodes[0].inputs))
    maker.nodes[made + 1 : made + 1] = nodes
    readers = {s.name for s in draft.stages if s is not maker and any(i == c.name for i, _ in s.inputs)}
    maker.outputs[:] = [o for o in maker.outputs if o != c.name or readers != {loop.name}] + [codes, *means]
    types = draft.types(maker)
    at = [n for n, _ in loop.inputs].index(c.name)
    loop.inputs[at : at + 1] = [(name, types[name]) for name in (codes, *means)]
    first = min(i for i, n in enumerate(loop.nodes) if c.name in n.inputs)
    loop.nodes.insert(first, Node(c.name, "unpack_codes", (codes, *means), tuple(sorted(how.items()))))
    taken.update((codes, *means))


def _validity(draft: Draft, maker: StageDraft, c: Crossing) -> tuple[str, ...]:
    """Which rows of the keys mean something, if a stage gives it under the name all families use."""
    want = ("prefix_valid", Type("bool", c.type.shape[:1]))
    if draft.types(maker).get(want[0]) == want[1]:
        return want[:1]
    for stage in draft.stages:
        types = draft.types(stage)
        if types.get(want[0]) == want[1] and any(n.name == want[0] for n in stage.nodes):
            if want[0] not in stage.outputs:
                stage.outputs.append(want[0])
            maker.inputs.append(want)
            return want[:1]
    return ()
