"""The training loop: one for every task, on one device or many, resumable at any moment."""

import dataclasses
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from models import params as model_params
from models.sharding import ShardingRules
from train.checkpoint import Checkpoints
from train.config import TrainConfig, build_task
from train.metrics import MetricsFile, Progress, Window, read_metrics
from train.run_folder import hash_tree, open_folder
from train.state import TrainState, abstract_state, create_state
from train.step import make_step
from train.task import Context, Task

Watch = Callable[[int, dict[str, float]], bool]


@dataclasses.dataclass
class Result:
    """How a run ended: its state, the last evaluation, and what ended it before its time.

    ``stopped``: a signal, after which the same launch goes on. ``given_up``: ``watch``.
    """

    state: TrainState
    rest: Any
    evaluation: dict[str, float]
    stopped: bool
    given_up: bool


@dataclasses.dataclass
class _Run:
    """Everything that the loop touches, set up or restored."""

    context: Context
    task: Task
    state: TrainState
    rest: Any
    data: grain.DatasetIterator | None
    resident: Any  # what the task keeps on the devices
    step: Any  # the compiled step
    checkpoints: Checkpoints
    record: dict[str, Any]
    window: Window
    start: int


def train(
    config: TrainConfig,
    workdir: str | pathlib.Path,
    mesh: Mesh,
    rules: ShardingRules | None = None,
    profile_steps: int = 0,
    watch: Watch | None = None,
) -> Result:
    """Train from the newest checkpoint in ``workdir``, or from the beginning, to ``config.steps``.

    SIGTERM saves a checkpoint and returns with ``stopped`` set. ``profile_steps`` writes a jax
    trace of that many updates (after the first two calls) to ``workdir/profile``. ``watch`` sees
    the step and the numbers of every evaluation but the last, on process 0; if it returns True the
    run saves and ends.

    Raises:
        ValueError: a config that does not fit together, or a checkpoint of another one.
        FloatingPointError: the loss was not finite ``max_bad_steps`` times in a row.
        OSError: the folder cannot be written, or the disk is full.
    """
    folder = pathlib.Path(workdir)
    context = Context(config, mesh, ShardingRules() if rules is None else rules)
    if config.batch_size % context.process_count:
        raise ValueError(
            f"config.batch_size {config.batch_size} cannot be split between "
            f"{context.process_count} processes: make it a multiple."
        )
    open_folder(folder)
    with _until_sigterm() as stop_asked:
        checkpoints = Checkpoints(folder, config.keep_checkpoints)
        try:
            run = _set_up(context, checkpoints)
            return _Loop(run, folder, profile_steps, stop_asked, watch).run_to_end()
        finally:
            checkpoints.close()


def _set_up(context: Context, checkpoints: Checkpoints) -> _Run:
    config = context.config
    task = build_task(config)
    trained_specs, rest_specs = task.partition(task.specs())
    optimizer = task.optimizer(config, trained_specs)
    abstract = abstract_state(
        trained_specs, optimizer, config.ema_decay > 0, context.mesh, context.rules
    )
    dataset = task.data(context)
    data = None if dataset is None else iter(dataset)
    record: dict[str, Any] = {"config": dataclasses.asdict(config)}
    latest = checkpoints.latest_step()
    saved = None if latest is None else checkpoints.read_record(latest, record["config"])

    trained, rest = None, None
    if saved is None or jax.tree.leaves(rest_specs):
        params = task.init(jax.random.key(config.seed), dataset, context)
        trained, rest = task.partition(params)
        model_params.validate(trained, trained_specs)
    record["frozen"] = hash_tree(rest) if jax.tree.leaves(rest) else None
    if saved is None or latest is None:
        make = jax.jit(
            lambda p: create_state(p, optimizer, config.ema_decay > 0),
            out_shardings=jax.tree.map(lambda s: s.sharding, abstract),
        )
        state = make(trained)
    else:
        if saved["frozen"] != record["frozen"]:
            raise ValueError(
                "the frozen parameters differ from those of the checkpoint: give the same "
                "pretrained files or choose a new --workdir."
            )
        state = checkpoints.restore(latest, abstract, data)
    resident = task.resident(context) if dataset is None else None
    return _Run(
        context=context,
        task=task,
        state=state,
        rest=rest,
        data=data,
        resident=resident,
        step=_compile(context, task, optimizer, abstract, rest, dataset, resident),
        checkpoints=checkpoints,
        record=record,
        window=Window(None if saved is None else saved["window"]),
        start=latest or 0,
    )


def _compile(
    context: Context,
    task: Task,
    optimizer: Any,
    abstract: TrainState,
    rest: Any,
    dataset: grain.IterDataset | None,
    resident: Any,
) -> Any:
    """The donated step, compiled ahead of time for the shapes of the first batch."""
    config = context.config
    batches = None
    if dataset is not None:
        example = next(iter(dataset))
        batches = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (config.steps_per_call, x.shape[0] * context.process_count, *x.shape[1:]),
                x.dtype,
                sharding=context.batch_sharding(x.shape[0] * context.process_count, leading=1),
            ),
            example,
        )
    step = jax.jit(
        make_step(task, config, optimizer, context),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda s: s.sharding, abstract), None),
    )
    return step.lower(abstract, rest, batches, resident).compile()


