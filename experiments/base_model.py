"""How well a model predicts held-out Python sources, against general-purpose compressors.

    python -m experiments.base_model --models=python-5m,python-1m

Bits per byte of the held-out files of ``python_stdlib``: the model's are its summed nats over the
files' bytes (every document from its start, windows that overlap by half), the compressors' are the
bytes of ``gzip -9`` and ``xz -9`` over all files concatenated, which is their best case.
"""

import gzip
import lzma
import math
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
from absl import app, flags, logging

from experiments import record
from models import decoder
from models import params as model_params
from models.attention import Step
from models.load import Model, load
from train.data.corpus import load_corpus
from train.data.pipeline import DataConfig, evaluation_batches, load_tokens
from train.losses import token_cross_entropy

CORPUS = "python_stdlib"


def bits_per_byte(model: Model, split: str, rows: int = 8) -> float:
    """Of the model on a split of the corpus, with windows of its context that overlap by half."""
    length = model.cfg.max_length
    params = decoder.unstack(model.params)

    @jax.jit
    def nats(params: Any, batch: dict[str, Any]) -> jax.Array:
        step = Step(batch["positions"], segments=batch["segments"])
        out = decoder.forward(params, model.cfg, batch["tokens"], step=step)
        head = decoder.head_matrix(params)
        return token_cross_entropy(out.hidden, head, batch["targets"], batch["mask"])

    with tempfile.TemporaryDirectory() as folder:
        model.tokenizer.save(folder)
        reading = DataConfig(CORPUS, folder, split, length, rows, seed=0)
        total = sum(float(nats(params, b)) for b in evaluation_batches(reading, length // 2))
        return total / math.log(2) / load_tokens(reading).num_bytes


def compressed(split: str) -> dict[str, float]:
    """Bits per byte of gzip and xz at their strongest usual setting on the split's files."""
    data = b"".join(d.text.encode() for d in load_corpus(CORPUS, split))
    return {
        "gzip -9": 8 * len(gzip.compress(data, 9, mtime=0)) / len(data),
        "xz -9": 8 * len(lzma.compress(data, preset=9)) / len(data),
    }


def measure(names: Sequence[str]) -> list[dict[str, Any]]:
    """A row per compressor and per model, on the validation and test splits."""
    splits = ("validation", "test")
    rivals = {split: compressed(split) for split in splits}
    rows = [
        {
            "predictor": name,
            "parameters": None,
            **{s: record.sample([rivals[s][name]]) for s in splits},
        }
        for name in rivals["test"]
    ]
    for name in names:
        model = load(name)
        rows.append(
            {
                "predictor": pathlib.Path(name).name,
                "parameters": model_params.count(model.params),
                **{s: record.sample([bits_per_byte(model, s)]) for s in splits},
            }
        )
    return rows


def main(_: Sequence[str]) -> None:
    """Measure, print and save."""
    logging.set_verbosity(logging.WARNING)
    rows = measure(flags.FLAGS.models)
    for row in rows:
        print(
            f"{row['predictor']:16} validation {row['validation']['mean']:.3f}  "
            f"test {row['test']['mean']:.3f} bits per byte"
        )
    config = {"corpus": CORPUS, "models": list(flags.FLAGS.models)}
    print("saved", record.save("base_model", rows, config=config, seeds=[0]))


if __name__ == "__main__":
    flags.DEFINE_list("models", ["python-5m", "python-1m"], "Models to measure.")
    app.run(main)
