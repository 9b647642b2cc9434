"""Training with SeqPE, its attention, what is exported, and generation under it."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import seqpe as seqpe_config
from configs import seqpe_vit
from configs.seqpe import WITHOUT
from inference.drafter import NoDrafter
from inference.drafters.lookup import LookupDrafter
from inference.policies.positions_file import write_positions
from inference.policies.registry import make_policy
from models import decoder, seqpe
from models.attention import Step
from models.load import load
from models.params import init
from models.sharding import make_mesh
from research.context.seqpe.policy import SeqPEPolicy
from research.context.seqpe.policy import make_policy as make_table
from tests.inference.models import config as decoder_config
from tests.inference.models import engine, prompts, weights
from tests.research.context.fine_tuning import (
    LENGTH,
    amplified,
    batch_of,
    nats,
    part,
    prepared,
    settings,
)
from train import loop
from train.config import TrainConfig, build, build_task
from train.export import Options, export_run
from train.metrics import read_metrics

NAME = "research.context.seqpe.task:SeqPETask"
ENCODER = {"width": 16, "heads": 2, "axis_length": 200, "layers": 1}
SAMPLING = {"candidates": 8, "spread": 32, "transfer_points": 8}
REGULARISER = {"sampling": SAMPLING, "pivots": 4, "shift_rows": 2}
MODEL = decoder_config(position="none")
METHODS = {
    "scalar": ("attn_scalar", "single"),
    "scalar by layer": ("attn_scalar", "multi"),
    "multiplied": ("attn_mul", "multi"),
    "added": ("attn_add", "single"),
    "on the input": ("input_add", "none"),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory):
    """Settings of the runs."""
    folder = tmp_path_factory.mktemp("seqpe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGREACH_DATA", str(folder / "cache"))
        config = settings(folder)
        config.task.name = NAME
        config.task.model.update({"position": "none", "max_length": 200})
        config.task.update({"encoder": ENCODER, "regulariser": REGULARISER})
        yield config


# Training.
def test_a_run_trains_all_parts_and_is_read_under_its_own_positions(config, tmp_path: pathlib.Path):
    config = config.copy_and_resolve_references()
    config.steps, config.clip = 4, "group_norm"
    built, mesh = build(TrainConfig, config.to_dict()), make_mesh("", jax.devices()[:1])
    task, context = prepared(config, NAME)
    first = task.init(jax.random.key(0), None, context)
    last = loop.train(built, tmp_path / "run", mesh).state.trained
    for before, after in (
        (first.encoder.token_embed, last.encoder.token_embed),
        (first.projection.w, last.projection.w),
        (first.trunk.embed, last.trunk.embed),
    ):
        assert float(jnp.abs(before - after).max()) > 1e-4
    lines = [x for x in read_metrics(tmp_path / "run" / "metrics.jsonl") if "contrastive" in x]
    assert len(lines) == 4 and lines[0]["contrastive"] == pytest.approx(np.log(8), rel=0.1)
    for line in lines:
        added = 0.1 * (line["contrastive"] + line["transfer"])
        assert line["loss"] == pytest.approx(line["nats_per_token"] + added, rel=1e-5)
        assert 0 <= line["nearest"] <= 1 and line["shifted"] in (0, 1)
    # An exported run.
    export_run(tmp_path / "run", tmp_path / "out", Options())
    model = load(tmp_path / "out")
    policy = make_policy(f"seqpe:{tmp_path / 'out'}", model.cfg)
    assert isinstance(policy, SeqPEPolicy) and policy.max_length == 200
    table = jax.jit(seqpe.extend_table, static_argnums=(1, 2))(last.encoder, task.encoder, (200,))
    np.testing.assert_array_equal(policy.vectors[0], table)
    np.testing.assert_array_equal(policy.projection.w, last.projection.w)
    np.testing.assert_array_equal(model.params.embed, last.trunk.embed)
    with pytest.raises(ValueError, match="know no positions but those of the model's config"):
        export_run(tmp_path / "run", tmp_path / "other", Options(stablehlo=("cpu",)))


@pytest.fixture(scope="module")
def prepared_task(config):
    """The task and parameters whose positions matter."""
    task, context = prepared(config, NAME)
    params = amplified(task, context)
    grown = jax.tree.map(lambda x: 8 * x, (params.encoder, params.projection))
    return task, dataclasses.replace(params, encoder=grown[0], projection=grown[1])


def test_packed_documents_are_read_as_if_alone(prepared_task):
    task, params = prepared_task
    batch, half = batch_of([16, 16]), LENGTH // 2
    apart = [nats(task, params, part(batch, *ends)) for ends in ((0, half), (half, LENGTH))]
    assert nats(task, params, batch) == pytest.approx(sum(apart), rel=1e-5)
    # Positions matter: the same tokens as one document are read otherwise.
    assert nats(task, params, batch_of([32])) != pytest.approx(sum(apart), rel=1e-3)


def test_each_row_takes_its_shifted_window():
    """Windows of several rows, looked up by positions within documents."""
    cfg, rng = MODEL, np.random.default_rng(0)
    tables = jnp.asarray(rng.normal(size=(2, 8, 16)), jnp.float32)
    positions = jnp.asarray([[0, 1, 2, 3], [0, 1, 0, 1]], jnp.int32)
    policy = SeqPEPolicy(tables, None, seqpe.Injection("input_add", "none"))
    found = policy.prepare(cfg, Step(positions))
    np.testing.assert_array_equal(found[0], tables[0, :4])
    np.testing.assert_array_equal(found[1], tables[1, jnp.asarray([0, 1, 0, 1])])


def test_pivots_visit_every_position_once_per_epoch(config):
    task, context = prepared(config, NAME)
    draw = task.beside(context)
    epochs = [
        np.concatenate([draw(i)["pivots"] for i in range(50 * e, 50 * e + 50)]) for e in (0, 1)
    ]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch[:, 0]), np.arange(200))
    assert (epochs[0] != epochs[1]).any() and epochs[0].dtype == np.int32
    batch = next(iter(task.data(context)))
    np.testing.assert_array_equal(batch["pivots"], draw(0)["pivots"])


def test_the_encoder_is_a_group_of_its_own(config):
    task, _ = prepared(config, NAME)
    assert task.group(".encoder.token_embed") == "encoder"
    assert task.group(".projection.w") == task.group(".trunk.embed") == "main"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder": {**ENCODER, "axis_length": 36}}, "no windows of .* raise axis_length"),
        ({"encoder": {**ENCODER, "out_width": 7}}, "2 heads do not divide vectors of width 7"),
        ({"regulariser": {**REGULARISER, "pivots": 0}}, "pivots is 0 .* give 1 or more"),
        ({"injection": {"method": "attn_mul", "projection": "none"}}, "without a projection"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        prepared(config, NAME, **fields)


@pytest.mark.parametrize("module", [seqpe_config, seqpe_vit])
def test_every_variant_of_the_configs_resolves(module):
    for variant in (*WITHOUT, *module.RIVALS):
        task = build_task(build(TrainConfig, module.get_config(variant).to_dict()))
        assert hasattr(task, "regulariser") == (variant in WITHOUT)
        assert task.model.position == (variant if variant in module.RIVALS else "none")
    for variant, lost in WITHOUT.items():
        weights = module.get_config(variant).task.regulariser.weights
        assert {n for n in ("contrastive", "transfer") if weights[n] == 0} == set(lost)
    with pytest.raises(ValueError, match="unknown variant 'rope2': seqpe, no_contrastive"):
        module.get_config("rope2")


def test_windows_and_pivots_must_divide(config, prepared_task):
    task, params = prepared_task
    odd = {name: jnp.concatenate([x] * 3) for name, x in batch_of([32]).items()}
    with pytest.raises(ValueError, match="3 rows cannot share 2 shifted windows"):
        task.loss(params, odd | {"pivots": jnp.zeros((4, 1), jnp.int32)}, jax.random.key(0))
    config = config.copy_and_resolve_references()
    config.task.regulariser.pivots, config.microbatches = 3, 2
    wrong, context = prepared(config, NAME)
    with pytest.raises(ValueError, match="pivots 3 cannot be split into 2 parts"):
        wrong.beside(context)


# Attention.
def policy_of(name: str, length: int = 160) -> SeqPEPolicy:
    """A random encoder's vectors, large enough to matter, under a way to take them in."""
    injection = seqpe.Injection(*METHODS[name])
    cfg = seqpe.Config(width=16, heads=2, axis_length=200, layers=1)
    specs = (seqpe.specs(cfg), seqpe.projection_specs(injection, 16, MODEL))
    params, projection = jax.tree.map(lambda x: 12 * x, init(specs, jax.random.key(5)))
    return make_table(params, cfg, projection, injection, length)


