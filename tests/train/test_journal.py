"""Pieces of a long computation that outlive its process."""

import pathlib

import pytest

from train.journal import Journal

ABOUT = {"model": "tiny", "lengths": (256, 512)}


def never() -> int:
    raise AssertionError("computed again")


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    """A journal with two pieces."""
    path = tmp_path / "new" / "kept.jsonl"
    journal = Journal(path, ABOUT)
    assert journal.get("a", lambda: {"loss": (1.5, 2)}) == {"loss": [1.5, 2]}
    assert journal.get("b", lambda: None) is None
    return path


def test_pieces_are_computed_once(path: pathlib.Path) -> None:
    journal = Journal(path, ABOUT)
    assert journal.get("a", never) == {"loss": [1.5, 2]}
    assert journal.get("b", never) is None
    assert journal.get("c", lambda: 3) == 3
    assert Journal(path, ABOUT).get("c", never) == 3


def test_nothing_is_kept_without_a_path() -> None:
    journal = Journal(None, ABOUT)
    assert journal.get("a", lambda: 1) == journal.get("a", never) == 1
    assert Journal(None, ABOUT).get("a", lambda: 2) == 2


@pytest.mark.parametrize("cut", [1, 5, 10_000])
def test_a_line_that_was_cut_off_is_computed_again(path: pathlib.Path, cut: int) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: max(3, len(whole) - cut)])
    journal = Journal(path, ABOUT)
    assert journal.get("b", lambda: 7) == 7
    assert Journal(path, ABOUT).get("b", never) == 7
    if cut < 100:
        assert Journal(path, ABOUT).get("a", never) == {"loss": [1.5, 2]}


def test_a_failed_piece_leaves_nothing(path: pathlib.Path) -> None:
    with pytest.raises(AssertionError, match="computed again"):
        Journal(path, ABOUT).get("c", never)
    with pytest.raises(ValueError, match="not JSON compliant"):
        Journal(path, ABOUT).get("c", lambda: float("nan"))
    assert Journal(path, ABOUT).get("c", lambda: 4) == 4


def test_another_computation_and_damage_are_refused(path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="of another computation: give the settings"):
        Journal(path, ABOUT | {"model": "other"})
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"{\n", *lines[1:]]))
    with pytest.raises(ValueError, match="is damaged: delete it"):
        Journal(path, ABOUT)


def test_a_file_that_is_no_journal_is_left_as_it_is(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one line without an end")
    with pytest.raises(ValueError, match="is damaged: delete it"):
        Journal(path, ABOUT)
    assert path.read_text() == "one line without an end"
