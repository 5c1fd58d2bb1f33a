"""GR00T N1.7 policies as LeRobot saves them: what the raw layout keeps in side files stands in the processors' steps.

config.json (type "groot"), model.safetensors, policy_preprocessor.json and policy_postprocessor.json. The network's own
config is not saved: it comes from a folder inside the checkpoint with the name of `base_model_path`, else the release's
values hold, and what tensors tell wins over those.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlac.errors import CheckpointError, Unsupported
from vlac.readers.gr00t_processor import Embodiment, group_of, robot_of
from vlac.readers.hub import local_companion
from vlac.readers.lerobot import Config
from vlac.readers.safetensors_file import inside, open_file, read_json
from vlac.registry import ReadOptions
from vlac.weights import Weights

PACK, ENCODE, DECODE, FLAT = (
    "groot_n1_7_pack_inputs_v1",
    "groot_n1_7_vlm_encode_v1",
    "groot_n1_7_action_decode_v1",
    "groot_action_unpack_unnormalize_v2",
)
OF_N1_5 = ("groot_pack_inputs_v3", "groot_eagle_encode_v3", "groot_action_unpack_unnormalize_v1")
"""Steps of LeRobot's earlier GR00T."""

PICTURES = (
    "image_crop_size", "image_target_size", "shortest_image_edge", "crop_fraction", "use_albumentations",
    "letter_box_transform",
)  # fmt: skip
IMAGES = "observation.images."


def version(table: Mapping[str, Any]) -> str:
    """ "N1.7", or the older version that the base model's name tells."""
    found = re.search(r"n1[._d-]?([56])", str(table.get("base_model_path") or ""), flags=re.IGNORECASE)
    return f"N1.{found[1]}" if found else "N1.7"


def read_robot(
    folder: Path, own: Config, tensors: Weights, options: ReadOptions, warnings: list[str]
) -> tuple[Config, Embodiment, dict[str, str]]:
    """(the network's config, the robot, observation keys to rename first). CheckpointError and Unsupported name file
    and step."""
    before, after = (_steps(folder, f"policy_{name}processor.json") for name in ("pre", "post"))
    pack, encode = _step(folder, before, PACK), _step(folder, before, ENCODE)
    decode = _step(folder, after, DECODE if DECODE in after else FLAT)
    for name in ("relative_actions_processor", "absolute_actions_processor"):
        given = {**before, **after}.get(name)
        if given is not None and given.get("config", {}).get("enabled", True):
            raise Unsupported(f"{folder}: {name}: GR00T's generic relative actions are not implemented")
    rename = before.get("rename_observations_processor", {}).get("config", {}).get("rename_map") or {}
    network = _network(folder, own, pack, tensors)
    tag = pack.take("embodiment_tag", own.take("embodiment_tag", "new_embodiment"))
    if options.embodiment not in (None, tag):
        raise CheckpointError(
            f"{folder}: saved for embodiment {tag!r}, not {options.embodiment!r}; it has no statistics of others",
            remedy=f"--embodiment {tag}, or compile the folder that it was trained from",
        )
    index = pack.table("embodiment_mapping").get(tag)
    if type(index) is not int or not 0 <= index < network.size("max_num_embodiments", 32):
        raise CheckpointError(f"{pack.path}: embodiment {tag!r} has id {index!r} in embodiment_mapping")
    if decode.raw("action_decode_transform") or decode.raw("libero_gripper_action"):
        warnings.append("LeRobot turns the gripper into a sign for this environment; actions here are the network's")
    robot = _robot(folder, pack, encode, decode, (tag, index), network.size("action_horizon", 40))
    limits = (own.raw("chunk_size"), own.raw("n_action_steps"), pack.raw("valid_action_horizon"))
    rows = min([robot.rows, *(v for v in limits if type(v) is int and v > 0)])
    cameras = _cameras(own, robot.cameras)
    return network, dataclasses.replace(robot, rows=rows, cameras=cameras), dict(rename)


