"""What an installation of this repository contains."""

import importlib
import pathlib
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

from tests.source_tree import PACKAGES, ROOT, files, python_files, read


@pytest.mark.parametrize("package", PACKAGES)
def test_package_resolves_under_the_repository_root(package):
    module = importlib.import_module(package)
    assert module.__file__ is not None, f"{package}/ has no __init__.py"
    assert pathlib.Path(module.__file__).resolve() == ROOT / package / "__init__.py"


def test_every_folder_of_code_is_a_package():
    folders = {p for n in python_files(*PACKAGES) for p in pathlib.PurePosixPath(n).parents}
    folders -= {pathlib.PurePosixPath(".")}
    assert [str(f) for f in folders if not (ROOT / f / "__init__.py").is_file()] == []


def test_package_list_is_the_tested_one():
    find = tomllib.loads(read("pyproject.toml"))["tool"]["setuptools"]["packages"]["find"]
    assert find["include"] == [name for p in PACKAGES for name in (p, f"{p}.*")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the tree, built with the installed back-end and no network."""
    pytest.importorskip("setuptools", minversion="77", reason="`make setup` installs setuptools")
    copy = tmp_path_factory.mktemp("wheel")
    for name in files():
        if name.split("/")[0] in (*PACKAGES, "tests", "pyproject.toml", "LICENSE"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(copy / done.stdout.split()[-1]) as archive:
        yield archive


def test_wheel_holds_exactly_our_packages(wheel):
    modules = {n for n in wheel.namelist() if n.endswith(".py")}
    assert modules == set(python_files(*PACKAGES))


def test_wheel_is_private_and_licensed(wheel):
    name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = wheel.read(name).decode().splitlines()
    assert "Classifier: Private :: Do Not Upload" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: <3.14,>=3.11" in metadata
    assert any(n.endswith("licenses/LICENSE") for n in wheel.namelist())
