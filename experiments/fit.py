"""Which context fits a model on a TPU slice, from the TPU compiler and without a TPU.

``python -m experiments.fit --model=llama3-8b --slice=v5e-16 --lengths=32768,131072,1048576
--mesh=context=4,tensor=4`` compiles, ahead of time, the two programs that the engine runs at a
cache of that many slots: one chunk of a prompt and the decoding loop. It reports what they need per
device, and whether that fits. There are no weights: everything is shapes. It needs the extra
``aot``.

Arguments are weights and cache, temporaries what the program needs besides; a program that the
compiler refuses for want of memory does not fit, and its sentence is kept. Seconds are rooflines of
one device at the chip's published peaks (``experiments.tpu_slices``), communication not counted:

- ``least``: the compiler's operations at the peak rate, or every argument but a gathered embedding
  table read once at the memory's bandwidth, whichever takes longer.
- ``counted``: the same with all the bytes that the compiler counts. It counts a copy to the chip's
  fast memory and the read from there, and what a kernel says of a cache whose rows are full.

Positions beyond those that a model was trained for are not looked at: this is about memory.
"""

import dataclasses
import functools
import math
import re
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import record, tpu_slices
from experiments.report import markdown
from inference.cache import init_cache
from inference.drafter import NoDrafter
from inference.loop import State, decode_rounds, init_stats, prefill_chunk
from inference.sharded import state_shardings, weight_shardings
from models import decoder
from models.hf_config import from_hf, read_config
from models.params import shape_dtype
from models.sharding import ShardingRules, make_mesh, parse_mesh
from ops.platform import target
from ops.sampling import SamplingParams

MODELS: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "max_position_embeddings": 8192, "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "max_position_embeddings": 131072, "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""The sizes in the public ``config.json`` of each."""

DTYPES = ("bfloat16", "float32")
GIB = 2**30
PROGRAMS = ("prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is asked. An empty ``mesh``: key heads over tensor while they last, then context."""

    model: tuple[str, ...]
    slice: tuple[str, ...]
    lengths: tuple[int, ...]
    mesh: str = ""
    rows: int = 1
    prefill_size: int = 512
    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    layers: int | None = None


def config_of(name: str, layers: int | None = None) -> decoder.Config:
    """The config of a known name or of a local Hugging Face directory, with another depth if asked.

    Raises:
        ValueError: neither, or no positive number of layers.
    """
    if name in MODELS:
        cfg = from_hf(MODELS[name])
    elif Path(name).is_dir():
        cfg = read_config(name)
    else:
        raise ValueError(
            f"unknown model {name!r}: use {', '.join(MODELS)}, or a folder that holds config.json."
        )
    if layers is None:
        return cfg
    if layers < 1:
        raise ValueError(f"layers must be 1 or more, got {layers}.")
    windows = None if cfg.windows is None else (cfg.windows * layers)[:layers]
    return dataclasses.replace(cfg, num_layers=layers, windows=windows)


def mesh_sizes(text: str, cfg: decoder.Config, name: str) -> dict[str, int]:
    """Sizes of the mesh over the slice ``name``, as given or chosen.

    Raises:
        ValueError: they do not multiply to the slice's devices.
    """
    count = tpu_slices.slice_named(name).devices
    if not text:
        tensor = math.gcd(cfg.num_kv_heads, cfg.num_heads, count)
        return parse_mesh(f"tensor={tensor},context={count // tensor}")
    sizes = parse_mesh(text)
    if math.prod(sizes.values()) != count:
        raise ValueError(
            f"the mesh {text} has {math.prod(sizes.values())} devices and the slice {name} has "
            f"{count}: change --mesh so that the sizes multiply to {count}."
        )
    return sizes


def check(settings: Settings, sizes: dict[str, int]) -> None:
    """Refuse what the mesh would not divide, and dtypes that are not known.

    Raises:
        ValueError: which setting, and what it must be.
    """
    for name in ("dtype", "cache_dtype"):
        if getattr(settings, name) not in DTYPES:
            raise ValueError(
                f"{name} {getattr(settings, name)!r} is not supported: use {' or '.join(DTYPES)}."
            )
    rows = sizes["data"] * sizes["fsdp"]
    if settings.rows < 1 or settings.rows % rows:
        raise ValueError(
            f"{settings.rows} rows cannot be divided by data * fsdp = {rows} of the mesh: "
            f"use a multiple of {rows}."
        )
    step = settings.prefill_size
    if step < 1 or (step > sizes["context"] and step % sizes["context"]):
        raise ValueError(
            f"prefill_size {step} cannot be divided by context = {sizes['context']} of the mesh: "
            "use a multiple of it."
        )
    for length in settings.lengths:
        if length < step or length % sizes["context"]:
            raise ValueError(
                f"the length {length} must be a multiple of context = {sizes['context']} of the "
                f"mesh and hold a chunk of {step} tokens."
            )


