"""Chunked pipeline parallelism of a prompt, with chunks of equal size or of equal cost.

A prompt is cut into chunks which follow each other through stages that hold some layers each. A
chunk of n tokens after a prefix of p takes ``a n + b n (p + n / 2)`` besides what every chunk
takes, since its tokens attend to all that came before: chunks of one size take longer and longer,
and stages wait. Dynamic chunks (arXiv 2501.15383) shrink, so that each takes as long as the others.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True)
class ChunkCost:
    """What a chunk costs on all stages together, in any unit of time.

    Attributes:
        per_token: a, of projections and MLPs.
        per_pair: b, of attention, for one query and one key.
        fixed: of every chunk, however short: launches, and reading the weights.
    """

    per_token: float
    per_pair: float
    fixed: float = 0.0

    def __post_init__(self) -> None:
        if min(self.per_token, self.per_pair, self.fixed) < 0 or self.work(1) <= 0:
            raise ValueError(f"costs must be 0 or more and a token must cost something: {self}.")

    def work(self, tokens: int | np.ndarray) -> float | np.ndarray:
        """Cost of a prompt of that many tokens, without what every chunk takes."""
        return self.per_token * tokens + self.per_pair * tokens * tokens / 2

    def reach(self, work: np.ndarray) -> np.ndarray:
        """Tokens of the prompt whose :meth:`work` this is."""
        # The root of a x + b x^2 / 2 = work, written so that b = 0 is no division by zero.
        root = np.sqrt(self.per_token**2 + 2 * self.per_pair * work)
        return 2 * work / (self.per_token + root)

    def times(self, sizes: Int[np.ndarray, " chunks"]) -> Float[np.ndarray, " chunks"]:
        """Cost of each of the consecutive chunks of one prompt."""
        ends = np.cumsum(sizes)
        return np.asarray(self.work(ends) - self.work(ends - sizes)) + self.fixed


def plan_chunks(
    tokens: int, cost: ChunkCost, stages: int, count: int | None = None, multiple: int = 1
) -> Int[np.ndarray, " chunks"]:
    """Sizes of consecutive chunks that are predicted to cost the same.

    Chunk i ends where the work so far is i + 1 shares of the whole. Among all ways to cut a prompt
    into ``count`` chunks that is the one with the least makespan on even stages: see
    :func:`simulate`.

    Args:
        count: how many chunks; None: as many as :func:`plan_stream` finds best.
        multiple: sizes are multiples of it, except the last; a block of a kernel or a page.

    Raises:
        ValueError: no tokens, or more chunks than blocks of ``multiple`` tokens.
    """
    if count is None:
        return plan_stream([tokens], cost, stages, multiple)[0]
    ends = cost.reach(np.arange(1, count + 1) / count * cost.work(tokens))
    return _cut(tokens, count, multiple, ends)


def plan_stream(
    lengths: Sequence[int], cost: ChunkCost, stages: int, multiple: int = 1
) -> list[Int[np.ndarray, " chunks"]]:
    """Chunks of several prompts that follow each other, all predicted to cost about the same.

    K chunks of cost t + f, f fixed and K t = W the work of all, take ``(K + S - 1)(t + f) / S`` on
    S stages. The least of it is at ``t = sqrt(f W / (S - 1))``: longer chunks fill and drain the
    stages for longer, shorter ones pay what is fixed more often.

    Raises:
        ValueError: no tokens, no stages, or chunks that cost nothing by themselves, of which more
            are always better.
    """
    if stages < 1 or multiple < 1:
        raise ValueError(f"{stages} stages and chunks of {multiple} tokens: use 1 or more of each.")
    if stages > 1 and cost.fixed == 0:
        raise ValueError("without a fixed cost the more chunks the better: give count or fixed.")
    work = [float(cost.work(tokens)) for tokens in lengths]
    target = np.inf if stages == 1 else np.sqrt(cost.fixed * sum(work) / (stages - 1))
    plans = []
    for tokens, one in zip(lengths, work, strict=True):
        count = int(np.clip(round(one / target), 1, max(1, -(-tokens // multiple))))
        plans.append(plan_chunks(tokens, cost, stages, count, multiple))
    return plans


def equal_chunks(tokens: int, count: int, multiple: int = 1) -> Int[np.ndarray, " chunks"]:
    """Sizes of ``count`` chunks that differ by at most ``multiple`` tokens, the last one aside.

    Raises:
        ValueError: see :func:`plan_chunks`.
    """
    return _cut(tokens, count, multiple, np.arange(1, count + 1) / count * tokens)


def _cut(
    tokens: int, count: int, multiple: int, ends: Float[np.ndarray, " chunks"]
) -> Int[np.ndarray, " chunks"]:
    """Sizes of chunks that end near ``ends``, in whole blocks, none of them empty."""
    blocks = -(-tokens // multiple)
    if tokens < 1 or not 1 <= count <= blocks:
        raise ValueError(
            f"{count} chunks of {tokens} tokens in blocks of {multiple}: use at least one chunk "
            "and no more than blocks."
        )
    at = np.arange(1, count + 1)
    whole = np.maximum.accumulate(np.rint(ends / multiple).astype(np.int64) - at)
    whole = at + np.clip(whole, 0, blocks - count)
    whole[-1] = blocks
    return np.diff(np.minimum(whole * multiple, tokens), prepend=0)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """When each chunk begins and ends on each stage."""

    starts: Float[np.ndarray, "chunks stages"]
    ends: Float[np.ndarray, "chunks stages"]

    @property
    def makespan(self) -> float:
        """From the first chunk's begin on the first stage to the last one's end on the last."""
        return float(self.ends[-1, -1])

    @property
    def bubble(self) -> float:
        """The share of the stages' time, over the makespan, in which they have nothing to do."""
        busy = float((self.ends - self.starts).sum())
        return 1 - busy / (self.makespan * self.ends.shape[1])


