"""Which context fits a model on a TPU slice, from the TPU compiler and without a TPU.

``python -m experiments.fit --model=llama3-8b --slice=v5e-16 --lengths=32768,131072,1048576
--mesh=context=4,tensor=4`` compiles, ahead of time, the two programs that the engine runs at a
cache of that many slots: one chunk of a prompt and the decoding loop. It reports what they need per
device, and whether that fits. There are no weights: everything is shapes. It needs the extra
``aot``.

``--policy=dense,dual_chunk:6144:1024`` compiles them under each of these attention policies, named
as everywhere (``inference.policies.registry``). A policy that is read from a folder or a file is
refused.

Arguments are weights and cache, temporaries what the program needs besides; a program that the
compiler refuses for want of memory does not fit, and its sentence is kept. Seconds are rooflines of
one device at the chip's published peaks (``experiments.tpu_slices``), communication not counted:

- ``least``: the compiler's operations at the peak rate, or every argument but a gathered embedding
  table read once at the memory's bandwidth, whichever takes longer.
- ``counted``: the same with all the bytes that the compiler counts. It counts a copy to the chip's
  fast memory and the read from there, and what a kernel says of a cache whose rows are full.

The compiler counts one turn of a loop. The decoding loop's is one step, as meant; a program with a
loop around its products besides, as sparse prefill has in a prompt's chunk, gets no seconds. Slots
outside a sliding window are counted, although kernels skip blocks of them.

Positions beyond those that a model was trained for are not looked at: this is about memory.
"""

import dataclasses
import functools
import itertools
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
from experiments.fit_models import MODELS, config_of, policy_of
from experiments.report import markdown
from inference.cache import init_cache
from inference.drafter import NoDrafter
from inference.loop import State, decode_rounds, init_stats, prefill_chunk
from inference.sharded import state_shardings, weight_shardings
from models import decoder
from models.flops import product_depth
from models.params import shape_dtype
from models.sharding import ShardingRules, make_mesh, parse_mesh
from ops.platform import target
from ops.sampling import SamplingParams

DTYPES = ("bfloat16", "float32")
GIB = 2**30
PROGRAMS = {"prefill": 0, "decode": 1}
"""The loops that each consists of: those of which one turn is what is asked about."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is asked.

    An empty ``mesh``: key heads over tensor as far as they divide, the rest over context. Heads
    that a mesh given does not divide are on each of its devices, as the engine has them.
    """

    model: tuple[str, ...]
    slice: tuple[str, ...]
    lengths: tuple[int, ...]
    policy: tuple[str, ...] = ("dense",)
    mesh: str = ""
    rows: int = 1
    prefill_size: int = 512
    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    layers: int | None = None


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
    cfg: decoder.Config, policy: Any, mesh: Mesh, settings: Settings, length: int
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
        width = policy.key_width(cfg)
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


