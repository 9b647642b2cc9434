"""A target's hidden states on disk: what drafters that read them are trained on.

A folder holds token ids and the states before the final norm of many texts, end to end, with a
manifest that names the target's weights by hash. Texts usually come from the target itself
(:func:`generate_texts`), so that the drafter learns the law it will be asked to guess.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from inference.engine import Engine
from models import decoder
from models.safetensors_io import new_directory
from ops.sampling import SamplingParams
from train.journal import Journal
from train.run_folder import hash_file, hash_tree

Split = Literal["train", "heldout"]
States = Callable[[Sequence[int], Array], Array]
"""``states(texts, tokens (b, t)) -> (b, t, width) float16``: of the texts of these numbers."""
SCHEMA = 1
HELDOUT_EVERY = 20
"""One prompt in so many, with all its texts, is held out."""
_PAD = 64
"""Texts are filled up to a multiple of this many tokens: few programs, little of them wasted."""
_READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=32)


@dataclasses.dataclass(frozen=True)
class Text:
    """Token ids, how many of them are the prompt, and which prompt it was."""

    tokens: Sequence[int]
    prompt_length: int
    prompt: int


def weights_hash(params: decoder.Params) -> str:
    """The hash of a target's weights, the same for stacked and unstacked layers."""
    return hash_tree(decoder.unstack(params))


def generate_texts(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperatures: Sequence[float] = (0.0, 1.0),
    batch: int = 16,
    eos: Sequence[int] = (),
    on_progress: Callable[[int, int], None] | None = None,
    keep: str | pathlib.Path | None = None,
) -> list[Text]:
    """The target's own continuations of every prompt, one per temperature.

    Prompts are batched by length. Each text's seed is its place in the result, so a run repeats.

    Args:
        on_progress: called with texts done and texts in all.
        keep: a file of finished batches, with which an interrupted call goes on.

    Raises:
        ValueError, OSError: a file of other texts, see :class:`train.journal.Journal`.
    """
    about = {}
    if keep is not None:
        given = json.dumps([[int(token) for token in prompt] for prompt in prompts])
        about = {
            "target": weights_hash(engine.params),
            "prompts": hashlib.sha256(given.encode()).hexdigest(),
            "max_new_tokens": max_new_tokens,
            "temperatures": list(temperatures),
            "batch": batch,
            "eos": list(eos),
        }
    kept = Journal(keep, about)
    texts: list[Text] = []
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    total = len(prompts) * len(temperatures)
    for temperature in temperatures:
        sampling = SamplingParams.make(temperature=temperature)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            generate = functools.partial(
                engine.generate,
                [prompts[i] for i in chosen],
                max_new_tokens,
                sampling=sampling,
                seeds=list(range(len(texts), len(texts) + len(chosen))),
                eos=eos,
            )
            new = kept.get(f"texts from {len(texts)}", lambda make=generate: make().tokens)
            texts += [
                Text([*prompts[i], *tokens], len(prompts[i]), i)
                for i, tokens in zip(chosen, new, strict=True)
            ]
            if on_progress is not None:
                on_progress(len(texts), total)
    return texts


@functools.partial(jax.jit, static_argnames="cfg")
def pre_norm(
    params: decoder.Params, cfg: decoder.Config, tokens: Int[Array, "b t"]
) -> Float[Array, "b t width"]:
    """States before the final norm, float16."""
    return decoder.forward(params, cfg, tokens).pre_norm.astype(jnp.float16)


