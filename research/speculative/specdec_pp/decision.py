"""When to stop drafting, as a Markov decision process small enough to be solved exactly.

Tokens are easy or hard: each has a kind, kinds follow a chain along the text, and a drafted token
of a kind is accepted with that kind's probability if all before it were. A drafter that knows the
kinds has the joint rejection probability that SpecDec++'s head estimates. Drafting a token costs
``c1``, verifying a round ``c2``; what counts is tokens per cost in the long run.

Source: arXiv 2405.19715, whose theorem says that it is optimal to stop once the probability of a
rejection reaches ``(c2 + D) / (c1 + c2 + D)``, D the value that the extra round boundary loses.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

Policy = Callable[[int, float, int], bool]
"""``policy(kind, cum, drafted) -> stop``: the newest token's kind, the probability that all drafted
tokens are accepted, and how many there are (at least 1)."""


@dataclasses.dataclass(frozen=True)
class Kinds:
    """The chain of kinds.

    Attributes:
        accept: probability of each kind that its drafted token is accepted.
        move: ``move[i][j]``: kind j follows kind i.
        fresh: kinds of a token that the target put in place of a rejected one.
        longest: most tokens of a draft.
    """

    accept: tuple[float, ...]
    move: tuple[tuple[float, ...], ...]
    fresh: tuple[float, ...]
    longest: int

    def __post_init__(self):
        rows = (*self.move, self.fresh)
        square = len(self.move) == len(self.accept) and all(
            len(r) == len(self.accept) for r in rows
        )
        laws = square and all(min(r) >= 0 and abs(sum(r) - 1) < 1e-9 for r in rows)
        if not laws or not all(0 <= a <= 1 for a in self.accept) or self.longest < 1:
            raise ValueError(
                "kinds need acceptances in 0..1, a law over all kinds for each row of move and for "
                "fresh, and a longest of at least 1."
            )


@dataclasses.dataclass(frozen=True)
class Round:
    """What a round that starts after a token of one kind comes to, in expectation."""

    drafted: float
    emitted: float
    next_kind: np.ndarray  # law of the last token's kind, after which the next round starts


def play(kinds: Kinds, policy: Policy, kind: int) -> Round:
    """The round under a policy, over all drafts that it may make.

    The first token is always drafted. After a rejection the target's own token is ``fresh``; after
    a whole draft it is the next of the chain.
    """
    count = len(kinds.accept)
    drafted = emitted = 0.0
    after = np.zeros(count)

    def extend(kind: int, cum: float, number: int, chance: float) -> None:
        nonlocal drafted, emitted, after
        for newest in range(count):
            p = chance * kinds.move[kind][newest]
            if p == 0:
                continue
            joint = cum * kinds.accept[newest]
            drafted += p
            emitted += p * joint
            if number + 1 < kinds.longest and not policy(newest, joint, number + 1):
                extend(newest, joint, number + 1, p)
            else:
                after += p * (1 - joint) * np.asarray(kinds.fresh)
                after += p * joint * np.asarray(kinds.move[newest])

    extend(kind, 1.0, 0, 1.0)
    return Round(drafted, emitted + 1.0, after)


def threshold_policy(threshold: float) -> Policy:
    """Stop once the probability of a rejection exceeds ``threshold``."""
    return lambda kind, cum, drafted: 1 - cum > threshold


def fixed_policy(length: int) -> Policy:
    """Stop after ``length`` tokens."""
    return lambda kind, cum, drafted: drafted >= length


def policy_value(kinds: Kinds, c1: float, c2: float, policy: Policy) -> float:
    """Tokens per cost in the long run, exactly: rounds form a chain over kinds.

    Raises:
        ValueError: costs that are not positive.
    """
    return 1 / evaluate(kinds, c1, c2, policy).cost


def threshold_policy_value(kinds: Kinds, c1: float, c2: float, threshold: float) -> float:
    """Tokens per cost of SpecDec++'s rule with a head that knows; see :func:`policy_value`."""
    return policy_value(kinds, c1, c2, threshold_policy(threshold))


