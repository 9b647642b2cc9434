"""EQSPEC and EXSPEC against traces of the official code on two tiny models."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from inference.drafters.draft_model import draft_model
from inference.engine import make_engine
from inference.loop import decode_rounds
from models import decoder
from models.hf import assemble
from ops.sampling import SamplingParams
from research.speculative.batch_spec.padded import PaddedDecoder, mask_positions, realign_padding
from research.speculative.batch_spec.pool import SequencePool
from tests.goldens import golden


class Tensors:
    """Arrays under the names of a Hugging Face checkpoint."""

    label = "goldens"

    def __init__(self, arrays: dict[str, np.ndarray], prefix: str):
        self.arrays = {
            name.removeprefix(prefix).replace("__", "."): array
            for name, array in arrays.items()
            if name.startswith(prefix)
        }

    def names(self) -> list[str]:
        return list(self.arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arrays[name].shape

    def read(self, name: str) -> np.ndarray:
        return self.arrays[name]


@pytest.fixture(scope="module")
def models() -> tuple[decoder.Config, decoder.Params, decoder.Params]:
    """The config of both models, the target's weights and the draft model's, unstacked."""
    arrays = golden("batch_spec", "weights")
    vocab, width, heads, kv_heads, inner, layers = arrays["cfg"].tolist()
    cfg = decoder.Config(
        vocab_size=vocab, hidden_size=width, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=width // heads, intermediate_size=inner, max_length=256,
        norm_eps=1e-6, tied=False,
    )  # fmt: skip
    both = (
        decoder.unstack(assemble(cfg, Tensors(arrays, prefix), jnp.float32, None, None))
        for prefix in ("target_", "draft_")
    )
    return cfg, *both


def rows(array: np.ndarray) -> list[list[int]]:
    """Rows of ids without their padding of -1."""
    return [row[row >= 0].tolist() for row in array]


@pytest.fixture(scope="module")
def trace() -> dict[str, np.ndarray]:
    return golden("batch_spec", "eqspec_trace")


def padded(models: Any, k: int, eos: int, pad: int, **settings: Any) -> PaddedDecoder:
    cfg, target, draft = models
    return PaddedDecoder(target, cfg, draft, cfg, k=k, eos=eos, pad=pad, **settings)


def test_the_padded_form_round_by_round(models, trace):
    k, new, pad, eos = trace["cfg"].tolist()
    one = padded(models, k, eos, pad, official_cap=True)
    batch = one.begin(rows(trace["prompts"]), new)
    keys = trace["official_layer0_keys"]
    for r in range(len(trace["official_bonus"])):
        live = batch.live.copy()
        np.testing.assert_array_equal(batch.content, trace["official_content_before"][r])
        before = trace["official_tokens_before"][r]
        width = int((before[0] >= 0).sum())
        assert batch.length == width
        np.testing.assert_array_equal(batch.tokens[:, :width], before[:, :width])
        mask = trace["official_mask"][r][:, :width] == 1
        np.testing.assert_array_equal(mask[live], (batch.tokens[:, :width] * 0 + 1)[live] * (
            np.arange(width) >= batch.padding[:, None])[live])  # fmt: skip
        got = one.round(batch, np.where(live, new - (batch.content - batch.prompt), 0))
        drafted = trace["official_draft"][r]
        there = (drafted >= 0) & live[:, None]
        np.testing.assert_array_equal(got.draft[there], drafted[there])
        positions = trace["official_verify_position_ids"][r]
        there = (positions >= 0) & live[:, None]
        np.testing.assert_array_equal(got.positions[there], positions[there])
        for row in np.flatnonzero(live):
            if batch.live[row]:  # what lies behind an end is not committed here
                assert len(got.committed[row]) == trace["official_committed"][r, row]
                assert got.bonus[row] == trace["official_bonus"][r, row]
        np.testing.assert_array_equal(got.padding[0], trace["official_old_pad"][r])
        np.testing.assert_array_equal(got.padding[1], trace["official_new_pad"][r])
        assert batch.length - 1 == trace["official_kv_len"][r]
        if r < len(keys):
            for row, pads in enumerate(batch.padding):
                here = np.asarray(batch.cache.layers[0].k)[row, :, pads : batch.length - 1]
                np.testing.assert_allclose(
                    here, keys[r, row, :, pads : batch.length - 1], atol=1e-4
                )
    assert not batch.live.any()
    for text, want in zip(batch.texts(), rows(trace["oracle_tokens"]), strict=True):
        assert text == want[-len(text) :]


def test_padding_moves_as_the_formula_says(trace):
    """On the trace itself: I1 before and after, the shift, and contiguous positions."""
    moved = 0
    for r, mask in enumerate(trace["official_mask"]):
        content, old, new = (
            trace[f"official_{name}"][r] for name in ("content_before", "old_pad", "new_pad")
        )
        length = int(trace["official_kv_len"][r]) + 1
        grown = length - new - content
        got, longest = realign_padding(old, content, grown)
        np.testing.assert_array_equal(got, new)
        assert longest == length
        shift = new - old
        np.testing.assert_array_equal(shift, (length - (old + content)[0]) - grown)
        assert np.all(shift == 0) == (len(set(grown.tolist())) == 1)
        moved += np.any(shift != 0)
        text = mask[:, : (old + content)[0]] == 1
        positions = mask_positions(text)
        for row in range(len(text)):
            if text[row].any():
                np.testing.assert_array_equal(positions[row, text[row]], np.arange(text[row].sum()))
    assert moved
    alike, longest = realign_padding(old, content, np.full(len(old), 3))
    np.testing.assert_array_equal(alike, old)
    assert longest == (old + content)[0] + 3
    with pytest.raises(ValueError, match="align first"):
        realign_padding(old + np.arange(len(old)), content, np.full(len(old), 3))


def test_the_ragged_loop_round_by_round(models, trace):
    """The loop that everything here decodes with, against the re-expression with K + 1 tokens."""
    k, new, _, eos = trace["cfg"].tolist()
    cfg, target, draft = models
    drafter, learnt = draft_model(cfg, draft, cfg, length=k, sampled=False)
    engine = make_engine(target, cfg, drafter=drafter, drafter_params=learnt)
    greedy, prompts = SamplingParams.make(), rows(trace["prompts"])
    state, seeds = engine.start(prompts, new, greedy)
    for r in range(len(trace["ragged_length_before"])):
        live = ~np.asarray(state.done)
        lengths, accepted = np.asarray(state.length), np.asarray(state.stats.accepted)
        np.testing.assert_array_equal(lengths[live], trace["ragged_length_before"][r][live])
        state = decode_rounds(
            engine.params, cfg, decoder.default_policy(cfg), drafter, learnt, state, seeds, greedy,
            jnp.asarray([eos], jnp.int32), jnp.asarray(1, jnp.int32), extent=128, rule="greedy",
        )  # fmt: skip
        got = np.asarray(state.stats.accepted) - accepted
        np.testing.assert_array_equal(got[live], trace["ragged_accepted"][r][live])
        assert np.all(trace["ragged_accepted"][r][~live] == -1)
        after = np.asarray(state.length)
        for row in np.flatnonzero(live & ~np.asarray(state.done)):
            added = np.asarray(state.tokens)[row, lengths[row] : after[row]]
            n = int(got[row])
            np.testing.assert_array_equal(added[:-1], trace["ragged_draft"][r, row, :n])
            assert added[-1] == trace["ragged_bonus"][r, row]
    assert bool(state.done.all())
    tokens = np.asarray(state.tokens)
    for row, want in enumerate(rows(trace["oracle_tokens"])):
        assert tokens[row, : int(state.length[row])].tolist() == want


def test_the_schedule_of_the_pool(models):
    """EXSPEC: every step's window, lengths and choice, with commits by the models themselves."""
    want = golden("batch_spec", "exspec_schedule")
    k, new, size, window = want["cfg"].tolist()
    prompts, oracle = rows(want["prompts"]), rows(want["oracle_tokens"])
    pool = SequencePool([len(p) for p in prompts], window, size)
    one = padded(models, k, eos=2, pad=0, official_cap=True)
    texts = [list(p) for p in prompts]
    for step, chosen in enumerate(rows(want["step_selected"])):
        assert pool.window == want["step_window"][step][want["step_window"][step] >= 0].tolist()
        lengths = [(row.padded, row.content) for row in pool.rows]
        active = [row.active for row in pool.rows]
        for name, column in (("padded", 0), ("content", 1)):
            given = want[f"step_{name}_lengths"][step]
            here = np.array([pair[column] for pair in lengths])
            np.testing.assert_array_equal(here[active], given[active])
        got, same = pool.next_batch()
        assert got == chosen and same == bool(want["step_is_same_length"][step])
        budget = np.array([len(prompts[i]) + new - len(texts[i]) for i in got])
        batch = one.begin([texts[i] for i in got], new, capacity=64)
        one.round(batch, budget)
        grown = [row[pad : batch.length].tolist() for row, pad in zip(
            batch.tokens, batch.padding, strict=True)]  # fmt: skip
        added = [len(text) - len(texts[i]) for text, i in zip(grown, got, strict=True)]
        np.testing.assert_array_equal(added, want["step_committed"][step][: len(got)])
        for i, text in zip(got, grown, strict=True):
            texts[i] = text
        pool.write_back(got, added, (~batch.live).tolist())
    assert pool.done and texts == oracle