def simulate(times: Float[np.ndarray, "chunks stages"], handover: float = 0.0) -> Pipeline:
    """Chunks in their order through the stages in theirs.

    A stage takes a chunk when it is done with the one before and the stage before has handed it
    over, ``handover`` after its end there. On even stages without hand-over the makespan is the
    cost of all chunks on one stage and ``stages - 1`` times that of the largest.

    Raises:
        ValueError: no chunk, no stage, or times below 0.
    """
    if times.ndim != 2 or not times.size or times.min() < 0 or handover < 0:
        raise ValueError(f"times of shape {times.shape}: give (chunks, stages), none below 0.")
    ready = np.zeros(len(times))
    starts, ends = np.empty_like(times, float), np.empty_like(times, float)
    for stage in range(times.shape[1]):
        # ends_i = max(ends_(i-1), ready_i) + t_i, unrolled: the latest of all waits so far.
        done = np.cumsum(times[:, stage])
        waits = np.maximum.accumulate(ready - (done - times[:, stage]))
        ends[:, stage] = done + waits
        starts[:, stage] = ends[:, stage] - times[:, stage]
        ready = ends[:, stage] + handover
    return Pipeline(starts, ends)


def even_stages(
    times: Float[np.ndarray, " chunks"], stages: int
) -> Float[np.ndarray, "chunks stages"]:
    """Times of chunks on stages that share the layers evenly."""
    return np.repeat(times[:, None] / stages, stages, axis=1)


def best_equal(
    lengths: Sequence[int], cost: ChunkCost, stages: int, sizes: Iterable[int], multiple: int = 1
) -> list[Int[np.ndarray, " chunks"]]:
    """Equal chunks of all prompts: of the ``sizes`` to try, that with the least predicted makespan.

    Each prompt has as many chunks as hold at most that many tokens, evenly.
    """

    def cut(size: int) -> list[np.ndarray]:
        return [equal_chunks(n, -(-n // size), multiple) for n in lengths]

    def makespan(plans: list[np.ndarray]) -> float:
        times = np.concatenate([cost.times(plan) for plan in plans])
        return simulate(even_stages(times, stages)).makespan

    return min(map(cut, sizes), key=makespan)
