"""vla.cpp's GGUF files (VinRobotics/vla.cpp 0.3 and 0.4) as tables: SmolVLA, pi0 and pi0.5.

Integers are UINT32, periods FLOAT64, epsilons FLOAT32; another type ends the process or reads as zero. Statistics are
tensors and the engine applies them: raw state in, robot units out. The token embedding must be BF16 and hold exactly
49280 rows. Version 0.3 takes F32 and BF16 only; packed linears need 0.4 (by its changelog; not run here).
"""

from __future__ import annotations

from vlac.gguf_dialects import Check, Key, Layout, Row
from vlac.targets._dialect_rows import CROSS_MEMORY, both, decoder, tower

_PACKED = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
_FLOAT = ("bf16", "f32")
_TOWER = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    **{f"self_attn.{p}_proj": f"attn_{p}" for p in "qkv"},
    "self_attn.out_proj": "attn_o",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
}
_DECODER = {
    "input_layernorm": "attn_norm.weight",
    "self_attn.q_proj": "attn_q.weight",
    "self_attn.k_proj": "attn_k.weight",
    "self_attn.v_proj": "attn_v.weight",
    "self_attn.o_proj": "attn_o.weight",
    "post_attention_layernorm": "ffn_norm.weight",
    "mlp.gate_proj": "ffn_gate.weight",
    "mlp.up_proj": "ffn_up.weight",
    "mlp.down_proj": "ffn_down.weight",
}
_NOTES = (
    "the engine normalises the state and unnormalises the actions itself",
    "it resizes and tokenises nothing: pixels HWC RGB at the model's size, the task ends with a newline",
)


def _u32(name: str, field: str, default: int | None = None, low: int = 1, high: int = 1 << 20) -> Key:
    return Key(name, "u32", field, default, low, high)


_E = "expert.hidden_size"

