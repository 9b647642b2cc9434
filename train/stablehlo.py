"""A decoder as programs for other systems: StableHLO through ``jax.export``, weights beside them.

Each function is exported once per platform, because a choice between a kernel and its plain form
cannot be part of one artefact. Weights are inputs, never constants. :mod:`train.exported` runs
the result without any of this code.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from inference.cache import Cache, DenseLayer
from models import decoder
from models.attention import Step
from models.params import path_name
from models.safetensors_io import save_arrays
from ops.attention import BlockSizes
from ops.platform import target
from train.exported import MANIFEST, SCHEMA
from train.run_folder import hash_file

PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}
"""jax.export's name of a platform, and that of ``ops.platform``."""

WEIGHTS = "weights.safetensors"

LENGTH_OF = {"forward": "t", "decode_step": "s"}
"""The size of each function that is a number of tokens: of the text, of the cache's slots."""


def check_platforms(names: Sequence[str]) -> None:
    """Raise ValueError for a platform that cannot be exported for."""
    for name in names:
        if name not in PLATFORMS:
            raise ValueError(
                f"unknown platform {name!r} for StableHLO: choose from {', '.join(PLATFORMS)}."
            )


def write_stablehlo(
    folder: pathlib.Path,
    params: decoder.Params,
    cfg: decoder.Config,
    platforms: Sequence[str],
    length: int | None = None,
    batch: int = 1,
) -> None:
    """Write ``manifest.json``, the weights and one artefact per function and platform.

    ``forward`` maps tokens (b, t) to logits (b, t, vocab); ``decode_step``, for causal models,
    takes and gives back a cache of s slots per row, with one token per row. b, t and s are free on
    cpu and cuda (t and s up to ``length``); the TPU kernels need them fixed, at ``batch`` and
    ``length``. Everything is computed in the dtype of the weights. Rotations that depend on the
    text's length (dynamic, longrope) take the length so far.

    Args:
        folder: an existing, empty folder.
        params: stacked or unstacked.
        platforms: of ``cpu``, ``cuda``, ``tpu``.
        length: most tokens of a text; default the config's ``max_length``.

    Raises:
        ValueError: an unknown platform, or a length outside 1 .. ``max_length``.
    """
    check_platforms(platforms)
    length = cfg.max_length if length is None else length
    if not 1 <= length <= cfg.max_length or batch < 1:
        raise ValueError(
            f"length {length} and batch {batch} do not fit: give a length of 1 to "
            f"{cfg.max_length}, the model's context, and a batch of at least 1."
        )
    params = decoder.unstack(params)
    weights = flat(params)
    save_arrays({name: np.asarray(x) for name, x in weights.items()}, folder / WEIGHTS)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    functions = _functions(cfg, jax.tree.structure(params), length)
    about: dict[str, Any] = {}
    for platform in platforms:
        about[platform] = {}
        for name, make in functions.items():
            sizes = {"b": batch, LENGTH_OF[name]: length}
            # The TPU kernels choose their blocks and state their cost in plain numbers.
            free = () if platform == "tpu" else tuple(sizes)
            inputs = _inputs(name, cfg, weights, sizes, free)
            file = f"{name}.{platform}.stablehlo"
            with target(PLATFORMS[platform]):
                exported = export.export(jax.jit(make(platform)), platforms=[platform])(
                    shapes, *inputs.values()
                )
            (folder / file).write_bytes(exported.serialize())
            about[platform][name] = {
                "file": file,
                "inputs": _described(inputs),
                "outputs": [_array(x) for x in exported.out_avals],
                "free": [n for n in sizes if n in free],
                "largest": {n: sizes[n] for n in sizes if n != "b" or n not in free},
            }
    manifest = {
        "schema": SCHEMA,
        "jax": jax.__version__,
        "vocab_size": cfg.vocab_size,
        "weights": WEIGHTS,
        "tensors": {name: _array(x) for name, x in shapes.items()},
        "platforms": about,
        "sha256": {path.name: hash_file(path) for path in sorted(folder.iterdir())},
    }
    text = json.dumps(manifest, indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def flat(params: Any) -> dict[str, Any]:
    """Weights by name, as ``segments[0].layers.attn.q.w``."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {path_name(path).lstrip("."): leaf for path, leaf in leaves}


def _functions(
    cfg: decoder.Config, structure: Any, length: int
) -> dict[str, Callable[[str], Callable[..., Any]]]:
    """The functions to export, each made for a platform; all take the weights by name."""

    def rebuilt(weights: dict[str, Any]) -> decoder.Params:
        names = flat(jax.tree.unflatten(structure, range(structure.num_leaves)))
        return jax.tree.unflatten(structure, [weights[name] for name in names])

    def forward_on(platform: str) -> Callable[..., Any]:
        policy = decoder.default_policy(cfg)
        if platform != "tpu":
            # One chunk: how many there are would depend on a length that is not known here.
            policy = dataclasses.replace(policy, blocks=BlockSizes(q=length))

        def forward(weights: dict[str, Any], tokens: Any) -> Any:
            params = rebuilt(weights)
            out = decoder.forward(params, cfg, tokens, policy=policy)
            return decoder.unembed(params, cfg, out.hidden)

        return forward

    def decode_on(platform: str) -> Callable[..., Any]:
        def decode_step(weights: dict[str, Any], cache: dict[str, Any], tokens: Any) -> Any:
            return _decode_step(rebuilt(weights), cfg, cache, tokens)

        return decode_step

    return {"forward": forward_on} | ({"decode_step": decode_on} if cfg.causal else {})


def _decode_step(
    params: decoder.Params, cfg: decoder.Config, cache: dict[str, Any], tokens: Any
) -> tuple[dict[str, Any], Any, Any]:
    """One token per row through the cache: the cache, the next ids (-1 if it was full), logits."""
    length, layers = cache["length"], range(cfg.num_layers)
    slots = cache["k.0"].shape[2]
    positions = jnp.arange(slots, dtype=jnp.int32)[None]
    state = Cache(
        layers=tuple(DenseLayer(cache[f"k.{i}"], cache[f"v.{i}"]) for i in layers),
        positions=jnp.broadcast_to(positions, (tokens.shape[0], slots)),
        length=length,
        scratch=jnp.zeros_like(length),
        next_position=length,
    )
    state, start = state.append_scratch(length[:, None])
    step = Step(length[:, None], start=start, slot_positions=state.positions, mode="decode")
    out = decoder.forward(params, cfg, tokens[:, None], step=step, cache=state.layers)
    state = dataclasses.replace(state, layers=out.cache).commit(None, jnp.ones_like(length))
    logits = decoder.unembed(params, cfg, out.hidden)[:, 0]
    following = jnp.where(length < slots, jnp.argmax(logits, axis=-1).astype(jnp.int32), -1)
    kept = {f"{name}.{i}": getattr(state.layers[i], name) for i in layers for name in ("k", "v")}
    return {**kept, "length": state.length}, following, logits


def _inputs(
    name: str,
    cfg: decoder.Config,
    weights: dict[str, Any],
    sizes: dict[str, int],
    free: Sequence[str],
) -> dict[str, Any]:
    """Abstract arguments after the weights; sizes in ``free`` are symbols bounded by ``sizes``."""
    bounds = [f"{n} <= {sizes[n]}" for n in free if n != "b"]
    scope = export.SymbolicScope(bounds)
    size = {n: export.symbolic_shape(n, scope=scope)[0] if n in free else sizes[n] for n in sizes}
    ids = jax.ShapeDtypeStruct
    if name == "forward":
        return {"tokens": ids((size["b"], size["t"]), jnp.int32)}
    widths = {"k": decoder.default_policy(cfg).key_width(cfg), "v": cfg.head_dim}
    dtype, lead = weights["final_norm.scale"].dtype, (size["b"], cfg.num_kv_heads, size["s"])
    cache: dict[str, Any] = {
        f"{part}.{i}": ids((*lead, width), dtype)
        for i in range(cfg.num_layers)
        for part, width in widths.items()
    }
    cache["length"] = ids((size["b"],), jnp.int32)
    return {"cache": cache, "tokens": ids((size["b"],), jnp.int32)}


def _described(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs by dotted name."""
    found = {}
    for name, value in inputs.items():
        parts = {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else None
        found |= {k: _array(v) for k, v in (parts or {name: value}).items()}
    return found


def _array(x: Any) -> dict[str, Any]:
    shape = [n if isinstance(n, int) else str(n) for n in x.shape]
    return {"shape": shape, "dtype": np.dtype(x.dtype).name}
