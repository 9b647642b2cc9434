"""Running a decoder's layers: all of them, a range, or what data chooses, layer by layer.

A choice that is data is a loop over indices where layers are stacked. Where they are unrolled, with
a cache for each, a condition stands around every sub-layer and never around a cache: what a
sub-layer would append is computed inside, and written outside. A skipped one writes back what lies
there.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool

from models.attention import Attended, Step
from models.layers import add_attention, add_mlp, finish, no_tap, project
from ops.weights import open_block


@struct.dataclass
class LayerChoice:
    """Layers ``start .. stop - 1``, or the first ``count`` entries of ``kept`` in that order.

    ``start`` and ``stop`` may be Python ints (resolved when tracing) or traced numbers. Of the
    layers chosen, ``skip_attention`` and ``skip_mlp`` leave out sub-layers: the stream passes
    unchanged and a cache keeps the entries it had. ``rows`` says for which rows a layer counts;
    it is computed for all (layer dropout in training), so it saves nothing.
    """

    start: Any = 0
    stop: Any = None
    kept: Any = None  # (k,) layer indices
    count: Any = None
    skip_attention: Any = None  # (layers,) bool
    skip_mlp: Any = None  # (layers,) bool
    rows: Any = None  # (layers, b) bool

    @property
    def traced(self) -> bool:
        """Whether the choice is data rather than part of the program."""
        ranged = isinstance(self.start, int) and isinstance(self.stop, int | None)
        return self.kept is not None or self.skips or not ranged

    @property
    def skips(self) -> bool:
        """Whether sub-layers are left out."""
        return self.skip_attention is not None or self.skip_mlp is not None

    def sub_layers(self, total: int) -> tuple[Bool[Array, " layers"], Bool[Array, " layers"]]:
        """Which attentions and which MLPs run.

        Raises:
            ValueError: a vector that has not one entry per layer.
        """
        index = jnp.arange(total)
        inside = (index >= self.start) & (index < (total if self.stop is None else self.stop))
        chosen = []
        for skip in (self.skip_attention, self.skip_mlp):
            if skip is not None and jnp.shape(skip) != (total,):
                raise ValueError(
                    f"a vector of {jnp.shape(skip)} sub-layers to skip for {total} layers: give "
                    "one entry per layer."
                )
            chosen.append(inside if skip is None else inside & ~jnp.asarray(skip))
        return chosen[0], chosen[1]


@struct.dataclass
class Kept:
    """What a run over layers leaves besides the stream."""

    first: Any = None
    cache: Any = None
    hidden: Any = None
    taps: Any = None
    aux: Any = None


@dataclasses.dataclass(frozen=True)
class _Aside:
    """A layer's cache that attention reads; what attention appends is kept aside, not written."""

    cache: Any
    new: tuple[Array, Array] | None = None

    def append(self, k: Array, v: Array, start: Array) -> "_Aside":
        return _Aside(self.cache, (k, v))

    def read(self, extent: int | None) -> tuple[Array, Array]:
        return self.cache.read(extent)

    def entries(self, start: Array, t: int) -> tuple[Array, Array]:
        return self.cache.entries(start, t)


@dataclasses.dataclass
class LayerRunner:
    """One layer step with everything that does not change from layer to layer."""

    cfg: Any
    policy: Any
    shared: Any
    step: Step
    taps: dict[str, Callable[[Array], Any]]
    all_hidden: bool
    remat: bool

    def layer(
        self, x: Array, block: Any, policy_layer: Any, cache: Any, rows: Any = None
    ) -> tuple[Array, Kept]:
        """A whole layer, for ``rows`` (b,) of the batch or for all."""
        sums: dict[str, Any] = {}

        def tap(name: str, value: Array) -> None:
            if name in self.taps:
                sums[name] = self.taps[name](value)

        layer = open_block(block)
        mixed = self._attend(layer, x, policy_layer, cache, tap)
        new = finish(layer, self.cfg, x, mixed.out, tap)
        x = new if rows is None else jnp.where(rows[:, None, None], new, x)
        return x, Kept(
            cache=mixed.cache, hidden=x if self.all_hidden else None, taps=sums, aux=mixed.aux
        )

    def sub_layers(
        self, x: Array, block: Any, policy_layer: Any, cache: Any, attention: Any, mlp: Any
    ) -> tuple[Array, Kept]:
        """A layer of which those sub-layers run whose (traced) flag is set."""
        if cache is not None:
            cache = self._append(x, block, policy_layer, cache, attention)

        def attended(x: Array, cache: Any) -> Array:
            layer, view = open_block(block), None if cache is None else _Aside(cache)
            return add_attention(layer, x, self._attend(layer, x, policy_layer, view).out)

        def transformed(x: Array) -> Array:
            return add_mlp(open_block(block), self.cfg, x)

        x = jax.lax.cond(attention, attended, lambda x, cache: x, x, cache)
        x = jax.lax.cond(mlp, transformed, lambda x: x, x)
        return x, Kept(cache=cache, hidden=x if self.all_hidden else None, taps={})

    def _append(self, x: Array, block: Any, policy_layer: Any, cache: Any, runs: Any) -> Any:
        """The cache with the new keys and values, or with those it had where attention is skipped.

        Of attention only keys and values are used here, so that nothing else of it is computed.
        """
        old = cache.entries(self.step.start, x.shape[1])

        def fresh(x: Array, cache: Any) -> tuple[Array, Array]:
            new = self._attend(open_block(block), x, policy_layer, _Aside(cache)).cache.new
            return jax.tree.map(lambda new, old: new.astype(old.dtype), new, old)

        new = jax.lax.cond(runs, fresh, lambda x, cache: old, x, cache)
        return cache.append(*new, self.step.start)

    def _attend(
        self,
        layer: Any,
        x: Array,
        policy_layer: Any,
        cache: Any,
        tap: Callable[[str, Array], None] = no_tap,
    ) -> Attended:
        q, k, v, normed = project(layer, self.cfg, x, tap)
        return self.policy.attend(policy_layer, self.shared, q, k, v, normed, self.step, cache)


