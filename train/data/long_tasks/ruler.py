"""Tasks that need more than finding: chains of variables, and the most common words.

Variable tracking and common words as families are RULER's (arXiv 2404.06654); the wording, the
made-up names and the sizes are our own.
"""

import itertools

import numpy as np

from train.data.long_tasks.example import Encoder, Example, Space, place
from train.data.long_tasks.lengths import Draft, fit
from train.data.long_tasks.needles import digits_range, insert
from train.data.long_tasks.text import Source
from train.data.long_tasks.words import NOUNS, count_made_up, made_up

_VARIABLES_HEADER = "Variables are set in the text below. Follow which has which value.\n\n"
_VARIABLES_TAIL = "\n\nWhich {count} variables have the value {value}?\nThe variables are"
_WORDS_HEADER = "Below is a list of words. Some are much more frequent than the others.\n\n"
_WORDS_TAIL = "\n\nWhich {count} words are the most frequent?\nThe words are"


def make_variables(
    rng: np.random.Generator,
    encoder: Encoder,
    tokens: int,
    source: Source,
    depth: float | None = None,
    chains: int = 2,
    hops: int = 3,
    digits: int = 4,
    task: str = "variables",
) -> Example:
    """``chains`` chains of ``hops`` copies; asked are all variables with the first one's value.

    A chain is ``VAR a = 4711.``, ``VAR b = VAR a.``, ``VAR c = VAR b.`` in this order and anywhere
    in the text. With a ``depth`` the first statement of the chain that is asked for stands there,
    its copies behind it. The score is the share of the ``hops + 1`` names that is recalled.

    Raises:
        ValueError: no chain or hop, or more names than there are.
    """
    names_needed = chains * (hops + 1)
    if chains < 1 or hops < 1 or names_needed > count_made_up(2):
        raise ValueError(f"{chains} chains of {hops} hops: ask for one of each at least, or fewer.")
    numbers = rng.choice(count_made_up(2), names_needed, replace=False).tolist()
    names = [made_up(number).upper() for number in numbers]
    values = digits_range(digits)
    chosen = (values.start + rng.choice(len(values), chains, replace=False)).tolist()
    statements, depths = [], []
    for chain in range(chains):
        own = names[chain * (hops + 1) : (chain + 1) * (hops + 1)]
        statements.append(f"VAR {own[0]} = {chosen[chain]}.")
        statements += [f"VAR {b} = VAR {a}." for a, b in itertools.pairwise(own)]
        if chain == 0 and depth is not None:
            depths += [depth, *(depth + (1 - depth) * np.sort(rng.random(hops))).tolist()]
        else:
            depths += np.sort(rng.random(hops + 1)).tolist()
    tail = _VARIABLES_TAIL.format(count=hops + 1, value=chosen[0])
    start = int(rng.integers(len(source.sentences)))

    def build(count: int, filler: str) -> Draft:
        gaps = [place(d, count + 1) for d in depths]
        text, starts = insert(source.run(start, count), list(zip(gaps, statements, strict=True)))
        head = filler + _VARIABLES_HEADER
        return Draft(head + text + tail, len(head) + starts[0])

    fitted = fit(build, tokens, encoder, len(source.sentences), least=0)
    answers = tuple(names[: hops + 1])
    return Example(
        task=task,
        prompt=fitted.text,
        answer=", ".join(answers),
        answers=answers,
        metric="recall",
        space=Space(tuple(names)),
        depth=place(depths[0], fitted.items + 1) / (fitted.items + 1),
        target_tokens=tokens,
        prompt_tokens=fitted.prompt_tokens,
        answer_token=fitted.answer_token,
        fields={"value": chosen[0], "chains": chains, "hops": hops, "sentences": fitted.items},
    )


def make_common_words(
    rng: np.random.Generator,
    encoder: Encoder,
    tokens: int,
    common: int = 3,
    often: int = 6,
    rarely: int = 2,
    task: str = "common-words",
) -> Example:
    """A shuffled list in which ``common`` words stand ``often`` times and all others ``rarely``.

    Longer prompts have more rare words. The score is the share of common words that is recalled.

    Raises:
        ValueError: words that are not more frequent than the others.
    """
    if not 1 <= rarely < often or common < 1:
        raise ValueError(f"words {often} times among words {rarely} times: make often larger.")
    every = len(NOUNS) + count_made_up(2)
    most = min(every, max(tokens, common + 1))
    order = rng.choice(every, most, replace=False).tolist()
    words = [NOUNS[i] if i < len(NOUNS) else made_up(i - len(NOUNS)) for i in order]
    seed = int(rng.integers(2**31))

    def build(rare: int, filler: str) -> Draft:
        listed = words[:common] * often + words[common : common + rare] * rarely
        mixed = np.random.default_rng([seed, rare]).permutation(len(listed)).tolist()
        text = " ".join(listed[i] for i in mixed)
        tail = _WORDS_TAIL.format(count=common)
        return Draft(filler + _WORDS_HEADER + text + tail)

    fitted = fit(build, tokens, encoder, most - common, least=1)
    answers = tuple(words[:common])
    return Example(
        task=task,
        prompt=fitted.text,
        answer=", ".join(answers),
        answers=answers,
        metric="recall",
        space=Space(tuple(words[: common + fitted.items])),
        depth=None,
        target_tokens=tokens,
        prompt_tokens=fitted.prompt_tokens,
        answer_token=None,
        fields={"often": often, "rarely": rarely, "rare_words": fitted.items},
    )