def abstract(
    cfg: decoder.Config, mesh: Mesh, settings: Settings, length: int
) -> tuple[decoder.Params, State]:
    """Shapes of the weights and of the decoding state, in their places on the mesh."""
    rules, rows = ShardingRules(), settings.rows
    weights = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, settings.dtype, sharding=place),
        jax.eval_shape(decoder.unstack, shape_dtype(decoder.specs(cfg))),
        weight_shardings(cfg, mesh, rules),
    )

    def start() -> State:
        zeros = jnp.zeros(rows, jnp.int32)
        width = decoder.default_policy(cfg).key_width(cfg)
        return State(
            tokens=jnp.zeros((rows, length), jnp.int32),
            begin=zeros,
            length=zeros,
            limit=zeros,
            done=jnp.zeros(rows, bool),
            cache=init_cache(cfg, rows, length, settings.cache_dtype, width),
            drafter=None,
            stats=init_stats(rows, 0, 1),
        )

    state = jax.eval_shape(start)
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        state,
        state_shardings(state, mesh, rules),
    )
    return weights, state


def lowered(
    program: str, cfg: decoder.Config, mesh: Mesh, settings: Settings, length: int
) -> jax.stages.Lowered:
    """One of the engine's programs, traced for a TPU over the mesh."""
    weights, state = abstract(cfg, mesh, settings, length)
    whole = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    rows, policy = settings.rows, decoder.default_policy(cfg)
    with target("tpu"), jax.set_mesh(mesh):
        if program == "prefill":
            chunk = whole((rows, settings.prefill_size), jnp.int32)
            counts = whole((rows,), jnp.int32)
            return prefill_chunk.lower(
                weights, cfg, policy, state.cache, chunk, counts, counts,
                extent=length, outputs=frozenset(),
            )  # fmt: skip
        sampling = jax.tree.map(
            lambda x: whole(x.shape, x.dtype), jax.eval_shape(SamplingParams.make)
        )
        return decode_rounds.lower(
            weights, cfg, policy, NoDrafter(), None, state, whole((rows,), jnp.int32), sampling,
            whole((1,), jnp.int32), whole((), jnp.int32), extent=length, rule="greedy",
        )  # fmt: skip


def embedding_bytes(cfg: decoder.Config, mesh: Mesh, settings: Settings) -> int:
    """Bytes of one device of an embedding table of which a step reads a few rows only."""
    if cfg.tied:
        return 0
    place = weight_shardings(cfg, mesh, ShardingRules()).embed
    shard = place.shard_shape((cfg.vocab_size, cfg.hidden_size))
    return math.prod(shard) * jnp.dtype(settings.dtype).itemsize


def figures(compiled: Any, chip: tpu_slices.Chip, unread: int) -> dict[str, Any]:
    """What the compiler says of a program, and the rooflines of one device.

    ``unread``: bytes of arguments that a step does not read.
    """
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    arguments = memory.argument_size_in_bytes
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporaries = memory.temp_size_in_bytes + max(0, fresh)
    work = cost["flops"] / chip.flops
    return {
        "arguments_gib": arguments / GIB,
        "temporaries_gib": temporaries / GIB,
        "total_gib": (arguments + temporaries) / GIB,
        "memory_share": (arguments + temporaries) / GIB / chip.memory_gib,
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "least_seconds": max(work, (arguments - unread) / chip.bandwidth),
        "counted_seconds": max(work, cost["bytes accessed"] / chip.bandwidth),
    }


def refusal(message: str) -> str | None:
    """What the compiler says if it refuses a program for want of the chip's memory, else None."""
    found = re.search(r"Ran out of memory[^\n]*\bhbm\b[^\n]*", message, re.IGNORECASE)
    return found.group(0) if found and "RESOURCE_EXHAUSTED" in message else None


def compile_one(lowering: Any, chip: tpu_slices.Chip, unread: int) -> dict[str, Any]:
    """Figures of one program, or the compiler's refusal; and the seconds of compiling it."""
    start = time.perf_counter()
    try:
        found: dict[str, Any] = {"fits": True, **figures(lowering.compile(), chip, unread)}
    except jax.errors.JaxRuntimeError as error:
        reason = refusal(str(error))
        if reason is None:
            raise
        found = {"fits": False, "refusal": reason}
    return found | {"compile_seconds": time.perf_counter() - start}