def run_layers(
    runner: LayerRunner,
    segments: Sequence[Any],
    x: Array,
    layers: LayerChoice | None,
    cache: Any,
) -> tuple[Array, Kept]:
    """The stream after the layers chosen, and what they leave.

    Raises:
        ValueError: a range beyond the model, a cache over stacked layers, or a choice that these
            segments cannot run.
    """
    if layers is None or not layers.traced:
        return _run_all(runner, segments, x, layers, cache)
    if layers.rows is not None or runner.taps:
        raise ValueError(
            "a traced choice of layers runs without taps, and for all rows alike: give start and "
            "stop as Python ints instead."
        )
    if len(segments) == 1 and segments[0].stacked:
        return _run_stacked(runner, segments[0], x, layers, cache)
    return _run_unrolled(runner, segments, x, layers, cache)


def _run_all(
    runner: LayerRunner, segments: Sequence[Any], x: Array, layers: LayerChoice | None, cache: Any
) -> tuple[Array, Kept]:
    """All layers, or a static range of them: stacked segments scanned, others unrolled."""
    total = sum(segment.count for segment in segments)
    start, stop = (layers.start, layers.stop) if layers is not None else (0, None)
    stop = total if stop is None else stop
    if not 0 <= start <= stop <= total:
        raise ValueError(f"layers {start} to {stop} are not within the model's {total}.")
    per_layer = (runner.policy.per_layer(total), None if layers is None else layers.rows)
    first, index, caches, kept = x, 0, list(cache) if cache is not None else None, []
    for segment in segments:
        low, high = max(start - index, 0), min(stop - index, segment.count)
        here = index
        index += segment.count
        if low >= high:
            continue
        chosen = _slice(per_layer, here + low, here + high)
        if segment.stacked:
            if caches is not None:
                raise ValueError(
                    "a cache needs unstacked layers: call unstack(params) once after loading."
                )
            x, out = _scan_segment(runner, _slice(segment.layers, low, high), chosen, x)
        else:
            policy_layer, rows = jax.tree.map(lambda leaf: leaf[0], chosen)
            x, out = runner.layer(
                x, segment.layers, policy_layer, caches[here] if caches else None, rows
            )
            if caches is not None:
                caches[here] = out.cache
            out = jax.tree.map(lambda leaf: leaf[None], dataclasses.replace(out, cache=None))
        kept.append(dataclasses.replace(out, cache=None))
    merged = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *kept) if kept else Kept()
    return x, dataclasses.replace(
        merged, first=first, cache=tuple(caches) if caches is not None else None
    )


def _scan_segment(runner: LayerRunner, stack: Any, chosen: Any, x: Array) -> tuple[Array, Kept]:
    def body(x: Array, xs: tuple) -> tuple[Array, Kept]:
        policy_layer, rows = xs[1]
        return runner.layer(x, xs[0], policy_layer, None, rows)

    return jax.lax.scan(jax.checkpoint(body) if runner.remat else body, x, (stack, chosen))


def _run_stacked(
    runner: LayerRunner, segment: Any, x: Array, layers: LayerChoice, cache: Any
) -> tuple[Array, Kept]:
    """A traced choice of stacked layers, as a loop over their indices."""
    if cache is not None or runner.all_hidden:
        raise ValueError(
            "a traced choice of layers runs without cache and all_hidden over a stacked segment: "
            "call unstack(params) once after loading."
        )
    stack, total = segment.layers, segment.count
    per_layer = (runner.policy.per_layer(total), layers.sub_layers(total))
    if layers.kept is not None:
        lower, upper = 0, layers.kept.shape[0] if layers.count is None else layers.count
    else:
        lower, upper = layers.start, total if layers.stop is None else layers.stop

    def body(i: Array, x: Array) -> Array:
        index = i if layers.kept is None else layers.kept[i]
        block, (policy_layer, runs) = jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False),
            (stack, per_layer),
        )
        if layers.skips:
            return runner.sub_layers(x, block, policy_layer, None, *runs)[0]
        return runner.layer(x, block, policy_layer, None)[0]

    return jax.lax.fori_loop(lower, upper, body, x), Kept(first=x)


def _run_unrolled(
    runner: LayerRunner, segments: Sequence[Any], x: Array, layers: LayerChoice, cache: Any
) -> tuple[Array, Kept]:
    """A traced choice of unrolled layers: every sub-layer stands under its own condition."""
    if layers.kept is not None or any(segment.stacked for segment in segments):
        raise ValueError(
            "kept layers run over one stacked segment, and other traced choices over one such or "
            "over unstacked layers: call unstack(params), or say what to skip."
        )
    total = len(segments)
    attention, mlp = layers.sub_layers(total)
    per_layer = runner.policy.per_layer(total)
    first, caches, hidden = x, list(cache) if cache is not None else None, []
    for i, segment in enumerate(segments):
        policy_layer = jax.tree.map(lambda leaf, i=i: leaf[i], per_layer)
        own = None if caches is None else caches[i]
        x, out = runner.sub_layers(x, segment.layers, policy_layer, own, attention[i], mlp[i])
        if caches is not None:
            caches[i] = out.cache
        hidden.append(out.hidden)
    return x, Kept(
        first=first,
        cache=None if caches is None else tuple(caches),
        hidden=jnp.stack(hidden) if runner.all_hidden else None,
        taps={},
    )


def _slice(tree: Any, start: int, stop: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[start:stop], tree)
