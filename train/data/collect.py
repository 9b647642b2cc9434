"""Hidden states of a target over texts that it writes itself: ``python -m train.data.collect``.

Prompts come from the sources that ``--prompts`` lists, see :mod:`train.data.prompts`. Each is
continued once at every temperature.
"""

import sys
import time
from collections.abc import Callable, Sequence

from absl import app, flags

from inference.engine import make_engine
from models.load import Model, load
from train.data.hidden import generate_texts, write_hidden
from train.data.prompts import load_prompts


def collect(
    model: Model,
    prompts: Sequence[Sequence[int]],
    folder: str,
    max_new_tokens: int,
    temperatures: Sequence[float] = (0.0, 1.0),
    batch: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Let the model continue the prompts, and write its states; returns the number of tokens.

    Raises as :func:`train.data.hidden.write_hidden` does.
    """
    engine = make_engine(model.params, model.cfg)
    texts = generate_texts(
        engine, prompts, max_new_tokens, temperatures, batch, model.tokenizer.end_ids,
        on_progress,
    )  # fmt: skip
    write_hidden(folder, model.params, model.cfg, texts, batch)
    return sum(len(text.tokens) for text in texts)


def show_progress() -> Callable[[int, int], None]:
    """Prints one line to stderr whenever it is called with texts done and texts in all."""
    began = time.monotonic()

    def report(done: int, total: int) -> None:
        left = (time.monotonic() - began) * (total - done) / done / 60
        print(f"{done} of {total} texts, {left:.1f} min left", file=sys.stderr)

    return report


def main() -> None:
    """Define the flags, read them, generate, and write the states; errors are one sentence."""
    target = flags.DEFINE_string("target", None, "Model by name.", required=True)
    sources = flags.DEFINE_list(
        "prompts", None, "python_stdlib, text:PATH, FILE.jsonl:FIELD, in turn.", required=True
    )
    chat = flags.DEFINE_bool("chat", False, "JSON lines are a user's turns in the chat template.")
    count = flags.DEFINE_integer("count", 2000, "Prompts.", lower_bound=1)
    length = flags.DEFINE_integer("prompt_tokens", 48, "Tokens of a prompt (at most, for files).")
    new = flags.DEFINE_integer("max_new_tokens", 208, "Tokens to generate.", lower_bound=1)
    batch = flags.DEFINE_integer("batch", 16, "Texts generated together.", lower_bound=1)
    temperatures = flags.DEFINE_list("temperatures", ["0", "1"], "One text per prompt at each.")
    seed = flags.DEFINE_integer("seed", 0, "Chooses the prompts.")
    out = flags.DEFINE_string("out", None, "Folder to write.", required=True)

    def run(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]}: options start with --.")
        try:
            model = load(target.value)
            prompts = load_prompts(
                sources.value, "train", model.tokenizer, count.value, length.value, seed.value,
                chat.value,
            )  # fmt: skip
            tokens = collect(
                model,
                prompts,
                out.value,
                new.value,
                [float(t) for t in temperatures.value],
                batch.value,
                show_progress(),
            )
            print(f"{tokens} tokens in {out.value}", file=sys.stderr)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    app.run(run)


if __name__ == "__main__":
    main()
