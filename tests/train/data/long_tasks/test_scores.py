"""Scores of outputs against values worked out by hand."""

import math

import numpy as np
import pytest

from train.data.long_tasks.example import Space
from train.data.long_tasks.scores import bleu, order_accuracy, presence_accuracy, recall


def test_presence_is_a_substring_of_the_stripped_reference():
    assert presence_accuracy("it is Paris, I think", " Paris\n") == 1
    assert presence_accuracy("it is paris", "Paris") == 0


def test_bleu():
    assert bleu("the cat sat on the mat", "the cat sat on the mat") == pytest.approx(1)
    # One word: only unigrams count, and two of three words of the output are wrong.
    assert bleu("Paris of course", "Paris") == pytest.approx(1 / 3)
    # Precisions 3/4, 2/3, 1/2 of orders 1 to 3; as long as the reference of three words.
    assert bleu("the red cat sat", "the red cat") == pytest.approx(
        (3 / 4 * 2 / 3 * 1 / 2) ** (1 / 3)
    )
    assert bleu("the red", "the red cat sat") == 0, "no trigram of it matches"
    brevity = bleu("a b c d", "a b c d e")
    assert brevity == pytest.approx(math.exp(1 - 5 / 4))
    assert bleu("a a a a", "a b") == 0 == bleu("", "a")
    assert bleu("a a", "a") == pytest.approx(1 / 2), "matches are clipped"
    with pytest.raises(ValueError, match="at least one word"):
        bleu("a", " ")


def test_recall_counts_whole_words_and_numbers():
    assert recall("12, 345 and 6", ("12", "34", "6")) == pytest.approx(2 / 3)
    assert recall("BAKO.", ("BAKO", "BA")) == 0.5


def test_order_counts_labels_in_their_place():
    assert order_accuracy("3 1 2 and 4", ("3", "1", "2")) == 1
    assert order_accuracy("1 3 2", ("3", "1", "2")) == pytest.approx(1 / 3)
    assert order_accuracy("3", ("3", "1", "2")) == pytest.approx(1 / 3)


def test_a_space_draws_without_repetition_and_counts():
    space = Space(("a", "b", "b"))
    assert sorted(space.draw(np.random.default_rng(0), 5)) == ["a", "b", "b"]
    assert space.count("b") == 2 and Space(range(10, 100)).count("99") == 1
    assert Space(range(10, 100)).count("100") == 0 == Space(range(10)).count("x") == len(Space())
