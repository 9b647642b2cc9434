"""The loop in one process: resuming, refusing, stopping, sharding, counting compilations."""

import errno
import json
import logging
import pathlib
import signal
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from models.sharding import make_mesh
from tests.train.regression import Regression, make
from train import loop
from train.config import TrainConfig, build_task
from train.metrics import read_metrics


def single() -> jax.sharding.Mesh:
    return make_mesh("", jax.devices()[:1])


def run(folder: pathlib.Path, config: TrainConfig, mesh: Any = None, **options: Any) -> loop.Result:
    return loop.train(config, folder, single() if mesh is None else mesh, **options)


def lines(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The metrics without what depends on the clock."""
    timed = ("seconds_per_step", "weight_per_second")
    found = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in timed} for line in found]


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process SIGTERM while it evaluates or logs its ``step``-th batch."""
    original = loop._Loop._next_batches
    calls = {"count": 0}

    def counted(self: Any) -> Any:
        calls["count"] += 1
        if calls["count"] == step:
            signal.raise_signal(signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(loop._Loop, "_next_batches", counted)


def same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    "source", [{}, {"on_device": True}, {"on_device": True, "kept_rows": 32}], ids=str
)
def test_sigterm_saves_and_the_resumed_run_is_the_same_to_the_last_bit(
    source: dict, tmp_path: pathlib.Path
):
    config = make(source, ema_decay=0.9, evaluate_every=8)
    whole = run(tmp_path / "whole", config)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 14)  # neither a step of a log line nor of a checkpoint
        stopped = run(tmp_path / "parts", config)
    assert stopped.stopped and int(stopped.state.step) == 14
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    resumed = run(tmp_path / "parts", config)
    assert not resumed.stopped
    same(whole.state, resumed.state)
    assert whole.evaluation == resumed.evaluation
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    logged = [line["step"] for line in lines(tmp_path / "parts") if "loss" in line]
    assert logged == list(range(4, 41, 4))


def test_batches_come_from_the_arrays_that_stay_on_the_device(tmp_path: pathlib.Path):
    """One kept row: every batch repeats it, so the loss is that of the row alone."""
    source = {"on_device": True, "kept_rows": 1}
    result = run(tmp_path / "run", make(source, steps=4, log_every=4))
    task = build_task(make(source))
    row = task.resident(None)
    batch = {"x": row, "y": jnp.sin(row.sum(-1)), "mask": jnp.ones(1)}
    before = lines(tmp_path / "run")[0]["loss"]
    after = float(task.loss(result.state.trained, batch, jax.random.key(0))[0])
    assert after < before
    x = task.generate(jax.random.key(1), 3, row)["x"]
    np.testing.assert_array_equal(x, jnp.broadcast_to(row, x.shape))


def test_a_run_that_is_given_up_saves_and_ends(tmp_path: pathlib.Path):
    seen: list[int] = []

    def watch(step: int, values: dict[str, float]) -> bool:
        assert set(values) == {"norm"}
        seen.append(step)
        return step == 16

    result = run(tmp_path / "run", make(evaluate_every=8), watch=watch)
    assert seen == [8, 16] and int(result.state.step) == 16
    assert result.given_up and not result.stopped
    # Nothing but the watch holds it back: a launch without one goes on to the end.
    whole = run(tmp_path / "whole", make(evaluate_every=8))
    resumed = run(tmp_path / "run", make(evaluate_every=8))
    assert not (resumed.given_up or resumed.stopped)
    same(whole.state, resumed.state)


def test_lines_after_the_last_checkpoint_are_written_once(tmp_path: pathlib.Path):
    """A killed run leaves lines of updates that it loses, and perhaps half a line."""
    run(tmp_path / "whole", make())
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 14)
        run(tmp_path / "parts", make())
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 16, "loss": 5.0}\n{"step": 20, "lo')
    (tmp_path / "parts" / "checkpoints" / "20.orbax-checkpoint-tmp").mkdir()
    run(tmp_path / "parts", make())
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")


def test_a_finished_run_stays_as_it_is(tmp_path: pathlib.Path):
    first = run(tmp_path, make())
    before = (tmp_path / "metrics.jsonl").read_text()
    again = run(tmp_path, make())
    same(first.state, again.state)
    assert again.evaluation == first.evaluation != {}
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_checkpoint_of_another_config_is_refused(tmp_path: pathlib.Path):
    run(tmp_path, make(steps=4))
    with pytest.raises(ValueError, match=r"another config: task\.width is 8 .* and 6 now"):
        run(tmp_path, make({"width": 6}, steps=4))
    run(tmp_path, make(steps=4, log_every=2))  # harmless


def test_the_loss_falls(tmp_path: pathlib.Path):
    run(tmp_path, make(steps=120))
    losses = [line["loss"] for line in lines(tmp_path) if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]


def test_an_endless_row_of_bad_updates_stops_the_run(tmp_path: pathlib.Path):
    with pytest.raises(FloatingPointError, match=r"not finite in 4 updates in a row .*step 8"):
        run(tmp_path, make({"poison": 4 * 8}, max_bad_steps=4, checkpoint_every=2))
    state = run(tmp_path, make({"poison": 4 * 8}, max_bad_steps=100, checkpoint_every=2))
    assert int(state.state.bad_in_row) == 36


def test_a_few_bad_updates_are_counted_and_survived(tmp_path: pathlib.Path, monkeypatch):
    original = Regression.data

    def data(self: Regression, context: Any) -> Any:
        def poison(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {**batch, "x": np.where(batch["x"][:1, :1] > 0.8, np.nan, batch["x"])}

        return original(self, context).map(poison)

    monkeypatch.setattr(Regression, "data", data)
    result = run(tmp_path, make())
    written = [line for line in lines(tmp_path) if "loss" in line]
    assert 0 < sum(line["skipped"] for line in written) < 20
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.state.trained))
    assert all(line["loss"] is not None for line in written if line["skipped"] < 4)


