"""What is shipped and what an import costs: wheel, sdist, start-up, walls between modules, the version."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

HEAVY = ("torch", "onnx", "onnxruntime", "openvino", "transformers", "huggingface_hub", "safetensors", "numpy")


def python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    """Output of code in a fresh Python that does not see the working tree unless `path` names it."""
    command = [sys.executable, *(["-S"] if path else []), "-c", code]
    environment = {"PATH": "/usr/bin:/bin", **({"PYTHONPATH": str(path)} if path else {})}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(source: Path, out: Path, *options: str) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out), *options]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as z:
        return set(z.namelist())


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    build(ROOT, out)
    return out


@pytest.mark.slow
def test_wheel_holds_the_package_once(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    found = names(wheel)
    assert {f.split("/")[0].removesuffix(".dist-info").split("-")[0] for f in found} == {
        "vlac",
        "vlac_compiler",
        "optimum",
    }
    for folder in ("vlac", "passes", "targets"):
        shipped = "vlac/" if folder == "vlac" else f"vlac/{folder}/"
        expected = {shipped + str(p.relative_to(ROOT / folder)) for p in (ROOT / folder).rglob("*.py")}
        assert expected <= found
    assert {"vlac/templates/report.html.j2", "vlac/zoo/push_cubes/model.safetensors"} <= found
    assert "vlac/py.typed" in found and any(f.endswith("licenses/LICENSE") for f in found)
    assert "optimum/__init__.py" not in found and "optimum/commands/__init__.py" not in found


@pytest.mark.slow
def test_wheel_made_from_the_sdist_is_the_same(dist: Path, tmp_path: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        tar.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    build(source, tmp_path / "again", "-t", "wheel")
    (wheel,), (again,) = dist.glob("*.whl"), (tmp_path / "again").glob("*.whl")
    assert names(wheel) == names(again)


@pytest.mark.slow
def test_unpacked_wheel_finds_its_passes_and_targets(dist: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        z.extractall(tmp_path / "site")
    code = f"""
import sys
sys.path.append({str(Path(__import__("numpy").__file__).parents[1])!r})
import vlac
from vlac.registry import families, passes, targets
print(vlac.__file__)
print(len(families.all()), len(passes.all()), len(targets.all()))
for name in ("passes", "targets"):
    try:
        __import__(name)
        print("top-level", name)
    except ImportError:
        pass
"""
    where, counts = python(code, cwd=tmp_path, path=tmp_path / "site").splitlines()
    assert Path(where) == tmp_path / "site" / "vlac" / "__init__.py"
    from vlac.registry import families, passes, targets

    assert counts == f"{len(families.all())} {len(passes.all())} {len(targets.all())}"


def test_links_give_passes_and_targets_one_name() -> None:
    for name in ("passes", "targets"):
        link = ROOT / "vlac" / name
        assert link.is_symlink() and link.resolve() == ROOT / name and not link.readlink().is_absolute()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["compile", "--help"]])
def test_start_up_imports_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    code = f"""
import sys
sys.argv = ["vlac", *{arguments!r}]
from vlac.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("loaded:", *sorted(set(sys.modules) & set({HEAVY!r})))
"""
    assert python(code, cwd=tmp_path).splitlines()[-1] == "loaded:"


def test_import_vlac_is_light(tmp_path: Path) -> None:
    code = f"import sys, vlac; print(*sorted(set(sys.modules) & set({HEAVY!r})))"
    assert python(code, cwd=tmp_path) == "\n"


def test_walls_between_modules_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_extra_and_its_packages_are_pinned() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    installed = (
        "compile",
        "onnx",
        "openvino",
        "gguf",
        "bitsandbytes",
        "datasets",
        "sim",
        "report",
        "ray",
        "serve",
        "dev",
    )
    assert set(extras) == {*installed, "optimum"}
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    used = [
        *project["dependencies"],
        *(d for e in installed for d in extras[e]),
    ]
    assert {d.split(">")[0].split("=")[0].lower().replace("_", "-") for d in used} <= pinned


def test_readme_tables_are_what_the_benchmarks_wrote() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "readme_tables.py", "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