SMOLVLA = Layout(
    dialect="vla.cpp",
    engine="vla.cpp",
    architecture="smolvla",
    family="smolvla",
    marker="vit.patch_embd.weight",
    keys=(
        Key("smolvla.architecture", "string", "io.architecture", one_of=("smolvla",)),
        _u32("smolvla.hidden", "text.hidden_size"),
        _u32("smolvla.intermediate", "text.intermediate_size"),
        _u32("smolvla.n_q_heads", "text.num_attention_heads", high=1024),
        _u32("smolvla.n_kv_heads", "text.num_key_value_heads", high=1024),
        _u32("smolvla.head_dim", "text.head_dim", high=1024),
        _u32("smolvla.n_layers", "text.num_hidden_layers", high=256),
        _u32("smolvla.vocab_size", "text.vocab_size"),
        _u32("smolvla.expert_h", _E),
        _u32("smolvla.expert_inter", "expert.intermediate_size"),
        _u32("smolvla.chunk_size", "chunk_size", high=1024),
        _u32("smolvla.num_steps", "flow.num_steps", high=1024),
        _u32("smolvla.max_state_dim", "max_state_dim", high=1024),
        _u32("smolvla.max_action_dim", "max_action_dim", high=1024),
        _u32("smolvla.real_state_dim", "io.state_dim", high=1024),
        _u32("smolvla.real_action_dim", "io.action_dim", high=1024),
        _u32("smolvla.self_attn_every_n_layers", "self_attn_every_n_layers", high=256),
        _u32("smolvla.tokenizer_max_length", "tokenizer_max_length", high=8192),
        Key("smolvla.min_period", "f64", "flow.min_period", low=1e-9, high=1e9),
        Key("smolvla.max_period", "f64", "flow.max_period", low=1e-9, high=1e9),
        Key("smolvla.norm_eps", "f32", "io.norm_eps", 1e-8, 0.0, 1.0),
        _u32("smolvla.vit_hidden", "vision.hidden_size", 768),
        _u32("smolvla.vit_layers", "vision.num_hidden_layers", 12, high=256),
        _u32("smolvla.vit_heads", "vision.num_attention_heads", 12, high=1024),
        _u32("smolvla.vit_inter", "vision.intermediate_size", 3072),
        _u32("smolvla.image_size", "vision.image_size", 512, high=16384),
        _u32("smolvla.patch_size", "vision.patch_size", 16, high=1024),
        _u32("smolvla.vit_pixel_shuffle", "scale_factor", 4, high=256),
        _u32("smolvla.n_img_tokens", "io.image_tokens", 64),
        Key("smolvla.vit_ln_eps", "f32", "vision.layer_norm_eps", 1e-6, 0.0, 1.0),
        Key("smolvla.expert_width_multiplier", "f64", "io.expert_width_multiplier", read=False),
    ),
    rows=(
        *tower("vit.patch_embd", "vit.pos_embd", "vit.blk.{i}", "vit.post_ln", _TOWER),
        Row("mm.fc.weight", "connector.proj.weight", ("text.hidden_size", "merged")),
        Row("token_embd.weight", "text.embed_tokens.weight", ("text.vocab_size", "text.hidden_size"), "embed"),
        *decoder("text", "vlm.blk.{i}", _DECODER),
        Row("vlm.output_norm.weight", "text.norm.weight", ("text.hidden_size",), "vector", fill=1.0),
        *decoder("expert", "aex.blk.{i}", _DECODER, CROSS_MEMORY),
        Row("aex.output_norm.weight", "expert.norm.weight", (_E,), "vector"),
        *both("state_proj", "state_proj", ("text.hidden_size", "max_state_dim"), "head"),
        *both("action_in_proj", "action_in_proj", (_E, "max_action_dim"), "head"),
        *both("action_out_proj", "action_out_proj", ("max_action_dim", _E), "head"),
        *both("action_time_mlp_in", "action_time_mlp_in", (_E, "twice"), "head"),
        *both("action_time_mlp_out", "action_time_mlp_out", (_E, _E), "head"),
        Row("state_mean", "io.state.mean", ("io.state_dim",), "vector"),
        Row("state_std", "io.state.std", ("io.state_dim",), "vector"),
        Row("action_mean", "io.action.mean", ("io.action_dim",), "vector"),
        Row("action_std", "io.action.std", ("io.action_dim",), "vector"),
    ),
    checks=(
        Check(
            "a vocabulary of {text_vocab_size}; the loader has room for 49280 rows",
            lambda d: d["text.vocab_size"] == 49280,
        ),
        Check(
            "images of {vision_image_size}, patches of {vision_patch_size} and a pixel shuffle of {scale_factor} do "
            "not make {io_image_tokens} tokens",
            lambda d: (
                int(d["vision.image_size"]) % (int(d["vision.patch_size"]) * int(d["scale_factor"])) == 0
                and (int(d["vision.image_size"]) // int(d["vision.patch_size"]) // int(d["scale_factor"])) ** 2
                == d["io.image_tokens"]
            ),
        ),
        Check(
            "the vision width {vision_hidden_size} does not divide by {vision_num_attention_heads} heads",
            lambda d: int(d["vision.hidden_size"]) % int(d["vision.num_attention_heads"]) == 0,
        ),
        Check(
            "{text_num_attention_heads} heads over {text_num_key_value_heads} key heads of size {text_head_dim}: heads "
            "must divide, sizes be even",
            lambda d: (
                int(d["text.num_attention_heads"]) % int(d["text.num_key_value_heads"]) == 0
                and int(d["text.head_dim"]) % 2 == 0
            ),
        ),
        Check("the expert's width {expert_hidden_size} is odd", lambda d: int(d["expert.hidden_size"]) % 2 == 0),
        Check(
            "a state of {io_state_dim} or an action of {io_action_dim} exceeds {max_state_dim} and {max_action_dim}",
            lambda d: (
                int(d["io.state_dim"]) <= int(d["max_state_dim"])
                and int(d["io.action_dim"]) <= int(d["max_action_dim"])
            ),
        ),
        Check(
            "periods {flow_min_period} to {flow_max_period}",
            lambda d: float(d["flow.min_period"]) <= float(d["flow.max_period"]),
        ),
    ),
    fixed={
        "vision.num_channels": 3,
        "vision.position_rule": "buckets",  # row-major ids, which this rule gives for the whole table
        "vision.hidden_act": "gelu_pytorch_tanh",
        "text.rms_norm_eps": 1e-5,
        "text.rope_theta": 10000.0,
        "text.hidden_act": "silu",
        "expert.rms_norm_eps": 1e-5,
        "expert.rope_theta": 10000.0,
        "expert.hidden_act": "silu",
        "expert.vocab_size": 0,
        "attention_mode": "cross_attn",
        "add_image_special_tokens": False,
    },
    same={
        "expert.num_hidden_layers": "text.num_hidden_layers",
        "expert.num_attention_heads": "text.num_attention_heads",
        "expert.num_key_value_heads": "text.num_key_value_heads",
        "expert.head_dim": "text.head_dim",
    },
    at_most={"prefix_length": 0},
    derived={
        "patches": lambda d: (int(d["vision.image_size"]) // int(d["vision.patch_size"])) ** 2,
        "merged": lambda d: int(d["vision.hidden_size"]) * int(d["scale_factor"]) ** 2,
        "text.q": lambda d: int(d["text.num_attention_heads"]) * int(d["text.head_dim"]),
        "text.kv": lambda d: int(d["text.num_key_value_heads"]) * int(d["text.head_dim"]),
        "expert.q": lambda d: int(d["text.num_attention_heads"]) * int(d["text.head_dim"]),
        "expert.kv": lambda d: int(d["text.num_key_value_heads"]) * int(d["text.head_dim"]),
        "twice": lambda d: 2 * int(d["expert.hidden_size"]),
    },
    formats={
        "linear": (*_PACKED, *_FLOAT),
        "embed": ("bf16",),
        "head": _FLOAT,
        "vector": _FLOAT,
        "position": _FLOAT,
        "conv": _FLOAT,
    },
    newer=(_PACKED, "0.4"),
    statistics=("MEAN_STD",),
    notes=_NOTES,
)

# --- pi0 and pi0.5 -----------------------------------------------------------------------------------------------


def _pi(architecture: str, ada: bool, heads: list[Row], statistics: tuple[str, ...], more: tuple[Key, ...]) -> Layout:
    """What pi0 and pi0.5 share. `ada`: the expert's norms are linears of the time; `heads`: beyond action_in, _out."""
    a = architecture
    layers = "expert.num_hidden_layers"
    if ada:
        norms = [
            *both("aex.blk.{i}.attn_norm", "expert.layers.{i}.input_layernorm.dense", ("thrice", _E), "head", layers),
            *both(
                "aex.blk.{i}.ffn_norm",
                "expert.layers.{i}.post_attention_layernorm.dense",
                ("thrice", _E),
                "head",
                layers,
            ),
            *both("aex.output_norm", "expert.norm.dense", ("thrice", _E), "head"),
        ]
    else:
        norms = [Row("aex.output_norm.weight", "expert.norm.weight", (_E,), "vector", add=-1.0)]
    state_dim = "max_state_dim" if not ada else "io.max_state_dim"
    return Layout(
        dialect="vla.cpp",
        engine="vla.cpp",
        architecture=a,
        family=a,
        marker="vit.patch_embd.weight",
        keys=(
            Key(f"{a}.architecture", "string", "io.architecture", one_of=(a,)),
            _u32(f"{a}.hidden", "text.hidden_size"),
            _u32(f"{a}.intermediate", "text.intermediate_size"),
            _u32(f"{a}.n_q_heads", "text.num_attention_heads", high=1024),
            _u32(f"{a}.n_kv_heads", "text.num_key_value_heads", high=1024),
            _u32(f"{a}.head_dim", "text.head_dim", high=1024),
            _u32(f"{a}.n_layers", "text.num_hidden_layers", high=256),
            _u32(f"{a}.expert_h", _E),
            _u32(f"{a}.expert_inter", "expert.intermediate_size"),
            _u32(f"{a}.chunk_size", "chunk_size", high=1024),
            _u32(f"{a}.num_steps", "flow.num_steps", high=1024),
            _u32(f"{a}.max_state_dim", state_dim, high=1024),
            _u32(f"{a}.max_action_dim", "max_action_dim", high=1024),
            _u32(f"{a}.real_state_dim", "io.state_dim", high=1024),
            _u32(f"{a}.real_action_dim", "io.action_dim", high=1024),
            _u32(f"{a}.tokenizer_max_length", "tokenizer_max_length", high=8192),
            Key(f"{a}.min_period", "f64", "flow.min_period", low=1e-9, high=1e9),
            Key(f"{a}.max_period", "f64", "flow.max_period", low=1e-9, high=1e9),
            Key(f"{a}.rms_norm_eps", "f32", "text.rms_norm_eps", 1e-6, 0.0, 1.0),
            Key(f"{a}.norm_eps", "f32", "io.norm_eps", 1e-8, 0.0, 1.0),
            Key(f"{a}.rope_theta", "f64", "text.rope_theta", 10000.0, 1.0, 1e9),
            _u32(f"{a}.vit_hidden", "vision.hidden_size", 1152),
            _u32(f"{a}.vit_layers", "vision.num_hidden_layers", 27, high=256),
            _u32(f"{a}.vit_heads", "vision.num_attention_heads", 16, high=1024),
            _u32(f"{a}.image_size", "vision.image_size", 224, high=16384),
            _u32(f"{a}.patch_size", "vision.patch_size", 14, high=1024),
            _u32(f"{a}.n_img_tokens", "io.image_tokens", 256),
            Key(f"{a}.vit_ln_eps", "f32", "vision.layer_norm_eps", 1e-6, 0.0, 1.0),
            Key(f"{a}.n_action_steps", "u32", "io.n_action_steps", read=False),
            Key(f"{a}.vocab_size", "u32", "text.vocab_size", read=False),
            Key(f"{a}.paligemma_variant", "string", read=False),
            Key(f"{a}.action_expert_variant", "string", read=False),
            Key(f"{a}.tokenizer.spm_model", "array", read=False),
            *more,
        ),
        rows=(
            *tower("vit.patch_embd", "vit.pos_embd", "vit.blk.{i}", "vit.post_ln", _TOWER),
            *both("mm.proj", "connector.proj", ("text.hidden_size", "vision.hidden_size")),
            Row("token_embd.weight", "text.embed_tokens.weight", ("text.vocab_size", "text.hidden_size"), "embed"),
            *decoder("text", "vlm.blk.{i}", _DECODER, norm_add=-1.0),
            Row("vlm.output_norm.weight", "text.norm.weight", ("text.hidden_size",), "vector", fill=0.0, optional=True),
            *decoder("expert", "aex.blk.{i}", _DECODER, norms=not ada, norm_add=-1.0),
            *norms,
            *both("action_in_proj", "action_in_proj", (_E, "max_action_dim"), "head"),
            *both("action_out_proj", "action_out_proj", ("max_action_dim", _E), "head"),
            *heads,
            *(
                Row(f"{part}_{name}", f"io.{part}.{name}", (f"io.{part}_dim",), "vector")
                for part in ("state", "action")
                for name in statistics
            ),
        ),
        checks=(
            Check(
                "images of {vision_image_size} in patches of {vision_patch_size}; the loader wants 256, of 224/14",
                lambda d: (d["vision.image_size"], d["vision.patch_size"], d["io.image_tokens"]) == (224, 14, 256),
            ),
            *(c for c in SMOLVLA.checks if "vision width" in c.text or "periods" in c.text or "heads over" in c.text),
            Check("the expert's width {expert_hidden_size} is odd", lambda d: int(d["expert.hidden_size"]) % 2 == 0),
            Check(
                "an action of {io_action_dim} exceeds {max_action_dim}",
                lambda d: int(d["io.action_dim"]) <= int(d["max_action_dim"]),
            ),
        ),
        fixed={
            "vision.num_channels": 3,
            "vision.hidden_act": "gelu_pytorch_tanh",
            "text.hidden_act": "gelu_pytorch_tanh",
            "expert.hidden_act": "gelu_pytorch_tanh",
            "expert.vocab_size": 0,
        },
        same={
            f"expert.{k}": f"text.{k}"
            for k in (
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "rms_norm_eps",
                "rope_theta",
            )
        },
        derived={
            **SMOLVLA.derived,
            "merged": lambda d: 0,
            "thrice": lambda d: 3 * int(d["expert.hidden_size"]),
        },
        formats={**SMOLVLA.formats, "embed": _FLOAT},
        statistics=("MEAN_STD", "QUANTILES") if ada else ("MEAN_STD",),
        notes=_NOTES if not ada else (*_NOTES, "the prompt carries the state, as LeRobot writes it"),
    )


PI0 = _pi(
    "pi0",
    False,
    [
        *both("state_proj", "state_proj", (_E, "max_state_dim"), "head"),
        *both("action_time_mlp_in", "action_time_mlp_in", (_E, "twice"), "head"),
        *both("action_time_mlp_out", "action_time_mlp_out", (_E, _E), "head"),
    ],
    ("mean", "std"),
    (),
)
PI05 = _pi(
    "pi05",
    True,
    [
        *both("time_mlp_in", "time_mlp_in", (_E, _E), "head"),
        *both("time_mlp_out", "time_mlp_out", (_E, _E), "head"),
    ],
    ("mean", "std", "q01", "q99"),
    (
        Key("pi05.adarms_cond_dim", "u32", _E, read=False),
        Key("pi05.norm_mode", "string", "io.norm_mode", "mean_std"),
        Key("pi05.use_adarms_expert", "bool", "io.adarms", read=False),
        Key("pi05.state.q01", "array", read=False),
        Key("pi05.state.q99", "array", read=False),
    ),
)

LAYOUTS = (SMOLVLA, PI0, PI05)
_UNKNOWN = "vla.cpp runs {} in a layout of its own that vlac does not know"
DECLINED = {
    "groot": _UNKNOWN.format("GR00T N1.7"),
    "openvla": _UNKNOWN.format("OpenVLA-OFT (and plain OpenVLA not at all)"),
    **dict.fromkeys(("pi0_fast", "tinyvla"), "vla.cpp does not run it"),
}
"""Families that vlac reads and does not write here, with the reason."""
