"""Hugging Face model directories: the decoder's parameters in and out of safetensors.

Tensor names and layouts are those of the ``transformers`` library for the families of
``hf_config``. There a linear weight is (out, in); here it is (in, out) and layers are stacked.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from models import params as parameters
from models.decoder import Config, Params, Segment, specs
from models.hf_config import family_of, read_config, to_hf
from models.safetensors_io import (
    DTYPES,
    Safetensors,
    TensorSource,
    new_directory,
    write_checkpoint,
)
from models.sharding import ShardingRules
from models.tokenizer import Tokenizer, check_vocab

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)

_TOP = {".embed": "embed_tokens", ".final_norm.scale": "norm"}
_LAYER = {
    ".attn_norm.scale": "input_layernorm.weight",
    ".attn.q.w": "self_attn.q_proj.weight",
    ".attn.k.w": "self_attn.k_proj.weight",
    ".attn.v.w": "self_attn.v_proj.weight",
    ".attn.o.w": "self_attn.o_proj.weight",
    ".attn.q.b": "self_attn.q_proj.bias",
    ".attn.k.b": "self_attn.k_proj.bias",
    ".attn.v.b": "self_attn.v_proj.bias",
    ".attn.o.b": "self_attn.o_proj.bias",
    ".attn.q_norm.scale": "self_attn.q_norm.weight",
    ".attn.k_norm.scale": "self_attn.k_norm.weight",
    ".mlp_norm.scale": "post_attention_layernorm.weight",
    ".mlp.gate.w": "mlp.gate_proj.weight",
    ".mlp.up.w": "mlp.up_proj.weight",
    ".mlp.down.w": "mlp.down_proj.weight",
    ".mlp.gate.b": "mlp.gate_proj.bias",
    ".mlp.up.b": "mlp.up_proj.bias",
    ".mlp.down.b": "mlp.down_proj.bias",
}
_GPT2_TOP = {
    ".embed": "wte.weight",
    ".position_embed": "wpe.weight",
    ".final_norm.scale": "ln_f.weight",
    ".final_norm.bias": "ln_f.bias",
}
_GPT2_LAYER = {
    ".attn_norm.scale": "ln_1.weight",
    ".attn_norm.bias": "ln_1.bias",
    ".attn.o.w": "attn.c_proj.weight",
    ".attn.o.b": "attn.c_proj.bias",
    ".mlp_norm.scale": "ln_2.weight",
    ".mlp_norm.bias": "ln_2.bias",
    ".mlp.up.w": "mlp.c_fc.weight",
    ".mlp.up.b": "mlp.c_fc.bias",
    ".mlp.down.w": "mlp.c_proj.weight",
    ".mlp.down.b": "mlp.c_proj.bias",
}
_LAYER_PREFIX = ".segments[0].layers"
_HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one (unstacked) parameter of ours lies in a Hugging Face checkpoint."""

    name: str
    transpose: bool = False
    columns: tuple[int, int, int] | None = None  # start, stop, total: a part of a fused tensor

    def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor in the file, for a parameter of ``shape``."""
        if self.columns is not None:
            return (*shape[:-1], self.columns[2])
        return shape[::-1] if self.transpose else shape

    def take(self, tensor: np.ndarray) -> np.ndarray:
        """Our parameter out of the file's tensor."""
        if self.columns is not None:
            return tensor[..., self.columns[0] : self.columns[1]]
        return tensor.T if self.transpose else tensor


def slots(cfg: Config, path: str) -> list[Slot]:
    """Where the parameter named ``path`` (of ``specs(cfg)``) lies: one slot per stacked layer.

    Raises:
        ValueError: the parameter has no counterpart there, as a codec's leaf has not.
    """
    family = family_of(cfg)
    gpt2 = family == "gpt2"
    if family == "longreach":
        return _own_slots(cfg, path)
    if path == ".head":
        return [Slot(_HEAD, transpose=True)]
    layer = path.removeprefix(_LAYER_PREFIX)
    if gpt2:
        if path in _GPT2_TOP:
            return [Slot(f"transformer.{_GPT2_TOP[path]}")]
        fused = {".attn.q": 0, ".attn.k": 1, ".attn.v": 2}.get(layer[:-2])
        if fused is not None:
            width, kind = cfg.hidden_size, "weight" if layer.endswith(".w") else "bias"
            columns = (fused * width, (fused + 1) * width, 3 * width)
            template = Slot(f"attn.c_attn.{kind}", columns=columns)
        else:
            template = Slot(_GPT2_LAYER[layer]) if layer in _GPT2_LAYER else None
        prefix = "transformer.h."
    else:
        if path in _TOP:
            return [Slot(f"model.{_TOP[path]}.weight")]
        template = Slot(_LAYER[layer], layer.endswith(".w")) if layer in _LAYER else None
        prefix = "model.layers."
    if template is None or not path.startswith(_LAYER_PREFIX):
        raise ValueError(
            f"parameter {path} has no Hugging Face name: decode codec leaves and merge segments "
            "into one stack before exporting."
        )
    return [
        dataclasses.replace(template, name=f"{prefix}{i}.{template.name}")
        for i in range(cfg.num_layers)
    ]


