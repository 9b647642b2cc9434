"""Trained models for other programs: ``python -m train.export --run=WORKDIR --out=DIR``.

From the newest checkpoint of a run (its moving average if it keeps one), or from any model that
``models.load`` knows (``--model=NAME``), write

- a Hugging Face directory: config, safetensors, tokenizer and a README with the facts of the run;
- for a trained position scheme ``positions.json``, which its policy reads (``--policy=clex:DIR``);
- with ``--stablehlo=cpu,tpu,cuda`` also ``DIR/stablehlo``: programs and weights that
  :mod:`train.exported` runs without this repository.

Other runs are exported by their task, if it has a method ``save``: a drafter to the folder that
``--drafter=KIND:DIR`` takes. Their card begins with the task's ``about``, if it says what it is.
The folder appears whole or not at all.
"""

import dataclasses
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Sequence

import jax.numpy as jnp
from absl import app, flags, logging

from inference.policies.positions_file import write_positions
from models import decoder
from models.hf import save_hf
from models.load import load
from models.params import cast
from models.safetensors_io import new_directory
from models.tokenizer import Tokenizer, check_vocab
from train.card import model_facts, run_facts, write_card
from train.data.pipeline import DataConfig, training_windows
from train.stablehlo import check_platforms, write_stablehlo
from train.tasks.language_model import LanguageModel
from train.trained import Trained, read_trained

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to write.

    Attributes:
        dtype: of the weights on disk, and of the StableHLO programs' arithmetic; None: as they are.
        stablehlo: platforms to write programs for.
        length, batch: see :func:`train.stablehlo.write_stablehlo`.
        hf: write the Hugging Face directory. Some models have no such form.
    """

    dtype: str | None = None
    stablehlo: tuple[str, ...] = ()
    length: int | None = None
    batch: int = 1
    hf: bool = True

    def __post_init__(self):
        check_platforms(self.stablehlo)
        if not self.hf and not self.stablehlo:
            raise ValueError("nothing to write: give --stablehlo, or leave out --nohf.")


def export_run(run: pathlib.Path, out: pathlib.Path, options: Options) -> None:
    """Export the newest checkpoint of a training run.

    Raises:
        FileNotFoundError: no checkpoint, or no tokenizer.
        FileExistsError: ``out`` is not empty.
        ValueError: a damaged checkpoint, or a task or model that cannot be exported as asked.
        OSError: ``out`` cannot be written.
    """
    with new_directory(out) as folder:
        trained = read_trained(run)
        task = trained.task
        if isinstance(task, LanguageModel):
            params = task.combine(trained.params, None)
            tokenizer = Tokenizer.load(task.tokenizer)
            told = task.positions(params)
            if told is not None and options.stablehlo and task.model.position == "none":
                raise ValueError(
                    "the programs of --stablehlo know no positions but those of the model's "
                    "config, and this model has none there: leave it out."
                )
            _write_model(folder, task.trunk(params), task.model, tokenizer, options)
            if told is not None:
                write_positions(folder, *told)
            facts = model_facts(task.model) | run_facts(run, trained, _windows_per_epoch(trained))
            write_card(folder, out.name, "A language model, trained by longreach.", facts)
        elif hasattr(task, "save"):
            if options.stablehlo:
                raise ValueError(
                    f"{type(task).__name__} has no StableHLO form: leave out --stablehlo."
                )
            task.save(trained.params, folder, DTYPES[options.dtype or "float32"])
            how = f"{getattr(task, 'about', 'A drafter')}, trained by longreach."
            write_card(folder, out.name, how, run_facts(run, trained, None), use="")
        else:
            raise ValueError(
                f"{type(task).__name__} cannot be exported: give the task a method "
                "save(trained, directory, dtype)."
            )


def export_model(name: str, out: pathlib.Path, options: Options) -> None:
    """Export a model that :func:`models.load.load` knows; errors as of :func:`export_run`."""
    with new_directory(out) as folder:
        model = load(name, dtype=None)
        _write_model(folder, model.params, model.cfg, model.tokenizer, options)
        how = f"The model `{pathlib.Path(name).name}`, exported again by longreach."
        write_card(folder, out.name, how, model_facts(model.cfg))


def _write_model(
    folder: pathlib.Path,
    params: decoder.Params,
    cfg: decoder.Config,
    tokenizer: Tokenizer,
    options: Options,
) -> None:
    check_vocab(tokenizer, cfg.vocab_size)
    if options.dtype is not None:
        params = cast(params, DTYPES[options.dtype])
    if options.hf:
        with tempfile.TemporaryDirectory() as files:
            tokenizer.save(files)
            save_hf(folder, params, cfg, files)
    else:
        tokenizer.save(folder)
    if options.stablehlo:
        programs = folder / "stablehlo"
        programs.mkdir()
        write_stablehlo(programs, params, cfg, options.stablehlo, options.length, options.batch)


def _windows_per_epoch(trained: Trained) -> int | None:
    """Rows of one pass over a language model's corpus as it is now; None if it is not there."""
    task, config = trained.task, trained.config
    reading = DataConfig(
        corpus=task.corpus,
        tokenizer=task.tokenizer,
        split="train",
        sequence_length=task.sequence_length,
        batch_size=config.batch_size,
        seed=config.seed,
        whole=task.whole_documents,
    )
    try:
        return training_windows(reading).windows_per_epoch
    except (ValueError, OSError):
        return None


def main() -> None:
    """Define the flags, read them and write the folder; bad input is one sentence."""
    run = flags.DEFINE_string("run", None, "Folder of a training run.")
    model = flags.DEFINE_string("model", None, "Directory, .gguf file or short name of a model.")
    out = flags.DEFINE_string(
        "out", None, "Folder to write; must not exist, or be empty.", required=True
    )
    dtype = flags.DEFINE_enum("dtype", None, list(DTYPES), "Type of the weights; default: kept.")
    platforms = flags.DEFINE_list("stablehlo", [], "Platforms to write programs for: cpu,tpu,cuda.")
    length = flags.DEFINE_integer("length", None, "Most tokens of a text; default: the context.")
    batch = flags.DEFINE_integer("batch", 1, "Rows of the programs whose sizes are fixed (tpu).")
    hf = flags.DEFINE_bool("hf", True, "Write the Hugging Face directory.")
    flags.mark_flags_as_mutual_exclusive(["run", "model"], required=True)

    def launch(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]}: options start with --.")
        logging.set_verbosity(logging.ERROR)  # reading a checkpoint tells every step
        target = pathlib.Path(out.value)
        try:
            options = Options(
                dtype.value, tuple(platforms.value), length.value, batch.value, hf.value
            )
            if run.value is not None:
                export_run(pathlib.Path(run.value), target, options)
            elif model.value is not None:  # one of the two is given
                export_model(model.value, target, options)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        print(f"exported to {shlex.quote(str(target))}", file=sys.stderr)

    app.run(launch)


if __name__ == "__main__":
    main()
