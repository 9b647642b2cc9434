"""Writes a corpus from which a small model learns text and retrieval within a short context.

    python -m train.data.records --text=python_stdlib --tokenizer=DIR --length=256 \
        --tokens=8000000 --out=runs/records.jsonl

One document per line, for ``corpus="text:runs/records.jsonl"``. A share of the documents are pieces
of real text; the others are line records between such pieces, followed by questions with answers,
and further tasks of :mod:`train.data.long_tasks`, whose haystack is the real text. No document has
more than ``--length`` tokens, so what an answer needs is in the model's reach.
"""

import collections
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import app, flags

from models.tokenizer import Tokenizer
from train.data.corpus import CORPORA, load_corpus
from train.data.long_tasks.example import Encoder, Example, place
from train.data.long_tasks.lengths import Draft, count_items
from train.data.long_tasks.lines import (
    LONGCHAT_LEAD,
    SHORT,
    LineStyle,
    draw_records,
    write_lines,
)
from train.data.long_tasks.paragraphs import make_infilling
from train.data.long_tasks.registry import Materials, find_task
from train.data.long_tasks.text import read_source
from train.data.prompts import corpus_pieces

LINE_STYLES = {"lines": LONGCHAT_LEAD, "lines-lead": LONGCHAT_LEAD, "lines-short": SHORT}
PLAIN = "text"
_QUESTIONS = 6
_DRAWS = 100
"""Of a document: paragraphs that are drawn differ in length, and some do not fit."""
_CHARACTERS = 4_000_000
"""Of the text that haystacks are cut from: enough that no piece is seen often."""


@dataclasses.dataclass(frozen=True)
class Mix:
    """What the documents are, and how long: see the flags."""

    tasks: tuple[str, ...]
    share: float  # of documents with a task
    length: int  # most tokens of a document
    seed: int

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"share {self.share} is outside [0, 1]: give the part with tasks.")
        if self.share and not self.tasks:
            raise ValueError("a share of tasks needs tasks: name some, or give share 0.")
        for name in self.tasks:
            find_task(name)


