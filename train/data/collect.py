"""Hidden states of a target over texts that it writes itself: ``python -m train.data.collect``.

Prompts are cut from a corpus (``python_stdlib``, ``text:PATH``) or read from JSON lines, one prompt
per line in the field that ``--field`` names. Each is continued greedily and at temperature 1.
"""

import gzip
import json
import pathlib
import sys
import time
from collections.abc import Sequence

import numpy as np
from absl import app, flags

from inference.engine import make_engine
from models.load import load
from models.tokenizer import Tokenizer
from train.data.corpus import load_corpus
from train.data.hidden import generate_texts, write_hidden


def corpus_prompts(
    texts: Sequence[str], tokenizer: Tokenizer, count: int, length: int, seed: int
) -> list[list[int]]:
    """``count`` pieces of ``length`` tokens, each from a random place of a random text.

    Raises:
        ValueError: no text is that long.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    # A token is at most a few bytes long, so texts of this many characters are long enough to try.
    long_enough = [text for text in texts if len(text) >= 2 * length]
    prompts: list[list[int]] = []
    for _ in range(20 * count):
        if len(prompts) == count or not long_enough:
            break
        text = long_enough[int(rng.integers(len(long_enough)))]
        start = int(rng.integers(max(len(text) - 8 * length, 1)))
        ids = tokenizer.encode(text[start : start + 12 * length])[:length]
        if len(ids) == length:
            prompts.append(ids)
    if len(prompts) < count:
        raise ValueError(
            f"the corpus gave {len(prompts)} prompts of {length} tokens, {count} are asked for: "
            f"use a larger corpus, or lower --prompt_tokens."
        )
    return prompts


def file_prompts(
    paths: Sequence[pathlib.Path], field: str, tokenizer: Tokenizer, chat: bool, limit: int
) -> list[list[int]]:
    """Prompts of JSON lines (``.jsonl``, ``.jsonl.gz``), at most ``limit`` tokens each.

    A field that is a list gives its first entry. With ``chat`` the prompt is a user's turn in the
    model's chat template. Prompts that are too long are left out, since a cut one asks nothing.

    Raises:
        ValueError: a line that is not JSON or lacks the field, or no prompt at all.
    """
    prompts = []
    for path in paths:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    value = json.loads(line)[field]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path}, line {number}, has no field {field!r}: name one with --field."
                    ) from error
                text = str(value[0] if isinstance(value, list) else value)
                if chat:
                    message = [{"role": "user", "content": text}]
                    text = tokenizer.apply_chat_template(message, add_generation_prompt=True)
                ids = tokenizer.encode(text)
                if 0 < len(ids) <= limit:
                    prompts.append(ids)
    if not prompts:
        raise ValueError(f"no prompt of at most {limit} tokens in {', '.join(map(str, paths))}.")
    return prompts


def main() -> None:
    """Define the flags, read them, generate, and write the states; errors are one sentence."""
    target = flags.DEFINE_string("target", None, "Model by name.", required=True)
    source = flags.DEFINE_list(
        "prompts", None, "One corpus (python_stdlib, text:PATH), or .jsonl files.", required=True
    )
    field = flags.DEFINE_string("field", "text", "Field of JSON lines that holds the prompt.")
    chat = flags.DEFINE_bool("chat", False, "Prompts are a user's turns in the chat template.")
    count = flags.DEFINE_integer("count", 2000, "Most prompts.", lower_bound=1)
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
            files = [pathlib.Path(p) for p in source.value if ".jsonl" in pathlib.Path(p).name]
            if files:
                prompts = file_prompts(
                    files, field.value, model.tokenizer, chat.value, length.value
                )
                order = np.random.Generator(np.random.Philox(seed.value)).permutation(len(prompts))
                prompts = [prompts[i] for i in order[: count.value]]
            else:
                texts = [document.text for document in load_corpus(source.value[0], "train")]
                prompts = corpus_prompts(
                    texts, model.tokenizer, count.value, length.value, seed.value
                )
            began = time.monotonic()

            def report(done: int, total: int) -> None:
                left = (time.monotonic() - began) * (total - done) / done / 60
                print(f"{done} of {total} texts, {left:.1f} min left", file=sys.stderr)

            eos = model.tokenizer.eos_id
            written = generate_texts(
                make_engine(model.params, model.cfg),
                prompts,
                new.value,
                [float(t) for t in temperatures.value],
                batch.value,
                () if eos is None else (eos,),
                report,
            )
            write_hidden(out.value, model.params, model.cfg, written, batch.value)
            tokens = sum(len(text.tokens) for text in written)
            print(f"{len(written)} texts, {tokens} tokens in {out.value}", file=sys.stderr)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    app.run(run)


if __name__ == "__main__":
    main()