def test_frozen_parameters_are_recorded_and_must_stay(tmp_path: pathlib.Path, monkeypatch):
    config = make({"freeze": True}, steps=4)
    result = run(tmp_path, config)
    np.testing.assert_array_equal(result.rest, np.full(16, 2.0))
    record = json.loads((tmp_path / "checkpoints" / "4" / "record" / "metadata").read_text())
    assert len(record["frozen"]) == 64
    original = Regression.init

    def changed(self: Regression, *arguments: Any) -> Any:
        params = original(self, *arguments)
        return params.replace(scale=params.scale + 1)

    monkeypatch.setattr(Regression, "init", changed)
    with pytest.raises(ValueError, match="frozen parameters differ"):
        run(tmp_path, config)


def test_a_full_disk_is_one_clear_sentence_and_keeps_the_last_checkpoint(tmp_path: pathlib.Path):
    with pytest.MonkeyPatch.context() as patch:
        original = ocp.CheckpointManager.save

        def save(self: Any, step: int, **arguments: Any) -> Any:
            if step == 20:
                (self.directory / "20.orbax-checkpoint-tmp").mkdir()
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(self, step, **arguments)

        patch.setattr(ocp.CheckpointManager, "save", save)
        with pytest.raises(OSError, match=r"disk of .* is full: free some space") as caught:
            run(tmp_path / "parts", make())
        assert caught.value.errno == errno.ENOSPC
    run(tmp_path / "parts", make())
    run(tmp_path / "whole", make())
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")


def test_a_folder_that_cannot_be_written_is_refused_early(tmp_path: pathlib.Path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="give a writable folder as --workdir"):
        run(tmp_path / "file" / "run", make())

    def refuse(self: pathlib.Path, *arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(pathlib.Path, "write_text", refuse)
    with pytest.raises(OSError, match="give a writable folder as --workdir"):
        run(tmp_path / "other", make())


def test_a_damaged_checkpoint_is_named(tmp_path: pathlib.Path):
    run(tmp_path, make(steps=4))
    for file in (tmp_path / "checkpoints" / "4" / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 100:
            file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"checkpoints.4 cannot be read .*remove that folder"):
        run(tmp_path, make(steps=4))


def test_data_that_ends_is_an_error(tmp_path: pathlib.Path, monkeypatch):
    rows = [{"x": np.zeros(8, np.float32), "y": np.float32(0), "mask": np.float32(1)}] * 24
    short = grain.MapDataset.source(rows).batch(8).to_iter_dataset()
    monkeypatch.setattr(Regression, "data", lambda self, context: short)
    with pytest.raises(ValueError, match="the data ended before"):
        run(tmp_path, make())


@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=2,tensor=2"])
@pytest.mark.parametrize("parts", [1, 2])
def test_sharded_training_equals_single_device_training(
    mesh: str, parts: int, tmp_path: pathlib.Path
):
    """Sums over devices are taken in another order: 1e-5 relative after 12 updates."""
    config = make({"width": 16}, steps=12, batch_size=16, microbatches=parts)
    alone = run(tmp_path / "alone", config)
    spread = run(tmp_path / "spread", config, make_mesh(mesh))
    for a, b in zip(lines(tmp_path / "alone"), lines(tmp_path / "spread"), strict=True):
        for name, value in a.items():
            np.testing.assert_allclose(b[name], value, rtol=1e-5, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        alone.state.trained,
        jax.device_get(spread.state.trained),
    )
    if "tensor" in mesh:
        first = spread.state.trained.first
        assert first.addressable_shards[0].data.shape == (8, 8)
        moment = jax.tree.leaves(spread.state.optimizer)
        assert any(x.shape == (16, 16) and x.sharding == first.sharding for x in moment)


def test_a_checkpoint_restores_onto_another_mesh(tmp_path: pathlib.Path):
    config = make({"width": 16}, batch_size=16, ema_decay=0.9)
    whole = run(tmp_path / "whole", config)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 14)
        run(tmp_path / "parts", config, make_mesh("data=2,fsdp=2,tensor=2"))
    moved = run(tmp_path / "parts", config, make_mesh("data=4,tensor=2"))
    assert int(moved.state.step) == 40
    assert moved.state.trained.first.addressable_shards[0].data.shape == (16, 8)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        jax.device_get(whole.state.trained),
        jax.device_get(moved.state.trained),
    )


def test_the_hot_loop_compiles_once(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture):
    """After the step is compiled, logging, evaluating and saving it again compile nothing."""
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        run(tmp_path, make(evaluate_every=8))
    names = [r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage()]
    assert sum("jit(step)" in name for name in names) == 1, names
    assert len(names) == len(set(name.split(" in ")[0] for name in names))


def test_a_profile_is_written_on_request(tmp_path: pathlib.Path):
    run(tmp_path, make(steps=8), profile_steps=2)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_tensorboard_events_are_written_on_request(tmp_path: pathlib.Path):
    pytest.importorskip("tensorboardX")
    run(tmp_path, make(steps=8, tensorboard=True))
    assert list((tmp_path / "tensorboard").glob("events.*"))