def write_hidden(
    folder: str | pathlib.Path,
    params: decoder.Params,
    cfg: decoder.Config,
    texts: Sequence[Text],
    batch: int = 16,
    states: States | None = None,
    per_token: Mapping[str, Sequence[np.ndarray]] | None = None,
) -> None:
    """Run the target over ``texts`` and write its pre-norm states as float16.

    The folder appears only when it is complete.

    Args:
        states: how they come from a padded batch, if not by a plain pass over each text.
        per_token: further arrays to keep by name, for every text one value per token.

    Raises:
        ValueError: no texts, one without a token after its prompt, or states beyond float16.
        FileExistsError: the folder is not empty.
        OSError: it cannot be written.
    """
    if not texts or min(len(t.tokens) - t.prompt_length for t in texts) < 1:
        raise ValueError("every text needs at least one token after its prompt.")

    def plain(chosen: Sequence[int], tokens: Array) -> Array:
        return pre_norm(params, cfg, tokens)

    with new_directory(folder) as partial:
        _write_arrays(partial, plain if states is None else states, cfg.hidden_size, texts, batch)
        for name, values in (per_token or {}).items():
            np.save(partial / f"{name}.npy", np.concatenate(values))
        files = {p.name: hash_file(p) for p in sorted(partial.glob("*.npy"))}
        manifest = {
            "schema": SCHEMA,
            "target": weights_hash(params),
            "hidden_size": cfg.hidden_size,
            "vocab_size": cfg.vocab_size,
            "texts": len(texts),
            "tokens": sum(len(t.tokens) for t in texts),
            "files": files,
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _write_arrays(
    folder: pathlib.Path, states: States, width: int, texts: Sequence[Text], batch: int
) -> None:
    lengths = np.array([len(t.tokens) for t in texts], np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "tokens.npy", np.concatenate([np.asarray(t.tokens, np.int32) for t in texts]))
    np.save(
        folder / "prompts.npy", np.array([[t.prompt, t.prompt_length] for t in texts], np.int64)
    )
    kept = np.lib.format.open_memmap(
        folder / "pre_norm.npy", "w+", np.float16, (int(offsets[-1]), width)
    )
    for chosen, tokens in padded_batches([t.tokens for t in texts], batch):
        out = np.asarray(states(chosen, jnp.asarray(tokens)))
        for row, i in enumerate(chosen):
            if not np.all(np.isfinite(out[row, : lengths[i]])):
                raise ValueError(
                    "the target's hidden states do not fit float16: scale its last layer's output "
                    "down or use another target."
                )
            kept[offsets[i] : offsets[i + 1]] = out[row, : lengths[i]]
    kept.flush()


def padded_batches(
    texts: Sequence[Sequence[int]], batch: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Texts in batches of about equal length: their numbers, and their tokens padded with 0.

    The last batch has rows of padding alone; lengths are rounded up, so that few shapes occur.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        width = -(-len(texts[chosen[-1]]) // _PAD) * _PAD
        tokens = np.zeros((batch, width), np.int32)
        for row, i in enumerate(chosen):
            tokens[row, : len(texts[i])] = texts[i]
        yield chosen, tokens


class HiddenTexts:
    """A folder written by :func:`write_hidden`, opened and checked.

    Raises:
        FileNotFoundError: no manifest in the folder.
        ValueError: files that are missing, damaged or of another schema, or states of another
            target than ``target`` (its :func:`weights_hash`, checked if given).
    """

    def __init__(self, folder: str | pathlib.Path, target: str | None = None):
        self.folder = pathlib.Path(folder)
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: write the target's hidden states there first."
            )
        self.manifest = json.loads(path.read_text(encoding="utf-8"))
        if self.manifest.get("schema") != SCHEMA:
            raise ValueError(
                f"{path} has schema {self.manifest.get('schema')}, not {SCHEMA}: write it again."
            )
        if target is not None and self.manifest["target"] != target:
            raise ValueError(
                f"the hidden states in {self.folder} are of another target: write them again with "
                f"this one's weights."
            )
        for name, digest in self.manifest["files"].items():
            file = self.folder / name
            if not file.is_file() or hash_file(file) != digest:
                raise ValueError(f"{file} is missing or damaged: write the hidden states again.")
        self.offsets = np.load(self.folder / "offsets.npy")
        self.tokens = np.load(self.folder / "tokens.npy", mmap_mode="r")
        self.prompts = np.load(self.folder / "prompts.npy")
        self.pre_norm = np.load(self.folder / "pre_norm.npy", mmap_mode="r")

    def per_token(self, name: str) -> np.ndarray:
        """A further array that was kept with the texts, one value per token.

        Raises:
            ValueError: there is none of that name.
        """
        if f"{name}.npy" not in self.manifest["files"]:
            raise ValueError(f"{self.folder} holds no {name}: it was written for another method.")
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    def chosen(self, split: Split) -> np.ndarray:
        """Numbers of the texts of a split; a prompt's texts are all in one."""
        heldout = self.prompts[:, 0] % HELDOUT_EVERY == HELDOUT_EVERY - 1
        return np.flatnonzero(heldout == (split == "heldout"))


class HiddenWindows:
    """Windows of ``length + 1`` states and ``length + 2`` tokens of one text, for random access.

    An element has ``pre_norm`` (length + 1, width) float16, ``tokens`` (length + 2,) int32 and
    ``mask`` (length + 1,) float32: 1 where the token AFTER the position was generated and is in the
    window. The next window starts ``length`` further on; the last of a text is padded.
    Windows in which nothing counts follow until there is a ``multiple`` of them.

    Raises:
        ValueError: a length below 1, or a split without texts.
    """

    def __init__(self, texts: HiddenTexts, split: Split, length: int, multiple: int = 1):
        if length < 1:
            raise ValueError(f"windows need a length of at least 1, got {length}.")
        self.texts, self.length = texts, length
        windows = []
        for text in texts.chosen(split).tolist():
            size = int(texts.offsets[text + 1] - texts.offsets[text])
            windows += [(text, start) for start in range(0, max(size - 2, 1), length)]
        if not windows:
            raise ValueError(
                f"{texts.folder} has no text in the split {split!r}: use at least {HELDOUT_EVERY} "
                f"prompts."
            )
        self.windows = windows
        self.size = -(-len(windows) // multiple) * multiple

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        text, start = self.windows[min(index, len(self.windows) - 1)]
        first, end = (int(x) for x in self.texts.offsets[text : text + 2])
        at = first + start
        tokens = np.zeros(self.length + 2, np.int32)
        states = np.zeros((self.length + 1, self.texts.pre_norm.shape[1]), np.float16)
        mask = np.zeros(self.length + 1, np.float32)
        piece = self.texts.tokens[at : min(at + self.length + 2, end)]
        tokens[: len(piece)] = piece
        kept = self.texts.pre_norm[at : min(at + self.length + 1, end)]
        states[: len(kept)] = kept
        follows = np.arange(1, len(piece)) + start >= self.texts.prompts[text, 1]
        if index < len(self.windows):
            mask[: len(piece) - 1] = follows
        return {"tokens": tokens, "pre_norm": states, "mask": mask}


def make_hidden_dataset(
    texts: HiddenTexts,
    length: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """Shuffled training batches without end, this process's rows of each.

    Raises:
        ValueError: fewer windows than a batch.
    """
    windows = HiddenWindows(texts, "train", length)
    return shuffled_batches(windows, batch_size, seed, process_index, process_count)


def heldout_batches(
    texts: HiddenTexts,
    length: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """Every held-out window once; the last batch is filled up with windows of mask 0."""
    windows = HiddenWindows(texts, "heldout", length, multiple=batch_size)
    return batches_in_order(windows, batch_size, process_index, process_count)


def shuffled_batches(
    windows: Any, batch_size: int, seed: int, process_index: int, process_count: int
) -> grain.IterDataset:
    """This process's rows of shuffled batches of a random-access source, without end.

    Raises:
        ValueError: fewer elements than a batch.
    """
    if len(windows) < batch_size:
        raise ValueError(
            f"{windows.texts.folder} has {len(windows)} windows of {windows.length} for a batch of "
            f"{batch_size}: write more texts or use smaller batches."
        )
    # Shuffling reads by global index, so every process sees the same order and takes its slice.
    dataset = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
    mine = dataset[process_index::process_count]
    return mine.to_iter_dataset(_READ_OPTIONS).batch(
        batch_size // process_count, drop_remainder=True
    )


def batches_in_order(
    windows: Any, batch_size: int, process_index: int, process_count: int
) -> grain.IterDataset:
    """This process's rows of batches that have every element once."""
    mine = grain.MapDataset.source(windows)[process_index::process_count]
    return mine.batch(batch_size // process_count).to_iter_dataset(_READ_OPTIONS)
