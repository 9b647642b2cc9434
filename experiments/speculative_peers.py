"""Speculative decoding of ``transformers`` on our weights, greedily, for comparison."""

import os
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from models.hf import save_hf
from models.load import Model, load

LOOKUP_TOKENS = 10
"""Tokens of a draft in its prompt lookup, as its documentation has them."""


class Peers:
    """Plain decoding, prompt lookup, and assisted generation if there is an assistant.

    Raises:
        ValueError: PyTorch or transformers is not installed.
    """

    def __init__(self, model: Model, assistant: str = ""):
        try:
            import torch  # pyright: ignore[reportMissingImports]
            from transformers import (  # pyright: ignore[reportMissingImports]
                AutoModelForCausalLM,
            )
        except ImportError as error:
            raise ValueError("--peers needs the extra: pip install -e '.[bench]'.") from error
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._torch: Any = torch

        def build(source: Model) -> Any:
            with tempfile.TemporaryDirectory() as folder:
                save_hf(folder, source.params, source.cfg)
                found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            return found.eval()

        self._model = build(model)
        self._options: dict[str, dict[str, Any]] = {
            "transformers": {},
            "transformers, prompt lookup": {"prompt_lookup_num_tokens": LOOKUP_TOKENS},
        }
        if assistant:
            self._options["transformers, assisted"] = {"assistant_model": build(load(assistant))}
        self._ends = list(model.tokenizer.end_ids)

    @property
    def sides(self) -> tuple[str, ...]:
        """What can be decoded with."""
        return tuple(self._options)

    def decode(self, side: str, prompt: Sequence[int], new_tokens: int) -> tuple[float, int]:
        """Seconds of decoding a prompt, and tokens made; the time of a first token is taken off."""
        start = time.perf_counter()
        self._generate(side, prompt, 1)
        middle = time.perf_counter()
        made = self._generate(side, prompt, new_tokens)
        return max(time.perf_counter() - middle - (middle - start), 1e-9), max(made - 1, 1)

    def _generate(self, side: str, prompt: Sequence[int], count: int) -> int:
        ids = self._torch.tensor([list(prompt)])
        with self._torch.inference_mode():
            out = self._model.generate(
                ids, attention_mask=self._torch.ones_like(ids), max_new_tokens=count,
                do_sample=False, pad_token_id=0, eos_token_id=self._ends or None,
                **self._options[side],
            )  # fmt: skip
        return out.shape[1] - len(prompt)
