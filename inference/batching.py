"""Continuous batching: requests come and go while one compiled loop decodes whoever is there.

A pool holds a fixed number of rows of one size. A request waits until a row is free, is prefilled
into it, and leaves it when its text ends; the others are not touched. Between two returns to the
host the device decodes as :mod:`inference.loop` does. A request's text depends on its own prompt,
settings and seed alone, up to the rounding of other shapes.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from inference.cache import check_capacity
from inference.drafter import shares_state
from inference.engine import Engine, as_ids, bucket
from inference.loop import State, decode_rounds
from inference.scheduler import Scheduler, Together
from models import decoder
from ops.sampling import SamplingParams


@dataclasses.dataclass(frozen=True)
class Job:
    """A text to be continued.

    Attributes:
        prompt: token ids.
        max_new_tokens: most tokens to add.
        temperature, top_k, top_p: see :class:`ops.sampling.SamplingParams`.
        seed: with a token's index it fixes its draw.
        on_tokens: called with new tokens as they become certain.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    on_tokens: Callable[[list[int]], None] | None = None


@dataclasses.dataclass(frozen=True)
class Finished:
    """What became of a job: its new tokens, why they end, and the loop's counters for its row.

    ``reason`` is ``end`` (an end token), ``length`` or ``cancelled``.
    """

    tokens: list[int]
    reason: str
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclasses.dataclass
class Counters:
    """What a pool has done so far.

    ``forwards`` are target passes of whatever rows took part; ``steps`` are calls of the device,
    ``grouped`` those whose rows the scheduler grouped by length; ``slots_read`` sums, over passes,
    the cache slots per row that attention read.
    """

    forwards: int = 0
    steps: int = 0
    grouped: int = 0
    slots_read: int = 0

    @property
    def grouping_rate(self) -> float:
        """Share of steps whose rows were grouped by length."""
        return self.grouped / max(self.steps, 1)


@dataclasses.dataclass
class _Row:
    """The job in a row of the pool, and how many of its tokens were handed out."""

    number: int
    job: Job
    shown: int = 0


