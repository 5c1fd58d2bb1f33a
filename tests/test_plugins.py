"""A newcomer's package: the examples of CONTRIBUTING.md, cut out of the page, found through entry points, compiled."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from smolvla_checkpoint import write_safetensors

FENCE = re.compile(r"^```(\w+)\n# ([^\n]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def examples() -> dict[str, str]:
    """First comment line of each code block in CONTRIBUTING.md -> the rest of the block."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return {title: body for _, title, body in FENCE.findall(page)}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as pip --target leaves it: the package beside its dist-info with entry_points.txt."""
    folder = tmp_path_factory.mktemp("site")
    blocks = examples()
    files = [title for title in blocks if title.startswith("vlac_toy/")]
    assert sorted(files) == ["vlac_toy/family.py", "vlac_toy/raw_target.py", "vlac_toy/zero_small.py"]
    (folder / "vlac_toy").mkdir()
    (folder / "vlac_toy" / "__init__.py").touch()
    for title in files:
        (folder / title).write_text(blocks[title], encoding="utf-8")
    info = folder / "vlac_toy-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vlac-toy\nVersion: 0.1\n", encoding="utf-8")
    points = blocks["pyproject.toml of your package"]
    points = re.sub(r'^\[project\.entry-points\."([^"]+)"\]', r"[\1]", points, flags=re.MULTILINE).replace('"', "")
    (info / "entry_points.txt").write_text(points, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LeRobot-like folder of type "toy"."""
    folder = tmp_path_factory.mktemp("toy") / "toy_checkpoint"
    folder.mkdir()
    config = {
        "type": "toy",
        "input_features": {
            "observation.images.top": {"type": "VISUAL", "shape": [3, 24, 32]},
            "observation.state": {"type": "STATE", "shape": [3]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [2]}},
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "IDENTITY", "ACTION": "IDENTITY"},
        "hidden_size": 32,
        "device": "cpu",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = {"patch.weight": (32, 192), "mix.weight": (32, 128), "state.weight": (32, 3), "velocity.weight": (2, 34)}
    rng = np.random.default_rng(5)
    write_safetensors(
        folder / "model.safetensors",
        shapes,
        lambda _, shape: (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32),
    )
    return folder


def run(site: Path, code: str, *arguments: object) -> str:
    """Runs code in a fresh Python that sees the package."""
    program = f"import sys; sys.path.insert(0, {str(site)!r})\n{textwrap.dedent(code)}"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_entry_points_are_found(site: Path) -> None:
    found = run(
        site,
        """
        from vlac.registry import families, passes, targets
        print(families.get("toy").doc, passes.get("zero-small").doc, targets.get("raw-f32").doc, sep="|")
        print(families.get("smolvla").name, passes.get("flow-steps").name)
        """,
    )
    assert (
        found
        == "An example|Weights below a threshold become zero.|all weights float32 in one file\nsmolvla flow-steps\n"
    )


COMPILE = """
import sys, json, numpy as np, vlac
checkpoint, out, target, engine, *passes = sys.argv[1:]
made = vlac.compile(checkpoint, target=target, out=out, passes=passes)
policy = vlac.load(out, engine=engine)
picture = np.random.default_rng(1).integers(0, 256, (24, 32, 3)).astype(np.uint8)
chunk = policy.act(images={"top": picture}, state=[0.1, -0.2, 0.3], noise=np.ones((4, 2), np.float32))
other = policy.act(images={"top": 255 - picture}, state=[0.1, -0.2, 0.3], noise=np.ones((4, 2), np.float32))
print(json.dumps({
    "chunk": chunk.tolist(),
    "moved": float(abs(other - chunk).max()),
    "history": made.manifest["history"],
    "formats": {k: v["realised"] for k, v in made.manifest["census"]["tensors"].items()},
}))
"""


def compiled(site: Path, *arguments: object) -> dict:
    return json.loads(run(site, COMPILE, *arguments))


def expected_chunk(checkpoint: Path, steps: int = 5) -> np.ndarray:
    """The toy's formula in numpy, from the bytes on disk."""
    data = (checkpoint / "model.safetensors").read_bytes()
    head = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + head])
    body = data[8 + head :]
    w = {k: np.frombuffer(body[slice(*v["data_offsets"])], "<f4").reshape(v["shape"]) for k, v in table.items()}
    from vlac.runtime.observation import letterbox, preprocess_image

    picture = np.random.default_rng(1).integers(0, 256, (24, 32, 3)).astype(np.uint8)
    pixels = preprocess_image(picture, letterbox(16, 16))
    patches = pixels.reshape(3, 2, 8, 2, 8).transpose(1, 3, 0, 2, 4).reshape(4, 192)
    tokens = patches @ w["patch.weight"].T
    tokens = 0.5 * tokens * (1 + np.tanh(np.sqrt(2 / np.pi) * (tokens + 0.044715 * tokens**3)))
    mixed = tokens.reshape(1, -1) @ w["mix.weight"].T + np.float32([[0.1, -0.2, 0.3]]) @ w["state.weight"].T
    context = np.repeat(mixed / (1 + np.exp(-mixed)), 4, axis=0)
    x = np.ones((4, 2), np.float32)
    for _ in range(steps):
        x = x - (np.concatenate([x, context], axis=1) @ w["velocity.weight"].T) / steps
    return x


@pytest.mark.parametrize(("target", "engine"), [("raw-f32", "torch"), ("raw-f32", "numpy"), ("gguf-f32", "ggml")])
def test_toy_family_compiles_to_toy_and_built_in_targets(
    site: Path, checkpoint: Path, tmp_path: Path, target: str, engine: str
) -> None:
    found = compiled(site, checkpoint, tmp_path / "out", target, engine)
    expected = expected_chunk(checkpoint)
    assert np.abs(np.array(found["chunk"]) - expected).max() <= 2e-5 * np.abs(expected).max()
    assert found["moved"] > 1e-3


def test_toy_family_and_pass_with_built_in_quantisation(site: Path, checkpoint: Path, tmp_path: Path) -> None:
    exact = np.array(compiled(site, checkpoint, tmp_path / "a", "raw-f32", "torch")["chunk"])
    found = compiled(
        site, checkpoint, tmp_path / "b", "onnx-int8", "onnxruntime", "zero-small:below=0.05", "flow-steps:steps=2"
    )
    assert [h["name"] for h in found["history"]] == ["zero-small", "flow-steps"]
    assert found["history"][0]["figures"] == {"matrices": 4}
    assert found["formats"]["patch.weight"] == "int8"
    # the half that multiplies x was split off and stays exact
    assert sorted(f for name, f in found["formats"].items() if name.startswith("velocity")) == ["f32", "int8"]
    moved = np.abs(np.array(found["chunk"]) - exact).max() / np.abs(exact).max()
    assert 1e-4 < moved < 0.5


def test_a_pass_refuses_with_its_numbers(site: Path, checkpoint: Path, tmp_path: Path) -> None:
    code = """
    import sys, vlac
    from vlac.errors import Inapplicable
    try:
        vlac.compile(sys.argv[1], target="raw-f32", out=sys.argv[2], passes=["zero-small:below=-1"])
    except Inapplicable as error:
        print(error.message)
    """
    assert run(site, code, checkpoint, tmp_path / "out") == "pass zero-small: below=-1.0: must be positive\n"
    assert not (tmp_path / "out").exists()
