"""Labelled states for SpecDec++'s head: ``python -m research.speculative.specdec_pp.collect``.

The target continues prompts at temperature 1, one text each; the draft model is then labelled on
them. Prompts come from the sources that ``--prompts`` lists, see :mod:`train.data.prompts`.
"""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from inference.drafters.draft_model import check_tokenizer
from inference.engine import make_engine
from models.load import Model, load
from research.speculative.specdec_pp.dataset import MIX, write_acceptance
from train.data.collect import show_progress
from train.data.hidden import generate_texts
from train.data.prompts import load_prompts


def collect(
    target: Model,
    draft: Model,
    prompts: Sequence[Sequence[int]],
    folder: str,
    max_new_tokens: int,
    mix: float = MIX,
    seed: int = 0,
    batch: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Let the target continue the prompts, label and write; returns the number of tokens.

    Raises as :func:`research.speculative.specdec_pp.dataset.write_acceptance` does.
    """
    check_tokenizer(draft, target)
    texts = generate_texts(
        make_engine(target.params, target.cfg), prompts, max_new_tokens, (1.0,), batch,
        target.tokenizer.end_ids, on_progress,
    )  # fmt: skip
    write_acceptance(folder, target, draft, texts, mix, seed, batch)
    return sum(len(text.tokens) for text in texts)


def main() -> None:
    """Define the flags, read them, generate, label and write; errors are one sentence."""
    target = flags.DEFINE_string("target", None, "Target by name.", required=True)
    draft = flags.DEFINE_string("draft", None, "Draft model by name.", required=True)
    sources = flags.DEFINE_list(
        "prompts", None, "python_stdlib, text:PATH, FILE.jsonl:FIELD, in turn.", required=True
    )
    chat = flags.DEFINE_bool("chat", False, "JSON lines are a user's turns in the chat template.")
    count = flags.DEFINE_integer("count", 2048, "Prompts.", lower_bound=1)
    length = flags.DEFINE_integer("prompt_tokens", 64, "Tokens of a prompt (at most, for files).")
    new = flags.DEFINE_integer("max_new_tokens", 192, "Tokens to generate.", lower_bound=1)
    batch = flags.DEFINE_integer("batch", 32, "Texts generated together.", lower_bound=1)
    mix = flags.DEFINE_float("mix", MIX, "Share of the target's tokens in the mixed texts.")
    seed = flags.DEFINE_integer("seed", 0, "Chooses prompts, draws and mixing.")
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
                model, load(draft.value), prompts, out.value, new.value, mix.value, seed.value,
                batch.value, show_progress(),
            )  # fmt: skip
            print(f"{tokens} tokens in {out.value}", file=sys.stderr)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    app.run(run)


if __name__ == "__main__":
    main()
