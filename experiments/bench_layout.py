"""What laying a model's matrices out by rows is worth on this machine, by the width of a pass.

    python -m experiments.bench_layout --model=smollm2-135m

Seconds of a decoding round at batch 1 with plain ``(in, out)`` matrices and with
:func:`models.layout.for_decoding`, both in turn within one run.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from experiments import record
from experiments.settings import from_flags
from inference.drafter import NoDrafter
from inference.engine import make_engine
from inference.tuning import seconds_in_turn
from models.layout import for_decoding
from models.load import Model, load

WIDTHS = (1, 2, 4, 5, 8, 11, 16, 26, 32)
"""Some are no multiple of :data:`ops.weights.LANES`: those products are filled up."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is timed; see the flags."""

    model: str
    new_tokens: int
    repeats: int


def measure(model: Model, new_tokens: int, repeats: int) -> list[dict[str, Any]]:
    """A row per width of a pass: seconds with either layout, and how much faster rows are."""
    prompts = [[1 % model.cfg.vocab_size] * 16]
    layouts = {"plain": model, "rows": for_decoding(model)}
    rows = []
    for width in WIDTHS:
        engines = {
            name: make_engine(laid_out.params, model.cfg, drafter=NoDrafter(width))
            for name, laid_out in layouts.items()
        }
        load_before = os.getloadavg()
        seconds = seconds_in_turn(engines, prompts, new_tokens, repeats)
        ratios = [a / b for a, b in zip(seconds["plain"], seconds["rows"], strict=True)]
        samples = {name: record.sample(values) for name, values in seconds.items()}
        rows.append({"width": width, **samples, "speedup": record.sample(ratios)})
        rows[-1]["load_average"] = list(load_before)
    return rows


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings, print and save."""
    settings = from_flags(Settings)
    try:
        rows = measure(load(settings.model), settings.new_tokens, settings.repeats)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    for row in rows:
        print(
            f"{row['width']:3} tokens: {1e3 * row['plain']['mean']:6.1f} ms plain, "
            f"{1e3 * row['rows']['mean']:6.1f} ms by rows, {row['speedup']['mean']:.2f}x"
        )
    print("saved", record.save("bench_layout", rows, config=settings, seeds=[0]))


if __name__ == "__main__":
    flags.DEFINE_string("model", "smollm2-135m", "The model.")
    flags.DEFINE_integer("new_tokens", 48, "Tokens of a decoding.", lower_bound=1)
    flags.DEFINE_integer("repeats", 6, "Timed repeats after the first.", lower_bound=1)
    app.run(main)