def _steps(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Registry name -> step of a processor file; steps of N1.5 are refused by name."""
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; statistics and pictures' sizes are in it")
    table = read_json(path)
    steps = table.get("steps") if isinstance(table, dict) else None
    if not isinstance(steps, list) or not all(isinstance(s, dict) for s in steps):
        raise CheckpointError(f"{path}: no list of steps")
    found = {str(s.get("registry_name")): s for s in steps}
    older = next((n for n in OF_N1_5 if n in found), "")
    if older:
        raise Unsupported(
            f"{path}: {older}: a step of GR00T N1.5, whose VLM is an Eagle; only N1.7 is implemented",
            remedy="LeRobot 0.5.1 runs it",
        )
    return found


def _step(folder: Path, steps: Mapping[str, dict[str, Any]], name: str) -> Config:
    """A step's config; its statistics, where it has a state file, under "stats"."""
    if name not in steps:
        raise CheckpointError(f"{folder}: no step {name}; there are: {', '.join(steps)}")
    table, file = dict(steps[name].get("config") or {}), steps[name].get("state_file")
    if file:
        stored = open_file(inside(folder, file, f"{folder}: state_file of {name}"))
        flat: dict[str, dict[str, list[float]]] = {}
        for key, tensor in stored.items():
            feature, _, stat = key.rpartition(".")
            flat.setdefault(feature, {})[stat] = tensor.load().reshape(-1).tolist()
        table["stats"] = flat
    return Config(folder / name, table)


def _network(folder: Path, own: Config, pack: Config, tensors: Weights) -> Config:
    """The network's config: the base model's where it lies in the checkpoint, completed from tensors and processors."""
    base = own.raw("base_model_path") or "nvidia/GR00T-N1.7-3B"
    path = local_companion(folder, str(base), "config.json")
    table = read_json(path) if path is not None else {}
    state, action = (tensors[f"action_head.{n}.W"].shape for n in ("state_encoder.layer1", "action_encoder.W1"))
    if len(state) != 3 or len(action) != 3:
        raise CheckpointError(f"{folder}: projectors of shape {list(state)} and {list(action)}, expected three axes")
    kept = {int(m[1]) for n in tensors if (m := re.match(r"language_model\.layers\.(\d+)\.", n))}
    told = {
        "max_num_embodiments": state[0],
        "max_state_dim": state[1],
        "max_action_dim": action[1],
        "action_horizon": pack.raw("action_horizon", 40),
        "select_layer": len(kept),
    }
    steps = own.raw("num_inference_timesteps")
    chosen = {} if steps is None else {"num_inference_timesteps": steps}
    return Config(path or own.path, {**told, **table, **chosen})


def _robot(
    folder: Path, pack: Config, encode: Config, decode: Config, who: tuple[str, int], horizon: int
) -> Embodiment:
    processor = Config(
        encode.path,
        {
            **{k: encode.raw(k) for k in PICTURES if encode.raw(k) is not None},
            "formalize_language": pack.raw("formalize_language", True),
            "clip_outliers": pack.raw("clip_outliers", True),
            "use_percentiles": pack.raw("use_percentiles", False),
            "use_relative_action": decode.raw("use_relative_action", False),
        },
    )
    if pack.raw("modality_config") is not None and pack.raw("raw_stats") is not None:
        modality, stats = (Config(pack.path, pack.table(k)) for k in ("modality_config", "raw_stats"))
        return robot_of(*who, processor, modality, stats, horizon)
    # trained on a dataset of its own: one range for all of the state, one for all of the action
    ranges = pack.table("stats")
    state, action = (
        group_of(pack.path, part, ranges.get(name), ("min", "max"))
        for part, name in (("state", "observation.state"), ("action", "action"))
    )
    cameras = tuple(str(n) for n in pack.raw("video_modality_keys") or ())
    return Embodiment(*who, processor, cameras, (state,), (action,), horizon, percentiles=False)


def _cameras(own: Config, keys: tuple[str, ...]) -> tuple[str, ...]:
    """Cameras in the network's order under the names of the policy's features; all of them by name without an order."""
    features = own.table("input_features")
    there = [n.removeprefix(IMAGES) for n in features if n.startswith(IMAGES)]
    aliases = {"wrist_image": "image2"}
    found = [next((n for n in (key, aliases.get(key)) if n in there), "") for key in keys]
    if keys and not all(found):
        raise CheckpointError(
            f"{own.path}: cameras {', '.join(there) or 'none'}; the network was trained with {', '.join(keys)}",
            remedy="name the features as the checkpoint names its views",
        )
    if not there:
        raise CheckpointError(f"{own.path}: no camera among input_features")
    return tuple(found) if keys else tuple(sorted(there))
