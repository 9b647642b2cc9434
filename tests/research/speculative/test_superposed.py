"""Superposed Decoding: what must hold of tables, scores, drafts and the loop."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.policies.registry import make_policy
from models import decoder
from ops.sampling import SamplingParams
from research.speculative.superposed import generate
from research.speculative.superposed.baselines import beam_search, ngram_generate
from research.speculative.superposed.drafts import (
    PUBLISHED,
    Drafts,
    Superposition,
    advance,
    draft_weights,
    init_drafts,
    keep_likeliest,
    last_tokens,
    mix_embeddings,
    ngram_log_scores,
)
from research.speculative.superposed.generate import (
    best_texts,
    start_drafts,
    superposed_generate,
    superposed_step,
)
from research.speculative.superposed.ngrams import count_ngrams
from tests.inference.models import (
    ROUNDING,
    VOCAB,
    config,
    engine,
    forward_logits,
    prefilled,
    prompts,
    weights,
)
from tests.research.speculative.ngram_corpus import brute_force, corpus

NEW = 6
K = 3
# Low enough to matter for weights drawn at random, whose logits are closer than a trained model's.
SETTINGS = Superposition.make(K, 9, alpha=0.4, temperature=0.3)


TABLES = count_ngrams(*corpus(0), VOCAB)
# Nearly all pairs of 20 tokens: of any nine tokens at least five are known after any other.
DENSE = count_ngrams(*corpus(0, 120, 20), VOCAB)


# Scores and weights.


def random_drafts(seed: int = 0, p: int = 2) -> Drafts:
    """Drafts of different tokens and scores after two prompt tokens."""
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(0, VOCAB, (p, K, 8)), jnp.int32)
    start = init_drafts(tokens[:, 0], jnp.full((p,), 4), K)
    scores = -np.sort(rng.uniform(0, 3, (p, K)), axis=1)
    return start.replace(tokens=tokens, scores=jnp.asarray(scores, jnp.float32))


def test_the_superposed_input_is_a_convex_combination_of_embeddings():
    drafts, p, cfg = random_drafts(), weights(config()), config()
    gamma, last = draft_weights(drafts.scores), last_tokens(drafts, 1)[..., 0]
    assert np.all(gamma >= 0)
    np.testing.assert_allclose(gamma.sum(1), 1, atol=1e-6)
    sparse = np.zeros((2, VOCAB))
    for row, i in itertools.product(range(2), range(K)):
        sparse[row, last[row, i]] += gamma[row, i]
    positions = jnp.asarray([[3], [3]])
    mixed = mix_embeddings(p, cfg, last, gamma, positions)
    np.testing.assert_allclose(mixed, sparse @ np.asarray(p.embed), atol=1e-6)
    same = mix_embeddings(p, cfg, jnp.full((2, K), 5), gamma, positions)
    np.testing.assert_allclose(same, np.asarray(p.embed)[[5, 5]], atol=1e-6)
    # Scores far below what exp can hold, as after penalties, and a missing draft.
    low = draft_weights(jnp.asarray([[-500.0, -501.0, -jnp.inf]]))
    np.testing.assert_allclose(low, [[1 / (1 + np.exp(-1)), 1 / (1 + np.e), 0]], atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_scores_with_and_without_overlap(alpha):
    log_p = jnp.log(jnp.asarray([[0.5, 0.3, 0.2]]))
    g = jnp.asarray([[[0.0, 0.2, 0.4], [0.0, 0.0, 0.0]]])
    got = np.asarray(ngram_log_scores(log_p, g, alpha, 200.0))
    want = (1 - alpha) * np.log([0.3, 0.2]) + alpha * np.log([0.2, 0.4])
    assert got[0, 0, 0] == -np.inf
    np.testing.assert_allclose(got[0, 0, 1:], want, atol=1e-5)
    # No overlap: the model's order, lowered by the penalty.
    np.testing.assert_allclose(got[0, 1], (1 - alpha) * np.log([0.5, 0.3, 0.2]) - 200, rtol=1e-6)
    assert not np.any(np.isnan(got))


def test_kept_tokens_are_renormalised_and_never_lose_all_probability():
    ids, log_p = keep_likeliest(jnp.asarray([[0.0, 30.0, 20.0, -5.0]]), 0.06, 3)
    np.testing.assert_array_equal(ids, [[1, 2, 0]])
    assert np.exp(log_p).sum() == pytest.approx(1)
    np.testing.assert_allclose(log_p[0, 1:] - log_p[0, :1], [-10 / 0.06, -30 / 0.06], rtol=1e-5)


def test_the_best_candidates_go_on_and_ended_ones_are_kept_apart():
    drafts = random_drafts(p=1).replace(scores=jnp.asarray([[-1.0, -2.0, -jnp.inf]]))
    ids = jnp.broadcast_to(jnp.asarray([4, 7, 9]), (1, K, 3))
    gains = jnp.asarray([[[-1.0, -0.1, -4.0], [-0.5, -3.0, -jnp.inf], [-0.1, -0.1, -0.1]]])
    new, source = advance(drafts, ids, gains, jnp.asarray([7]))
    # In order: -1.1 (ends), -2, -2.5, -5 (ends, and -5 goes on: the second draft before), ...
    np.testing.assert_allclose(new.scores, [[-2.0, -2.5, -5.0]])
    np.testing.assert_array_equal(source, [[0, 1, 0]])
    np.testing.assert_array_equal(new.tokens[0, :, 4], [4, 4, 9])
    np.testing.assert_allclose(new.finished_scores, [[-1.1, -5.0, -jnp.inf]])
    np.testing.assert_array_equal(new.finished_tokens[0, :2, 4], [7, 7])
    np.testing.assert_array_equal(new.finished_lengths[0, :2], [5, 5])
    for i, text in enumerate(np.asarray(new.tokens[0])):
        np.testing.assert_array_equal(text[:4], drafts.tokens[0, source[0, i], :4])


def test_finished_texts_are_ranked_by_their_own_length():
    drafts = random_drafts(p=1).replace(
        length=jnp.asarray([8]),
        scores=jnp.asarray([[-6.0, -12.0, -jnp.inf]]),
        finished_scores=jnp.asarray([[-3.0, -5.0, -jnp.inf]]),
        finished_lengths=jnp.asarray([[4, 7, 0]]),
    )
    got = best_texts(drafts, [[0, 0]], 6, rows_per_prompt=1)
    np.testing.assert_allclose(got.scores, [[-1.0, -1.0, -1.5]])
    np.testing.assert_allclose(got.perplexities, np.exp([[1.0, 1.0, 1.5]]))
    assert [len(text) for text in got.tokens[0]] == [6, 5, 2]
    assert not got.lossless


# The loop.


STEP = jax.jit(superposed_step, static_argnames=("cfg", "extent"))


def trace(settings=SETTINGS, tables=DENSE, texts=None, eos=(), steps=NEW, alone=None):
    """Drafts, caches and logits after every step."""
    texts = prompts() if texts is None else texts
    eng = engine() if alone is None else alone
    drafts, cache, extent = start_drafts(eng, texts, steps, settings.drafts)
    limit = drafts.length + steps
    # No token is -1, so that there is one program whether texts can end or not.
    ends = jnp.asarray(list(eos) or [-1], jnp.int32)
    policy, steps_taken = decoder.default_policy(eng.cfg), [(cache, drafts, None)]
    for i in range(steps):
        cache, drafts, _ = steps_taken[-1]
        new = STEP(
            eng.params, eng.cfg, policy, cache, drafts, settings, tables, ends,
            jnp.asarray(i == 0), limit, extent,
        )  # fmt: skip
        steps_taken.append(new)
    return steps_taken


@pytest.fixture(scope="module")
def traced():
    return trace()


def test_the_compiled_loop_is_the_steps(traced):
    got = superposed_generate(engine(), prompts(), NEW, SETTINGS, DENSE)
    want = best_texts(traced[-1][1], prompts(), NEW, rows_per_prompt=1)
    assert got.tokens == want.tokens and got.passes == NEW and got.rows_per_prompt == 1
    np.testing.assert_allclose(got.scores, want.scores, atol=1e-4)
    assert all(len(text) == NEW for texts in got.tokens for text in texts)


def test_the_cache_has_one_row_per_prompt_and_grows_by_one_entry_per_token(traced):
    sizes = np.array([len(prompt) for prompt in prompts()])
    for i, (cache, drafts, _) in enumerate(traced):
        np.testing.assert_array_equal(cache.length, sizes - 1 + i)
        np.testing.assert_array_equal(drafts.length, sizes + i)
        assert cache.positions.shape[0] == len(sizes)
        for row, n in enumerate(np.asarray(cache.length)):
            np.testing.assert_array_equal(cache.positions[row, :n], np.arange(n))


@pytest.mark.parametrize("k", [1, 5])
def test_a_step_is_one_pass_over_one_entry_whatever_k(k, monkeypatch):
    eng, settings, seen = engine(), Superposition.make(k), []
    drafts, cache, extent = start_drafts(eng, prompts(), NEW, k)
    real = decoder.forward

    def counted(*args, **given):
        seen.append(given["embeds"].shape)
        return real(*args, **given)

    monkeypatch.setattr(decoder, "forward", counted)
    jax.eval_shape(
        lambda cache, drafts: superposed_step(
            eng.params, eng.cfg, eng.policy_in_force, cache, drafts, settings, None,
            jnp.asarray([-1]), jnp.asarray(True), drafts.length + NEW, extent,
        ),
        cache, drafts,
    )  # fmt: skip
    assert seen == [(len(prompts()), 1, eng.cfg.hidden_size)]


def test_drafts_are_distinct_sorted_and_never_gain(traced):
    first = np.asarray(traced[1][1].tokens)
    for row, prompt in enumerate(prompts()):
        assert len(set(first[row, :, len(prompt)].tolist())) == K
    for (_, before, _), (_, after, _) in itertools.pairwise(traced):
        old, new = (jax.tree.map(np.asarray, x) for x in (before, after))
        assert np.all(np.isfinite(new.scores)) and np.all(np.diff(new.scores, axis=1) <= 0)
        for row, size in enumerate(old.length):
            assert len({tuple(text) for text in new.tokens[row].tolist()}) == K
            for i, text in enumerate(new.tokens[row]):
                # Of the drafts before, the one that this one continues.
                same = np.all(old.tokens[row, :, :size] == text[:size], axis=1)
                (parent,) = np.flatnonzero(same & np.isfinite(old.scores[row]))
                assert new.scores[row, i] <= old.scores[row, parent]


def test_emitted_tokens_are_kept_ones_that_some_ngram_knows(traced):
    w, known, mixture = jnp.asarray(SETTINGS.weights), [], jax.jit(DENSE.mixture)
    for (_, before, _), (_, after, logits) in itertools.pairwise(traced):
        top = np.asarray(jax.lax.top_k(logits, SETTINGS.kept)[1])
        parents = last_tokens(before, len(w))
        g = np.asarray(mixture(parents, jnp.asarray(np.broadcast_to(top[:, None], (4, K, 9))), w))
        old, new = (jax.tree.map(np.asarray, x) for x in (before, after))
        for row, i in itertools.product(range(4), range(K)):
            size, text = old.length[row], new.tokens[row, i]
            token = text[size]
            assert token in top[row]
            same = np.all(old.tokens[row, :, :size] == text[:size], axis=1)
            of = g[row, same & np.isfinite(old.scores[row])]
            assert np.any((of[:, top[row] == token] > 0) | ~np.any(of > 0, axis=1, keepdims=True))
            known.append(np.any(of > 0))
    assert any(known)


def test_a_row_is_as_if_it_were_alone(traced):
    together = superposed_generate(engine(), prompts(), NEW, SETTINGS, DENSE)
    for i in (1, 3):
        prompt = prompts()[i]
        alone = superposed_generate(engine(), [prompt], NEW, SETTINGS, DENSE)
        assert alone.tokens[0] == together.tokens[i]
        np.testing.assert_allclose(alone.scores[0], together.scores[i], atol=1e-3)


def test_one_draft_without_smoothing_is_greedy_decoding_and_its_cache():
    steps = trace(Superposition.make(1), None)
    want = engine().generate(prompts(), NEW).tokens
    cache, drafts, _ = steps[-1]
    texts = [
        np.asarray(drafts.tokens[row, 0, : len(prompt) + NEW]).tolist()
        for row, prompt in enumerate(prompts())
    ]
    assert [t[len(p) :] for t, p in zip(texts, prompts(), strict=True)] == want
    fresh = prefilled(weights(config()), config(), texts)
    for row, n in enumerate(np.asarray(cache.length)):
        for a, b in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(fresh.layers), strict=True):
            np.testing.assert_allclose(a[row, :, :n], b[row, :, :n], atol=1e-5)


def test_after_greedys_end_the_draft_goes_on_and_the_ended_text_is_finished():
    prompt = prompts()[3]
    greedy = engine().generate([prompt], NEW).tokens[0]
    at = next(i for i in range(1, NEW) if greedy[i] not in greedy[:i])
    _, drafts, _ = trace(Superposition.make(1), None, [prompt], (greedy[at],))[-1]
    end = len(prompt) + at
    alive = np.asarray(drafts.tokens[0, 0])
    np.testing.assert_array_equal(alive[:end], prompt + greedy[:at])
    logits = forward_logits(config(), prompt + greedy[:at])[-1]
    assert alive[end] == np.argsort(-logits)[1]
    assert greedy[at] not in alive[len(prompt) : len(prompt) + NEW].tolist()
    assert int(drafts.finished_lengths[0, 0]) == end + 1
    np.testing.assert_array_equal(
        drafts.finished_tokens[0, 0, : end + 1], prompt + greedy[: at + 1]
    )
    ended = superposed_generate(engine(), [prompt], NEW, Superposition.make(1), None, [greedy[at]])
    assert ended.tokens[0][0] == greedy[: at + 1]


def test_ngrams_may_wait_until_the_second_token():
    late = superposed_generate(
        engine(), prompts(), 1, Superposition.make(K, 9, interpolate_first=False), DENSE
    )
    off = superposed_generate(engine(), prompts(), 1, Superposition.make(K, 9), None)
    on = superposed_generate(engine(), prompts(), 1, Superposition.make(K, 9), DENSE)
    assert late.tokens == off.tokens != on.tokens
    np.testing.assert_allclose(late.scores, off.scores, atol=1e-6)


def test_settings_are_data():
    eng, count = engine(), generate._superpose._cache_size
    superposed_generate(eng, prompts(), NEW, SETTINGS, DENSE)
    before = count()
    other = Superposition.make(K, 9, 0.7, 0.1, SETTINGS.weights.tolist(), 50.0, False)
    superposed_generate(eng, prompts(), NEW - 1, other, DENSE)
    assert count() == before


def test_published_settings_keep_three_tokens_per_draft_or_more():
    assert len(PUBLISHED) == 13
    for settings in PUBLISHED.values():
        assert settings.kept >= 3 * settings.drafts
    assert len(PUBLISHED["orders-4"].weights) == 3
    assert float(PUBLISHED["drafts-10"].temperature) == pytest.approx(0.12)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="keep at least 2"):
        Superposition.make(10, 9)
    with pytest.raises(ValueError, match="keep at least 2"):
        Superposition.make(1, 1)
    with pytest.raises(ValueError, match="temperature above 0"):
        Superposition.make(temperature=0.0)
    with pytest.raises(ValueError, match="alpha must lie"):
        Superposition.make(alpha=1.5)
    with pytest.raises(ValueError, match="must not be negative"):
        Superposition.make(weights=(-0.1,))
    with pytest.raises(ValueError, match="keep fewer"):
        superposed_generate(engine(), prompts(), NEW, Superposition.make(3, VOCAB + 1))
    other = count_ngrams(*corpus(0), VOCAB + 1)
    with pytest.raises(ValueError, match="over 25 tokens, the model over 24"):
        superposed_generate(engine(), prompts(), NEW, SETTINGS, other)
    short = count_ngrams(*corpus(0), VOCAB, max_order=3)
    with pytest.raises(ValueError, match="the tables have up to 3"):
        superposed_generate(engine(), prompts(), NEW, SETTINGS, short)
    with pytest.raises(ValueError, match="beyond the context"):
        superposed_generate(engine(), prompts(), 1000, SETTINGS, TABLES)
    with pytest.raises(ValueError, match="at least one beam"):
        beam_search(engine(), prompts(), NEW, 0)
    with pytest.raises(ValueError, match="weights for n-grams up to 6"):
        ngram_generate(TABLES, prompts(), NEW, [0.1] * 6)


@pytest.mark.slow
def test_other_attention_policies_serve():
    cfg = config(max_length=8)
    policy = make_policy("yarn:4", cfg)
    eng = engine(cfg, policy=policy, context_limit=32)
    got = superposed_generate(eng, prompts(), NEW, Superposition.make(1), None)
    assert [texts[0] for texts in got.tokens] == eng.generate(prompts(), NEW).tokens


# The baselines.


def test_beam_search_is_a_beam_search():
    prompt = prompts()[2]
    got = beam_search(engine(), [prompt, prompts()[0]], 4, beams=K)
    beams = [([], 0.0)]
    for _ in range(4):
        grown = []
        for text, score in beams:
            law = jax.nn.log_softmax(forward_logits(config(), prompt + text)[-1])
            grown += [([*text, x], score + float(law[x])) for x in range(VOCAB)]
        beams = sorted(grown, key=lambda beam: -beam[1])[:K]
    assert got.tokens[0] == [text for text, _ in beams]
    np.testing.assert_allclose(got.scores[0], [score / 4 for _, score in beams], atol=ROUNDING)
    assert (got.passes, got.rows_per_prompt, got.lossless) == (4, K, True)
    one = beam_search(engine(), prompts(), NEW, beams=1)
    greedy = engine().generate(prompts(), NEW, sampling=SamplingParams.make()).tokens
    assert [texts[0] for texts in one.tokens] == greedy


def test_ngrams_alone_take_the_likeliest_token():
    text = corpus(0)[0][:7].tolist()
    counts = brute_force(*corpus(0), 2)
    got = ngram_generate(TABLES, [text[:3], text[:1]], 2, [1.0])
    for new, last in zip(got, (text[2], text[0]), strict=True):
        for token in new:
            assert counts[(last, token)] == max(n for (a, _), n in counts.items() if a == last)
            last = token
    never = next(iter(set(range(VOCAB)) - set(corpus(0)[0].tolist())))
    assert ngram_generate(TABLES, [[never]], 1, [1.0]) == [[0]]
