"""Hidden states of a target over texts that it writes itself: ``python -m train.data.collect``.

Prompts come from the sources that ``--prompts`` lists, see :mod:`train.data.prompts`. Each is
continued once at every temperature. A run that was interrupted goes on when it is started again.
"""

import pathlib
import sys
import time
from collections.abc import Callable, Sequence

from absl import app, flags

from inference.engine import make_engine
from models.load import Model, load
from models.safetensors_io import check_new
from train.data.hidden import Text, generate_texts, write_hidden
from train.data.prompts import load_prompts


def collect(
    model: Model,
    prompts: Sequence[Sequence[int]],
    folder: str | pathlib.Path,
    max_new_tokens: int,
    temperatures: Sequence[float] = (0.0, 1.0),
    batch: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Let the model continue the prompts, and write its states; returns the number of tokens.

    Raises as :func:`own_texts` and :func:`train.data.hidden.write_hidden` do.
    """
    texts = own_texts(model, prompts, folder, max_new_tokens, temperatures, batch, on_progress)
    write_hidden(folder, model.params, model.cfg, texts, batch)
    return end(folder, texts)


def own_texts(
    model: Model,
    prompts: Sequence[Sequence[int]],
    folder: str | pathlib.Path,
    max_new_tokens: int,
    temperatures: Sequence[float],
    batch: int,
    on_progress: Callable[[int, int], None] | None,
) -> list[Text]:
    """The texts that a folder is to be written about; finished batches are kept beside it.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError, OSError: see :func:`train.data.hidden.generate_texts`.
    """
    check_new(folder)
    return generate_texts(
        make_engine(model.params, model.cfg), prompts, max_new_tokens, temperatures, batch,
        model.tokenizer.end_ids, on_progress, _kept(folder),
    )  # fmt: skip


def end(folder: str | pathlib.Path, texts: Sequence[Text]) -> int:
    """Forget the batches kept beside a folder that is complete now; returns the texts' tokens."""
    _kept(folder).unlink()
    return sum(len(text.tokens) for text in texts)


def _kept(folder: str | pathlib.Path) -> pathlib.Path:
    folder = pathlib.Path(folder)
    return folder.with_name(f"{folder.name}.texts.jsonl")


def show_progress() -> Callable[[int, int], None]:
    """Prints one line to stderr whenever it is called with texts done and texts in all."""
    began = time.monotonic()

    def report(done: int, total: int) -> None:
        left = (time.monotonic() - began) * (total - done) / done / 60
        print(f"{done} of {total} texts, {left:.1f} min left", file=sys.stderr)

    return report


def define_flags(count: int, prompt_tokens: int, max_new_tokens: int, batch: int) -> None:
    """The flags of a command that lets a target write texts, with these defaults."""
    flags.DEFINE_string("target", None, "Target by name.", required=True)
    flags.DEFINE_list(
        "prompts", None, "python_stdlib, text:PATH, FILE.jsonl:FIELD, in turn.", required=True
    )
    flags.DEFINE_bool("chat", False, "JSON lines are a user's turns in the chat template.")
    flags.DEFINE_integer("count", count, "Prompts.", lower_bound=1)
    flags.DEFINE_integer("prompt_tokens", prompt_tokens, "Tokens of a prompt (at most, for files).")
    flags.DEFINE_integer("max_new_tokens", max_new_tokens, "Tokens to generate.", lower_bound=1)
    flags.DEFINE_integer("batch", batch, "Texts generated together.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Chooses the prompts, and whatever else is drawn.")
    flags.DEFINE_string("out", None, "Folder to write.", required=True)


def chosen_prompts(target: Model) -> list[list[int]]:
    """The prompts that the flags ask for.

    Raises as :func:`train.data.prompts.load_prompts` does.
    """
    values = flags.FLAGS
    return load_prompts(
        values.prompts, "train", target.tokenizer, values.count, values.prompt_tokens, values.seed,
        values.chat,
    )  # fmt: skip


def run_command(work: Callable[[], int]) -> None:
    """Run what writes ``--out`` and returns a number of tokens; errors are one sentence."""

    def run(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]}: options start with --.")
        try:
            print(f"{work()} tokens in {flags.FLAGS.out}", file=sys.stderr)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    app.run(run)


def main() -> None:
    """Define the flags, read them, generate, and write the states."""
    define_flags(count=2000, prompt_tokens=48, max_new_tokens=208, batch=16)
    flags.DEFINE_list("temperatures", ["0", "1"], "One text per prompt at each.")

    def work() -> int:
        values = flags.FLAGS
        target = load(values.target)
        return collect(
            target, chosen_prompts(target), values.out, values.max_new_tokens,
            [float(t) for t in values.temperatures], values.batch, show_progress(),
        )  # fmt: skip

    run_command(work)


if __name__ == "__main__":
    main()
