import numpy as np
import pytest

from inference.drafter import NoDrafter
from inference.engine import bucket
from ops.sampling import SamplingParams
from research.speculative.token_recycling.drafter import TokenRecycling
from tests.inference.models import (
    NEW,
    PROMPT_LENGTHS,
    VOCAB,
    ScriptedDrafter,
    assert_greedy,
    config,
    engine,
    prompts,
    script,
)

SAMPLED = SamplingParams.make(1.0, top_p=0.95)


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    """Greedy continuations without a drafter."""
    return engine().generate(prompts(), NEW).tokens


def test_plain_decoding_is_greedy(plain):
    for prompt, new in zip(prompts(), plain, strict=True):
        assert len(new) == NEW
        assert_greedy(config(), prompt, new)


@pytest.mark.parametrize("sampling", [SamplingParams.make(), SAMPLED], ids=["greedy", "sampled"])
def test_a_row_of_a_batch_gets_what_it_gets_among_copies_of_itself(sampling):
    eng, texts = engine(drafter=NoDrafter(5)), prompts()
    together = eng.generate(texts, NEW, sampling=sampling, seeds=[3, 4, 5, 6])
    for row, prompt in enumerate(texts):
        # The same shapes, so the bits must agree, whatever the other rows are.
        alone = eng.generate([prompt] * 4, NEW, sampling=sampling, seeds=[3 + row] * 4)
        assert alone.tokens == [together.tokens[row]] * 4


def test_a_row_of_a_batch_gets_what_it_gets_alone(plain):
    for prompt, new in zip(prompts(), plain, strict=True):
        alone = engine().generate([prompt], NEW).tokens[0]
        same = [a == b for a, b in zip(alone, new, strict=True)]
        # Other shapes round differently: a text may part only where two logits nearly tie.
        first = same.index(False) if False in same else NEW
        assert_greedy(config(), prompt, alone)
        assert first == NEW or assert_greedy(config(), prompt, new[: first + 1]) is None


def test_rows_that_finish_early_leave_the_others_alone(plain):
    table = script([prompt + new for prompt, new in zip(prompts(), plain, strict=True)])
    eng = engine(drafter=ScriptedDrafter(), drafter_params=table.at[1].set(0))
    got = eng.generate(prompts(), NEW)
    assert got.tokens == plain
    assert got.stats.rounds[1] > got.stats.rounds[0]


@pytest.mark.parametrize("size", [16, 32, 512])
def test_prefill_in_chunks_equals_one_pass(size):
    texts = prompts(1, 16, 17, 33, 40)
    got = engine(prefill_size=size).generate(texts, 8).tokens
    for prompt, new in zip(texts, got, strict=True):
        assert_greedy(config(), prompt, new)


@pytest.mark.parametrize("new", [0, 1, 2, 6])
def test_the_limit_cuts_an_accepted_path(plain, new):
    table = script([prompt + text for prompt, text in zip(prompts(), plain, strict=True)])
    got = engine(drafter=ScriptedDrafter(), drafter_params=table).generate(prompts(), new)
    assert got.tokens == [text[:new] for text in plain]
    np.testing.assert_array_equal(got.stats.emitted, [new] * len(PROMPT_LENGTHS))


def test_text_ends_at_the_first_end_token_inside_an_accepted_path(plain):
    table = script([prompt + text for prompt, text in zip(prompts(), plain, strict=True)])
    eng = engine(drafter=ScriptedDrafter(), drafter_params=table)
    cut = False
    for eos in ([plain[0][2]], [plain[1][7], plain[2][3]], []):
        want = []
        for text in plain:
            ends = [i for i, token in enumerate(text) if token in eos]
            want.append(text[: ends[0] + 1] if ends else text)
            cut |= bool(ends) and ends[0] % 5 not in (4, 0)
        assert eng.generate(prompts(), NEW, eos=eos).tokens == want
        assert engine().generate(prompts(), NEW, eos=eos).tokens == want
    assert cut  # at least one end token was followed by accepted ones


def test_seeds_and_nothing_else_decide_a_sampled_row():
    eng, texts = engine(), prompts()
    first = eng.generate(texts, NEW, sampling=SAMPLED, seeds=[1, 2, 3, 4]).tokens
    again = eng.generate(texts, NEW, sampling=SAMPLED, seeds=[1, 2, 3, 4]).tokens
    other = eng.generate(texts, NEW, sampling=SAMPLED, seeds=[1, 2, 3, 5]).tokens
    assert first == again
    assert other[:3] == first[:3] and other[3] != first[3]


def test_controls_may_differ_between_rows(plain):
    mixed = SamplingParams.make(temperature=[0.0, 1.0, 0.0, 1.0])
    got = engine().generate(prompts(), NEW, sampling=mixed).tokens
    assert [got[0], got[2]] == [plain[0], plain[2]]
    assert got[1] != plain[1] and got[3] != plain[3]


def test_the_context_may_be_filled_to_the_last_token():
    prompt = prompts(150)[0]
    assert len(engine().generate([prompt], 10).tokens[0]) == 10
    with pytest.raises(ValueError, match=r"150 tokens and 11 new .* beyond the context of 160"):
        engine().generate([prompt], 11)
    assert len(engine(context_limit=161).generate([prompt], 11).tokens[0]) == 11


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": []}, "at least one prompt"),
        ({"max_new_tokens": -1}, "max_new_tokens of 0 or more"),
        ({"prompts": [[VOCAB]]}, "outside 0..23"),
        ({"prompts": [[-1]]}, "outside 0..23"),
        ({"seeds": [1]}, "1 seeds for 4 prompts"),
        ({"drafter_state": 0}, "NoDrafter keeps no state between calls"),
    ],
)
def test_bad_input_is_refused_early(call, message):
    with pytest.raises(ValueError, match=message):
        engine().generate(**({"prompts": prompts(), "max_new_tokens": 4} | call))


def test_state_of_a_shared_drafter_is_carried_and_stays_usable():
    eng = engine(drafter=TokenRecycling())
    cold = eng.generate(prompts(), NEW)
    warm = eng.generate(prompts(), NEW, drafter_state=cold.drafter_state)
    again = eng.generate(prompts(), NEW, drafter_state=cold.drafter_state)
    assert warm.tokens == again.tokens == cold.tokens
    assert np.sum(warm.stats.rounds) < np.sum(cold.stats.rounds)
    np.testing.assert_array_equal(warm.stats.rounds, again.stats.rounds)
    assert engine().generate(prompts(), 1).drafter_state is None


def test_buckets_are_powers_of_two():
    assert [bucket(n, 16) for n in (1, 16, 17, 32, 33)] == [16, 16, 32, 32, 64]
    assert bucket(5) == 128
