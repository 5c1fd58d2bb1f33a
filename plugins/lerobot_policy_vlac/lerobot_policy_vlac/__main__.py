"""python -m lerobot_policy_vlac ARTIFACT FOLDER: a LeRobot policy folder around an artifact."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from lerobot.configs import FeatureType, PolicyFeature

from vlac.artifact import open_artifact
from vlac.errors import VlacError

from .configuration_vlac import VlacConfig
from .processor_vlac import make_vlac_pre_post_processors


def make_policy_folder(artifact: str | Path, folder: str | Path) -> Path:
    """Writes config.json, both processor files and a copy of the artifact into a new or empty folder."""
    opened, out = open_artifact(artifact), Path(folder)
    if out.exists() and any(out.iterdir()):
        raise VlacError(f"{out} exists and is not empty", remedy="give a new folder")
    io = opened.io
    if io.units != "robot":
        raise VlacError(f"{artifact}: compiled without statistics; LeRobot wants actions in the robot's units")
    out.mkdir(parents=True, exist_ok=True)
    inputs = {c.key: PolicyFeature(FeatureType.VISUAL, tuple(c.shape)) for c in io.cameras if not c.optional}
    if io.state_dim:
        inputs[io.state_key] = PolicyFeature(FeatureType.STATE, (io.state_dim,))
    config = VlacConfig(
        input_features=inputs,
        output_features={io.action_key: PolicyFeature(FeatureType.ACTION, (io.action_dim,))},
        device="cpu",
        artifact=opened.path.name if opened.path.is_file() else "artifact",
        chunk_size=io.chunk_size,
        n_action_steps=io.n_action_steps,
    )
    config.save_pretrained(out)
    for processor in make_vlac_pre_post_processors(config):
        processor.save_pretrained(out)
    if opened.path.is_file():
        shutil.copyfile(opened.path, out / config.artifact)
    else:
        shutil.copytree(opened.path, out / config.artifact)
    return out


def main() -> int:
    """Exit code 0, or 2 with the reason on stderr."""
    if len(sys.argv) != 3:
        print("usage: python -m lerobot_policy_vlac ARTIFACT FOLDER", file=sys.stderr)
        return 2
    try:
        print(f"wrote {make_policy_folder(sys.argv[1], sys.argv[2])}")
    except VlacError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
