"""A tiny real model and a small corpus of its kind of text."""

import pathlib

import pytest

from models.load import Model, load
from models.stories import convert

STORIES = pathlib.Path(__file__).parents[1] / "data" / "stories260k"
TEXT = "Once upon a time there was a little dog who liked to play with a red ball in the park. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The model and a small corpus of its kind of text."""
    path = tmp_path_factory.mktemp("speculative")
    convert(STORIES / "stories260K.bin", STORIES / "tok512.bin", path / "stories260k")
    (path / "texts").mkdir()
    for i in range(60):
        (path / "texts" / f"{i}.txt").write_text(f"Story {i}. " + TEXT * 2)
    return path


@pytest.fixture(scope="module")
def model(folder: pathlib.Path) -> Model:
    return load(folder / "stories260k")
