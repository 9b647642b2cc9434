import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.packing import (
    DocumentWindows,
    PackedWindows,
    ProcessRows,
    WholeDocuments,
    permutation,
)
from train.data.tokens import Tokens

START, END = 1000, 1001

documents_strategy = st.lists(st.integers(0, 13), min_size=1, max_size=12)


def make_tokens(lengths: list[int]) -> Tokens:
    """Documents whose tokens are all different: token ``i`` of the corpus is ``i``."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Tokens(np.arange(offsets[-1], dtype=np.uint16), offsets, START, END, num_bytes=0)


def pairs_of(tokens: Tokens) -> list[tuple[int, int]]:
    """Every (token read, token to predict) that one epoch must show."""
    pairs = []
    for start, stop in itertools.pairwise(tokens.offsets):
        framed = [START, *tokens.ids[start:stop].tolist(), END]
        pairs += itertools.pairwise(framed)
    return pairs


def counted(windows) -> list[tuple[int, int]]:
    """The (token, target) pairs that count, over some windows."""
    pairs = []
    for window in windows:
        kept = window["mask"] == 1
        pairs += zip(window["tokens"][kept].tolist(), window["targets"][kept].tolist(), strict=True)
    return pairs


@settings(max_examples=60, deadline=None)
@given(documents_strategy, st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_an_epoch_predicts_every_token_and_end_exactly_once(lengths, length, seed, shuffle):
    tokens = make_tokens(lengths)
    packed = PackedWindows(tokens, length, seed, shuffle, epochs=3)
    per_epoch = packed.windows_per_epoch
    assert len(packed) == 3 * per_epoch
    for epoch in range(3):
        shown = [packed[epoch * per_epoch + visit] for visit in range(per_epoch)]
        assert sorted(counted(shown)) == sorted(pairs_of(tokens))


@settings(max_examples=40, deadline=None)
@given(documents_strategy, st.integers(14, 20), st.integers(0, 3), st.booleans())
def test_whole_documents_begin_at_position_0_and_end_in_their_window(
    lengths, length, seed, shuffle
):
    tokens = make_tokens(lengths)
    packed = WholeDocuments(tokens, length, seed, shuffle, epochs=2)
    assert len(packed) == 2 * packed.windows_per_epoch
    for epoch in range(2):
        shown = [packed[epoch * packed.windows_per_epoch + v] for v in range(len(packed) // 2)]
        assert sorted(counted(shown)) == sorted(pairs_of(tokens))
        for window in shown:
            for segment in range(1, window["segments"].max() + 1):
                here = window["segments"] == segment
                assert window["tokens"][here][0] == START and window["targets"][here][-1] == END
                assert window["positions"][here].tolist() == list(range(here.sum()))


def test_whole_documents_fill_windows_and_move_between_epochs():
    tokens = make_tokens([3, 3, 3] * 20)  # 4 positions each, two to a window
    packed = WholeDocuments(tokens, 9, seed=0, shuffle=True, epochs=None)
    assert packed.windows_per_epoch == 30
    first, second = ([packed[30 * e + v]["tokens"][1] for v in range(30)] for e in range(2))
    assert first != second and sorted(first) == sorted(second)
    with pytest.raises(ValueError, match=r"4 positions.*windows have 3"):
        WholeDocuments(tokens, 3, 0, True, None)


def test_window_contents_by_hand():
    # Documents (0 1 2) and (3), joined: S 0 1 2 | S 3, cut every 4 positions.
    packed = PackedWindows(make_tokens([3, 1]), 4, seed=0, shuffle=False, epochs=1)
    first, second = packed[0], packed[1]
    assert first["tokens"].tolist() == [START, 0, 1, 2]
    assert first["targets"].tolist() == [0, 1, 2, END]
    assert first["positions"].tolist() == [0, 1, 2, 3]
    assert second["tokens"].tolist() == [START, 3, END, END]
    assert second["targets"].tolist() == [3, END, END, END]
    assert second["segments"].tolist() == [1, 1, 0, 0]
    assert second["mask"].tolist() == [1, 1, 0, 0]
    assert {key: value.dtype.name for key, value in first.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "segments": "int32",
        "positions": "int32",
        "mask": "float32",
    }


def test_a_continued_document_restarts_its_positions_and_segments_count_up():
    packed = PackedWindows(make_tokens([5, 1, 2]), 4, seed=0, shuffle=False, epochs=1)
    window = packed[1]
    assert window["tokens"].tolist() == [3, 4, START, 5]
    assert window["targets"].tolist() == [4, END, 5, END]
    assert window["segments"].tolist() == [1, 1, 2, 2]
    assert window["positions"].tolist() == [0, 1, 0, 1]


def test_epochs_and_seeds_differ_and_repeat_exactly():
    tokens = make_tokens([7] * 40)

    def order(seed: int, epoch: int) -> list[int]:
        packed = PackedWindows(tokens, 8, seed, True, epochs=None)
        start = epoch * packed.windows_per_epoch
        return [int(packed[start + i]["targets"][0]) for i in range(packed.windows_per_epoch)]

    assert order(0, 0) == order(0, 0)
    assert sorted(order(0, 0)) == sorted(order(0, 1)) == sorted(order(1, 0))
    assert len({tuple(order(seed, epoch)) for seed in range(2) for epoch in range(3)}) == 6
    assert order(0, 0) != sorted(order(0, 0))


def test_documents_are_joined_in_another_order_each_epoch():
    # Windows as long as the stream: only the order of documents can differ.
    packed = PackedWindows(make_tokens([1] * 30), 60, seed=0, shuffle=True, epochs=2)
    assert packed[0]["targets"].tolist() != packed[1]["targets"].tolist()


def test_windows_are_visited_in_another_order_each_epoch():
    # One document: only the order of windows can differ.
    packed = PackedWindows(make_tokens([79]), 8, seed=0, shuffle=True, epochs=2)
    visits = [[int(packed[10 * epoch + i]["targets"][0]) for i in range(10)] for epoch in range(2)]
    assert sorted(visits[0]) == sorted(visits[1]) == list(range(0, 80, 8))
    assert visits[0] != visits[1]


def test_permutation_never_changes():
    assert permutation(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert permutation(7, 3, 8).tolist() == [2, 5, 7, 3, 0, 6, 4, 1]
    assert sorted(permutation(1, 2, 1000).tolist()) == list(range(1000))


@settings(max_examples=60, deadline=None)
@given(documents_strategy, st.integers(1, 9), st.integers(0, 8))
def test_evaluation_counts_every_token_and_end_exactly_once(lengths, length, overlap):
    tokens = make_tokens(lengths)
    windows = DocumentWindows(tokens, length, min(overlap, length - 1))
    assert sorted(counted(windows[i] for i in range(len(windows)))) == sorted(pairs_of(tokens))


def test_evaluation_windows_hold_one_document_and_overlap_as_context():
    windows = DocumentWindows(make_tokens([6, 1]), 4, overlap=2)
    shown = [windows[index] for index in range(len(windows))]
    assert [window["tokens"].tolist() for window in shown] == [
        [START, 0, 1, 2],
        [1, 2, 3, 4],
        [3, 4, 5, END],
        [START, 6, END, END],
    ]
    assert [window["mask"].tolist() for window in shown] == [
        [1, 1, 1, 1],
        [0, 0, 1, 1],
        [0, 0, 1, 0],
        [1, 1, 0, 0],
    ]
    assert [window["segments"].max() for window in shown] == [1, 1, 1, 1]
    assert shown[2]["positions"].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_process_rows_are_disjoint_and_complete(count):
    windows = DocumentWindows(make_tokens([3] * 10), 4, 0)
    shares = [ProcessRows(windows, 4, index, count) for index in range(count)]
    assert {len(share) for share in shares} == {3 * 4 // count}
    rows = [share[index] for share in shares for index in range(len(share))]
    assert sorted(counted(rows)) == sorted(counted(windows[i] for i in range(10)))
    assert sum(row["mask"].sum() == 0 for row in rows) == 2


def test_global_batches_do_not_depend_on_the_number_of_processes():
    windows = DocumentWindows(make_tokens([3] * 8), 4, 0)
    whole = ProcessRows(windows, 4, 0, 1)
    shares = [ProcessRows(windows, 4, index, 2) for index in range(2)]
    for step in range(2):
        joined = [share[2 * step + row] for share in shares for row in range(2)]
        for row, window in enumerate(joined):
            np.testing.assert_array_equal(window["tokens"], whole[4 * step + row]["tokens"])
