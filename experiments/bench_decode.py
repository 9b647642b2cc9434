"""Decode speed at batch 1 against ``transformers`` with PyTorch, same weights and prompt, one run.

``make bench`` runs it on the shipped models and, where it is installed, on SmolLM2-135M. Both sides
decode greedily in float32 on the CPU's cores, with a key-value cache; prefill is timed apart and
taken off. The order of the sides alternates, so that a drifting machine hits both. What share of
the measured memory bandwidth decoding reaches is said beside: each token reads every weight once.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags

from experiments import record
from inference.engine import Engine, make_engine
from models import params as model_params
from models.hf import save_hf
from models.load import load, locate, shipped

PROMPT = "import os\n\n\ndef read_lines(path):\n"


def ours(engine: Engine, prompt: list[int], new_tokens: int) -> Callable[[int], list[int]]:
    """A function that decodes some number of tokens with our engine."""

    def run(count: int) -> list[int]:
        return engine.generate([prompt], count).tokens[0]

    run(new_tokens)
    run(1)
    return run


def theirs(
    folder: str, prompt: list[int], new_tokens: int, dtype: str
) -> Callable[[int], list[int]]:
    """The same with ``transformers.generate``."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import (  # pyright: ignore[reportMissingImports]
        AutoModelForCausalLM,
    )

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    ids = torch.tensor([prompt])

    def run(count: int) -> list[int]:
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        return out[0, len(prompt) :].tolist()

    run(new_tokens)
    return run


def rate(run: Callable[[int], list[int]], new_tokens: int) -> float:
    """Tokens per second of decoding: the time of one new token (prefill) is taken off."""
    start = time.perf_counter()
    run(1)
    middle = time.perf_counter()
    run(new_tokens)
    end = time.perf_counter()
    return (new_tokens - 1) / ((end - middle) - (middle - start))


def measure(name: str, new_tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Rows for one model: ours and theirs, with the ratio of medians."""
    model = load(name)
    prompt = model.tokenizer.encode(PROMPT)
    engine = make_engine(model.params, model.cfg)
    bandwidth = record.memory_bandwidth()
    with tempfile.TemporaryDirectory() as folder:
        save_hf(folder, model.params, model.cfg)
        sides = {
            "longreach, float32": ours(engine, prompt, new_tokens),
            "transformers, float32": theirs(folder, prompt, new_tokens, "float32"),
            "transformers, bfloat16": theirs(folder, prompt, new_tokens, "bfloat16"),
        }
        rates: dict[str, list[float]] = {side: [] for side in sides}
        load_before = os.getloadavg()
        for i in range(repeats):
            for side in list(sides) if i % 2 == 0 else reversed(sides):
                rates[side].append(rate(sides[side], new_tokens))
        same = sides["longreach, float32"](new_tokens) == sides["transformers, float32"](new_tokens)
    nbytes = model_params.nbytes(model.params)
    base = statistics.median(rates["longreach, float32"])
    return [
        {
            "model": name,
            "side": side,
            "tokens_per_second": record.sample(values),
            "ours_over_this": base / statistics.median(values),
            "same_tokens_in_float32": same,
            "bandwidth_share": statistics.median(values) * nbytes / 1e9 / bandwidth
            if side.endswith("float32")
            else None,
            "memory_bandwidth_gb_s": bandwidth,
            "load_average": list(load_before),
        }
        for side, values in rates.items()
    ]


def main(_: list[str]) -> None:
    """Measure every model that is there, print and save."""
    names = shipped()
    try:
        locate("smollm2-135m")
        names.append("smollm2-135m")
    except FileNotFoundError as error:
        print(f"leaving it out: {error}")
    rows = [
        row for name in names for row in measure(name, flags.FLAGS.new_tokens, flags.FLAGS.repeats)
    ]
    for row in rows:
        print(
            f"{row['model']:16} {row['side']:24} {row['tokens_per_second']['mean']:8.1f} "
            f"tokens/s   ours is {row['ours_over_this']:.2f} times this"
        )
    config = {
        "prompt": PROMPT,
        "new_tokens": flags.FLAGS.new_tokens,
        "repeats": flags.FLAGS.repeats,
    }
    print("saved", record.save("bench_decode", rows, config=config, seeds=[0]))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    flags.DEFINE_integer("new_tokens", 128, "Tokens to decode per repeat.")
    flags.DEFINE_integer("repeats", 5, "Repeats per side.")
    app.run(main)
