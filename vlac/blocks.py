"""What families share: ViT tower, connector, decoder layers, gated MLP, action-time embedding, drawn with ops only.

Every block takes a StageBuilder, names of values and the prefix of its weights, and returns names of values. The
`*_shapes` functions give the shape of every weight a block reads, so that readers can check a checkpoint.
Activations are [rows, features] float32; keys and values are [rows, num_key_value_heads * head_dim].
"""

from __future__ import annotations

from vlac.dims import Dim
from vlac.errors import Unsupported
from vlac.graph import Call, Param, Program, Repeat, Schedule, Stage, StageBuilder, Symbol, check
from vlac.policy import Policy
from vlac.spec import DecoderSpec, EncoderSpec, FlowSpec, VisionSpec
from vlac.weights import LazyTensor, Weights

Shapes = dict[str, tuple[int, ...]]


def activation(b: StageBuilder, x: str, hidden_act: str) -> str:
    """Hugging Face's name of an activation, applied; Unsupported names an unknown one."""
    if hidden_act in ("silu", "relu"):
        return b.op(hidden_act, x)
    kinds = {"gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu": "none", "quick_gelu": "quick"}
    if hidden_act not in kinds:
        raise Unsupported(f"activation {hidden_act!r}; known: silu, relu, {', '.join(kinds)}")
    return b.op("gelu", x, approximate=kinds[hidden_act])


def linear(b: StageBuilder, x: str, name: str, *, bias: bool = False, as_: str = "") -> str:
    """x @ weight.T (+ bias), weights `{name}.weight` and `{name}.bias`."""
    operands = (x, f"@{name}.weight", f"@{name}.bias") if bias else (x, f"@{name}.weight")
    return b.op("linear", *operands, name=as_)


# --- vision ----------------------------------------------------------------------------------------------------


def vit_tower(b: StageBuilder, pixels: str, spec: VisionSpec, name: str = "vision") -> str:
    """SigLIP tower (Zhai et al. 2023): pixels [3, S, S] -> [grid*grid, hidden_size], after the final norm.

    Position ids are 0..grid*grid-1, row-major: the image always fills the tower. Some versions of transformers shift
    them by one (see docs); checkpoints were trained with these.
    """
    used = spec.grid * spec.patch_size
    for axis in (1, 2) if used != spec.image_size else ():  # the convolution drops a remainder at right and bottom
        pixels = b.op("slice", pixels, axis=axis, start=0, stop=used)
    x = b.op("patchify", pixels, patch=spec.patch_size, block=1)
    x = linear(b, x, f"{name}.patch_embedding", bias=True)
    x = b.op("add", x, f"@{name}.position_embedding", name=f"{name}.embedded")
    if not spec.merges:
        return _layer_norm(b, vit_layers(b, x, spec, name), spec, f"{name}.post_layernorm")
    x = _layer_norm(b, _merging_layers(b, x, spec, name), spec, f"{name}.post_layernorm")
    return _mix_rows(b, x, f"@{name}.unmerge", as_=f"{name}.unmerged")


def _mix_rows(b: StageBuilder, x: str, weight: str, as_: str = "") -> str:
    """weight [m, n] times x [n, D], written as a linear on columns: [m, D]."""
    columns = b.op("linear", b.op("transpose", x, perm=(1, 0)), weight)
    return b.op("transpose", columns, perm=(1, 0), name=as_)


def _merging_layers(b: StageBuilder, x: str, spec: VisionSpec, name: str) -> str:
    """The layers, with rows merged before some of them; what a row stands for weighs in attention from then on."""
    mask, merges = "", dict(spec.merges)
    for i in range(spec.num_hidden_layers):
        if i in merges:
            x = _mix_rows(b, x, f"@{name}.merge.{i}", as_=f"{name}.merged.{i}")
            rows = sum(n for n, _ in merges[i])
            mask = weigh(b, b.op("full", shape=(rows, rows), value=1.0, dtype="bool"), *merges[i])
        x = _vit_layer(b, x, spec, f"{name}.layers.{i}", mask)
    return x


