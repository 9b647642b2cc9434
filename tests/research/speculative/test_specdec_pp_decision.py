"""The decision process behind SpecDec++: exact values, the theorem, and a simulation."""

import numpy as np
import pytest

from research.speculative.specdec_pp.decision import (
    Kinds,
    Policy,
    evaluate,
    fixed_policy,
    play,
    policy_value,
    rates,
    solve,
    threshold_policy,
    threshold_policy_value,
)

MIXED = Kinds((0.95, 0.4), ((0.85, 0.15), (0.5, 0.5)), (0.6, 0.4), longest=9)
ALIKE = Kinds((0.7,), ((1.0,),), (1.0,), longest=12)
COSTS = [(1.0, 4.0), (1.0, 8.0), (1.0, 16.0)]


def simulate(kinds: Kinds, policy: Policy, c1: float, c2: float, rounds: int) -> float:
    rng = np.random.default_rng(0)
    kind, cost, tokens = 0, 0.0, 0

    def draw(law: tuple[float, ...]) -> int:
        return int(rng.choice(len(law), p=law))

    for _ in range(rounds):
        newest, cum, kept, lost = kind, 1.0, 0, False
        for number in range(1, kinds.longest + 1):
            newest = draw(kinds.move[newest])
            cum *= kinds.accept[newest]
            lost = lost or rng.random() >= kinds.accept[newest]
            kept += not lost
            cost += c1
            if policy(newest, cum, number):
                break
        kind = draw(kinds.fresh if lost else kinds.move[newest])
        cost, tokens = cost + c2, tokens + kept + 1
    return tokens / cost


@pytest.mark.parametrize("length", [1, 3, 7])
def test_one_kind_has_the_closed_form_of_fixed_lengths(length):
    a = ALIKE.accept[0]
    emitted = (1 - a ** (length + 1)) / (1 - a)
    got = policy_value(ALIKE, 1.0, 8.0, fixed_policy(length))
    assert got == pytest.approx(emitted / (length + 8.0))
    verified, discarded = rates(ALIKE, fixed_policy(length))
    assert verified == pytest.approx(1 / emitted)
    assert discarded == pytest.approx((length - (emitted - 1)) / emitted)


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_values_are_those_of_a_simulation(threshold):
    got = threshold_policy_value(MIXED, 1.0, 8.0, threshold)
    seen = simulate(MIXED, threshold_policy(threshold), 1.0, 8.0, 20_000)
    assert got == pytest.approx(seen, rel=0.015)


def test_a_token_costs_what_rates_say():
    """T / N = draft + (target - draft) v + draft d."""
    for threshold in (0.2, 0.5, 0.8):
        v, d = rates(MIXED, threshold_policy(threshold))
        for c1, c2 in COSTS:
            cost = 1 / threshold_policy_value(MIXED, c1, c2, threshold)
            assert cost == pytest.approx(c1 + (c2 - c1) * v + c1 * d)


def prefixes(kinds: Kinds):
    """Every draft (newest kind, joint acceptance, tokens)."""
    layer = {(z, round(a, 12)) for z, a in enumerate(kinds.accept)}
    for number in range(1, kinds.longest + 1):
        yield from ((kind, cum, number) for kind, cum in layer)
        layer = {
            (z, round(cum * a, 12)) for kind, cum in layer for z, a in enumerate(kinds.accept)
            if kinds.move[kind][z] > 0
        }  # fmt: skip


@pytest.mark.parametrize(("c1", "c2"), COSTS)
def test_the_theorem_on_every_draft(c1, c2):
    best = solve(MIXED, c1, c2)
    stopped = went_on = 0
    for kind, cum, drafted in prefixes(MIXED):
        if drafted == MIXED.longest:
            continue
        if 1 - cum >= best.bound(kind, drafted):
            assert best.policy(kind, cum, drafted)
            stopped += 1
        went_on += not best.policy(kind, cum, drafted)
    assert stopped > 10 and went_on > 0


@pytest.mark.parametrize(("c1", "c2"), COSTS)
def test_the_best_policy_beats_fixed_lengths_and_thresholds_come_close(c1, c2):
    best = solve(MIXED, c1, c2)
    value = policy_value(MIXED, c1, c2, best.policy)
    assert value == pytest.approx(1 / best.cost)
    fixed = max(policy_value(MIXED, c1, c2, fixed_policy(n)) for n in range(1, 10))
    by_threshold = [threshold_policy_value(MIXED, c1, c2, h) for h in np.linspace(0, 1, 41)]
    assert all(x <= value + 1e-12 for x in (fixed, *by_threshold))
    assert max(by_threshold) > fixed
    assert max(by_threshold) > 0.98 * value


def test_no_change_of_one_decision_improves_the_best_policy():
    best = solve(MIXED, 1.0, 8.0)
    for flipped in [(0, round(0.95, 12), 1), (1, round(0.95 * 0.4, 12), 2)]:

        def other(kind: int, cum: float, drafted: int, flipped=flipped) -> bool:
            here = (kind, round(cum, 12), drafted) == flipped
            return best.policy(kind, cum, drafted) != here

        assert policy_value(MIXED, 1.0, 8.0, other) < 1 / best.cost


def test_thresholds_order_the_rates():
    """A larger threshold verifies less and discards more."""
    both = np.array([rates(MIXED, threshold_policy(h)) for h in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)])
    assert np.all(np.diff(both[:, 0]) <= 1e-12) and np.all(np.diff(both[:, 1]) >= -1e-12)
    never = play(MIXED, threshold_policy(1.0), 0)
    assert never.drafted == pytest.approx(MIXED.longest)
    assert play(MIXED, threshold_policy(-1.0), 0).drafted == pytest.approx(1.0)
    assert never.next_kind.sum() == pytest.approx(1.0)


@pytest.mark.parametrize(
    "changes", [{"accept": (1.2, 0.4)}, {"fresh": (0.5, 0.4)}, {"move": ((1.0, 0.0),)}]
)
def test_kinds_that_are_no_chain_are_refused(changes):
    fields = {"accept": MIXED.accept, "move": MIXED.move, "fresh": MIXED.fresh, "longest": 3}
    with pytest.raises(ValueError, match="kinds need acceptances"):
        Kinds(**(fields | changes))
    with pytest.raises(ValueError, match="must cost something"):
        evaluate(MIXED, 0.0, 1.0, fixed_policy(1))
