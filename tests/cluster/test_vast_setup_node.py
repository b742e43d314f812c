"""setup_node.sh run for real in a home of its own: real uv, a real environment. The packages are wheels of a few bytes each."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from cluster.vast.locked import PACKAGES, versions

ROOT = Path(__file__).parents[2]


def wheel(folder: Path, name: str, version: str, python: str = "") -> None:
    """A package with nothing in it but its name and version, and perhaps one module."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nProvides-Extra: default\n"
        )
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
        if python:
            file.writestr(f"{name}.py", python)


def needed() -> list[str]:
    """Names of all that pairscope needs on a node, by pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["vast"]]
    return [re.split(r"[^A-Za-z0-9_]", line)[0] for line in wanted]


class Node:
    """A home with the project in it, as Ray's file mounts leave it, and a bare Python as its image."""

    def __init__(self, folder: Path) -> None:
        self.home, self.wheels, self.image = folder / "home", folder / "wheels", folder / "image"
        project = self.home / "pairscope"
        project.mkdir(parents=True)
        self.wheels.mkdir()
        (self.home / ".pairscope").mkdir()
        shutil.copytree(ROOT / "cluster", project / "cluster", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "pairscope.py"):
            shutil.copy(ROOT / name, project / name)
        self.wanted = {"python": versions()["python"], **{name: f"9.{n}.0" for n, name in enumerate(PACKAGES)}}
        file = project / "pyproject.toml"  # without its ranges, which exclude versions that are made up
        file.write_text(re.sub(r'(?<=[a-z0-9\]])[<>=]=?[0-9.,<>=]+"', '"', file.read_text()))
        locked = dict.fromkeys(needed(), "1.5.0") | {k: v for k, v in self.wanted.items() if k != "python"}
        (project / "constraints.txt").write_text("".join(f"{name}=={version}\n" for name, version in locked.items()))
        for name, version in locked.items():
            wheel(self.wheels, name, version)
            wheel(self.wheels, name, "99.0", "raise SystemExit('too new')")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(self.image)], check=True)

    def set_up(self, uv: str | None, *packages: str) -> subprocess.CompletedProcess[str]:
        (self.home / ".pairscope/versions.json").write_text(json.dumps(self.wanted, indent=1))
        path = [
            str(self.image / "bin"),
            *([str(Path(uv).parent)] if uv else []),
            "/usr/bin",
            "/bin",
            f"{sys.base_prefix}/bin",
        ]
        env = {"HOME": str(self.home), "PATH": ":".join(path), "UV_FIND_LINKS": str(self.wheels), "UV_NO_INDEX": "1", "UV_OFFLINE": "1",
               "UV_CACHE_DIR": str(self.home / "cache"), "UV_PYTHON_DOWNLOADS": "never"}  # fmt: skip
        script = self.home / "pairscope/cluster/vast/setup_node.sh"
        return subprocess.run(["bash", str(script), *packages], env=env, capture_output=True, text=True, timeout=180)

    def has(self) -> dict[str, str]:
        code = "import json; from cluster.vast.locked import versions; print(json.dumps(versions()))"
        out = subprocess.run(
            [str(self.home / "venv/bin/python"), "-c", code],
            cwd=self.home / "pairscope",
            capture_output=True,
            text=True,
            check=True,
        )
        return dict(json.loads(out.stdout))