class _Loop:
    """The run from its start to its end."""

    def __init__(
        self,
        run: _Run,
        folder: pathlib.Path,
        profile_steps: int,
        stop_asked: Any,
        watch: Watch | None,
    ):
        config = run.context.config
        self.run, self.folder, self.config = run, folder, config
        self.stop_asked, self.watch = stop_asked, watch
        self.leader = run.context.process_index == 0
        self.writer = MetricsFile(folder / "metrics.jsonl", run.start) if self.leader else None
        self.board = _tensorboard(folder) if self.leader and config.tensorboard else None
        self.progress = Progress(run.start, config.steps, silent=not self.leader)
        first = run.start + 2 * config.steps_per_call
        self.profile = (first, first + profile_steps) if profile_steps else None
        self.tracing = False
        self.evaluation: dict[str, float] = {}
        self.saved_at = run.start

    def run_to_end(self) -> Result:
        config, run = self.config, self.run
        step, stopped, given_up = run.start, False, False
        try:
            while step < config.steps and not (stopped or given_up):
                self._trace(step)
                batches = self._next_batches()
                run.state, metrics = run.step(run.state, run.rest, batches, run.resident)
                run.window.add(metrics)
                step += config.steps_per_call
                if step % config.log_every == 0 or step == config.steps:
                    self._log(step)
                if step == config.steps:
                    break
                if config.evaluate_every and step % config.evaluate_every == 0:
                    self._evaluate(step)
                    given_up = self._gives_up(step)
                stopped = self.stop_asked(step)
                if stopped or given_up or step % config.checkpoint_every == 0:
                    self._save(step)
            if not (stopped or given_up):
                self._finish(step)
        finally:
            self._trace(None)
            if self.writer:
                self.writer.close()
            if self.board:
                self.board.close()
        return Result(run.state, run.rest, self.evaluation, stopped, given_up)

    def _next_batches(self) -> Any:
        """The batches of one call, stacked and on the devices; None if the task makes them."""
        if self.run.data is None:
            return None
        try:
            batches = [next(self.run.data) for _ in range(self.config.steps_per_call)]
        except StopIteration:
            raise ValueError(
                "the data ended before config.steps: let the task's data repeat without end."
            ) from None
        return self.run.context.put(jax.tree.map(lambda *xs: np.stack(xs), *batches), leading=1)

    def _log(self, step: int) -> None:
        self._stop_if_not_finite(step)
        values = self.run.window.take()
        rates = self.progress.show(step, values)
        if self.writer:
            self.writer.write(step, {**values, **rates})
        self._to_board(step, values)

    def _evaluate(self, step: int) -> None:
        run = self.run
        average = run.state.average
        trained = run.state.trained if average is None else average
        self.evaluation = run.task.evaluate(run.task.combine(trained, run.rest), run.context)
        values = {f"evaluation/{name}": value for name, value in self.evaluation.items()}
        if values and self.writer:
            self.writer.write(step, values)
            shown = "  ".join(f"{name} {value:.4g}" for name, value in self.evaluation.items())
            print(f"step {step} evaluation: {shown}", file=sys.stderr, flush=True)
        self._to_board(step, values)

    def _gives_up(self, step: int) -> bool:
        """What ``watch`` says on process 0, to all processes."""
        if self.watch is None:
            return False
        answer = self.leader and self.watch(step, self.evaluation)
        if self.run.context.process_count == 1:
            return answer
        return bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))

    def _save(self, step: int) -> None:
        if step == self.saved_at:
            return
        self._stop_if_not_finite(step)
        record = {**self.run.record, "window": self.run.window.rows()}
        self.run.checkpoints.save(step, self.run.state, self.run.data, record)
        self.saved_at = step

    def _finish(self, step: int) -> None:
        """The last evaluation, before the last checkpoint: a run killed between does both again."""
        if self.run.start == step:
            lines = read_metrics(self.folder / "metrics.jsonl") if self.leader else []
            prefix = "evaluation/"
            self.evaluation = {
                name.removeprefix(prefix): value
                for line in lines
                for name, value in line.items()
                if name.startswith(prefix)
            }
            return
        self._evaluate(step)
        self._save(step)

    def _stop_if_not_finite(self, step: int) -> None:
        worst = max((row["bad_in_row"] for row in self.run.window.rows()), default=0)
        if worst >= self.config.max_bad_steps:
            raise FloatingPointError(
                f"the loss or its gradient was not finite in {int(worst)} updates in a row "
                f"(noticed at step {step}): lower the learning rate or look at the data; "
                f"the last checkpoint is of step {self.saved_at}."
            )

    def _to_board(self, step: int, values: dict[str, float]) -> None:
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def _trace(self, step: int | None) -> None:
        """Start or end the profile at its steps; None ends it whatever the step."""
        if self.profile is None or not self.leader:
            return
        if self.tracing and (step is None or step >= self.profile[1]):
            jax.block_until_ready(self.run.state)
            jax.profiler.stop_trace()
            self.tracing, self.profile = False, None
        elif not self.tracing and step is not None and step >= self.profile[0]:
            jax.block_until_ready(self.run.state)
            jax.profiler.start_trace(str(self.folder / "profile"))
            self.tracing = True


def _tensorboard(folder: pathlib.Path) -> Any:
    try:
        import tensorboardX  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "config.tensorboard needs tensorboardX: pip install -e '.[tensorboard]'."
        ) from error
    return tensorboardX.SummaryWriter(str(folder / "tensorboard"))


@contextmanager
def _until_sigterm() -> Iterator[Callable[[int], bool]]:
    """A function of the step that says whether SIGTERM came, to any process of the run.

    With several processes jax agrees on a step that all have reached, and owns the signal.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: asked.is_set()  # signals reach the main thread only
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
