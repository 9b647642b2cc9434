"""Continue a prompt from the command line, printing text as it is generated.

python -m inference.generate --model=smollm2-135m --prompt="Once upon a time" --drafter=lookup
"""

import pathlib
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
from absl import flags

from inference.drafters.registry import DRAFTERS, check_name, make_drafter
from inference.engine import Engine, Generation, make_engine
from inference.policies.registry import POLICIES, check_policy, make_policy
from models.layout import by_rows, for_decoding
from models.load import Model, load
from models.tokenizer import Tokenizer
from ops.sampling import SamplingParams

ROUNDS_PER_CALL = 4
"""Rounds between two looks at the text: fewer stream more smoothly and decode more slowly."""


def define_flags() -> flags.FlagValues:
    """The command's flags, apart from those of other commands."""
    values = flags.FlagValues()
    flags.DEFINE_string(
        "model", None, "directory, .gguf file or short name (required)", flag_values=values
    )
    flags.DEFINE_string("prompt", None, "text to continue", flag_values=values)
    flags.DEFINE_string("prompt_file", None, "file with the text to continue", flag_values=values)
    flags.DEFINE_string("drafter", "none", f"one of {', '.join(DRAFTERS)}", flag_values=values)
    flags.DEFINE_string(
        "policy", None, f"attention policy, one of {', '.join(POLICIES)}", flag_values=values
    )
    flags.DEFINE_integer(
        "context_limit", None, "longest text, if beyond the model's own", flag_values=values
    )
    flags.DEFINE_integer("max_new_tokens", 128, "most tokens to generate", flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "0 is greedy", flag_values=values)
    flags.DEFINE_integer("top_k", 0, "keep the k most likely tokens, 0: all", flag_values=values)
    flags.DEFINE_float(
        "top_p", 1.0, "keep the most likely tokens of this mass, 1: all", flag_values=values
    )
    flags.DEFINE_integer(
        "seed", 0, "fixes the draws", lower_bound=0, upper_bound=2**31 - 1, flag_values=values
    )
    flags.DEFINE_boolean(
        "chat", False, "wrap the prompt in the model's chat template", flag_values=values
    )
    flags.DEFINE_boolean("stats", False, "print counters and speed to stderr", flag_values=values)
    flags.DEFINE_boolean("help", False, "show this", short_name="h", flag_values=values)
    return values


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt's text.

    Raises:
        ValueError: not exactly one source, or no text in it.
        FileNotFoundError: there is no such file.
    """
    if (prompt is None) == (prompt_file is None):
        raise ValueError("give exactly one of --prompt and --prompt_file.")
    if prompt is None:
        path = pathlib.Path(prompt_file or "")
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}: give --prompt_file an existing text file.")
        prompt = path.read_text(encoding="utf-8")
    if not prompt:
        raise ValueError("the prompt is empty: give at least one character to continue.")
    return prompt


def stream(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: list[int],
    max_new_tokens: int,
    sampling: SamplingParams,
    seed: int,
    write: Callable[[str], None],
) -> tuple[Generation, float, float]:
    """Generate, handing text to ``write`` as soon as it is certain.

    Returns:
        The generation; seconds until the first tokens (compilation and prefill included); and
        tokens per second after that, 0 if there were none.
    """
    decoder, shown, first, begin = tokenizer.stream(), 0, 0.0, time.perf_counter()
    decoder.push(prompt)  # how a piece is written may depend on what stands before it
    first_count = 0

    def on_progress(rows: list[list[int]]) -> None:
        nonlocal shown, first, first_count
        if shown == 0:
            first, first_count = time.perf_counter() - begin, len(rows[0])
        write(decoder.push(rows[0][shown:]))
        shown = len(rows[0])

    generation = engine.generate(
        [prompt],
        max_new_tokens,
        sampling=sampling,
        seeds=[seed],
        eos=tokenizer.end_ids,
        rounds_per_call=ROUNDS_PER_CALL,
        on_progress=on_progress,
    )
    rest = time.perf_counter() - begin - first
    write(decoder.flush())
    later = len(generation.tokens[0]) - first_count
    return generation, first, later / rest if later else 0.0


def report(generation: Generation, first: float, rate: float) -> str:
    """One paragraph of counters and speed."""
    stats = generation.stats
    emitted, rounds, drafted, accepted = (
        int(np.sum(x)) for x in (stats.emitted, stats.rounds, stats.drafted, stats.accepted)
    )
    then = f"then {rate:.1f} tokens per second" if rate else "which were all"
    return (
        f"{emitted} tokens in {rounds} target passes ({generation.tokens_per_pass:.2f} per pass); "
        f"drafted {drafted}, of which right {accepted}. First tokens after {first:.2f} s "
        f"(compilation and prefill included), {then}."
    )


def run(values: flags.FlagValues, write: Callable[[str], None]) -> str:
    """The command for parsed flags; returns the report.

    Raises:
        ValueError, FileNotFoundError: flags that do not make sense, cheapest checks first.
    """
    if values.model is None:
        raise ValueError("--model is missing: name a directory, a .gguf file or a shipped model.")
    check_name(values.drafter)
    if values.policy is not None:
        check_policy(values.policy)
    sampling = SamplingParams.make(values.temperature, values.top_k, values.top_p)
    text = read_prompt(values.prompt, values.prompt_file)
    model: Model = load(values.model)
    prompt = model.tokenizer.encode_prompt(text, values.chat)
    drafter, params = make_drafter(values.drafter, model)
    model = for_decoding(model)
    engine = make_engine(
        model.params,
        model.cfg,
        drafter=drafter,
        drafter_params=by_rows(params),
        policy=None if values.policy is None else make_policy(values.policy, model.cfg),
        context_limit=values.context_limit,
    )
    result = stream(
        engine, model.tokenizer, prompt, values.max_new_tokens, sampling, values.seed, write
    )
    return report(*result)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    values = define_flags()

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        extra = values(list(argv))[1:]
        if values.help:
            print(f"{__doc__}\n{values.get_help()}")
            return 0
        if extra:
            raise ValueError(f"unexpected argument {extra[0]!r}: quote the prompt as one argument.")
        summary = run(values, write)
    except (ValueError, FileNotFoundError, flags.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print()
    if values.stats:
        print(summary, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
