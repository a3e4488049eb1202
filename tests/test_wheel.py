"""The wheel: what is in it, and that it works where nothing else of the project is."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import nacre

ROOT = Path(__file__).parent.parent

# A package that a test machine without the build tools may lack; `make wheel` has it.
pytest.importorskip("hatchling")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_everything_is_in_it_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    source = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "nacre").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    recipes = {f"nacre/{path.relative_to(ROOT)}" for path in ROOT.glob("recipes/**/*.yaml")}
    assert {"nacre/py.typed", "nacre/report/page.html", "nacre/substrate/unifont.xz"} <= source
    assert "nacre/recipes/tiny.yaml" in recipes
    assert {name for name in names if ".dist-info/" not in name} == source | recipes
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_its_name_is_not_that_of_another_project_on_pypi(wheel: Path) -> None:
    """The version that is recorded comes from the code: no name has to be looked up."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == nacre.__version__
    assert wheel.name.startswith(f"nacre_lm-{nacre.__version__}-")


def test_it_works_alone(wheel: Path, tmp_path: Path) -> None:
    """Installed without its dependencies, which are those of this environment."""
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target"]
    subprocess.run([*install, str(target), str(wheel)], check=True, capture_output=True)
    own = os.environ | {"PYTHONPATH": str(target)}

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=own, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import nacre, nacre.growth.plan as p; print(nacre.__file__, *p.recipes().values())"
    places = run("-c", where).split()
    assert len(places) > 5
    assert all(place.startswith(str(target)) for place in places)
    assert "push" in run("-m", "nacre", "--help")
    assert '"stages"' in run("-m", "nacre", "plan", "tiny", "--json")
    assert len(run("-m", "nacre", "substrate", "show", "a").splitlines()) == 8
