"""EQSPEC in the paper's left-padded form: the reference that the ragged loop is compared with.

Every row is padded on the left to one length. After a round rows have grown by different amounts,
so padding, positions, mask and cache are all realigned. The ragged cache needs none of that; this
form exists for tests, for its cost in bytes, and to show that its usual mistakes are caught.

Source: arXiv 2510.22876 and its official code.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from inference.cache import Cache, check_capacity, init_cache, slot_bytes
from inference.drafters.draft_model import check_vocabulary
from models import decoder
from models.attention import Step

Fault = Literal["positions", "cache", "bonus", "growth"]
"""Mistakes of published implementations, as negative controls: positions that go on as if every
draft had been accepted; rejected entries that stay visible in the cache; the draft model's token in
place of the target's; padding that grows without the cache being moved."""
FAULTS: tuple[Fault, ...] = get_args(Fault)


def realign_padding(
    padding: np.ndarray, content: np.ndarray, committed: np.ndarray
) -> tuple[np.ndarray, int]:
    """Padding of every row after ``committed`` more tokens, and the new common length.

    ``padding + content`` is one length L for all rows before and after; padding moves by
    ``(L' - L) - committed``, which may be negative, and not at all where all rows grew alike.

    Raises:
        ValueError: rows that were not aligned before.
    """
    lengths = np.unique(padding + content)
    if len(lengths) != 1:
        raise ValueError(f"padding and content give the lengths {lengths.tolist()}: align first.")
    longest = int((content + committed).max())
    return padding + (longest - int(lengths[0])) - committed, longest


def mask_positions(mask: Bool[np.ndarray, "b l"]) -> Int[np.ndarray, "b l"]:
    """Positions 0, 1, ... of the tokens of each row, counted anew from the mask; 0 at padding."""
    return np.maximum(0, np.cumsum(mask, axis=1) - 1).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Round:
    """What one round did: what it fed, what it committed, and where padding went."""

    draft: np.ndarray  # (b, k)
    positions: np.ndarray  # (b, k + 1) of the last token and the drafts
    accepted: np.ndarray  # (b,) drafted tokens that matched
    committed: list[list[int]]  # without the bonus
    bonus: np.ndarray  # (b,)
    padding: tuple[np.ndarray, np.ndarray]  # before and after
    length: tuple[int, int]
    realigning: float  # seconds that appending and realigning took

    @property
    def moved(self) -> bool:
        """Whether a row's entries had to move."""
        return bool(np.any(self.padding[0] != self.padding[1]))


@dataclasses.dataclass
class PaddedBatch:
    """Rows under way: ids padded on the left, and the target's cache over the same slots.

    ``start`` is the slot of the next entry: one less than the length, since the last token of a
    text has no entry yet. ``visible`` are the slots whose entries may be seen.
    """

    tokens: np.ndarray  # (b, capacity), the first ``length`` columns of it
    padding: np.ndarray  # (b,)
    length: int
    prompt: np.ndarray  # (b,) tokens of each prompt
    live: np.ndarray  # (b,) bool
    cache: Cache
    visible: np.ndarray  # (b, capacity) bool
    start: int
    carried: np.ndarray  # (b,) position of the last token, for the control that does not roll back

    @property
    def content(self) -> np.ndarray:
        """Tokens of each row."""
        return self.length - self.padding

    def texts(self) -> list[list[int]]:
        """New tokens of each row."""
        starts = self.padding + self.prompt
        return [row[at : self.length].tolist() for row, at in zip(self.tokens, starts, strict=True)]


