"""RAPID: retrieval, a drafter with a context of its own, and the loop with transfer."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from inference.drafter import NoDrafter
from inference.drafters.draft_model import draft_model
from inference.loop import decode_rounds
from models import decoder
from ops.sampling import SamplingParams
from ops.transfer import Transfer, shift_logits
from research.speculative.rapid.drafter import rapid_drafter, sure
from research.speculative.rapid.retrieval import (
    BM25,
    Embedding,
    choose_chunks,
    context_budget,
    retrieve,
    split_text,
)
from tests.inference.models import (
    NEW,
    ROUNDING,
    VOCAB,
    config,
    engine,
    forward_logits,
    prefilled,
    prompts,
    weights,
)

SHORT = 3
"""Tokens of a draft prompt at most: the end of its prompt."""


def drafts_of(texts: list[list[int]]) -> list[list[int]]:
    """Draft prompts shorter than the prompts, with another beginning."""
    return [[1, *text[-SHORT:]] for text in texts]


def make(eta: float = 0.0, seed: int = 0, confidence: float = 0.0, cfg=None, **settings):
    """An engine whose target drafts for itself (seed 0) or has another drafter."""
    cfg = config() if cfg is None else cfg
    drafter, params = rapid_drafter(cfg, weights(cfg, seed), cfg, 4, Transfer.make(eta), confidence)
    return engine(cfg, drafter=drafter, drafter_params=params, **settings)


# The loop.


def test_greedy_without_eta_is_plain_greedy_decoding():
    want = engine(drafter=NoDrafter(5)).generate(prompts(), NEW).tokens
    got = make().generate(prompts(), NEW, draft_prompts=drafts_of(prompts()))
    assert got.tokens == want
    # The drafter reads another text, so that it is not always right.
    assert np.sum(got.stats.discarded) > 0 and np.sum(got.stats.accepted) > 0


def test_a_larger_model_may_draft():
    larger = config(num_layers=3, hidden_size=48)
    drafter, params = rapid_drafter(config(), weights(larger, 1), larger, 4, Transfer.make(0.0))
    got = engine(drafter=drafter, drafter_params=params).generate(
        prompts(), NEW, draft_prompts=drafts_of(prompts())
    )
    assert got.tokens == engine(drafter=NoDrafter(5)).generate(prompts(), NEW).tokens
    assert got.stats.discarded.sum() > 0


def test_a_drafter_of_the_same_context_is_always_accepted_at_any_eta():
    for sampling in (SamplingParams.make(), SamplingParams.make(0.9)):
        got = make(10.0).generate(prompts(), NEW, sampling=sampling, draft_prompts=prompts())
        np.testing.assert_array_equal(got.stats.rounds, [NEW // 5] * 4)
        np.testing.assert_array_equal(got.stats.discarded, [0] * 4)
    assert got.tokens == make(10.0).generate(prompts(), NEW, sampling=sampling).tokens


def test_greedy_text_with_eta_follows_the_moved_logits():
    drafts, transfer = drafts_of(prompts()), Transfer.make(40.0)
    moved = make(40.0).generate(prompts(), NEW, draft_prompts=drafts).tokens
    assert moved != make().generate(prompts(), NEW, draft_prompts=drafts).tokens
    for prompt, draft, new in zip(prompts(), drafts, moved, strict=True):
        # The token behind a whole draft of four is not moved.
        for i in range(4):
            z = jnp.asarray(forward_logits(config(), prompt + new[:i])[-1])
            q = jax.nn.softmax(jnp.asarray(forward_logits(config(), draft + new[:i])[-1]))
            best = shift_logits(z, jax.nn.softmax(z), q, transfer)
            assert best[new[i]] >= best.max() - 100 * ROUNDING
            if new[i] != int(jnp.argmax(q)):
                break  # The draft went another way: here the round ended.


def test_eta_confidence_and_alpha_are_data():
    drafts, greedy = drafts_of(prompts()), SamplingParams.make()
    make().generate(prompts(), NEW, draft_prompts=drafts, sampling=greedy)
    before = decode_rounds._cache_size()
    eng = make(3.0, confidence=0.2)
    params = eng.drafter_params.replace(transfer=Transfer.make(5.0, 0.3))
    eng = dataclasses.replace(eng, drafter_params=params)
    eng.generate(prompts(), NEW, draft_prompts=drafts, sampling=greedy)
    assert decode_rounds._cache_size() == before


def test_each_cache_grows_from_its_own_length():
    texts = prompts()
    drafts = drafts_of(texts)
    eng, sampling = make(5.0), SamplingParams.make(0.9)
    state, seeds = eng.start(texts, NEW, sampling, draft_prompts=drafts)
    assert state.drafter.cache.capacity < state.cache.capacity
    for _ in range(3):
        before = state
        state = decode_rounds(
            eng.params, eng.cfg, decoder.default_policy(eng.cfg), eng.drafter, eng.drafter_params,
            jax.tree.map(jnp.array, state), seeds, sampling, jnp.zeros((0,), jnp.int32),
            jnp.asarray(1, jnp.int32), extent=128, rule="transfer",
        )  # fmt: skip
        grown = np.asarray(state.length - before.length)
        assert np.all(grown >= 1)
        np.testing.assert_array_equal(state.cache.length, np.asarray(state.length) - 1)
        lag = np.asarray(state.length) - np.asarray(
            state.drafter.ahead + state.drafter.cache.length
        )
        assert set(lag.tolist()) <= {1, 2}
    # What the drafter has read is its own prompt and then the text.
    own = state.drafter.cache
    read = [
        [*draft, *np.asarray(state.tokens[row, len(text) : state.length[row]]).tolist()]
        for row, (text, draft) in enumerate(zip(texts, drafts, strict=True))
    ]
    fresh = prefilled(weights(config()), config(), [[*text, 0] for text in read])
    for row, n in enumerate(np.asarray(own.length)):
        np.testing.assert_array_equal(own.positions[row, :n], np.arange(n))
        for a, b in zip(jax.tree.leaves(own.layers), jax.tree.leaves(fresh.layers), strict=True):
            np.testing.assert_allclose(a[row, :, :n], b[row, :, :n], atol=1e-5)


def test_a_draft_prompt_may_be_longer_than_the_prompt():
    texts = [[5], [5, 7]]
    long = [[*prompts(60)[0], text[-1]] for text in texts]
    got = make().generate(texts, NEW, draft_prompts=long)
    assert got.tokens == engine(drafter=NoDrafter(5)).generate(texts, NEW).tokens


def test_a_text_ends_at_its_end_token_inside_a_draft():
    texts = prompts()
    plain = engine(drafter=NoDrafter(5)).generate(texts, NEW).tokens
    eos = plain[3][5]
    got = make(10.0).generate(texts, NEW, eos=[eos], draft_prompts=texts).tokens
    assert got[3] == plain[3][: plain[3].index(eos) + 1]


def test_an_unsure_drafter_stops_after_the_token_it_was_unsure_of():
    probs = jnp.asarray([[[0.9, 0.1], [0.5, 0.5], [0.9, 0.1], [0.0, 0.0]]])
    np.testing.assert_array_equal(sure(probs, 0.0), [[True] * 4])
    np.testing.assert_array_equal(sure(probs, 0.6), [[True, True, True, False]])
    np.testing.assert_array_equal(sure(probs, 0.95), [[True, True, False, False]])
    drafts = drafts_of(prompts())
    want = engine(drafter=NoDrafter(5)).generate(prompts(), NEW).tokens
    got = make(confidence=0.3).generate(prompts(), NEW, draft_prompts=drafts)
    assert got.tokens == want
    assert (
        got.stats.drafted.sum()
        < make().generate(prompts(), NEW, draft_prompts=drafts).stats.drafted.sum()
    )


TINY = config(vocab_size=4, num_layers=1, hidden_size=8, init_stddev=1.0, max_length=16)
ROWS = 4000


def p_value(eta: float) -> float:
    """Pearson's test of two sampled tokens against the target's own law."""
    sampling = SamplingParams.make(0.8)
    drafter, params = rapid_drafter(TINY, weights(TINY, 9), TINY, 2, Transfer.make(eta))
    eng = engine(TINY, drafter=drafter, drafter_params=params)
    texts, drafts = [[2, 1]] * ROWS, [[3, 0, 1]] * ROWS
    got = np.asarray(
        eng.generate(texts, 2, sampling=sampling, seeds=range(ROWS), draft_prompts=drafts).tokens
    )
    counts = np.bincount(got[:, 0] * 4 + got[:, 1], minlength=16)
    inputs = jnp.asarray([[2, 1, x] for x in range(4)])
    hidden = decoder.forward(weights(TINY), TINY, inputs).hidden
    law = np.asarray(sampling.warp(decoder.unembed(weights(TINY), TINY, hidden)), np.float64)
    want = (law[:1, 1, :, None] * law[None, :, 2].reshape(1, 4, 4)).reshape(-1)
    return stats.chisquare(counts, want / want.sum() * ROWS).pvalue


def test_sampling_without_eta_has_the_targets_law_and_with_eta_another():
    assert p_value(0.0) > 1e-3
    assert p_value(10.0) < 1e-6


def test_bad_input_is_refused():
    texts, cfg = prompts(), config()
    with pytest.raises(ValueError, match="must end with the last token of prompt 0"):
        make().generate([[1, 2]], 2, draft_prompts=[[2, 1]])
    with pytest.raises(ValueError, match="must end with the last token"):
        make().generate([[1, 2]], 2, draft_prompts=[[]])
    with pytest.raises(ValueError, match="1 draft prompts for 4 prompts"):
        make().generate(texts, 2, draft_prompts=[[1]])
    with pytest.raises(ValueError, match="draft prompt 0 has token ids outside"):
        make().generate([[1, 2]], 2, draft_prompts=[[VOCAB, 2]])
    with pytest.raises(ValueError, match="beyond the context of 160"):
        make(context_limit=400).generate([[2] * 10], 2, draft_prompts=[[2] * 159])
    with pytest.raises(ValueError, match="NoDrafter reads the prompts"):
        engine().generate([[1, 2]], 2, draft_prompts=[[2]])
    other = config(vocab_size=8)
    with pytest.raises(ValueError, match="draft model has 8 tokens and the target 24"):
        rapid_drafter(cfg, weights(other), other)
    with pytest.raises(ValueError, match="confidence within 0 and 1"):
        rapid_drafter(cfg, weights(cfg), cfg, confidence=2.0)


def test_any_draft_model_may_read_a_prompt_of_its_own():
    drafter, params = draft_model(config(), weights(config()), config(), 4, sampled=False)
    eng = engine(drafter=drafter, drafter_params=params)
    got = eng.generate(prompts(), NEW, draft_prompts=drafts_of(prompts()))
    assert got.tokens == engine(drafter=NoDrafter(5)).generate(prompts(), NEW).tokens
    assert np.sum(got.stats.discarded) > 0


# Retrieval.

TEXT = (
    "The sky is blue. The code of Anna is maple, she says.\n\nRivers run to the sea.\n"
    "Stones do not.\n\nThe code of Bert is willow. Nobody knows why, and nobody asks."
)


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("size", [1, 3, 5, 12, 100])
def test_chunks_are_the_text_and_not_too_long(size):
    chunks = split_text(TEXT, size, words)
    assert "".join(chunk.text for chunk in chunks) == TEXT
    assert all(words(chunk.text) <= size for chunk in chunks)
    for chunk in chunks:
        assert TEXT[chunk.start :].startswith(chunk.text)
    if size == 100:
        assert len(chunks) == 1
    if size == 12:
        # Paragraphs stay whole where they fit.
        assert chunks[0].text.endswith("says.\n\n")
    # Neighbours that would fit together are together.
    pairs = itertools.pairwise(chunks)
    assert all(words(a.text + b.text) > size for a, b in pairs)


def test_a_word_too_long_is_cut_into_characters():
    chunks = split_text("abcdefgh ij", 3, len)
    assert "".join(chunk.text for chunk in chunks) == "abcdefgh ij"
    assert all(len(chunk.text) <= 3 for chunk in chunks)
    with pytest.raises(ValueError, match="use larger chunks"):
        split_text("ab", 1, lambda text: 2 * len(text))
    with pytest.raises(ValueError, match="at least one token"):
        split_text("ab", 0, len)


def test_bm25_is_its_formula_and_prefers_rare_words():
    chunks = ["the cat sat", "the dog", "the cat the dog and the bird"]
    got = BM25(1.2, 0.5).scores(chunks, "Cat dog? dog")
    idf = np.log(1 + 1.5 / 2.5)
    norm = [1.2 * (0.5 + 0.5 * n / 4) for n in (3, 2, 7)]
    want = [2.2 * idf / (1 + norm[0]), 2.2 * idf / (1 + norm[1]), 2 * 2.2 * idf / (1 + norm[2])]
    np.testing.assert_allclose(got, want)
    np.testing.assert_array_equal(BM25().scores(chunks, "whale"), [0, 0, 0])


def test_the_best_chunks_come_once_and_in_the_texts_order():
    chunks = split_text("aa. bb. cc. bb. dd. ", 4, len)
    scores = np.array([0.1, 0.9, 0.5, 0.9, 0.2])
    chosen = choose_chunks(scores, chunks, 3, 0.15)
    assert [(c.text, c.start) for c in chosen] == [("bb. ", 4), ("cc. ", 8), ("dd. ", 16)]
    assert [c.text for c in choose_chunks(scores, chunks, 1, 0.0)] == ["bb. "]
    assert choose_chunks(scores, chunks, 3, 1.0) == []


def test_retrieval_finds_the_passage():
    got = retrieve(TEXT, "What is the code of Bert?", BM25(), words, size=12, budget=12)
    assert "Bert is willow" in got and "Rivers" not in got
    both = retrieve(TEXT, "codes of Bert and Anna", BM25(), words, size=12, budget=24)
    assert both.index("Anna") < both.index("Bert") and "\n\n" in both
    with pytest.raises(ValueError, match="no context to retrieve from"):
        retrieve(" \n", "x", BM25(), words)
    with pytest.raises(ValueError, match="no chunk of the context reaches"):
        retrieve(TEXT, "zebra", BM25(), words, size=12)


def test_embeddings_are_compared_by_cosine():
    vectors = {"a": [3.0, 0.0], "b": [0.0, 0.1], "c": [1.0, 1.0], "q": [0.0, 2.0]}
    retriever = Embedding(lambda texts: np.array([vectors[t] for t in texts]))
    np.testing.assert_allclose(retriever.scores(["a", "b", "c"], "q"), [0, 1, np.sqrt(0.5)])
    assert retriever.threshold == 0.3


def test_the_budget_is_a_share_of_the_text_but_not_less_than_a_bound():
    assert context_budget(240_000) == 10_000
    assert context_budget(30_000) == 4096
    assert context_budget(1000) == 1000