def measure(settings: Settings, model: str, name: str, length: int) -> dict[str, Any]:
    """One row: a model at a length on a slice."""
    cfg, place = config_of(model, settings.layers), tpu_slices.slice_named(name)
    sizes = mesh_sizes(settings.mesh, cfg, name)
    mesh = make_mesh(sizes, tpu_slices.devices(place.topology))
    unread = embedding_bytes(cfg, mesh, settings)
    programs = {
        program: compile_one(lowered(program, cfg, mesh, settings, length), place.chip, unread)
        for program in PROGRAMS
    }
    return {
        "model": model if model in MODELS else Path(model).name,
        "layers": cfg.num_layers,
        "slice": name,
        "mesh": ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1),
        "length": length,
        "chip_gib": place.chip.memory_gib,
        "fits": all(found["fits"] for found in programs.values()),
        "programs": programs,
    }


def run(settings: Settings) -> list[dict[str, Any]]:
    """All rows; everything that can be refused is, before the first compilation.

    Raises:
        ValueError: a name, a mesh or a length that does not do.
        RuntimeError: libtpu is not installed.
    """
    for model in settings.model:
        for name in settings.slice:
            check(settings, mesh_sizes(settings.mesh, config_of(model, settings.layers), name))
    rows = []
    for name in settings.slice:
        for model in settings.model:
            for length in settings.lengths:
                rows.append(measure(settings, model, name, length))
                print(sentence(rows[-1]), flush=True)
    return rows


def sentence(row: dict[str, Any]) -> str:
    """A row in words."""
    what = f"{row['model']} with {row['length']} slots on {row['slice']} ({row['mesh']})"
    if row["fits"]:
        total = max(found["total_gib"] for found in row["programs"].values())
        least = row["programs"]["decode"]["least_seconds"]
        return (
            f"{what}: fits in {total:.2f} of {row['chip_gib']} GiB per device; "
            f"a decoding step takes {1e3 * least:.2f} ms or more"
        )
    said = [
        f"{program}: {found['refusal']}"
        for program, found in row["programs"].items()
        if not found["fits"]
    ]
    return f"{what}: does not fit. {' '.join(said)}"


def settings_of(values: Any) -> Settings:
    """Settings from flag values.

    Raises:
        ValueError: a length that is no positive integer, or nothing asked.
    """
    for text in values.lengths:
        if not text.strip().isdigit():
            raise ValueError(f"lengths are positive integers, as in 32768,131072; got {text!r}.")
    settings = Settings(
        model=tuple(values.model),
        slice=tuple(values.slice),
        lengths=tuple(int(text) for text in values.lengths),
        mesh=values.mesh,
        rows=values.rows,
        prefill_size=values.prefill_size,
        dtype=values.dtype,
        cache_dtype=values.cache_dtype,
        layers=values.layers,
    )
    if not (settings.model and settings.slice and settings.lengths):
        raise ValueError("give at least one each of --model, --slice and --lengths.")
    return settings


def main(_: list[str]) -> None:
    """Compile, print in words and as a table, save."""
    from experiments.shown import fit as shown

    try:
        settings = settings_of(flags.FLAGS)
        rows = run(settings)
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from error
    print(markdown(shown.HEADER, [shown.row(row) for row in rows]))
    timing = {"libtpu": metadata.version("libtpu")}
    folder = Path(flags.FLAGS.out) if flags.FLAGS.out else None
    name = record.name_of("fit", None, flags.FLAGS.label)
    print("saved", record.save(name, rows, config=settings, seeds=[], timing=timing, folder=folder))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # concrete arrays; an installed libtpu finds no TPU
    flags.DEFINE_list("model", ["llama3-8b"], f"{', '.join(MODELS)}, or folders with config.json.")
    flags.DEFINE_list("slice", ["v5e-16"], f"Of {', '.join(tpu_slices.SLICES)}.")
    flags.DEFINE_list("lengths", ["32768"], "Cache slots per row.")
    flags.DEFINE_string("mesh", "", "As context=4,tensor=4; empty: chosen by key heads.")
    flags.DEFINE_integer("rows", 1, "Sequences at a time.")
    flags.DEFINE_integer("prefill_size", 512, "Tokens per chunk of a prompt.")
    flags.DEFINE_string("dtype", "bfloat16", "Of the weights.")
    flags.DEFINE_string("cache_dtype", "bfloat16", "Of keys and values.")
    flags.DEFINE_integer("layers", None, "Another depth, for a quick check.")
    flags.DEFINE_string("label", "", "Ending of the result's name.")
    flags.DEFINE_string("out", "", "Folder of the result; empty: the committed ones.")
    app.run(main)
