"""Six families as ``transformers`` computes them, whole and sharded over eight devices."""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from models import decoder
from models.hf import load_hf, save_hf
from models.sharding import make_mesh
from tests.goldens import golden

FAMILIES = ("llama", "llama3_scaled_tied", "qwen2_yarn", "qwen3", "mistral", "gpt2")
TOLERANCE = 5e-5


def folder(name: str) -> pathlib.Path:
    default = pathlib.Path(__file__).parent / "data"
    return pathlib.Path(os.environ.get("LONGREACH_GOLDENS") or default) / "hf_models" / name


def run(params: Any, cfg: decoder.Config, tokens: Any) -> tuple[Any, Any]:
    """Logits, and hidden states as ``transformers`` lists them: the last one after the norm."""
    out = decoder.forward(params, cfg, tokens, all_hidden=True)
    states = jnp.concatenate([out.hidden_states[:-1], out.hidden[None]])
    return decoder.unembed(params, cfg, out.hidden), states


jitted = jax.jit(run, static_argnums=1)


def gap(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_hidden_states_and_greedy_tokens(name):
    expected = golden(f"hf_models/{name}", "expected")
    params, cfg = load_hf(folder(name))
    logits, states = jitted(params, cfg, expected["input_ids"])
    assert states.shape == expected["hidden_states"].shape
    assert gap(logits, expected["logits"]) < TOLERANCE
    assert gap(states, expected["hidden_states"]) < TOLERANCE

    greedy = expected["greedy"]
    prompt = 7
    assert np.array_equal(greedy[0, :prompt], expected["input_ids"][0, :prompt])
    # What stands after a position does not reach it, so one padded shape serves every step.
    tokens = np.zeros_like(greedy)
    tokens[:, :prompt] = greedy[:, :prompt]
    for i in range(prompt, greedy.shape[1]):
        tokens[:, i] = np.argmax(jitted(params, cfg, tokens)[0][:, i - 1], -1)
    assert tokens.tolist() == greedy.tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_sharded_over_eight_devices(name):
    expected = golden(f"hf_models/{name}", "expected")
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    params, cfg = load_hf(folder(name), mesh=mesh)
    split = [leaf for leaf in jax.tree.leaves(params) if not leaf.is_fully_replicated]
    assert len(split) > 5
    tokens = jax.device_put(expected["input_ids"], NamedSharding(mesh, PartitionSpec("data")))
    logits, states = jitted(params, cfg, tokens)
    assert len(logits.sharding.device_set) == 8
    assert gap(logits, expected["logits"]) < TOLERANCE
    assert gap(states, expected["hidden_states"]) < TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("form", ["single", "sharded", "unstacked"])
def test_export_gives_the_same_tensors_bit_for_bit(name, form, tmp_path):
    golden(f"hf_models/{name}", "expected")
    params, cfg = load_hf(folder(name))
    out = tmp_path / "out"
    given = decoder.unstack(params) if form == "unstacked" else params
    save_hf(out, given, cfg, **({"max_shard_bytes": 40_000} if form == "sharded" else {}))
    shards = sorted(out.glob("*.safetensors"))
    assert (len(shards) > 1) == (form == "sharded")
    ours = {key: array for shard in shards for key, array in load_file(shard).items()}
    theirs = load_file(folder(name) / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        assert (ours[key].shape, ours[key].dtype) == (array.shape, array.dtype)
        assert ours[key].tobytes() == array.tobytes(), key
    again, cfg_again = load_hf(out)
    assert cfg_again == cfg
    same = jax.tree.map(lambda a, b: np.array_equal(a, b) and a.dtype == b.dtype, params, again)
    assert all(jax.tree.leaves(same))


def unnormed(params: Any) -> Any:
    segment = params.segments[0]
    attn = segment.layers.attn.replace(q_norm=None, k_norm=None)
    layers = segment.layers.replace(attn=attn)
    return params.replace(segments=(segment.replace(layers=layers),))


def unbiased(params: Any) -> Any:
    segment = params.segments[0]
    attn = segment.layers.attn
    q = attn.q.replace(b=jnp.zeros_like(attn.q.b))
    layers = segment.layers.replace(attn=attn.replace(q=q))
    return params.replace(segments=(segment.replace(layers=layers),))


POISONS = {
    "qwen3 without qk norm": ("qwen3", unnormed, {}),
    "qwen2 without q bias": ("qwen2_yarn", unbiased, {}),
    "gpt2 with the exact gelu": ("gpt2", None, {"activation": "gelu"}),
    "mistral with a window one narrower": ("mistral", None, {"windows": -1}),
    "llama3 without scaling": ("llama3_scaled_tied", None, {"rope": None}),
    "yarn without scaling": ("qwen2_yarn", None, {"rope": None}),
}


@pytest.mark.parametrize("case", POISONS)
def test_a_dropped_part_is_seen(case):
    name, change, fields = POISONS[case]
    expected = golden(f"hf_models/{name}", "expected")
    params, cfg = load_hf(folder(name))
    fields = dict(fields)
    if fields.get("windows") == -1:
        fields["windows"] = tuple(w - 1 for w in cfg.windows)
    if "rope" in fields:
        fields["rope"] = decoder.RopeScaling()
    cfg = dataclasses.replace(cfg, **fields)
    logits, _ = jitted(params if change is None else change(params), cfg, expected["input_ids"])
    assert gap(logits, expected["logits"]) > 2 * TOLERANCE
