"""Labelled states for SpecDec++'s head: ``python -m research.speculative.specdec_pp.collect``.

The target continues prompts at temperature 1, one text each; the draft model is then labelled on
them. Prompts come from the sources that ``--prompts`` lists, see :mod:`train.data.prompts`. A run
that was interrupted goes on when it is started again.
"""

from collections.abc import Callable, Sequence

from absl import flags

from inference.drafters.draft_model import check_tokenizer
from models.load import Model, load
from research.speculative.specdec_pp.dataset import MIX, write_acceptance
from train.data.collect import (
    chosen_prompts,
    define_flags,
    end,
    own_texts,
    run_command,
    show_progress,
)


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
    texts = own_texts(target, prompts, folder, max_new_tokens, (1.0,), batch, on_progress)
    write_acceptance(folder, target, draft, texts, mix, seed, batch)
    return end(folder, texts)


def main() -> None:
    """Define the flags, read them, generate, label and write."""
    define_flags(count=2048, prompt_tokens=64, max_new_tokens=192, batch=32)
    flags.DEFINE_string("draft", None, "Draft model by name.", required=True)
    flags.DEFINE_float("mix", MIX, "Share of the target's tokens in the mixed texts.")

    def work() -> int:
        values = flags.FLAGS
        target = load(values.target)
        return collect(
            target, load(values.draft), chosen_prompts(target), values.out, values.max_new_tokens,
            values.mix, values.seed, values.batch, show_progress(),
        )  # fmt: skip

    run_command(work)


if __name__ == "__main__":
    main()