def rates(kinds: Kinds, policy: Policy) -> tuple[float, float]:
    """Verification and discard rate: rounds, and discarded tokens, per emitted token."""
    # The cost of a token is c1 times drafted plus c2 times rounds per emitted token.
    once, twice = (evaluate(kinds, 1.0, c2, policy).cost for c2 in (1.0, 2.0))
    verified = twice - once
    drafted = once - verified
    return verified, drafted - (1 - verified)


@dataclasses.dataclass(frozen=True)
class Solution:
    """The best policy: what a token costs under it, and the least cost of every kind's round.

    ``cost`` is per token; ``start[i]`` is the cost, above that rate, of all that follows when a
    round starts after kind i (relative: the first is 0).
    """

    kinds: Kinds
    c1: float
    c2: float
    cost: float
    start: np.ndarray

    def stop(self, kind: int, cum: float, drafted: int) -> float:
        """Cost to come above the rate if the round is verified now."""
        bonus = np.asarray(self.kinds.move[kind]) @ self.start
        fresh = np.asarray(self.kinds.fresh) @ self.start
        return float(self.c2 - self.cost + (1 - cum) * fresh + cum * bonus)

    def go_on(self, kind: int, cum: float, drafted: int) -> float:
        """Cost to come above the rate if another token is drafted; infinite if none may be."""
        if drafted >= self.kinds.longest:
            return np.inf
        total = self.c1
        for newest, p in enumerate(self.kinds.move[kind]):
            joint = cum * self.kinds.accept[newest]
            if p > 0:
                total += p * (self.least(newest, joint, drafted + 1) - self.cost * joint)
        return total

    def least(self, kind: int, cum: float, drafted: int) -> float:
        """The smaller of the two."""
        return min(self.stop(kind, cum, drafted), self.go_on(kind, cum, drafted))

    def policy(self, kind: int, cum: float, drafted: int) -> bool:
        """Whether the best policy stops."""
        return bool(self.stop(kind, cum, drafted) <= self.go_on(kind, cum, drafted))

    def boundary_loss(self, kind: int, drafted: int) -> float:
        """D of the theorem: what stopping now loses, ``c2`` aside, if nothing was rejected."""
        saved = self.stop(kind, 1.0, drafted) - self.go_on(kind, 1.0, drafted)
        return max(saved - self.c2, 0.0)

    def bound(self, kind: int, drafted: int) -> float:
        """The probability of a rejection from which on it is optimal to stop, by the theorem."""
        lost = self.c2 + self.boundary_loss(kind, drafted)
        return lost / (self.c1 + lost)


def solve(kinds: Kinds, c1: float, c2: float, rounds: int = 100) -> Solution:
    """The best of all policies, by policy iteration.

    Raises:
        ValueError: costs that are not positive.
        ArithmeticError: no fixed point within so many rounds.
    """
    policy: Policy = fixed_policy(1)
    last = np.inf
    for _ in range(rounds):
        solution = evaluate(kinds, c1, c2, policy)
        if solution.cost >= last - 1e-12:
            return solution
        last, policy = solution.cost, solution.policy
    raise ArithmeticError(f"policy iteration did not end within {rounds} rounds.")


def evaluate(kinds: Kinds, c1: float, c2: float, policy: Policy) -> Solution:
    """A policy's cost per token, and the relative costs of its rounds.

    Raises:
        ValueError: costs that are not positive.
    """
    if not (c1 > 0 and c2 > 0):
        raise ValueError(f"drafting and verifying must cost something, got {c1} and {c2}.")
    count = len(kinds.accept)
    rounds = [play(kinds, policy, kind) for kind in range(count)]
    # start[i] = c1 drafted + c2 - cost emitted + next_kind . start, with start[0] = 0.
    system = np.eye(count) - np.stack([r.next_kind for r in rounds])
    system[:, 0] = [r.emitted for r in rounds]
    right = np.array([c1 * r.drafted + c2 for r in rounds])
    found = np.linalg.solve(system, right)
    return Solution(kinds, c1, c2, float(found[0]), np.append(0.0, found[1:]))