def vit_layers(
    b: StageBuilder, x: str, spec: VisionSpec | EncoderSpec, name: str, mask: str = "", scaled: bool = False
) -> str:
    """The pre-norm layers of a ViT on rows of any number; every row sees every other, or those that `mask` allows.

    scaled: what a layer adds is multiplied by `layer_scale1` and `layer_scale2` before (Touvron et al. 2021). The
    factors stay out of the weights: a product would no longer be a bfloat16 number, and round in float16.
    """
    for i in range(spec.num_hidden_layers):
        x = _vit_layer(b, x, spec, f"{name}.layers.{i}", mask, scaled)
    return x


def _layer_norm(b: StageBuilder, x: str, spec: VisionSpec | EncoderSpec, name: str) -> str:
    return b.op("layer_norm", x, f"@{name}.weight", f"@{name}.bias", eps=spec.layer_norm_eps)


def _vit_layer(
    b: StageBuilder, x: str, spec: VisionSpec | EncoderSpec, name: str, mask: str = "", scaled: bool = False
) -> str:
    def added(part: str, scale: str) -> str:
        y = linear(b, h, f"{name}.{part}", bias=True)
        return b.op("mul", y, f"@{name}.{scale}") if scaled else y

    heads = spec.num_attention_heads
    h = _layer_norm(b, x, spec, f"{name}.layer_norm1")
    q, k, v = (linear(b, h, f"{name}.self_attn.{p}_proj", bias=True) for p in "qkv")
    scale = (spec.hidden_size // heads) ** -0.5
    operands = (q, k, v, mask) if mask else (q, k, v)
    h = b.op("attention", *operands, heads=heads, kv_heads=heads, scale=scale, name=f"{name}.attended")
    x = b.op("add", x, added("self_attn.out_proj", "layer_scale1"))
    h = _layer_norm(b, x, spec, f"{name}.layer_norm2")
    h = activation(b, linear(b, h, f"{name}.mlp.fc1", bias=True), spec.hidden_act)
    return b.op("add", x, added("mlp.fc2", "layer_scale2"), name=f"{name}.hidden")


def vit_shapes(spec: VisionSpec, name: str = "vision") -> Shapes:
    """Weights of `vit_tower`."""
    d = spec.hidden_size
    shapes: Shapes = {
        f"{name}.patch_embedding.weight": (d, spec.num_channels * spec.patch_size**2),
        f"{name}.patch_embedding.bias": (d,),
        f"{name}.position_embedding": (spec.grid**2, d),
    }
    rows = spec.grid**2
    for i, runs in spec.merges:
        shapes[f"{name}.merge.{i}"] = (sum(n for n, _ in runs), rows)
        rows = sum(n for n, _ in runs)
    if spec.merges:
        shapes[f"{name}.unmerge"] = (spec.grid**2, rows)
    shapes |= vit_layers_shapes(spec, name)
    shapes[f"{name}.post_layernorm.weight"] = shapes[f"{name}.post_layernorm.bias"] = (d,)
    return shapes


def vit_layers_shapes(spec: VisionSpec | EncoderSpec, name: str, scaled: bool = False) -> Shapes:
    """Weights of `vit_layers`."""
    d, f = spec.hidden_size, spec.intermediate_size
    shapes: Shapes = {}
    for i in range(spec.num_hidden_layers):
        layer = f"{name}.layers.{i}"
        for part, (rows, columns) in {
            "self_attn.q_proj": (d, d),
            "self_attn.k_proj": (d, d),
            "self_attn.v_proj": (d, d),
            "self_attn.out_proj": (d, d),
            "mlp.fc1": (f, d),
            "mlp.fc2": (d, f),
        }.items():
            shapes[f"{layer}.{part}.weight"] = (rows, columns)
            shapes[f"{layer}.{part}.bias"] = (rows,)
        for norm in ("layer_norm1", "layer_norm2"):
            shapes[f"{layer}.{norm}.weight"] = shapes[f"{layer}.{norm}.bias"] = (d,)
        if scaled:
            shapes[f"{layer}.layer_scale1"] = shapes[f"{layer}.layer_scale2"] = (d,)
    return shapes


def shuffle_connector(b: StageBuilder, x: str, factor: int, name: str = "connector.proj", as_: str = "") -> str:
    """Idefics3 connector: pixel shuffle by `factor`, then a linear without bias."""
    return linear(b, b.op("pixel_shuffle", x, factor=factor), name, as_=as_)


def mean_tokens(b: StageBuilder, x: str, factor: int, width: int, as_: str = "") -> str:
    """Means over factor x factor blocks of a square grid of tokens x [g*g, width] -> [(g/factor)^2, width]."""
    rows = b.op("pixel_shuffle", x, factor=factor)
    parts = [b.op("slice", rows, axis=1, start=i * width, stop=(i + 1) * width) for i in range(factor**2)]
    total = parts[0]
    for part in parts[1:]:
        total = b.op("add", total, part)
    return b.op("scale", total, factor=1 / factor**2, name=as_)


# --- decoder ---------------------------------------------------------------------------------------------------


def rms_norm(b: StageBuilder, x: str, spec: DecoderSpec, name: str) -> str:
    """RMSNorm with weight `{name}.weight` (Gemma's 1+w is folded into it when the checkpoint is read)."""
    return b.op("rms_norm", x, f"@{name}.weight", eps=spec.rms_norm_eps)


def rotary(b: StageBuilder, x: str, positions: str, spec: DecoderSpec, as_: str = "") -> str:
    """RoPE on every head of x."""
    return b.op("rope", x, positions, head_dim=spec.head_dim, base=spec.rope_theta, name=as_)


def attend(b: StageBuilder, q: str, k: str, v: str, mask: str, spec: DecoderSpec) -> str:
    """Grouped-query attention with scale head_dim^-0.5."""
    return b.op(
        "attention",
        *(q, k, v, mask),
        heads=spec.num_attention_heads,
        kv_heads=spec.num_key_value_heads,
        scale=spec.head_dim**-0.5,
    )


def gated_mlp(b: StageBuilder, x: str, spec: DecoderSpec, name: str) -> str:
    """down(act(gate(x)) * up(x))."""
    gate = activation(b, linear(b, x, f"{name}.gate_proj"), spec.hidden_act)
    return linear(b, b.op("mul", gate, linear(b, x, f"{name}.up_proj")), f"{name}.down_proj")


def _rest_of_layer(b: StageBuilder, x: str, attended: str, spec: DecoderSpec, name: str) -> str:
    x = b.op("add", x, linear(b, attended, f"{name}.self_attn.o_proj"))
    h = rms_norm(b, x, spec, f"{name}.post_attention_layernorm")
    return b.op("add", x, gated_mlp(b, h, spec, f"{name}.mlp"), name=f"{name}.hidden")


def decoder_layer(
    b: StageBuilder,
    x: str,
    spec: DecoderSpec,
    name: str,
    positions: str,
    mask: str,
    past: tuple[str, str] | None = None,
    kv_names: tuple[str, str] = ("", ""),
    cache: tuple[str, str, str] | None = None,
) -> tuple[str, str, str]:
    """A pre-norm decoder layer; returns (hidden, rotated keys, values) of its own rows.

    Attention reads the rows of `past` (keys, values) before its own; `mask` is [rows, past rows + rows].
    `kv_names` are wished for the keys and values, where they leave the stage.
    With `cache` (keys, values, row number) its own keys and values are written into that cache from that row on, and
    the cache takes their place: attention reads it, and it is returned.
    """
    h = rms_norm(b, x, spec, f"{name}.input_layernorm")
    q = rotary(b, linear(b, h, f"{name}.self_attn.q_proj"), positions, spec)
    k = rotary(b, linear(b, h, f"{name}.self_attn.k_proj"), positions, spec, as_="" if cache else kv_names[0])
    v = linear(b, h, f"{name}.self_attn.v_proj", as_="" if cache else kv_names[1])
    if cache:
        k = b.op("write_rows", cache[0], k, cache[2], name=kv_names[0])
        v = b.op("write_rows", cache[1], v, cache[2], name=kv_names[1])
    keys, values = k, v
    if past:
        keys = b.op("concat", past[0], k, axis=0)
        values = b.op("concat", past[1], v, axis=0)
    return _rest_of_layer(b, x, attend(b, q, keys, values, mask, spec), spec, name), k, v


def kv_tap(
    b: StageBuilder, x: str, spec: DecoderSpec, name: str, positions: str, kv_names: tuple[str, str] = ("", "")
) -> tuple[str, str]:
    """(rotated keys, values) of a layer that is otherwise left out: its norm and projections on the hidden state x."""
    h = rms_norm(b, x, spec, f"{name}.input_layernorm")
    k = rotary(b, linear(b, h, f"{name}.self_attn.k_proj"), positions, spec, as_=kv_names[0])
    return k, linear(b, h, f"{name}.self_attn.v_proj", as_=kv_names[1])


def kv_tap_shapes(spec: DecoderSpec, name: str) -> Shapes:
    """Weights of `kv_tap`."""
    layer = decoder_layer_shapes(spec, name)
    return {n: layer[n] for n in layer if n.endswith((".input_layernorm.weight", ".k_proj.weight", ".v_proj.weight"))}


def cross_layer(
    b: StageBuilder,
    x: str,
    spec: DecoderSpec,
    name: str,
    positions: str,
    mask: str,
    memory: tuple[str, str],
) -> str:
    """A decoder layer that attends only to `memory` (keys, values of another decoder), projected by its own k and v."""
    h = rms_norm(b, x, spec, f"{name}.input_layernorm")
    q = rotary(b, linear(b, h, f"{name}.self_attn.q_proj"), positions, spec)
    k = linear(b, memory[0], f"{name}.self_attn.k_proj")
    v = linear(b, memory[1], f"{name}.self_attn.v_proj")
    return _rest_of_layer(b, x, attend(b, q, k, v, mask, spec), spec, name)


def decoder_layer_shapes(spec: DecoderSpec, name: str, memory_width: int | None = None) -> Shapes:
    """Weights of one layer; `memory_width` is the width that k and v project from in a cross layer."""
    d, f = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    source = d if memory_width is None else memory_width
    return {
        f"{name}.input_layernorm.weight": (d,),
        f"{name}.self_attn.q_proj.weight": (q, d),
        f"{name}.self_attn.k_proj.weight": (kv, source),
        f"{name}.self_attn.v_proj.weight": (kv, source),
        f"{name}.self_attn.o_proj.weight": (d, q),
        f"{name}.post_attention_layernorm.weight": (d,),
        f"{name}.mlp.gate_proj.weight": (f, d),
        f"{name}.mlp.up_proj.weight": (f, d),
        f"{name}.mlp.down_proj.weight": (d, f),
    }


# --- bookkeeping of sequences ----------------------------------------------------------------------------------


def positions_of(b: StageBuilder, valid: str) -> str:
    """cumsum(valid) - 1: an invalid row repeats the position before it. bool [L] -> i32 [L]."""
    count = b.op("cumsum", b.op("cast", valid, dtype="i32"))
    return b.op("sub", count, b.op("full", shape=(1,), value=1.0, dtype="i32"), name="positions")


def count_valid(b: StageBuilder, valid: str) -> str:
    """Number of valid rows. bool [L] -> i32 [1]."""
    return b.op("reduce_sum", b.op("cast", valid, dtype="i32"), name="prefix_count")


def weigh(b: StageBuilder, mask: str, *runs: tuple[Dim, int]) -> str:
    """What attention reads where keys stand for several: runs of (rows, how many each stands for); the mask itself
    where all stand for themselves."""
    if all(count == 1 for _, count in runs):
        return mask
    return b.op("weighted_mask", mask, block_ids(b, *runs))


def block_centres(b: StageBuilder, side: int, factor: int) -> str:
    """Where the middles of factor x factor blocks of a side x side grid lie, row by row, rounded down:
    i32 [(side/factor)^2]."""
    blocks, middle = side // factor, (factor - 1) * (side + 1) // 2

    def times(value: str, by: int) -> str:
        return b.op("mul", value, b.op("full", shape=(1,), value=float(by), dtype="i32"))

    one = b.op("arange", start=0, stop=blocks)
    rows = times(b.op("repeat_each", one, times=blocks), factor * side)
    across = b.op("reshape", times(one, factor), shape=(1, blocks))
    columns = b.op("reshape", b.op("tile", across, rows=blocks), shape=(blocks**2,))
    return b.op("add", b.op("add", rows, columns), b.op("full", shape=(1,), value=float(middle), dtype="i32"))


def centred_positions(b: StageBuilder, cameras: tuple[str, Dim], grid: tuple[int, int], behind: str) -> tuple[str, str]:
    """(positions, their number) of a prefix whose image tokens stand for blocks of older ones, as if all of these were
    there: a block has its middle's position, what follows has the positions it always had.

    cameras: validity of slots bool [C], C; grid: (side before, factor); behind: validity of the rows behind, bool.
    """
    (given, count), (side, factor) = cameras, grid
    kept, before = (side // factor) ** 2, b.op("full", shape=(1,), value=float(side**2), dtype="i32")
    one = b.op("full", shape=(1,), value=1.0, dtype="i32")
    slots = b.op("cast", given, dtype="i32")
    start = b.op("repeat_each", b.op("mul", b.op("sub", b.op("cumsum", slots), one), before), times=kept)
    table = b.op("reshape", block_centres(b, side, factor), shape=(1, kept))
    every = b.op("reshape", b.op("tile", table, rows=count), shape=(count * kept,))
    images = b.op("mul", b.op("reduce_sum", slots), before)
    real = b.op("cast", behind, dtype="i32")
    later = b.op("add", b.op("sub", b.op("cumsum", real), one), images)
    positions = b.op("concat", b.op("add", every, start), later, axis=0, name="positions")
    return positions, b.op("add", b.op("reduce_sum", real), images, name="prefix_count")


def block_ids(b: StageBuilder, *runs: tuple[Dim, int]) -> str:
    """Block numbers for attention_mask: (rows, number) runs after one another, i32."""
    parts = [b.op("full", shape=(rows,), value=float(number), dtype="i32") for rows, number in runs]
    return parts[0] if len(parts) == 1 else b.op("concat", *parts, axis=0)


# --- flow ------------------------------------------------------------------------------------------------------


def action_time_tokens(b: StageBuilder, x: str, t: str, rows: int, width: int, periods: tuple[float, float]) -> str:
    """Noisy actions x [N, A] and time t [1, 1] -> action tokens [N, width] (pi0, Black et al. 2024, appendix B).

    Weights: action_in_proj, action_time_mlp_in, action_time_mlp_out.
    """
    actions = linear(b, x, "action_in_proj", bias=True)
    time = b.op("time_embedding", t, dim=width, min_period=periods[0], max_period=periods[1])
    both = b.op("concat", actions, b.op("tile", time, rows=rows), axis=1)
    hidden = b.op("silu", linear(b, both, "action_time_mlp_in", bias=True))
    return linear(b, hidden, "action_time_mlp_out", bias=True, as_="action_tokens")


def euler_step(b: StageBuilder, x: str, velocity: str, dt: str) -> str:
    """x + dt * velocity, dt [1, 1]."""
    return b.op("add", x, b.op("mul", velocity, dt), name="x_next")


def flow_tables(flow: FlowSpec) -> dict[str, LazyTensor]:
    """What a drawn sampler reads besides the network's weights: times, and steps or the solver's recurrence."""
    tables = {"flow.times": LazyTensor.of([[t] for t in flow.times], "flow.times")}
    if flow.solver == "euler":
        return tables | {"flow.dts": LazyTensor.of([[d] for d in flow.dts], "flow.dts")}
    return tables | {"flow.recurrence": LazyTensor.of(flow.recurrence, "flow.recurrence")}


def sampler_step(
    b: StageBuilder, x: str, velocity: str, step: str, flow: FlowSpec, shape: tuple[int, int]
) -> tuple[tuple[str, str, str], ...]:
    """Draws one turn of the solver, makes its results outputs, and returns the Repeat's carries; x_next is the result.

    x and velocity have `shape` (N, A); see FlowSpec for the recurrence. Columns of zeros are not drawn.
    """
    if flow.solver == "euler":
        b.output(euler_step(b, x, velocity, b.op("embed", step, "@flow.dts")))
        return (("x_next", "x", "noise"),)
    row = b.op("embed", step, "@flow.recurrence")
    columns = [[r[i] for r in flow.recurrence] for i in range(6)]
    has_memory = any(columns[1])
    operands = (x, b.input("memory", "f32", *shape) if has_memory else "", velocity)

    def mixed(first: int, name: str) -> str:
        terms = []
        for i, operand in enumerate(operands, first):
            if any(columns[i]):
                factor = b.op("slice", row, axis=1, start=i, stop=i + 1)
                plain = all(c == 1.0 for c in columns[i])
                terms.append(operand if plain else b.op("mul", operand, factor))
        for term in terms[1:-1]:
            terms[0] = b.op("add", terms[0], term)
        return (
            b.op("add", terms[0], terms[-1], name=name)
            if len(terms) > 1
            else b.op("scale", *terms, factor=1.0, name=name)
        )

    b.output(mixed(0, "x_next"))
    if not has_memory:
        return (("x_next", "x", "noise"),)
    b.output(mixed(3, "memory_next"))
    return (("x_next", "x", "noise"), ("memory_next", "memory", "noise"))


def action_shapes(max_action_dim: int, width: int) -> Shapes:
    """Weights of `action_time_tokens` and the output projection."""
    shapes: Shapes = {}
    for name, (rows, columns) in {
        "action_in_proj": (width, max_action_dim),
        "action_out_proj": (max_action_dim, width),
        "action_time_mlp_in": (width, 2 * width),
        "action_time_mlp_out": (width, width),
    }.items():
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)
    return shapes


def token_buckets(maximum: int) -> tuple[int, ...]:
    """Prompt lengths a stage may be built for: multiples of 8 (of 32 beyond 64) below `maximum`, and `maximum`."""
    return (*(n for n in range(8, maximum, 8) if n <= 64 or n % 32 == 0), maximum)


# --- programs --------------------------------------------------------------------------------------------------


def program_of(policy: Policy, stages: tuple[Stage, ...], steps: tuple[Call | Repeat, ...], result: str) -> Program:
    """The program of these stages with the weights that they read, checked. Symbols: C cameras, T prompt tokens, of
    which `policy.spec.tokenizer_max_length` are the most."""
    read = {i[1:] for s in stages for n in s.nodes for i in n.inputs if i.startswith("@")}
    weights = {name: t for name, t in policy.weights.items() if name in read}
    program = Program(
        name=policy.family,
        symbols=(
            Symbol("C", tuple(range(1, len(policy.io.cameras) + 1))),
            Symbol("T", token_buckets(policy.spec.tokenizer_max_length)),
        ),
        stages=stages,
        params={name: Param(t.shape) for name, t in weights.items()},
        schedule=Schedule(steps, result),
        weights=Weights(weights),
    )
    return check(program)


def flow_program(
    policy: Policy, flow: FlowSpec, before: tuple[Stage, Stage], stage: Stage, carry: tuple[tuple[str, str, str], ...]
) -> Program:
    """`before`: vision (once per camera) and prefix (once); then `stage`, once per solver step with its carries, gives
    x_next."""
    timed = policy.replace(weights=policy.weights.with_(**flow_tables(flow)))
    vision, prefix = before
    repeat = Repeat(stage.name, len(flow.times), "step", carry)
    steps = (Call(vision.name, each="camera"), Call(prefix.name), repeat)
    return program_of(timed, (vision, prefix, stage), steps, "x_next")