def traced(
    program: str, cfg: decoder.Config, policy: Any, mesh: Mesh, settings: Settings, length: int
) -> jax.stages.Traced:
    """One of the engine's programs, traced for a TPU over the mesh."""
    weights, state = abstract(cfg, policy, mesh, settings, length)
    whole = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    policy, sampling = jax.tree.map(
        lambda x: whole(x.shape, x.dtype),
        jax.eval_shape(lambda: (policy, SamplingParams.make())),
    )
    rows = settings.rows
    with target("tpu"), jax.set_mesh(mesh):
        if program == "prefill":
            chunk = whole((rows, settings.prefill_size), jnp.int32)
            counts = whole((rows,), jnp.int32)
            return prefill_chunk.trace(
                weights, cfg, policy, state.cache, chunk, counts, counts,
                extent=length, outputs=frozenset(), prompt_lengths=counts,
            )  # fmt: skip
        return decode_rounds.trace(
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


def figures(compiled: Any, chip: tpu_slices.Chip, unread: int, looped: bool) -> dict[str, Any]:
    """What the compiler says of a program, and the rooflines of one device.

    Args:
        unread: bytes of arguments that a step does not read.
        looped: whether the compiler's counts leave out turns; then they are None, and the seconds.
    """
    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporaries = memory.temp_size_in_bytes + max(0, fresh)
    needs = {
        "arguments_gib": arguments / GIB,
        "temporaries_gib": temporaries / GIB,
        "total_gib": (arguments + temporaries) / GIB,
        "memory_share": (arguments + temporaries) / GIB / chip.memory_gib,
    }
    if looped:
        return needs | dict.fromkeys(("flops", "bytes", "least_seconds", "counted_seconds"))
    cost = compiled.cost_analysis()
    work = cost["flops"] / chip.flops
    return needs | {
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "least_seconds": max(work, (arguments - unread) / chip.bandwidth),
        "counted_seconds": max(work, cost["bytes accessed"] / chip.bandwidth),
    }


def refusal(message: str) -> str | None:
    """What the compiler says if it refuses a program for want of the chip's memory, else None."""
    found = re.search(r"Ran out of memory[^\n]*\bhbm\b[^\n]*", message, re.IGNORECASE)
    return found.group(0) if found and "RESOURCE_EXHAUSTED" in message else None


def compile_one(
    tracing: jax.stages.Traced, chip: tpu_slices.Chip, unread: int, loops: int
) -> dict[str, Any]:
    """Figures of one program, or the compiler's refusal; and the seconds of compiling it.

    ``loops``: those of which one turn is meant, see :data:`PROGRAMS`.
    """
    looped, lowered = product_depth(tracing.jaxpr.jaxpr) > loops, tracing.lower()
    start = time.perf_counter()
    try:
        found: dict[str, Any] = {"fits": True, **figures(lowered.compile(), chip, unread, looped)}
    except jax.errors.JaxRuntimeError as error:
        reason = refusal(str(error))
        if reason is None:
            raise
        found = {"fits": False, "refusal": reason}
    return found | {"compile_seconds": time.perf_counter() - start}


def measure(settings: Settings, model: str, policy: str, name: str, length: int) -> dict[str, Any]:
    """One row: a model under a policy at a length on a slice."""
    cfg, place = config_of(model, settings.layers), tpu_slices.slice_named(name)
    sizes = mesh_sizes(settings.mesh, cfg, name)
    mesh = make_mesh(sizes, tpu_slices.devices(place.topology))
    unread, rules = embedding_bytes(cfg, mesh, settings), policy_of(policy, cfg)
    programs = {
        program: compile_one(
            traced(program, cfg, rules, mesh, settings, length), place.chip, unread, loops
        )
        for program, loops in PROGRAMS.items()
    }
    return {
        "model": model if model in MODELS else Path(model).name,
        "policy": policy,
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
        ValueError: a name, a policy, a mesh or a length that does not do.
        RuntimeError: libtpu is not installed.
    """
    for model in settings.model:
        cfg = config_of(model, settings.layers)
        for name in settings.slice:
            sizes = mesh_sizes(settings.mesh, cfg, name)
            check(settings, sizes)
            for policy in settings.policy:
                policy_of(policy, cfg)
    rows = []
    for name, model, length, policy in itertools.product(
        settings.slice, settings.model, settings.lengths, settings.policy
    ):
        rows.append(measure(settings, model, policy, name, length))
        print(sentence(rows[-1]), flush=True)
    return rows


def sentence(row: dict[str, Any]) -> str:
    """A row in words."""
    what = (
        f"{row['model']}, {row['policy']}, with {row['length']} slots on {row['slice']} "
        f"({row['mesh']})"
    )
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
        policy=tuple(values.policy),
        mesh=values.mesh,
        rows=values.rows,
        prefill_size=values.prefill_size,
        dtype=values.dtype,
        cache_dtype=values.cache_dtype,
        layers=values.layers,
    )
    if not (settings.model and settings.slice and settings.lengths and settings.policy):
        raise ValueError("give at least one each of --model, --slice, --lengths and --policy.")
    return settings


def main(_: list[str]) -> None:
    """Compile, print in words and as a table, save."""
    from experiments.shown import fit as shown

    try:
        settings = settings_of(flags.FLAGS)
        rows = run(settings)
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from error
    print(markdown(shown.POLICY_HEADER, [shown.policy_row(row) for row in rows]))
    timing = {"libtpu": metadata.version("libtpu")}
    folder = Path(flags.FLAGS.out) if flags.FLAGS.out else None
    name = record.name_of("fit", None, flags.FLAGS.label)
    print("saved", record.save(name, rows, config=settings, seeds=[], timing=timing, folder=folder))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # concrete arrays; an installed libtpu finds no TPU
    flags.DEFINE_list("model", ["llama3-8b"], f"{', '.join(MODELS)}, or folders with config.json.")
    flags.DEFINE_list("slice", ["v5e-16"], f"Of {', '.join(tpu_slices.SLICES)}.")
    flags.DEFINE_list("lengths", ["32768"], "Cache slots per row.")
    flags.DEFINE_list("policy", ["dense"], "Attention policies by name, as dual_chunk:6144:1024.")
    flags.DEFINE_string("mesh", "", "As context=4,tensor=4; empty: chosen by key heads.")
    flags.DEFINE_integer("rows", 1, "Sequences at a time.")
    flags.DEFINE_integer("prefill_size", 512, "Tokens per chunk of a prompt.")
    flags.DEFINE_string("dtype", "bfloat16", "Of the weights.")
    flags.DEFINE_string("cache_dtype", "bfloat16", "Of keys and values.")
    flags.DEFINE_integer("layers", None, "Another depth, for a quick check.")
    flags.DEFINE_string("label", "", "Ending of the result's name.")
    flags.DEFINE_string("out", "", "Folder of the result; empty: the committed ones.")
    app.run(main)