def write_records(
    rng: np.random.Generator,
    encoder: Encoder,
    tokens: int,
    style: LineStyle,
    pieces: Callable[[int], str],
) -> str:
    """Records between two pieces of real text, then questions with answers about some of them.

    Args:
        tokens: most tokens of the document; the number of lines is what fits.
        pieces: ``pieces(n)`` gives at most ``n`` tokens of real text.

    Raises:
        ValueError: not even one record fits.
    """
    records = draw_records(rng, style, min(style.count_keys(), max(1, tokens // 3)))
    lines = write_lines(style, records)

    def ask(key: str, value: int) -> str:
        return style.question.format(key=key) + style.line.format(key=key, value=value)

    # At most half of the tokens for questions; of what then is left two thirds for real text.
    most = tokens // 2 // len(encoder.encode(ask(*records[0])))
    depths = rng.random(int(rng.integers(1, min(max(most, 1), _QUESTIONS) + 1))).tolist()
    around = ["", ""]

    def build(n: int, filler: str) -> Draft:
        answers = "".join(ask(*records[place(depth, n)]) for depth in depths)
        parts = (around[0], style.header + "".join(lines[:n]), around[1], answers)
        return Draft("\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n")

    left = tokens - len(encoder.encode(build(1, "").text))
    room = int(rng.integers(max(0, 2 * left // 3) + 1))
    first = int(rng.integers(room + 1))
    around[:] = pieces(first), pieces(room - first)
    return build(count_items(build, tokens, encoder, len(records)), "").text


def complete(example: Example) -> str:
    """The prompt with its answer, as a text to learn from."""
    end = example.prompt[-1]
    gap = "" if end.isspace() or end in "<>" else " "
    return f"{example.prompt}{gap}{example.answer}\n"


def write_documents(
    mix: Mix, tokenizer: Tokenizer, texts: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Kind and text of one document after the other, without end.

    Raises:
        ValueError: texts too short for a piece, or a task that does not fit the length.
    """
    rng = np.random.default_rng([mix.seed, 0])
    plain = corpus_pieces(texts, tokenizer, mix.length, np.random.default_rng([mix.seed, 1]))
    order = rng.permutation(np.arange(len(texts)))
    joined = "\n\n".join(texts[int(i)] for i in order)[:_CHARACTERS]
    data = Materials(read_source(joined), seed=mix.seed)

    def pieces(size: int) -> str:
        """At most ``size`` tokens, from the beginning of a line on."""
        start = joined.rfind("\n", 0, int(rng.integers(len(joined)))) + 1
        return tokenizer.decode(tokenizer.encode(joined[start : start + 8 * size])[:size])

    while True:
        if rng.random() >= mix.share:
            ids = next(plain, None)
            if ids is None:
                raise ValueError(f"no text has {mix.length} tokens: give more, or a shorter one.")
            text = tokenizer.decode(ids)
            # What a piece begins or ends in the middle of may take more tokens on its own.
            if len(tokenizer.encode(text)) <= mix.length:
                yield PLAIN, text
            continue
        name = mix.tasks[int(rng.integers(len(mix.tasks)))]
        yield name, _task_document(rng, name, mix.length, tokenizer, data, pieces)


def _task_document(
    rng: np.random.Generator,
    name: str,
    length: int,
    tokenizer: Tokenizer,
    data: Materials,
    pieces: Callable[[int], str],
) -> str:
    """A document of one task: of all lengths up to ``length``, those that hold it at all.

    Raises:
        ValueError: in many draws none fitted, not even into ``length`` tokens.
    """
    reason = ""
    for _ in range(_DRAWS):
        seed = int(rng.integers(2**31))
        tokens = int(rng.integers(length // 2, length + 1))
        for size in (tokens, length):
            again = np.random.default_rng([seed, size])
            try:
                text = _make_document(again, name, size, tokenizer, data, pieces)
            except ValueError as error:
                reason = str(error)
                continue
            if len(tokenizer.encode(text)) <= length:
                return text
    raise ValueError(f"no document of {name!r} fits into {length} tokens: {reason}")


def _make_document(
    rng: np.random.Generator,
    name: str,
    size: int,
    tokenizer: Tokenizer,
    data: Materials,
    pieces: Callable[[int], str],
) -> str:
    """A document of one task of about ``size`` tokens; ValueError: this draw does not fit."""
    if name in LINE_STYLES:
        return write_records(rng, tokenizer, size, LINE_STYLES[name], pieces)
    if name == "infilling":
        # Half of the text is missing on average, and has to fit as well.
        return complete(make_infilling(rng, tokenizer, size // 2, data.source))
    task = find_task(name)
    return complete(task.make(rng, tokenizer, size - task.new_tokens, None, data))


def write_corpus(
    path: pathlib.Path, mix: Mix, tokenizer: Tokenizer, texts: Sequence[str], tokens: int
) -> dict[str, dict[str, int]]:
    """Write documents until they have ``tokens`` tokens; returns documents and tokens by kind.

    Raises:
        ValueError: see :func:`write_documents`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    counts: dict[str, dict[str, int]] = collections.defaultdict(
        lambda: {"documents": 0, "tokens": 0}
    )
    total = 0
    # A run that was cut off must not leave what looks like a corpus.
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for kind, text in write_documents(mix, tokenizer, texts):
            size = len(tokenizer.encode(text))
            file.write(json.dumps({"text": text, "kind": kind}, ensure_ascii=False) + "\n")
            counts[kind]["documents"] += 1
            counts[kind]["tokens"] += size
            total += size
            if total >= tokens:
                break
    partial.replace(path)
    return dict(sorted(counts.items()))


def main() -> None:
    """Define the flags, write the corpus, and print what it holds; errors are one sentence."""
    text = flags.DEFINE_string("text", "python_stdlib", f"Real text: {CORPORA} (training split).")
    tokenizer = flags.DEFINE_string("tokenizer", None, "Its folder.", required=True)
    tasks = flags.DEFINE_list(
        "tasks", ["lines-short", "lines-short", "passkey-short", "needle"],
        "Tasks in equal parts; one named twice has two.",
    )  # fmt: skip
    share = flags.DEFINE_float("share", 0.5, "Share of documents with a task.")
    length = flags.DEFINE_integer("length", 256, "Most tokens of a document.", lower_bound=16)
    tokens = flags.DEFINE_integer("tokens", 1_000_000, "Tokens in all.", lower_bound=1)
    seed = flags.DEFINE_integer("seed", 0, "Chooses everything.")
    out = flags.DEFINE_string("out", None, "File to write, .jsonl.", required=True)

    def run(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]}: options start with --.")
        try:
            if not out.value.endswith(".jsonl"):
                raise ValueError(f"--out={out.value}: documents are lines, so end it in .jsonl.")
            mix = Mix(tuple(tasks.value), share.value, length.value, seed.value)
            texts = [document.text for document in load_corpus(text.value, "train")]
            counts = write_corpus(
                pathlib.Path(out.value), mix, Tokenizer.load(tokenizer.value), texts, tokens.value
            )
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        for kind, count in counts.items():
            print(json.dumps({"kind": kind, **count}))

    app.run(run)


if __name__ == "__main__":
    main()
