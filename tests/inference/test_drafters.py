import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.drafter import NoDrafter, TargetOutputs
from inference.drafters import registry
from inference.drafters.draft_model import DraftModel, draft_model
from inference.drafters.lookup import LookupDrafter, copy_after_match
from inference.drafters.medusa import MedusaDrafter
from inference.drafters.registry import DRAFTERS, check_name, make_drafter
from inference.loop import decode_rounds
from models import clover, decoder, eagle, medusa
from models import params as params_
from models.drafter_io import save_drafter
from models.load import Model
from ops.sampling import SamplingParams
from research.speculative.swift.drafter import SwiftDrafter
from research.speculative.token_recycling.drafter import TokenRecycling
from tests.inference.models import (
    NEW,
    VOCAB,
    ScriptedDrafter,
    assert_greedy,
    assert_needs_no_laws,
    config,
    engine,
    letters,
    near,
    prefilled,
    prompts,
    save_model,
    script,
    weights,
)
from tests.inference.sampled_law import p_value

SAMPLED = SamplingParams.make(0.9, top_k=20, top_p=0.95)


def small(seed: int = 1) -> tuple[decoder.Params, decoder.Config]:
    """A draft model: fewer layers than the target, other weights."""
    cfg = config(num_layers=1)
    return weights(cfg, seed), cfg


def cases() -> dict[str, tuple[Any, Any]]:
    """Drafters of all kinds and their params."""
    noise = np.random.default_rng(5)
    matrix = jnp.asarray(noise.integers(0, VOCAB, (VOCAB, 8)), jnp.int32)
    return {
        "lookup": (LookupDrafter(), None),
        "unigram lookup": (LookupDrafter(4, (2, 1)), None),
        "recycling": (TokenRecycling(), None),
        "random matrix": (TokenRecycling(), matrix),
        "draft model": draft_model(config(), *small()),
        "greedy draft model": draft_model(config(), *small(), sampled=False),
        "random": (ScriptedDrafter(), jnp.asarray(noise.integers(0, VOCAB, (4, 64)), "int32")),
    }


CASES = cases()


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    """Greedy continuations without a drafter, checked against a pass over the whole text."""
    texts = engine().generate(prompts(), NEW).tokens
    for prompt, new in zip(prompts(), texts, strict=True):
        assert_greedy(config(), prompt, new)
    return texts


@pytest.mark.parametrize("name", CASES)
def test_greedy_text_is_that_of_plain_decoding_at_the_same_width(name, plain):
    drafter, params = CASES[name]
    got = engine(drafter=drafter, drafter_params=params, widths=()).generate(prompts(), NEW)
    same_width = engine(drafter=NoDrafter(drafter.width)).generate(prompts(), NEW)
    assert got.tokens == same_width.tokens
    for prompt, new in zip(prompts(), got.tokens, strict=True):
        assert_greedy(config(), prompt, new)
    assert np.all(got.stats.by_depth.shape[1] == drafter.max_depth)


@pytest.mark.parametrize("name", ["lookup", "recycling", "greedy draft model", "random"])
def test_sampled_text_with_fixed_candidates_is_that_of_plain_sampling_with_the_seed(name):
    drafter, params = CASES[name]
    got = engine(drafter=drafter, drafter_params=params).generate(prompts(), NEW, sampling=SAMPLED)
    want = engine(drafter=NoDrafter(drafter.width)).generate(prompts(), NEW, sampling=SAMPLED)
    assert got.tokens == want.tokens
    assert got.tokens != engine().generate(prompts(), NEW).tokens


def test_a_draft_model_draws_nothing_where_no_row_samples():
    drafter, params = CASES["draft model"]
    assert_needs_no_laws(engine(drafter=drafter, drafter_params=params))


def test_an_always_wrong_drafter_gives_one_token_per_round(plain):
    texts = [prompt + new for prompt, new in zip(prompts(), plain, strict=True)]
    wrong = [[(token + 1) % VOCAB for token in text] for text in texts]
    got = engine(drafter=ScriptedDrafter(), drafter_params=script(wrong)).generate(prompts(), NEW)
    assert got.tokens == plain
    np.testing.assert_array_equal(got.stats.rounds, [NEW] * 4)
    np.testing.assert_array_equal(got.stats.accepted, [0] * 4)