class Batching:
    """A pool of rows over an engine.

    Args:
        engine: model, drafter and policy.
        rows: texts that are decoded at a time.
        capacity: cache slots per row, rounded up to a power of two: the longest text with its new
            tokens and one draft must fit.
        scheduler: which rows take part in a step; default all.
        eos: ids that end a text; the end token is kept.
        rounds_per_call: rounds between two returns to the host. Fewer free rows sooner.

    Raises:
        ValueError: no rows, or fewer than the scheduler takes at a time.
    """

    def __init__(
        self,
        engine: Engine,
        rows: int,
        capacity: int,
        scheduler: Scheduler | None = None,
        eos: Sequence[int] = (),
        rounds_per_call: int = 8,
    ):
        self.engine, self.capacity = engine, bucket(capacity)
        self.scheduler = Together() if scheduler is None else scheduler
        wanted = 1 if self.scheduler.batch is None else self.scheduler.batch
        if rows < wanted or rounds_per_call < 1:
            raise ValueError(
                f"a pool of {rows} rows cannot take {wanted} at a time for {rounds_per_call} "
                f"rounds: give at least {wanted} rows and 1 round."
            )
        self.counters = Counters()
        self._eos = tuple(int(x) for x in eos)
        self._rounds = rounds_per_call
        self._rows: list[_Row | None] = [None] * rows
        self._order: list[int] = []  # occupied rows, the earliest job first
        self._queue: collections.deque[tuple[int, Job]] = collections.deque()
        self._results: dict[int, Finished] = {}
        self._next = 0
        self._seeds = np.zeros(rows, np.int32)
        self._temperature = np.zeros(rows, np.float32)
        self._top_k = np.zeros(rows, np.int32)
        self._top_p = np.ones(rows, np.float32)
        # Steps of the program that no job has needed yet are left out of it.
        self._uses = {"sampled": False, "top_k": False, "top_p": False}
        self._state, _ = engine.start(
            [[0]] * rows, 0, SamplingParams.make(), capacity=self.capacity
        )

    def submit(self, job: Job) -> int:
        """Queue a job; returns its number.

        Raises:
            ValueError: what :meth:`Engine.generate` refuses, sampling values that make no sense, or
                a text that does not fit a row.
        """
        self.engine.check([job.prompt], job.max_new_tokens)
        SamplingParams.make(job.temperature, job.top_k, job.top_p)
        needed = len(job.prompt) + job.max_new_tokens + self.engine.drafter.width
        check_capacity(needed, self.capacity, "the text with one draft")
        number = self._next
        self._next += 1
        self._queue.append((number, job))
        return number

    def cancel(self, number: int) -> None:
        """Drop a job that waits or runs; its result has the tokens so far.

        Raises:
            ValueError: there is no such job, or it has finished.
        """
        for waiting in self._queue:
            if waiting[0] == number:
                self._queue.remove(waiting)
                self._results[number] = Finished([], "cancelled")
                return
        for slot in self._order:
            if self._row(slot).number == number:
                self._finish(slot, self._texts([slot])[0], "cancelled")
                done = self._state.done.at[slot].set(True)
                self._state = dataclasses.replace(self._state, done=done)
                return
        raise ValueError(f"job {number} neither waits nor runs: it cannot be cancelled.")

    def step(self) -> bool:
        """Fill free rows, decode some rounds, hand out tokens; False if there was nothing to do."""
        self._admit()
        if not self._order:
            return False
        lengths = np.asarray(self._state.cache.length)
        chosen, grouped = self.scheduler.choose([int(lengths[slot]) + 1 for slot in self._order])
        slots = [self._order[place] for place in chosen]
        rounds = np.asarray(self._state.stats.rounds)
        needed = int(lengths[slots].max()) + self.engine.drafter.width
        extent = self.engine.extent(needed, self.capacity)
        self._decode(slots, extent)
        done = int((np.asarray(self._state.stats.rounds) - rounds).max())
        self.counters.forwards += done
        self.counters.slots_read += done * extent
        self.counters.steps += 1
        self.counters.grouped += grouped
        self._collect(slots)
        return True

    def run(self) -> None:
        """Decode until no job is left.

        Raises:
            ValueError: no job was submitted.
        """
        if not self._order and not self._queue:
            raise ValueError("the pool is empty: submit a job before running it.")
        while self.step():
            pass

    def result(self, number: int) -> Finished:
        """What became of a job; it is given out once.

        Raises:
            ValueError: the job has not finished, or its result was taken.
        """
        if number not in self._results:
            raise ValueError(f"job {number} has no result: run the pool, and ask once.")
        return self._results.pop(number)

    def generate(self, jobs: Sequence[Job]) -> list[Finished]:
        """Run all jobs; results come in the order of ``jobs``, whatever the order they ended in."""
        numbers = [self.submit(job) for job in jobs]
        self.run()
        return [self.result(number) for number in numbers]

    def _row(self, slot: int) -> _Row:
        row = self._rows[slot]
        assert row is not None, "an occupied row has its job"
        return row

    def _admit(self) -> None:
        """Prefill waiting jobs into free rows, as many at a time as there are."""
        free = [slot for slot, row in enumerate(self._rows) if row is None]
        count = min(len(free), len(self._queue))
        if count == 0:
            return
        slots = free[:count]
        for slot in slots:
            number, job = self._queue.popleft()
            self._rows[slot] = _Row(number, job)
            self._order.append(slot)
            self._seeds[slot] = job.seed
            self._temperature[slot], self._top_k[slot] = job.temperature, job.top_k
            self._top_p[slot] = job.top_p
            self._uses["sampled"] |= job.temperature > 0
            self._uses["top_k"] |= job.top_k > 0
            self._uses["top_p"] |= job.top_p < 1
        # Rows beyond the jobs fill up to a power of two, so that few programs are compiled; they
        # are finished texts, and no row of the pool takes them.
        fill = bucket(count, 1) - count
        jobs = [self._row(slot).job for slot in slots]
        fresh, _ = self.engine.start(
            [*(job.prompt for job in jobs), *[[0]] * fill],
            [*(job.max_new_tokens for job in jobs), *[0] * fill],
            self._sampling([*slots, *[slots[0]] * fill]),
            self._seeds[[*slots, *[slots[0]] * fill]].tolist(),
            self._state.drafter if shares_state(self.engine.drafter) else None,
            self.capacity,
        )
        rows = jnp.asarray([*slots, *[len(self._rows)] * fill], jnp.int32)
        self._state = _place(self._state, fresh, rows, shares_state(self.engine.drafter))

    def _sampling(self, slots: Sequence[int]) -> SamplingParams:
        rows = np.asarray(slots)
        return SamplingParams(
            self._temperature[rows],
            self._top_k[rows],
            self._top_p[rows],
            self._uses["top_k"],
            self._uses["top_p"],
        )

    def _decode(self, slots: list[int], extent: int) -> None:
        """Some rounds of the chosen rows, of the whole pool if the scheduler does not choose."""
        engine = self.engine
        rule = engine.verification(self._uses["sampled"])
        untuned = engine.rounds_to_tuning(self._state)
        rows = list(range(len(self._rows)))
        if self.scheduler.batch is not None:
            # Always as many rows: where fewer are unfinished, free ones fill up.
            others = [slot for slot in rows if slot not in slots]
            rows = [*slots, *others[: self.scheduler.batch - len(slots)]]
        eos = as_ids(self._eos)
        self._state = _decode_rows(
            engine.params,
            engine.cfg,
            engine.policy_in_force,
            engine.drafter,
            engine.drafter_params,
            self._state,
            None if self.scheduler.batch is None else jnp.asarray(rows, jnp.int32),
            jnp.asarray(self._seeds[rows]),
            self._sampling(rows),
            eos,
            jnp.asarray(min(self._rounds, untuned or self._rounds), jnp.int32),
            extent=extent,
            rule=rule,
            widths=engine.narrower(),
        )
        if untuned:
            everyone = range(len(self._rows))
            self._state = engine.tuned(
                self._state, jnp.asarray(self._seeds), self._sampling(everyone), eos
            )

    def _collect(self, slots: Sequence[int]) -> None:
        """Hand out new tokens of these rows and free those whose texts have ended."""
        done = np.asarray(self._state.done)
        rows = [self._row(slot) for slot in slots]
        for slot, row, text in zip(slots, rows, self._texts(slots), strict=True):
            new, row.shown = text[row.shown :], len(text)
            if new and row.job.on_tokens is not None and self._rows[slot] is row:
                row.job.on_tokens(new)
            # Whoever is told of tokens may cancel jobs.
            if done[slot] and self._rows[slot] is row:
                ended = bool(text) and text[-1] in self._eos
                self._finish(slot, text, "end" if ended else "length")

    def _texts(self, slots: Sequence[int]) -> list[list[int]]:
        tokens, length = np.asarray(self._state.tokens), np.asarray(self._state.length)
        starts = [len(self._row(slot).job.prompt) for slot in slots]
        return [tokens[s, at : length[s]].tolist() for s, at in zip(slots, starts, strict=True)]

    def _finish(self, slot: int, text: list[int], reason: str) -> None:
        stats = self._state.stats
        counts = [int(np.asarray(x)[slot]) for x in (stats.rounds, stats.drafted, stats.accepted)]
        self._results[self._row(slot).number] = Finished(text, reason, *counts)
        self._rows[slot] = None
        self._order.remove(slot)


