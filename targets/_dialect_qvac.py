"""QVAC's GGUF files (npm @qvac/vla-ggml 0.27) as tables: SmolVLA and pi0.5.

Every integer key is UINT32; another type is silently replaced by the default. Tensor shapes are not checked when the
engine loads a file: a wrong one ends the process at the first run. Any ggml type suits any tensor, except the patch
convolution. Fused q/k/v or gate/up tensors exist and give wrong results over several flow steps: never written.
"""

from __future__ import annotations

from vlac.gguf import GGML_TYPES
from vlac.gguf_dialects import Check, Key, Layout, Row
from vlac.targets._dialect_rows import CROSS_MEMORY, both, decoder, tower
from vlac.targets._qvac_memory import hazards

_COMPUTE_ONLY = ("q8_1", "q8_k", "i8", "i16", "i32", "i64", "f64", "nvfp4", "q1_0")
_ANY = tuple(name for name, _, _ in GGML_TYPES.values() if name not in _COMPUTE_ONLY)
_FORMATS = {
    "linear": (*(n for n in _ANY if n not in ("f16", "f32")), "f16", "f32"),
    "embed": (*(n for n in _ANY if n not in ("f16", "f32")), "f16", "f32"),
    "head": (*(n for n in _ANY if n not in ("f16", "f32")), "f16", "f32"),
    "vector": ("q8_0", "bf16", "f16", "f32"),  # those tried in the engine; they are cast to f32 there
    "position": ("q8_0", "bf16", "f16", "f32"),
    "conv": ("f16", "f32"),
}
_FORBIDDEN = (
    ("*.attn_qkv.*", "fused q/k/v gives wrong results over several flow steps, and ends the process in cross layers"),
    ("*.ffn_gate_up.*", "fused gate/up gives wrong results over several flow steps"),
)
_NOTES = (
    "the engine applies no statistics: give it a normalised state, unnormalise its actions",
    "it resizes and tokenises nothing: pixels CHW in [-1, 1] at the model's size, the task ends with a newline",
    "0.27 overwrites its masks in the flow for some sizes; `vlac inspect --dialect qvac` tells with which prompts",
)


def _u32(name: str, field: str, default: int, low: int = 1, high: int = 1024, read: bool = True) -> Key:
    return Key(name, "u32", field, default, low, high, read)


_TOWER = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    **{f"self_attn.{p}_proj": f"attn_{p}" for p in ("q", "k", "v", "out")},
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_DECODER = {
    "input_layernorm": "attn_norm.weight",
    "self_attn.q_proj": "attn_q.weight",
    "self_attn.k_proj": "attn_k.weight",
    "self_attn.v_proj": "attn_v.weight",
    "self_attn.o_proj": "attn_out.weight",
    "post_attention_layernorm": "ffn_norm.weight",
    "mlp.gate_proj": "ffn_gate.weight",
    "mlp.up_proj": "ffn_up.weight",
    "mlp.down_proj": "ffn_down.weight",
}

# --- SmolVLA -----------------------------------------------------------------------------------------------------

_E = "expert.hidden_size"

