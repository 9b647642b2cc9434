"""A trained LC-PFN on disk, and weights of the released code.

A folder holds ``config.json`` (the network's shape) and ``model.safetensors`` (its parameters and
the borders of its bins).
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from models import lc_pfn
from models.layers import MLP, Attention, Layer, Linear, Norm
from models.load import ASSETS
from models.params import ParamSpec, path_name, validate
from models.safetensors_io import Safetensors, new_directory, write_checkpoint

SCHEMA = 1
MODEL_TYPE = "lc_pfn"
MAX_SHARD_BYTES = 2 << 30


@struct.dataclass
class LCPFN:
    """A trained network and the borders of its bins."""

    params: lc_pfn.Params
    borders: Any  # (buckets + 1,)
    cfg: lc_pfn.Config = struct.field(pytree_node=False)


def specs(cfg: lc_pfn.Config) -> LCPFN:
    """The abstract parameters, borders included."""
    return LCPFN(lc_pfn.specs(cfg), ParamSpec((cfg.buckets + 1,), (None,)), cfg)


def save(directory: str | pathlib.Path, model: LCPFN, dtype: Any = jnp.float32) -> None:
    """Write a network; its weights in ``dtype``, the borders always in float32.

    Raises:
        FileExistsError: the directory is not empty.
        ValueError: parameters that the config does not describe.
        OSError: it cannot be written.
    """
    validate(model, specs(model.cfg))
    settings = {"schema": SCHEMA, "model_type": MODEL_TYPE, **dataclasses.asdict(model.cfg)}
    tensors = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = _name(path)
        kind = np.dtype(np.float32 if name == "borders" else dtype)
        size = math.prod(leaf.shape) * kind.itemsize
        tensors.append((name, size, lambda leaf=leaf, kind=kind: np.asarray(leaf, kind)))
    with new_directory(directory) as folder:
        (folder / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
        write_checkpoint(folder, tensors, MAX_SHARD_BYTES)


def load(name: str | pathlib.Path) -> LCPFN:
    """Read a network, in float32: of a directory, or by the name of one under ``assets/``.

    Raises:
        FileNotFoundError: nothing goes by that name, or no ``config.json`` or no safetensors there.
        ValueError: a config of another kind of model or another version, tensors that it does not
            describe, or a damaged file.
    """
    directory = pathlib.Path(name)
    if not directory.is_dir():
        if not (ASSETS / name / "config.json").is_file():
            raise FileNotFoundError(
                f"no LC-PFN {str(name)!r}: name the folder of one, or {', '.join(shipped())}."
            )
        directory = ASSETS / name
    cfg = _read_config(directory / "config.json")
    source = Safetensors(directory)
    wanted = {_name(path): s for path, s in jax.tree_util.tree_leaves_with_path(specs(cfg))}
    if odd := sorted(wanted.keys() ^ set(source.names())):
        state = "missing from" if odd[0] in wanted else "not expected in"
        raise ValueError(
            f"tensor {odd[0]} is {state} {directory}: its config is of another network."
        )
    for name, spec in wanted.items():
        if source.shape(name) != spec.shape:
            raise ValueError(
                f"tensor {name} in {directory} has shape {source.shape(name)}, its config asks for "
                f"{spec.shape}: save the network again."
            )
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(source.read(_name(path)), jnp.float32), specs(cfg)
    )


def shipped() -> list[str]:
    """Names of the networks under ``assets/``."""
    kinds = {
        path.parent.name: json.loads(path.read_text()) for path in ASSETS.glob("*/config.json")
    }
    return sorted(name for name, kind in kinds.items() if kind.get("model_type") == MODEL_TYPE)


def import_torch_state(
    state: Mapping[str, Any], heads: int | None = None, borders: Any = None
) -> LCPFN:
    """A network from the released code's ``state_dict``, arrays by name.

    Args:
        state: as :func:`models.torch_archive.read_torch` reads it; names may share a prefix, such
            as ``module.``.
        heads: of the attention, which the arrays do not tell; None: the released sizes' one per
            128 channels.
        borders: of the bins, if ``criterion.borders`` is not in the state.

    Raises:
        ValueError: names that are missing or unknown, shapes that do not fit together, or borders
            that do not rise.
    """
    arrays = {_plain(name): np.asarray(array) for name, array in state.items()}
    reader = _TorchState(arrays)
    if borders is None:
        borders = reader.take("criterion.borders")
    cfg = reader.config(heads, len(borders) - 1)
    layers = [reader.layer(i) for i in range(cfg.layers)]
    shapes = [[leaf.shape for leaf in jax.tree.leaves(layer)] for layer in layers]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("the layers differ in shape: the state is not of an LC-PFN.")
    params = lc_pfn.Params(
        x_embed=reader.linear("encoder.2"),
        y_embed=reader.linear("y_encoder.1"),
        layers=jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers),
        hidden=reader.linear("decoder.0"),
        out=reader.linear("decoder.2"),
    )
    known = ("criterion.bucket_widths", "criterion.smoothing")  # the borders say it all
    if unknown := sorted(reader.arrays.keys() - reader.taken - set(known)):
        raise ValueError(f"{unknown[0]} is no parameter of LC-PFN: give its state_dict alone.")
    if not (np.diff(borders) > 0).all():
        raise ValueError("criterion.borders do not rise: the state is damaged, get it again.")
    model = LCPFN(params, jnp.asarray(borders, jnp.float32), cfg)
    validate(model, specs(cfg))
    return model


class _TorchState:
    """Arrays of a state dict and which of them were used."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays
        self.taken: set[str] = set()

    def take(self, name: str) -> np.ndarray:
        """One array by name."""
        if name not in self.arrays:
            raise ValueError(f"{name} is missing: give the whole state_dict of an LC-PFN.")
        self.taken.add(name)
        return self.arrays[name].astype(np.float32)

    def config(self, heads: int | None, buckets: int) -> lc_pfn.Config:
        """What the shapes tell."""
        prefix = "transformer_encoder.layers."
        layers = [n.removeprefix(prefix) for n in self.arrays if n.startswith(prefix)]
        numbers = {int(n.split(".")[0]) for n in layers}
        if numbers != set(range(len(numbers))) or not numbers:
            raise ValueError(
                f"layers {sorted(numbers)} are not 0, 1, ...: give a whole state_dict."
            )
        ffn, width = self.take(f"{prefix}0.linear1.weight").shape
        return lc_pfn.Config(
            width=width,
            layers=len(numbers),
            heads=max(width // 128, 1) if heads is None else heads,
            ffn=ffn,
            buckets=buckets,
        )

    def linear(self, name: str) -> Linear:
        """A linear layer, which torch keeps as (out, in)."""
        w, b = self.take(f"{name}.weight"), self.take(f"{name}.bias")
        if w.ndim != 2 or b.shape != w.shape[:1]:
            raise ValueError(f"{name} has a weight of shape {w.shape} and a bias of {b.shape}.")
        return Linear(jnp.asarray(w.T), jnp.asarray(b))

    def norm(self, name: str) -> Norm:
        """A layer norm."""
        return Norm(
            jnp.asarray(self.take(f"{name}.weight")), jnp.asarray(self.take(f"{name}.bias"))
        )

    def layer(self, i: int) -> Layer:
        """One block; its q, k and v are packed by rows."""
        name = f"transformer_encoder.layers.{i}"
        w = self.take(f"{name}.self_attn.in_proj_weight")
        b = self.take(f"{name}.self_attn.in_proj_bias")
        if w.shape[0] != 3 * w.shape[1] or b.shape != w.shape[:1]:
            raise ValueError(f"{name}.self_attn.in_proj has shape {w.shape}: it packs q, k and v.")
        q, k, v = (
            Linear(jnp.asarray(part.T), jnp.asarray(bias))
            for part, bias in zip(np.split(w, 3), np.split(b, 3), strict=True)
        )
        return Layer(
            attn_norm=self.norm(f"{name}.norm1"),
            attn=Attention(q, k, v, self.linear(f"{name}.self_attn.out_proj")),
            mlp_norm=self.norm(f"{name}.norm2"),
            mlp=MLP(self.linear(f"{name}.linear1"), self.linear(f"{name}.linear2")),
        )


def _plain(name: str) -> str:
    """A name without what a wrapping module put before it."""
    for start in ("transformer_encoder.", "y_encoder.", "encoder.", "decoder.", "criterion."):
        if name.startswith(start):
            return name
        _, found, rest = name.partition(f".{start}")
        if found:
            return start + rest
    return name


def _read_config(path: pathlib.Path) -> lc_pfn.Config:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: name the folder of a trained LC-PFN.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): save the network again.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings: save the network again.")
    kind, schema = (settings.pop(name, None) for name in ("model_type", "schema"))
    if kind != MODEL_TYPE or schema != SCHEMA:
        raise ValueError(
            f"{path} is of model_type {kind!r}, schema {schema}, and {MODEL_TYPE!r}, schema "
            f"{SCHEMA}, is read here: name another folder."
        )
    try:
        return lc_pfn.Config(**settings)
    except TypeError as error:
        raise ValueError(
            f"{path} has unknown settings ({error}): save the network again."
        ) from error


def _name(path: tuple) -> str:
    return path_name(path).lstrip(".")