@pytest.fixture(scope="module")
def uv(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The real one: of this machine, else as the script gets it, from the package index."""
    found = shutil.which("uv")
    if found:
        return found
    folder = tmp_path_factory.mktemp("uv")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), "uv"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"uv is not installed and cannot be: {done.stderr.strip().splitlines()[-1]}")
    return str(folder / "bin" / "uv")


def test_a_bare_image_is_given_the_other_machines_python_and_versions(tmp_path: Path, uv: str) -> None:
    node = Node(tmp_path)
    done = node.set_up(uv)
    assert done.returncode == 0, done.stdout + done.stderr
    assert node.has() == node.wanted
    assert "versions: as wanted" in done.stdout
    installed = {p.name.split("-")[0] for p in (node.home / "venv").glob("lib/*/site-packages/*.dist-info")}
    assert set(needed()) <= installed
    (duckdb,) = (node.home / "venv").glob("lib/*/site-packages/duckdb-*.dist-info")
    assert duckdb.name == "duckdb-1.5.0.dist-info", "what versions.json leaves open is as constraints.txt says"
    rc = (node.home / ".bashrc").read_text()
    assert "PATH=~/venv/bin" in rc
    assert os.access(node.home / ".pairscope/bin/pairscope", os.X_OK)
    assert not (node.home / ".pairscope/download.json").exists(), "a few bytes say nothing about a machine"

    again = node.set_up(uv)  # a second `ray up`
    assert again.returncode == 0, again.stderr
    assert (node.home / ".bashrc").read_text() == rc

    node.wanted["ray"] = "9.99.0"  # the laptop has another Ray now
    wheel(node.wheels, "ray", "9.99.0")
    (node.home / "pairscope/constraints.txt").write_text("")
    assert node.set_up(uv).returncode == 0
    assert node.has()["ray"] == "9.99.0"


def test_an_image_that_has_all_is_left_as_it_is(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.wanted = {"python": node.wanted["python"]}
    done = node.set_up(None)
    assert (done.returncode, done.stdout) == (0, "versions: as wanted\n"), done.stderr
    assert not (node.home / "venv").exists()
    rc = (node.home / ".bashrc").read_text()
    assert "PATH=~/.pairscope/bin" in rc


def test_further_packages_are_installed_on_an_image_that_has_all_else_too(tmp_path: Path, uv: str) -> None:
    node = Node(tmp_path)
    wheel(node.wheels, "bitsandbytes", "0.50.2")
    wheel(node.wheels, "bitsandbytes", "99.0")
    with open(node.home / "pairscope/constraints.txt", "a") as constraints:
        constraints.write("bitsandbytes==0.50.2\n")
    node.wanted = {"python": node.wanted["python"]}
    done = node.set_up(uv, "bitsandbytes")
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = (node.home / "venv").glob("lib/*/site-packages/bitsandbytes-*.dist-info")
    assert found.name == "bitsandbytes-0.50.2.dist-info"


def test_a_version_that_cannot_be_had_fails_the_set_up(tmp_path: Path, uv: str) -> None:
    node = Node(tmp_path)
    node.wanted["ray"] = "1.2.3"
    done = node.set_up(uv)
    assert done.returncode != 0
    assert "ray" in done.stderr


@pytest.mark.parametrize("bare", [True, False])
def test_a_machine_whose_cards_cannot_be_used_fails_the_set_up(tmp_path: Path, uv: str, bare: bool) -> None:
    node = Node(tmp_path)
    if not bare:
        node.wanted = {"python": node.wanted["python"]}
    (node.home / "pairscope/cluster/vast/cards.py").write_text("raise SystemExit('no card')\n")
    done = node.set_up(uv)
    assert done.returncode != 0
    assert "versions: as wanted" in done.stdout
    assert "no card" in done.stderr


def test_the_command_runs_the_code_that_was_sent_or_that_of_the_jobs_folder(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.wanted = {"python": node.wanted["python"]}
    node.set_up(None)
    (node.home / "pairscope/pairscope.py").write_text("import sys\nprint('sent', *sys.argv[1:])\n")
    elsewhere, job = tmp_path / "elsewhere", tmp_path / "job"
    elsewhere.mkdir()
    job.mkdir()
    (job / "pairscope.py").write_text("print('the job')\n")
    command = [str(node.home / ".pairscope/bin/pairscope"), "sweep", "a b"]
    env = {"HOME": str(node.home), "PATH": f"{node.image / 'bin'}:/usr/bin:/bin"}
    said = [subprocess.run(command, cwd=d, env=env, capture_output=True, text=True).stdout for d in (elsewhere, job)]
    assert said == ["sent sweep a b\n", "the job\n"]