def test_an_always_right_drafter_gives_full_rounds(plain):
    right = script([prompt + new for prompt, new in zip(prompts(), plain, strict=True)])
    got = engine(drafter=ScriptedDrafter(), drafter_params=right).generate(prompts(), NEW)
    assert got.tokens == plain
    np.testing.assert_array_equal(got.stats.rounds, [NEW // 5] * 4)
    assert got.tokens_per_pass == 5.0


@pytest.mark.parametrize("sampling", [SamplingParams.make(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("length", [1, 4])
def test_the_target_as_its_own_draft_model_is_always_accepted(sampling, length):
    drafter, params = draft_model(config(), weights(config()), config(), length)
    got = engine(drafter=drafter, drafter_params=params).generate(prompts(), NEW, sampling=sampling)
    np.testing.assert_array_equal(got.stats.rounds, [NEW // (length + 1)] * 4)
    np.testing.assert_array_equal(got.stats.discarded, [0] * 4)


def test_the_draft_models_cache_is_the_one_recomputed():
    drafter, params = draft_model(config(), near(), config(), length=3, sampled=False)
    eng, greedy = engine(drafter=drafter, drafter_params=params), SamplingParams.make()
    state, seeds = eng.start(prompts(), NEW, greedy)
    lags = set()
    while not bool(state.done.all()):
        state = decode_rounds(
            eng.params, eng.cfg, decoder.default_policy(eng.cfg), drafter, params, state, seeds,
            greedy, jnp.zeros((0,), jnp.int32), jnp.asarray(1, jnp.int32), extent=128,
        )  # fmt: skip
        cache = state.drafter.cache
        lag = np.asarray(state.length - cache.length)
        lags |= set(lag.tolist())
        texts = [np.asarray(state.tokens[row, : n + 1]) for row, n in enumerate(cache.length)]
        fresh = prefilled(params, config(), [text.tolist() for text in texts])
        for row, n in enumerate(np.asarray(cache.length)):
            np.testing.assert_array_equal(cache.positions[row, :n], np.arange(n))
            for a, b in zip(
                jax.tree.leaves(cache.layers), jax.tree.leaves(fresh.layers), strict=True
            ):
                np.testing.assert_allclose(a[row, :, :n], b[row, :, :n], atol=1e-5)
    assert lags == {1, 2}


def test_models_of_different_vocabularies_are_refused():
    params, cfg = weights(config(vocab_size=8)), config(vocab_size=8)
    with pytest.raises(ValueError, match="draft model has 8 tokens and the target 24"):
        draft_model(config(), params, cfg)
    with pytest.raises(ValueError, match="draft model has 8 tokens and the target 24"):
        engine(drafter=DraftModel(cfg), drafter_params=params).generate([[1]], 2)
    with pytest.raises(ValueError, match="at least one token"):
        draft_model(config(), *small(), length=0)


# Statistics: the law of three sampled tokens from the real loop, against exact enumeration.
TINY = config(vocab_size=4, num_layers=1, hidden_size=8, init_stddev=1.0, max_length=16)


@dataclasses.dataclass(frozen=True)
class LyingDraftModel(DraftModel):
    """States a flat law for tokens that it drew from another."""

    def propose(self, *args: Any):
        draft, state, cache = super().propose(*args)
        flat = jnp.full_like(draft.probs, 1 / draft.probs.shape[-1])
        return draft.replace(probs=flat), state, cache


@pytest.mark.parametrize(
    ("length", "sampling"),
    [
        pytest.param(1, SamplingParams.make(1.0), marks=pytest.mark.slow),
        pytest.param(2, SamplingParams.make(1.0), marks=pytest.mark.slow),
        (3, SamplingParams.make(0.7, top_p=0.8)),
    ],
    ids=["short", "middle", "warped"],
)
def test_text_sampled_with_a_draft_model_has_the_targets_law(length, sampling):
    assert p_value(TINY, DraftModel(TINY, length), weights(TINY, 9), sampling) > 1e-4


def test_the_statistics_reject_a_wrong_draft_law():
    lying = LyingDraftModel(TINY, 2)
    assert p_value(TINY, lying, weights(TINY, 9), SamplingParams.make(1.0)) < 1e-6


# Prompt lookup.
def naive_copy(text: list[int], ngrams: tuple[int, ...], count: int) -> list[int] | None:
    for size in ngrams:
        for end in range(len(text) - 2, size - 2, -1):
            if text[end - size + 1 : end + 1] == text[len(text) - size :] and len(text) >= size:
                grown = list(text)
                period = len(text) - 1 - end
                for _ in range(count):
                    grown.append(grown[-period])
                return grown[len(text) :]
    return None


@pytest.mark.parametrize("ngrams", [(3, 2), (3, 2, 1), (2,)])
def test_lookup_copies_what_followed_the_most_recent_longest_match(ngrams):
    rng = np.random.default_rng(len(ngrams))
    look = jax.jit(lambda tokens, n: copy_after_match(tokens, n, ngrams, 6))
    hits = 0
    for _ in range(300):
        length = int(rng.integers(1, 20))
        tokens = rng.integers(0, 4, 24).astype(np.int32)
        got, place = look(jnp.asarray(tokens), jnp.asarray(length, jnp.int32))
        want = naive_copy(tokens[:length].tolist(), ngrams, 6)
        sizes = [n for n in ngrams if naive_copy(tokens[:length].tolist(), (n,), 6) is not None]
        assert ([*ngrams, None][int(place)]) == (sizes[0] if sizes else None)
        assert (want is not None) == bool(sizes)
        if want is not None:
            assert np.asarray(got).tolist() == want
            hits += 1
    assert 50 < hits < 300


def test_lookup_drafts_only_the_root_where_nothing_matches():
    got = engine(drafter=LookupDrafter()).generate([[1, 2, 3, 4, 5]], 1)
    assert got.stats.drafted == 0 and got.stats.rounds == 1
    repeated = engine(drafter=LookupDrafter()).generate([[1, 2, 3, 4, 1, 2, 3]], 1)
    assert repeated.stats.drafted == 10
    for length in (0, (0, 0)):
        with pytest.raises(ValueError, match="length and n-gram sizes of 1 or more"):
            LookupDrafter(length)
    for length in ((3,), (3, -1)):
        with pytest.raises(ValueError, match="one of 0 or more for each of the n-gram sizes"):
            LookupDrafter(length)


def test_lookup_drafts_more_after_a_longer_match():
    drafter = LookupDrafter((5, 0, 2), (3, 2, 1))
    assert (drafter.width, drafter.max_depth) == (6, 5)
    texts = {5: [1, 2, 3, 4, 1, 2, 3], 0: [5, 2, 3, 4, 1, 2, 3], 2: [5, 6, 3, 4, 1, 2, 3]}
    for drafted, text in texts.items():
        assert engine(drafter=drafter).generate([text], 1).stats.drafted == drafted


# Names.
def test_drafters_are_made_by_name():
    model = target_model()
    assert make_drafter("none", model) == (NoDrafter(), None)
    assert make_drafter("lookup", model) == (LookupDrafter(), None)
    assert make_drafter("recycling", model) == (TokenRecycling(), None)


def test_swift_drafts_a_comb_or_a_chain_of_a_given_length():
    model = dataclasses.replace(target_model(), cfg=config(num_layers=4))
    assert make_drafter("swift", model)[0].width == 64
    assert make_drafter("swift:4", model)[0] == SwiftDrafter(max_steps=4, max_nodes=0)
    for name in ("swift:0", "swift:-1", "swift:some"):
        with pytest.raises(ValueError, match="a chain of 1 or more tokens, got"):
            make_drafter(name, model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lookahead", "unknown drafter 'lookahead': choose one of none, lookup"),
        ("", "unknown drafter ''"),
        ("draft", "lacks an argument: write 'draft:DIR'"),
        ("medusa:", "lacks an argument: write 'medusa:DIR'"),
        ("lookup:3", "takes no argument, got 'lookup:3'"),
        ("swift:", "lacks an argument: write 'swift:STEPS'"),
    ],
)
def test_names_of_drafters_are_checked(name, message):
    with pytest.raises(ValueError, match=message):
        check_name(name)


def test_every_registered_drafter_is_named_as_module_and_attribute():
    assert all(entry.count(":") == 1 for entry in DRAFTERS.values())
    assert {"none", "lookup", "recycling"} <= set(DRAFTERS)


def test_a_missing_draft_model_is_refused_by_name():
    with pytest.raises(FileNotFoundError, match="no model '/nowhere'"):
        make_drafter("draft:/nowhere", target_model())


def test_shipped_drafters_go_by_their_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "ASSETS", tmp_path)
    cfg = medusa.MedusaConfig(num_heads=2)
    heads = params_.init(medusa.specs(cfg, config()), jax.random.key(0))
    save_drafter(tmp_path / "model-medusa", "medusa", cfg, heads, config())
    drafter, _ = make_drafter("medusa:model-medusa", target_model())
    assert isinstance(drafter, MedusaDrafter) and drafter.cfg == cfg
    with pytest.raises(FileNotFoundError, match="name the folder of a trained drafter"):
        make_drafter("medusa:model-clover", target_model())


@pytest.mark.parametrize(
    ("kind", "saved", "specs", "cfg"),
    [
        ("medusa", "medusa", medusa.specs, medusa.MedusaConfig(num_heads=2)),
        ("eagle", "eagle", eagle.specs, eagle.EagleConfig()),
        ("eagle2", "eagle", eagle.specs, eagle.EagleConfig()),
        ("clover", "clover", clover.specs, clover.CloverConfig(num_layers=1)),
    ],
)
def test_heads_for_a_target_of_another_size_are_refused(kind, saved, specs, cfg, tmp_path):
    other = config(hidden_size=48)
    heads = params_.init(specs(cfg, other), jax.random.key(0))
    save_drafter(tmp_path, saved, cfg, heads, other)
    with pytest.raises(ValueError, match="48"):
        make_drafter(f"{kind}:{tmp_path}", target_model())


def test_a_draft_model_with_another_tokenizer_is_refused(tmp_path):
    for name, shift in (("same", 0), ("other", 1)):
        save_model(tmp_path / name, config(num_layers=1), letters(shift))
    drafter, params = make_drafter(f"draft:{tmp_path / 'same'}", target_model())
    assert isinstance(drafter, DraftModel) and drafter.cfg.num_layers == 1
    assert not params.segments[0].stacked
    with pytest.raises(ValueError, match="another tokenizer than target"):
        make_drafter(f"draft:{tmp_path / 'other'}", target_model())


def target_model() -> Model:
    return Model(params=weights(config()), cfg=config(), tokenizer=letters(), name="target")


def test_target_outputs_default_to_nothing():
    outputs = TargetOutputs(tokens=jnp.zeros((1, 2), jnp.int32))
    assert outputs.logits is None and outputs.hidden is None