SMOLVLA = Layout(
    dialect="qvac",
    engine="QVAC (@qvac/vla-ggml)",
    architecture="smolvla",
    family="smolvla",
    marker="v.enc.patch_embd.weight",
    keys=(
        _u32("smolvla.vision.hidden_size", "vision.hidden_size", 768, high=65536),
        _u32("smolvla.vision.intermediate_size", "vision.intermediate_size", 3072, high=1 << 20, read=False),
        _u32("smolvla.vision.num_layers", "vision.num_hidden_layers", 12, high=256),
        _u32("smolvla.vision.num_heads", "vision.num_attention_heads", 12),
        _u32("smolvla.vision.image_size", "vision.image_size", 512, high=16384),
        _u32("smolvla.vision.patch_size", "vision.patch_size", 16),
        _u32("smolvla.connector.scale_factor", "scale_factor", 4, high=256),
        _u32("smolvla.text.hidden_size", "text.hidden_size", 960, high=65536),
        _u32("smolvla.text.intermediate_size", "text.intermediate_size", 2560, high=1 << 20, read=False),
        _u32("smolvla.text.num_layers", "text.num_hidden_layers", 16, high=256),
        _u32("smolvla.text.num_heads", "text.num_attention_heads", 15),
        _u32("smolvla.text.num_kv_heads", "text.num_key_value_heads", 5),
        _u32("smolvla.text.head_dim", "text.head_dim", 64),
        _u32("smolvla.expert.hidden_size", _E, 720, 2, 65536),
        _u32("smolvla.expert.intermediate_size", "expert.intermediate_size", 2048, high=1 << 20, read=False),
        _u32("smolvla.expert.num_layers", "expert.num_hidden_layers", 16, high=256),
        _u32("smolvla.expert.num_heads", "expert.num_attention_heads", 15),
        _u32("smolvla.expert.num_kv_heads", "expert.num_key_value_heads", 5),
        _u32("smolvla.expert.self_attn_every_n", "self_attn_every_n_layers", 2, high=256),
        _u32("smolvla.flow.num_ode_steps", "flow.num_steps", 10),
        _u32("smolvla.flow.chunk_size", "chunk_size", 50),
        _u32("smolvla.flow.max_action_dim", "max_action_dim", 32),
        _u32("smolvla.flow.max_state_dim", "max_state_dim", 32),
        _u32("smolvla.flow.action_dim", "io.action_dim", 7),
    ),
    rows=(
        *tower("v.enc.patch_embd", "v.enc.pos_embd.weight", "v.enc.blk.{i}", "v.enc.post_ln", _TOWER),
        Row("v.connector.proj.weight", "connector.proj.weight", ("text.hidden_size", "merged")),
        Row("t.embed.weight", "text.embed_tokens.weight", ("text.vocab_size", "text.hidden_size"), "embed"),
        *decoder("text", "t.blk.{i}", _DECODER),
        Row("t.final_norm.weight", "text.norm.weight", ("text.hidden_size",), "vector", fill=1.0),
        *decoder("expert", "e.blk.{i}", _DECODER, CROSS_MEMORY),
        Row("e.final_norm.weight", "expert.norm.weight", (_E,), "vector"),
        *both("proj.state", "state_proj", ("text.hidden_size", "max_state_dim"), "head"),
        *both("proj.action_in", "action_in_proj", (_E, "max_action_dim"), "head"),
        *both("proj.action_out", "action_out_proj", ("max_action_dim", _E), "head"),
        *both("proj.time_mlp_in", "action_time_mlp_in", (_E, "twice"), "head"),
        *both("proj.time_mlp_out", "action_time_mlp_out", (_E, _E), "head"),
    ),
    checks=(
        Check(
            "images of {vision_image_size} are no multiple of patches of {vision_patch_size}",
            lambda d: int(d["vision.image_size"]) % int(d["vision.patch_size"]) == 0,
        ),
        Check(
            "a grid of {vision_image_size}/{vision_patch_size} patches does not divide by scale_factor {scale_factor}",
            lambda d: (
                (int(d["vision.image_size"]) // int(d["vision.patch_size"])) % int(d["scale_factor"]) == 0
                and int(d["vision.image_size"]) >= int(d["vision.patch_size"])
            ),
        ),
        Check(
            "the vision width {vision_hidden_size} does not divide by {vision_num_attention_heads} heads",
            lambda d: int(d["vision.hidden_size"]) % int(d["vision.num_attention_heads"]) == 0,
        ),
        Check(
            "{text_num_hidden_layers} text layers and {expert_num_hidden_layers} expert layers; they must be as many",
            lambda d: d["text.num_hidden_layers"] == d["expert.num_hidden_layers"],
        ),
        Check(
            "no expert layer is a cross layer ({expert_num_hidden_layers} layers, every {self_attn_every_n_layers}. a "
            "self layer); the engine's process ends without one",
            lambda d: int(d["self_attn_every_n_layers"]) >= 2 and int(d["expert.num_hidden_layers"]) >= 2,
        ),
        Check(
            "the last of {expert_num_hidden_layers} expert layers is a self layer: from the second of "
            "{flow_num_steps} flow steps on the engine's answers are wrong (measured, 0.27.1)",
            lambda d: (
                d["flow.num_steps"] == 1
                or (int(d["expert.num_hidden_layers"]) - 1) % int(d["self_attn_every_n_layers"]) > 0
            ),
        ),
        Check("the expert's width {expert_hidden_size} is odd", lambda d: int(d["expert.hidden_size"]) % 2 == 0),
        Check(
            "text keys of {text_num_key_value_heads} x {text_head_dim} and expert keys of {expert_num_key_value_heads} "
            "x 64; they must be as many and as wide (equal products alone end the process)",
            lambda d: d["text.head_dim"] == 64 and d["text.num_key_value_heads"] == d["expert.num_key_value_heads"],
        ),
        Check(
            "{text_num_attention_heads} text heads over {text_num_key_value_heads} key heads, or a head_dim of "
            "{text_head_dim}: heads must divide, sizes be even",
            lambda d: (
                int(d["text.num_attention_heads"]) % int(d["text.num_key_value_heads"]) == 0
                and int(d["text.head_dim"]) % 2 == 0
            ),
        ),
        Check(
            "{expert_num_attention_heads} expert heads over {expert_num_key_value_heads} key heads",
            lambda d: int(d["expert.num_attention_heads"]) % int(d["expert.num_key_value_heads"]) == 0,
        ),
        Check(
            "action_dim {io_action_dim} exceeds max_action_dim {max_action_dim}",
            lambda d: int(d["io.action_dim"]) <= int(d["max_action_dim"]),
        ),
    ),
    fixed={
        "vision.num_channels": 3,
        "vision.position_rule": "buckets",  # row-major ids, which this rule gives for the whole table
        "vision.layer_norm_eps": 1e-6,
        "vision.hidden_act": "gelu_pytorch_tanh",
        "text.rms_norm_eps": 1e-5,
        "text.rope_theta": 10000.0,
        "text.hidden_act": "silu",
        "expert.head_dim": 64,
        "expert.rms_norm_eps": 1e-5,
        "expert.rope_theta": 10000.0,
        "expert.hidden_act": "silu",
        "expert.vocab_size": 0,
        "attention_mode": "cross_attn",
        "add_image_special_tokens": False,
        "flow.min_period": 4e-3,
        "flow.max_period": 4.0,
    },
    at_most={"tokenizer_max_length": 48, "prefix_length": 0},
    derived={
        "patches": lambda d: (int(d["vision.image_size"]) // int(d["vision.patch_size"])) ** 2,
        "merged": lambda d: int(d["vision.hidden_size"]) * int(d["scale_factor"]) ** 2,
        "text.q": lambda d: int(d["text.num_attention_heads"]) * int(d["text.head_dim"]),
        "text.kv": lambda d: int(d["text.num_key_value_heads"]) * int(d["text.head_dim"]),
        "expert.q": lambda d: int(d["expert.num_attention_heads"]) * 64,
        "expert.kv": lambda d: int(d["expert.num_key_value_heads"]) * 64,
        "twice": lambda d: 2 * int(d["expert.hidden_size"]),
    },
    formats=_FORMATS,
    forbidden=_FORBIDDEN,
    case_insensitive=True,
    nameless=True,
    notes=_NOTES,
    # 8 bits round what a linear reads as well, and narrow networks average little of that out (cosines of 0.9993)
    small=(20_000_000, "[te]*.layers.*", "f16"),  # text and expert
    hazards=hazards,
)

# --- pi0.5 -------------------------------------------------------------------------------------------------------

_PI_TOWER = {**_TOWER, "mlp.fc1": "fc1", "mlp.fc2": "fc2"}
_PI_DECODER = {
    "input_layernorm": "pre_attn_norm.scale",
    **{f"self_attn.{p}_proj": f"attn.{p}.weight" for p in "qkvo"},
    "post_attention_layernorm": "pre_ffw_norm.scale",
    **{f"mlp.{p}_proj": f"mlp.{p}.weight" for p in ("gate", "up", "down")},
}
_COND = 1024
"""Width of what adaRMS norms read: in the engine's code, whatever the file says."""


def _ada(file: str, ours: str, layers: str = "") -> list[Row]:
    """An adaRMS norm: rows scale, shift, gate; and the plain scale that converters write as zeros, never read."""
    return [
        Row(f"{file}.ada.weight", f"{ours}.dense.weight", ("thrice", _COND), "ada", layers),
        Row(f"{file}.ada.bias", f"{ours}.dense.bias", ("thrice",), "ada", layers),
        Row(f"{file}.scale", f"{ours}.weight", (_E,), "ada", layers, fill=0.0, optional=True),
    ]


def _unread(name: str, kind: str = "u32", field: str = "") -> Key:
    return Key(f"pi05.{name}", kind, field, read=False)


PI05 = Layout(
    dialect="qvac",
    engine="QVAC (@qvac/vla-ggml)",
    architecture="pi05",
    family="pi05",
    marker="vision.patch_embed.weight",
    keys=(
        _u32("pi05.image_resolution", "vision.image_size", 224, high=2048),
        _u32("pi05.vision.num_layers", "vision.num_hidden_layers", 27, high=512),
        _u32("pi05.vlm.num_layers", "text.num_hidden_layers", 18, high=512),
        _u32("pi05.vlm.hidden_size", "text.hidden_size", 2048, high=65536),
        _u32("pi05.vlm.num_heads", "text.num_attention_heads", 8),
        _u32("pi05.vlm.num_kv_heads", "text.num_key_value_heads", 1),
        _u32("pi05.vlm.head_dim", "text.head_dim", 256),
        _u32("pi05.vocab_size", "text.vocab_size", 257152, high=1 << 20),
        _u32("pi05.expert.hidden_size", _E, 1024, high=16384),
        _u32("pi05.expert.num_layers", "expert.num_hidden_layers", 18, high=512),
        _u32("pi05.action_dim", "max_action_dim", 32, high=512),
        _u32("pi05.action_horizon", "chunk_size", 50),
        _u32("pi05.max_token_len", "tokenizer_max_length", 200, high=8192),
        _u32("pi05.num_cameras", "io.cameras", 3, high=16),
        _unread("quant_profile", "string"),
        _unread("paligemma_variant", "string"),
        _unread("action_expert_variant", "string"),
        _unread("vision.embed_dim", field="vision.hidden_size"),
        _unread("vision.num_heads", field="vision.num_attention_heads"),
        _unread("vision.mlp_dim", field="vision.intermediate_size"),
        _unread("vision.patch_size", field="vision.patch_size"),
        _unread("vision.head_out_dim", field="text.hidden_size"),
        _unread("vlm.mlp_dim", field="text.intermediate_size"),
        _unread("expert.num_heads", field="expert.num_attention_heads"),
        _unread("expert.num_kv_heads", field="expert.num_key_value_heads"),
        _unread("expert.head_dim", field="expert.head_dim"),
        _unread("expert.mlp_dim", field="expert.intermediate_size"),
        _unread("expert.adarms_cond_dim", field=_E),
        _unread("rms_norm_eps", "f32", "text.rms_norm_eps"),
    ),
    rows=(
        *tower("vision.patch_embed", "vision.pos_embed", "vision.blk.{i}", "vision.post_ln", _PI_TOWER),
        *both("vision.head", "connector.proj", ("text.hidden_size", "vision.hidden_size")),
        Row("vlm.embed_tokens", "text.embed_tokens.weight", ("text.vocab_size", "text.hidden_size"), "embed"),
        *decoder("text", "vlm.blk.{i}", _PI_DECODER, norm_add=-1.0),
        Row("vlm.final_norm.scale", "text.norm.weight", ("text.hidden_size",), "vector", fill=0.0),
        *decoder("expert", "expert.blk.{i}", _PI_DECODER, norms=False),
        *_ada("expert.blk.{i}.pre_attn_norm", "expert.layers.{i}.input_layernorm", "expert.num_hidden_layers"),
        *_ada("expert.blk.{i}.pre_ffw_norm", "expert.layers.{i}.post_attention_layernorm", "expert.num_hidden_layers"),
        *_ada("expert.final_norm", "expert.norm"),
        *both("proj.action_in", "action_in_proj", (_E, "max_action_dim"), "head"),
        *both("proj.action_out", "action_out_proj", ("max_action_dim", _E), "head"),
        *both("proj.time_mlp_in", "time_mlp_in", (_COND, _COND), "head"),
        *both("proj.time_mlp_out", "time_mlp_out", (_COND, _COND), "head"),
    ),
    checks=(
        Check("images of {vision_image_size} are no multiple of 14", lambda d: int(d["vision.image_size"]) % 14 == 0),
        Check(
            "{text_num_hidden_layers} text layers and {expert_num_hidden_layers} expert layers; they must be as many",
            lambda d: d["text.num_hidden_layers"] == d["expert.num_hidden_layers"],
        ),
        Check(
            "a language model of width {text_hidden_size} with {text_num_attention_heads} heads of {text_head_dim} "
            "over {text_num_key_value_heads}; the engine has the projector and the expert of 2048, 8 x 256 over 1",
            lambda d: (
                [d[f"text.{k}"] for k in ("hidden_size", "num_attention_heads", "head_dim", "num_key_value_heads")]
                == [2048, 8, 256, 1]
            ),
        ),
        Check("the expert's width {expert_hidden_size} is odd", lambda d: int(d["expert.hidden_size"]) % 2 == 0),
    ),
    fixed={
        "vision.hidden_size": 1152,
        "vision.num_attention_heads": 16,
        "vision.patch_size": 14,
        "vision.num_channels": 3,
        "vision.layer_norm_eps": 1e-6,
        "vision.hidden_act": "gelu_pytorch_tanh",
        "text.rms_norm_eps": 1e-6,
        "text.rope_theta": 10000.0,
        "text.hidden_act": "gelu_pytorch_tanh",
        "expert.num_attention_heads": 8,
        "expert.num_key_value_heads": 1,
        "expert.head_dim": 256,
        "expert.rms_norm_eps": 1e-6,
        "expert.rope_theta": 10000.0,
        "expert.hidden_act": "gelu_pytorch_tanh",
        "expert.vocab_size": 0,
        "flow.num_steps": 10,
        "flow.min_period": 4e-3,
        "flow.max_period": 4.0,
    },
    derived={
        "patches": lambda d: (int(d["vision.image_size"]) // 14) ** 2,
        "text.q": lambda d: int(d["text.num_attention_heads"]) * int(d["text.head_dim"]),
        "text.kv": lambda d: int(d["text.num_key_value_heads"]) * int(d["text.head_dim"]),
        "expert.q": lambda d: 2048,
        "expert.kv": lambda d: 256,
        "thrice": lambda d: 3 * int(d["expert.hidden_size"]),
    },
    formats={
        **_FORMATS,
        "ada": ("f32",),
        "head": ("f16", "f32"),
        "vector": ("f16", "f32"),
        "position": ("f16", "f32"),
    },
    forbidden=_FORBIDDEN,
    case_insensitive=True,
    notes=(
        "the engine applies no statistics and ignores the state: the prompt carries it, as LeRobot writes it",
        "it takes exactly its number of cameras and no masks for absent ones; the prompt is padded to its full length",
        "it pads no pictures: centre them, as LeRobot does; its own preprocessImage pads at the left and top",
    ),
)

LAYOUTS = (SMOLVLA, PI05)
_NOT_RUN = "QVAC's engine runs SmolVLA, pi0.5 and GR00T N1.7 only"
DECLINED = {
    "groot": "QVAC's engine runs GR00T N1.7, but of its loader vlac knows names of keys and tensors, not every shape "
    "nor what it checks, and a tensor of another shape ends its process at the first run",
    **dict.fromkeys(("pi0", "pi0_fast", "openvla", "tinyvla"), _NOT_RUN),
}
"""Families that vlac reads and does not write here, with the reason."""