@dataclasses.dataclass(frozen=True)
class PaddedDecoder:
    """Greedy speculation on padded rows; all weights unstacked.

    Attributes:
        k: drafted tokens per round.
        eos, pad: ids that end a text and that fill.
        official_cap: commit at most ``k`` tokens per round as the official code does (it drops the
            last row of logits), and not ``k + 1``.
        fault: leave something out, see :data:`Fault`.
    """

    params: decoder.Params
    cfg: decoder.Config
    draft_params: decoder.Params
    draft_cfg: decoder.Config
    k: int
    eos: int | None = None
    pad: int = 0
    official_cap: bool = False
    fault: Fault | None = None

    def begin(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, capacity: int | None = None
    ) -> PaddedBatch:
        """Prefill all prompts, into rows of ``capacity`` slots; default: as many as needed.

        Raises:
            ValueError: models with different vocabularies, no prompts, or too few slots.
        """
        check_vocabulary(self.draft_cfg, self.cfg)
        if not prompts:
            raise ValueError("give at least one prompt.")
        lengths = np.array([len(p) for p in prompts], np.int32)
        length = int(lengths.max())
        rounds = max_new_tokens if self.fault == "cache" else 1
        needed = length + max_new_tokens + rounds * (self.k + 1)
        capacity = needed if capacity is None else capacity
        check_capacity(needed, capacity, "the padded batch with its drafts")
        tokens = np.full((len(prompts), capacity), self.pad, np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[length - len(prompt) : length] = prompt
        padding = length - lengths
        slots = np.arange(capacity)[None]
        text = (slots >= padding[:, None]) & (slots < length)
        cache = init_cache(self.cfg, len(prompts), capacity, self.params.final_norm.scale.dtype)
        causal = np.tri(capacity, dtype=bool)[None]
        # Rows of padding see themselves: a row that sees nothing has no softmax.
        seen = (causal & text[:, None, :]) | np.eye(capacity, dtype=bool)[None]
        cache, _ = _feed(
            self.params, self.cfg, cache, tokens, mask_positions(text), seen, np.int32(0)
        )
        return PaddedBatch(
            tokens, padding, length, lengths, np.ones(len(prompts), bool), cache,
            text & (slots < length - 1), length - 1, lengths - 1,
        )  # fmt: skip

    def round(self, batch: PaddedBatch, budget: np.ndarray) -> Round:
        """One round of the live rows; ``budget`` are the tokens that each may still add."""
        live = batch.live
        # Shapes keep the full k; drafts beyond the smallest budget do not count.
        k = int(min(self.k, budget[live].min()))
        draft = self._draft(batch)
        fed = np.concatenate([batch.tokens[:, batch.length - 1 : batch.length], draft], axis=1)
        positions = self._positions(batch)
        logits = self._verify(batch, fed, positions)
        best = logits.argmax(-1).astype(np.int32)
        matches = np.cumprod(best[:, :k] == draft[:, :k], axis=1).sum(axis=1)
        kept = np.minimum(matches, k - 1) if self.official_cap else matches
        bonus = np.take_along_axis(best, kept[:, None], axis=1)[:, 0]
        if self.fault == "bonus":
            guess = np.take_along_axis(draft, np.minimum(kept, self.k - 1)[:, None], axis=1)[:, 0]
            bonus = np.where(kept < self.k, guess, bonus)
        added = []
        for row in range(len(live)):
            new = [*draft[row, : kept[row]].tolist(), int(bonus[row])] if live[row] else []
            new = new[: budget[row]]
            if self.eos is not None and self.eos in new:
                new = new[: new.index(self.eos) + 1]
            added.append(new)
        before, start = (batch.padding.copy(), batch.length), time.perf_counter()
        self._commit(batch, added)
        jax.block_until_ready(batch.cache)
        realigning = time.perf_counter() - start
        for row, new in enumerate(added):
            ended = self.eos is not None and self.eos in new
            batch.live[row] &= not (ended or len(new) == budget[row])
        return Round(
            draft, positions, np.where(live, matches, 0), [new[:-1] for new in added], bonus,
            (before[0], batch.padding), (before[1], batch.length), realigning,
        )  # fmt: skip

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        capacity: int | None = None,
    ) -> tuple[list[list[int]], list[Round]]:
        """Continue all prompts together: new tokens per row, and the rounds it took.

        Args:
            max_new_tokens: one number, or one per prompt.
            capacity: see :meth:`begin`.
        """
        limits = np.broadcast_to(np.asarray(max_new_tokens), (len(prompts),))
        batch, rounds = self.begin(prompts, int(limits.max()), capacity), []
        while batch.live.any():
            used = batch.content - batch.prompt
            rounds.append(self.round(batch, np.where(batch.live, limits - used, 0)))
        return batch.texts(), rounds

    def _text(self, batch: PaddedBatch) -> np.ndarray:
        slots = np.arange(batch.tokens.shape[1])[None]
        return (slots >= batch.padding[:, None]) & (slots < batch.length)

    def _positions(self, batch: PaddedBatch) -> np.ndarray:
        last = batch.carried if self.fault == "positions" else batch.content - 1
        return (last[:, None] + np.arange(self.k + 1)[None]).astype(np.int32)

    def _draft(self, batch: PaddedBatch) -> np.ndarray:
        """The draft model's greedy tokens; it reads the whole text each time, as officially."""
        tokens = batch.tokens.copy()
        slots = np.arange(tokens.shape[1])[None]
        for j in range(self.k):
            end = batch.length + j
            text = (slots >= batch.padding[:, None]) & (slots < end)
            chosen = _next_tokens(
                self.draft_params, self.draft_cfg, tokens, mask_positions(text), text, np.int32(end)
            )
            tokens[:, end] = np.where(batch.live, np.asarray(chosen), self.pad)
        return tokens[:, batch.length : batch.length + self.k]

    def _verify(self, batch: PaddedBatch, fed: np.ndarray, positions: np.ndarray) -> np.ndarray:
        slots = np.arange(batch.tokens.shape[1])[None, None]
        new = batch.start + np.arange(self.k + 1)[None, :, None]
        own = (slots >= batch.start) & (slots <= new)
        seen = batch.visible[:, None, :] | own
        batch.cache, logits = _feed(
            self.params, self.cfg, batch.cache, fed, positions, seen, np.int32(batch.start)
        )
        return np.asarray(logits)

    def _commit(self, batch: PaddedBatch, added: Sequence[Sequence[int]]) -> None:
        """Append, realign everything, and forget what was rejected."""
        count = np.array([len(new) for new in added], np.int32)
        padding, length = realign_padding(batch.padding, batch.content, count)
        tokens = np.full_like(batch.tokens, self.pad)
        for row, new in enumerate(added):
            text = [*batch.tokens[row, batch.padding[row] : batch.length].tolist(), *new]
            tokens[row, padding[row] : length] = text
        shift = padding - batch.padding
        batch.tokens, batch.padding, batch.length = tokens, padding, length
        batch.carried = batch.carried + self.k + 1
        slots = np.arange(tokens.shape[1])[None]
        if self.fault == "cache":
            batch.visible = batch.visible | (
                (slots >= batch.start) & (slots < batch.start + self.k + 1)
            )
            batch.start += self.k + 1
            return
        if self.fault != "growth" and np.any(shift):
            batch.cache = _shift(batch.cache, jnp.asarray(shift, jnp.int32))
        batch.visible = self._text(batch) & (slots < length - 1)
        batch.start = length - 1

    def bytes_per_realignment(self, rows: int, length: int) -> int:
        """Bytes of keys and values that one realignment copies."""
        return rows * length * slot_bytes(self.cfg, self.params.final_norm.scale.dtype)