POLICIES = {name: policy_of(name) for name in METHODS}
NEW, WIDTH = 12, LookupDrafter().width


def decode(name: str, drafter, params=None) -> list[list[int]]:
    """Greedy continuations under a policy."""
    eng = engine(MODEL, drafter=drafter, drafter_params=params, policy=POLICIES[name])
    return eng.generate(prompts(), NEW).tokens


@jax.jit
def full_logits(policy: SeqPEPolicy, tokens: jax.Array) -> jax.Array:
    params = weights(MODEL)
    return decoder.unembed(
        params, MODEL, decoder.forward(params, MODEL, tokens, policy=policy).hidden
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_token_is_that_of_a_pass_over_the_whole_text(name: str):
    """Ragged rows through prefill and cache, with and without drafts."""
    plain = decode(name, NoDrafter(WIDTH))
    assert decode(name, LookupDrafter()) == plain
    texts = [prompt + new for prompt, new in zip(prompts(), plain, strict=True)]
    tokens = np.zeros((len(texts), 32), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    logits = np.asarray(full_logits(POLICIES[name], jnp.asarray(tokens)))
    for row, prompt, new in zip(logits, prompts(), plain, strict=True):
        rows = row[len(prompt) - 1 : len(prompt) + NEW - 1]
        chosen = np.take_along_axis(rows, np.asarray(new)[:, None], 1)[:, 0]
        assert np.all(chosen >= rows.max(axis=1) - 1e-4)


def test_the_ways_differ():
    tokens = jnp.asarray([prompts(20)[0]], jnp.int32)
    found = [full_logits(policy, tokens) for policy in POLICIES.values()]
    assert all(np.abs(a - b).max() > 1e-2 for i, a in enumerate(found) for b in found[:i])


def test_cached_keys_hold_their_vectors():
    """Twice as wide under the scalar form, and only there."""
    widths = {name: policy.key_width(MODEL) for name, policy in POLICIES.items()}
    assert {name for name, width in widths.items() if width == 16} == {"scalar", "scalar by layer"}
    assert set(widths.values()) == {8, 16}


def test_texts_beyond_the_vectors_are_refused():
    short = policy_of("scalar", length=24)
    eng = engine(MODEL, policy=short)
    with pytest.raises(ValueError, match="beyond the context of 24"):
        eng.generate([[1] * 20], 5)
    assert len(eng.generate([[1] * 20], 4).tokens[0]) == 4
    with pytest.raises(ValueError, match="a text of 25 tokens and SeqPE vectors for 24"):
        short.prepare(MODEL, Step(jnp.zeros((1, 25), jnp.int32)))
    with pytest.raises(ValueError, match="up to 1000, which is what 3 digits can tell"):
        policy_of("scalar", length=1001)


def test_what_does_not_fit_the_vectors_is_refused():
    step = Step(jnp.zeros((1, 4), jnp.int32))
    with pytest.raises(ValueError, match="set the model's position to 'none'"):
        POLICIES["scalar"].prepare(decoder_config(), step)
    with pytest.raises(ValueError, match="must be whole numbers"):
        POLICIES["scalar"].prepare(MODEL, Step(jnp.zeros((1, 4))))
    with pytest.raises(ValueError, match="projections for 2 layers and the model has 3"):
        POLICIES["multiplied"].per_layer(3)


def test_a_folder_that_tells_no_encoder_is_refused(tmp_path: pathlib.Path):
    name = f"seqpe:{tmp_path}"
    with pytest.raises(FileNotFoundError, match="export a run of seqpe there"):
        make_policy(name, MODEL)
    write_positions(tmp_path, "seqpe", {"encoder": {"width": 16}})
    with pytest.raises(ValueError, match=r"tells no encoder .*export it again"):
        make_policy(name, MODEL)
    facts = {"encoder": ENCODER, "injection": {"method": "input_add", "projection": "none"}}
    write_positions(tmp_path, "seqpe", facts)
    with pytest.raises(FileNotFoundError):
        make_policy(name, MODEL)
    write_positions(tmp_path, "seqpe", facts, {"encoder": {"last": jnp.zeros(3)}})
    with pytest.raises(ValueError, match="whose settings describe another model"):
        make_policy(name, MODEL)