def _own_slots(cfg: Config, path: str) -> list[Slot]:
    """Where a parameter lies in the ``longreach`` form: under its own name."""
    if not path.startswith(_LAYER_PREFIX):
        return [Slot(path[1:])]
    layer = path.removeprefix(_LAYER_PREFIX)
    return [Slot(f"layers.{i}{layer}") for i in range(cfg.num_layers)]


def assemble(
    cfg: Config,
    source: TensorSource,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> Params:
    """Parameters of ``cfg`` from named tensors, one parameter in host memory at a time.

    Args:
        source: tensors under Hugging Face names.
        dtype: dtype of the parameters; default: as stored.
        mesh, rules: place each parameter by the rules (default: the default rules).

    Raises:
        ValueError: missing or left-over tensors (by their names there), or wrong shapes.
    """
    abstract = specs(cfg)
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    named = [(parameters.path_name(path), spec) for path, spec in leaves]
    wanted = {name: (spec, slots(cfg, name)) for name, spec in named}
    _check_names(cfg, source, {slot.name for _, found in wanted.values() for slot in found})
    shardings = None
    if mesh is not None:
        shardings = parameters.shardings(abstract, mesh, rules or ShardingRules())
        shardings = {
            parameters.path_name(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(shardings)
        }
    arrays = []
    for path, (spec, found) in wanted.items():
        host = _gather(
            source, spec.shape, found, stacked=path.startswith(_LAYER_PREFIX), dtype=dtype
        )
        if shardings is None:
            arrays.append(jax.device_put(host))
        else:
            arrays.append(
                jax.make_array_from_callback(host.shape, shardings[path], host.__getitem__)
            )
    return jax.tree.unflatten(tree, arrays)


def _check_names(cfg: Config, source: TensorSource, wanted: set[str]) -> None:
    given = set(source.names())
    if missing := sorted(wanted - given):
        raise ValueError(
            f"tensor {missing[0]} is missing from {source.label} ({len(missing)} in all): the "
            "checkpoint and its config do not belong together."
        )
    extra = given - wanted
    if cfg.tied and _HEAD in extra:
        # Some writers store the tied matrix twice; equal copies are harmless.
        embedding = slots(cfg, ".embed")[0].name
        if not np.array_equal(source.read(_HEAD), source.read(embedding)):
            raise ValueError(
                f"{source.label} has {_HEAD} different from {embedding} although "
                "tie_word_embeddings is true: set it to false in config.json."
            )
        extra.discard(_HEAD)
    if extra:
        raise ValueError(
            f"tensor {sorted(extra)[0]} in {source.label} has no place in this model "
            f"({len(extra)} such): the checkpoint and its config do not belong together."
        )


def _gather(
    source: TensorSource, shape: tuple[int, ...], found: list[Slot], stacked: bool, dtype: Any
) -> np.ndarray:
    """One parameter as a host array: read, checked, turned, converted, stacked."""
    buffer = None
    each = shape[1:] if stacked else shape
    for i, slot in enumerate(found):
        if source.shape(slot.name) != slot.file_shape(each):
            raise ValueError(
                f"tensor {slot.name} in {source.label} has shape {source.shape(slot.name)} but the "
                f"config asks for {slot.file_shape(each)}: they do not belong together."
            )
        tensor = source.read(slot.name)
        if buffer is None:
            buffer = np.empty(shape, tensor.dtype if dtype is None else np.dtype(dtype))
        elif dtype is None and tensor.dtype != buffer.dtype:
            raise ValueError(
                f"tensor {slot.name} in {source.label} is {tensor.dtype} but the layers before it "
                f"are {buffer.dtype}: name the dtype to load them in."
            )
        (buffer[i] if stacked else buffer)[...] = slot.take(tensor)
    if buffer is None:
        raise ValueError("a model needs at least one layer: check num_hidden_layers.")
    return buffer


class _Renamed:
    """A gpt2 checkpoint under the names of its language-model class.

    Older exports leave out the prefix ``transformer.`` and store the causal masks as tensors.
    """

    def __init__(self, source: TensorSource):
        self.source = source
        self._old: dict[str, str] = {}
        for name in source.names():
            if name.endswith((".attn.bias", ".attn.masked_bias")):
                continue
            top = name.partition(".")[0] in ("wte", "wpe", "h", "ln_f")
            self._old[f"transformer.{name}" if top else name] = name

    @property
    def label(self) -> str:
        return self.source.label

    def names(self) -> list[str]:
        return list(self._old)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(self._old[name])

    def read(self, name: str) -> np.ndarray:
        return self.source.read(self._old[name])


def load_hf(
    directory: str | pathlib.Path,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> tuple[Params, Config]:
    """Parameters and config of a directory in Hugging Face layout, of a family in ``FAMILIES``.

    Args:
        directory: holds ``config.json`` and ``model.safetensors``, or shards with their index.
        dtype: dtype of the parameters; default: as stored.
        mesh, rules: place each parameter by the rules (default: the default rules).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an unsupported setting, a corrupt file, missing or left-over tensors, wrong
            shapes, or an index that points outside the folder.
    """
    cfg = read_config(directory)
    source: TensorSource = Safetensors(directory)
    if family_of(cfg) == "gpt2":
        source = _Renamed(source)
    return assemble(cfg, source, dtype, mesh, rules), cfg


def save_hf(
    directory: str | pathlib.Path,
    params: Params,
    cfg: Config,
    tokenizer_dir: str | pathlib.Path | None = None,
    dtype: Any = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a Hugging Face directory; it appears whole or not at all.

    Args:
        directory: must not exist, or be empty.
        params: stacked or unstacked plain arrays in float32, float16 or bfloat16.
        tokenizer_dir: its tokenizer files are copied along.
        dtype: dtype on disk; default: each parameter's own.
        max_shard_bytes: above this the weights are cut into shards with an index.

    Raises:
        ValueError: the config or a parameter has no Hugging Face form, or the tokenizer has more
            ids than the model.
        FileNotFoundError: ``tokenizer_dir`` has no ``tokenizer.json``.
        FileExistsError: the directory is not empty.
        OSError: it cannot be written.
    """
    params = _one_stack(params)
    parameters.validate(params, specs(cfg))
    tensors = _export_list(params, cfg, dtype)
    config = to_hf(cfg, np.dtype(params.embed.dtype if dtype is None else dtype).name)
    files: list[pathlib.Path] = []
    if tokenizer_dir is not None:
        tokenizer = Tokenizer.load(tokenizer_dir)
        check_vocab(tokenizer, cfg.vocab_size)
        # Generation code of others reads these two in the model's config.
        config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        files = [pathlib.Path(tokenizer_dir) / name for name in TOKENIZER_FILES]
    with new_directory(directory) as folder:
        text = json.dumps(config, indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        for file in files:
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        write_checkpoint(folder, tensors, max_shard_bytes)


def _one_stack(params: Params) -> Params:
    """The same parameters with all layers in one stacked segment."""
    if len(params.segments) == 1 and params.segments[0].stacked:
        return params
    stacks = [
        s.layers if s.stacked else jax.tree.map(lambda leaf: leaf[None], s.layers)
        for s in params.segments
    ]
    layers = jax.tree.map(lambda *leaves: np.concatenate([np.asarray(x) for x in leaves]), *stacks)
    total = sum(s.count for s in params.segments)
    return dataclasses.replace(params, segments=(Segment(layers, count=total),))


def _export_list(
    params: Params, cfg: Config, dtype: Any
) -> list[tuple[str, int, Callable[[], np.ndarray]]]:
    """Every tensor of the checkpoint as (name, bytes, maker), layer by layer."""
    parts: dict[str, list[tuple[Slot, Any, int | None]]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = parameters.path_name(path)
        stacked = name.startswith(_LAYER_PREFIX)
        for i, slot in enumerate(slots(cfg, name)):
            parts.setdefault(slot.name, []).append((slot, leaf, i if stacked else None))
    tensors = []
    for name, pieces in parts.items():
        kind = np.dtype(pieces[0][1].dtype if dtype is None else dtype)
        if kind not in DTYPES.values():
            raise ValueError(f"tensor {name} would be {kind}: export float32, float16 or bfloat16.")
        slot, leaf, layer = pieces[0]
        each = leaf.shape if layer is None else leaf.shape[1:]
        size = int(np.prod(slot.file_shape(each))) * kind.itemsize
        tensors.append((name, size, _maker(pieces, kind)))
    return sorted(tensors, key=lambda tensor: _natural(tensor[0]))


def _maker(pieces: list[tuple[Slot, Any, int | None]], kind: np.dtype) -> Callable[[], np.ndarray]:
    def make() -> np.ndarray:
        pieces.sort(key=lambda piece: piece[0].columns or (0, 0, 0))
        arrays = []
        for slot, leaf, layer in pieces:
            array = np.asarray(leaf if layer is None else leaf[layer]).astype(kind)
            arrays.append(array.T if slot.transpose else array)
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, -1)

    return make


def _natural(name: str) -> list[Any]:
    """A sort key that puts layer 2 before layer 10."""
    return [(0, int(x), "") if x.isdigit() else (1, 0, x) for x in name.split(".")]