@functools.partial(jax.jit, static_argnames="shared", donate_argnames="pool")
def _place(pool: State, fresh: State, rows: Int[Array, " r"], shared: bool) -> State:
    """The pool with fresh rows in places ``rows``; those beyond its end are dropped."""
    return _put(pool, fresh, rows, shared)


def _put(pool: State, new: State, rows: Int[Array, " r"], shared: bool) -> State:
    kept = dataclasses.replace(pool, drafter=None) if shared else pool
    other = dataclasses.replace(new, drafter=None) if shared else new
    out = jax.tree.map(lambda leaf, x: leaf.at[rows].set(x, mode="drop"), kept, other)
    return dataclasses.replace(out, drafter=new.drafter) if shared else out


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "drafter", "extent", "rule", "widths"),
    donate_argnames=("pool",),
)
def _decode_rows(
    params: Any,
    cfg: decoder.Config,
    policy: Any,
    drafter: Any,
    drafter_params: Any,
    pool: State,
    rows: Int[Array, " r"] | None,
    seeds: Int[Array, " r"],
    sampling: SamplingParams,
    eos: Int[Array, " e"],
    max_rounds: Int[Array, ""],
    extent: int,
    rule: str | None,
    widths: tuple[int, ...],
) -> State:
    """Rounds of some rows of the pool (None: all, without moving them)."""
    shared = shares_state(drafter)
    state = pool
    if rows is not None:
        kept = dataclasses.replace(pool, drafter=None) if shared else pool
        state = jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), kept)
        state = dataclasses.replace(state, drafter=pool.drafter) if shared else state
    state = decode_rounds(
        params, cfg, policy, drafter, drafter_params, state, seeds, sampling, eos, max_rounds,
        extent=extent, rule=rule, widths=widths,
    )  # fmt: skip
    return state if rows is None else _put(pool, state, rows, shared)
