"""What the benchmarks count: work of a training step, bits per byte, compressors, rates."""

import gzip
import math
import pathlib
import time

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import base_model, bench_decode
from experiments.bench_train import step_flops
from models import decoder
from models.load import Model


def test_work_of_a_step_by_hand() -> None:
    cfg = decoder.Config(
        vocab_size=11, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4,
        intermediate_size=12, max_length=16, tied=True,
    )  # fmt: skip
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12 + 2 * 8  # q, k and v, o, mlp, norms
    parameters = 11 * 8 + 2 * layer + 8
    # A query sees 1 to 5 keys, 3 on average; scores and mixing; forward once, backward twice.
    attention = 3 * 2 * (2 * 2 * 8 * 3)
    assert step_flops(cfg, tokens=10, length=5) == 10 * (6 * parameters + attention)


def test_compressors_see_the_split_as_one_file(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model, "CORPUS", f"text:{folder / 'texts'}")
    documents = [d.text for d in base_model.load_corpus(base_model.CORPUS, "train")]
    whole = "".join(documents).encode()
    got = base_model.compressed("train")
    assert got["gzip -9"] == 8 * len(gzip.compress(whole, 9, mtime=0)) / len(whole)
    assert 0 < got["xz -9"] < 8


def test_bits_per_byte_are_the_summed_nats_over_bytes(
    folder: pathlib.Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model, "CORPUS", f"text:{folder / 'texts'}")
    bos, eos = model.tokenizer.bos_id, model.tokenizer.eos_id
    nats = nbytes = 0.0
    for document in base_model.load_corpus(base_model.CORPUS, "test"):
        ids = model.tokenizer.encode(document.text)
        out = decoder.forward(model.params, model.cfg, jnp.asarray([[bos, *ids]]))
        logits = np.asarray(decoder.unembed(model.params, model.cfg, out.hidden)[0], np.float64)
        laws = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats -= laws[np.arange(len(ids) + 1), [*ids, eos]].sum()
        nbytes += len(document.text.encode())
    got = base_model.bits_per_byte(model, "test", rows=4)
    assert got == pytest.approx(nats / math.log(2) / nbytes, rel=1e-4)


def test_the_rate_leaves_the_prompt_out() -> None:
    def run(count: int) -> list[int]:
        time.sleep(0.2 + 0.005 * count)  # a prompt, and tokens of 5 ms
        return [0] * count

    assert bench_decode.rate(run, 41) == pytest.approx(200, rel=0.1)
