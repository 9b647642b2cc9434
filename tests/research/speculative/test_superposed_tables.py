"""N-gram tables: counts, laws, merging, and the disk."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.speculative.superposed.ngrams import (
    count_ngrams,
    load_tables,
    merge,
    tables_from_rows,
)
from tests.inference.models import VOCAB
from tests.research.speculative.ngram_corpus import brute_force, corpus

TABLES = count_ngrams(*corpus(0), VOCAB)


@pytest.mark.parametrize("order", [2, 3, 6])
def test_counts_are_those_of_brute_force_and_laws_sum_to_one(order):
    counts = brute_force(*corpus(0), order)
    totals = collections.Counter()
    for gram, n in counts.items():
        totals[gram[:-1]] += n
    rng = np.random.default_rng(1)
    unseen = rng.integers(0, VOCAB, (40, order - 1))
    keys = np.concatenate([np.array(list(totals)), unseen])
    nxt = np.broadcast_to(np.arange(VOCAB), (len(keys), VOCAB))
    got = np.asarray(jax.jit(TABLES.prob)(jnp.asarray(keys), jnp.asarray(nxt)))
    for key, row in zip(map(tuple, keys.tolist()), got, strict=True):
        if key not in totals:
            np.testing.assert_array_equal(row, -1)
            continue
        want = [counts[(*key, x)] / totals[key] for x in range(VOCAB)]
        np.testing.assert_allclose(row, want, atol=1e-6)
        assert row.sum() == pytest.approx(1)
    assert np.any(got == -1) and np.any(got > 0)


def assert_same_tables(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_counts_merge_in_any_order_and_to_those_of_the_whole_text():
    parts = [count_ngrams(*corpus(seed), VOCAB) for seed in range(3)]
    a, b, c = parts
    assert_same_tables(merge(merge(a, b), c), merge(a, merge(b, c)))
    assert_same_tables(merge(a, b), merge(b, a))
    texts = [corpus(seed) for seed in range(3)]
    shifts = np.cumsum([0, *(len(ids) for ids, _ in texts)])
    offsets = np.concatenate(
        [[0], *(at[1:] + shift for (_, at), shift in zip(texts, shifts, strict=False))]
    )
    whole = count_ngrams(np.concatenate([ids for ids, _ in texts]), offsets, VOCAB)
    assert_same_tables(merge(*parts), whole)


def test_rows_give_the_tables_that_counting_gives_above_order_one():
    rows = []
    for order in range(2, 7):
        counts = brute_force(*corpus(0), order)
        rows.append((np.array(list(counts)), np.array(list(counts.values()))))
    given = tables_from_rows(rows, VOCAB)
    for ours, counted in zip(given.levels[1:], TABLES.levels[1:], strict=True):
        assert_same_tables(ours, counted)


def test_the_mixture_skips_unknown_keys_and_orders_longer_than_the_text():
    w = jnp.asarray([0.5, 0.25, 0.125])
    text, ids = corpus(0)[0][:3].tolist(), jnp.arange(VOCAB)[None]
    never = next(iter(set(range(VOCAB)) - set(corpus(0)[0].tolist())))
    prob, mixture = jax.jit(TABLES.prob), jax.jit(TABLES.mixture)
    p = [np.asarray(prob(jnp.asarray([text[3 - n :]]), ids)) for n in (1, 2, 3)]
    want = sum(float(a) * np.maximum(b, 0) for a, b in zip(w, p, strict=True))
    np.testing.assert_allclose(mixture(jnp.asarray([text]), ids, w), want, atol=1e-6)
    short = mixture(jnp.asarray([[-1, -1, text[2]]]), ids, w)
    np.testing.assert_allclose(short, 0.5 * np.maximum(p[0], 0), atol=1e-6)
    unknown = mixture(jnp.asarray([[never, never, text[2]]]), ids, w)
    np.testing.assert_allclose(unknown, short, atol=1e-6)


def test_tables_survive_the_disk_and_know_their_tokenizer(tmp_path):
    file = tmp_path / "tables.safetensors"
    tables = count_ngrams(*corpus(0), VOCAB, tokenizer="abc")
    tables.save(file)
    read = load_tables(file, "abc")
    assert_same_tables(read, tables)
    assert (read.vocab_size, read.tokenizer, read.max_order) == (VOCAB, "abc", 6)
    assert read.nbytes == sum(x.nbytes for x in jax.tree.leaves(tables))
    with pytest.raises(ValueError, match="another tokenizer"):
        load_tables(file, "abd")
    with pytest.raises(ValueError, match="merging needs tables of one tokenizer"):
        merge(tables, TABLES)
    TABLES.save(file)
    assert load_tables(file).tokenizer == ""
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match="damaged"):
        load_tables(file)
    with pytest.raises(FileNotFoundError, match="no n-gram tables"):
        load_tables(tmp_path / "none")


def test_what_cannot_be_counted_is_refused():
    ids, offsets = corpus(0)
    with pytest.raises(ValueError, match="token ids, all within 0"):
        count_ngrams(ids, offsets, 8)
    with pytest.raises(ValueError, match="longer documents"):
        count_ngrams(ids, offsets, VOCAB, max_order=61)
    with pytest.raises(ValueError, match="max_order 2 or more"):
        count_ngrams(ids, offsets, VOCAB, max_order=1)