@functools.partial(jax.jit, static_argnames="cfg")
def _feed(
    params: decoder.Params,
    cfg: decoder.Config,
    cache: Cache,
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    seen: Bool[Array, "b t s"],
    start: Any,
) -> tuple[Cache, Array]:
    """Run tokens whose entries go to slots from ``start`` on, under a mask over all slots."""
    rows = tokens.shape[0]
    step = Step(
        positions=positions,
        start=jnp.broadcast_to(start, (rows,)),
        slot_positions=cache.positions,
        tree=seen,
        tree_start=jnp.zeros((rows,), jnp.int32),
        mode="decode",
    )
    out = decoder.forward(params, cfg, tokens, step=step, cache=cache.layers)
    return dataclasses.replace(cache, layers=out.cache), decoder.unembed(params, cfg, out.hidden)


@functools.partial(jax.jit, static_argnames="cfg")
def _next_tokens(
    params: decoder.Params,
    cfg: decoder.Config,
    tokens: Int[Array, "b l"],
    positions: Int[Array, "b l"],
    text: Bool[Array, "b l"],
    end: Any,
) -> Int[Array, " b"]:
    """The greedy successor of column ``end - 1``, by a pass over whole rows; padding is apart."""
    step = Step(positions=positions, segments=text.astype(jnp.int32))
    hidden = decoder.forward(params, cfg, tokens, step=step).hidden
    last = jax.lax.dynamic_slice_in_dim(hidden, end - 1, 1, axis=1)[:, 0]
    return jnp.argmax(decoder.unembed(params, cfg, last), axis=-1).astype(jnp.int32)


@jax.jit
def _shift(cache: Cache, by: Int[Array, " b"]) -> Cache:
    """Every row's entries ``by`` slots to the right (left if negative)."""
    slots = jnp.arange(cache.capacity, dtype=jnp.int32)[None]
    source = jnp.clip(slots - by[:, None], 0, cache.capacity - 1)
    start = jnp.zeros_like(by)
    moved = tuple(layer.gather(source, start) for layer in cache.layers)
    return dataclasses.replace(cache, layers=moved)
