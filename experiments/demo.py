"""The main job in minutes: train a drafter for a small model, decode losslessly, show the result.

    make demo            (or python -m experiments.demo)

Loads the shipped model, lets it write a few hundred texts, trains Clover-2 heads on its hidden
states, decodes with them and with rivals that need no training, checks every text against plain
decoding, and leaves a table, a picture and a replay of one text in ``runs/demo``. The heads are
trained for about two minutes: the committed results come from longer trainings.
"""

import pathlib
import time
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging

from experiments import figures, record, replay, speculative
from experiments.exactness import is_exact
from experiments.shown.speculative import tokens_per_pass
from models import params as model_params
from models.load import load

SETTINGS: dict[str, Any] = {
    "model": "python-5m",
    "prompts": ("python_stdlib",),
    "chat": False,
    "methods": ("none", "lookup", "recycling", "draft", "clover"),
    "seeds": (0,),
    "texts": 512,
    "prompt_tokens": 64,
    "text_tokens": 192,
    "steps": 400,
    "batch_size": 4,
    "heldout": 8,
    "new_tokens": 128,
    "draft_model": "python-1m",
    "draft_vocab": 1024,  # a quarter of the head: drafts and their training cost that much less
    "variant": "",
    "speed_prompts": 1,
}


LEGEND = """
tokens/pass: text tokens per pass of the model. draft cost: work of a draft as a share of a pass.
modelled: speedup where a pass over a draft costs what a pass over one token does (memory-bound
accelerators). measured: on this machine at batch 1. exact: every greedy text equals plain decoding.
"""


def main(_: Sequence[str]) -> None:
    """Run the demonstration."""
    logging.set_verbosity(logging.WARNING)
    start = time.perf_counter()
    folder = pathlib.Path(flags.FLAGS.folder)
    settings = speculative.Settings(folder=str(folder), **SETTINGS)
    model = load(settings.model)
    size = model_params.count(model.params)
    print(f"{settings.model}: {size / 1e6:.1f}M parameters, trained here on Python sources")
    try:
        rows = speculative.run(settings)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    path = record.save(
        "demo",
        rows,
        config=settings,
        seeds=settings.seeds,
        timing={"memory_bandwidth_gb_s": record.memory_bandwidth()},
        folder=folder,
    )
    result = record.load("demo", folder)
    picture = folder / "tokens_per_pass.svg"
    figures.save(figures.Figure(str(picture), "demo", tokens_per_pass), result, picture, "demo")
    page = replay.write(settings, model, folder / "replay.html")
    print()
    print(speculative.show(rows))
    print(LEGEND)
    print(
        f"table {path}, picture {picture}, replay {page}; "
        f"{time.perf_counter() - start:.0f} s in all"
    )
    if not all(map(is_exact, rows)):
        raise SystemExit(
            "a greedy text differs from plain decoding: this is a bug, please report it."
        )


if __name__ == "__main__":
    flags.DEFINE_string(
        "folder", "runs/demo", "Where everything is kept; a second run goes on from it."
    )
    app.run(main)
