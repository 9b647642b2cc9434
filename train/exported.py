"""Run an exported model without the code that made it: this file, jax, numpy and safetensors.

    python exported.py DIR --tokens=1,2,3 --new=16 [--platform=cpu]

``DIR`` is the ``stablehlo`` folder that ``python -m train.export`` wrote. Copy this file anywhere.

    model = load("DIR", "cpu")
    logits = model(tokens)                       # (b, t) ids -> (b, t, vocab) float32
    cache = model.init_cache(batch=1)
    cache, token, logits = model.decode_step(cache, token)   # (b,) ids -> greedy next ids
    model.generate([[1, 2, 3]], max_new_tokens=16)
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import export
from safetensors import SafetensorError
from safetensors.numpy import load_file

SCHEMA = 1
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Program:
    """One model on one platform; weights are on its first device.

    Attributes:
        weights: arrays by name.
        functions: the compiled functions by name: ``forward`` and, for causal models,
            ``decode_step``; each takes the weights first.
        description: what the manifest says of the platform: inputs and outputs per function, with
            names for sizes that are free and ``largest`` for their bounds.
        vocab_size: ids are 0 .. vocab_size - 1.
    """

    weights: dict[str, Any]
    functions: dict[str, Callable[..., Any]]
    description: dict[str, Any]
    vocab_size: int

    def __call__(self, tokens: Any) -> Any:
        """Logits (b, t, vocab), float32, of token ids (b, t).

        Raises:
            ValueError: another shape than the artefact takes, or ids outside the vocabulary.
        """
        tokens = np.asarray(tokens, np.int32)
        self._check_sizes("forward", "tokens", tokens.shape)
        self._check_ids(tokens)
        return self.functions["forward"](self.weights, tokens)

    def init_cache(self, batch: int, slots: int | None = None) -> dict[str, Any]:
        """An empty cache for ``batch`` texts of up to ``slots`` tokens (default: the most).

        Raises:
            ValueError: a size that the artefact does not take, or a model that cannot decode.
        """
        if "decode_step" not in self.functions:
            raise ValueError("this model has no decode_step: it is not causal, call it as a whole.")
        inputs = self.description["decode_step"]["inputs"]
        arrays = {name.removeprefix("cache."): x for name, x in inputs.items() if name != "tokens"}
        largest = self.description["decode_step"]["largest"]
        sizes = {"b": batch, "s": largest["s"] if slots is None else slots}
        full = {name: tuple(sizes.get(n, n) for n in x["shape"]) for name, x in arrays.items()}
        keys = next(name for name in full if name.startswith("k."))
        self._check_sizes("decode_step", f"cache.{keys}", full[keys])
        return {
            name: jax.numpy.zeros(full[name], x["dtype"], device=self._device())
            for name, x in arrays.items()
        }

    def decode_step(self, cache: dict[str, Any], tokens: Any) -> tuple[dict[str, Any], Any, Any]:
        """One token per row: the cache with it, the greedy next ids (b,), and logits (b, vocab).

        The given cache is used up. A row whose cache was full already gets -1 instead of an id.
        """
        return self.functions["decode_step"](self.weights, cache, tokens)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos: Sequence[int] = ()
    ) -> list[list[int]]:
        """Greedy continuations, each up to ``max_new_tokens`` ids or an id of ``eos``.

        Raises:
            ValueError: an empty prompt, ids outside the vocabulary, or texts beyond the cache.
        """
        if not prompts or min(len(p) for p in prompts) == 0 or max_new_tokens < 1:
            raise ValueError("give prompts of at least one token each and max_new_tokens >= 1.")
        for prompt in prompts:
            self._check_ids(np.asarray(prompt))
        steps = max(len(p) for p in prompts) + max_new_tokens - 1
        about = self.description.get("decode_step", {"largest": {"s": steps}, "free": []})
        most = about["largest"]["s"]
        if steps > most:
            raise ValueError(
                f"prompt and new tokens need {steps} cache slots and there are {most}: shorten the "
                "prompt, ask for fewer tokens, or export with a larger --length."
            )
        cache = self.init_cache(len(prompts), steps if "s" in about["free"] else None)
        new: list[list[int]] = [[] for _ in prompts]
        last = np.zeros(len(prompts), np.int32)
        for i in range(steps):
            fed = [p[i] if i < len(p) else x for p, x in zip(prompts, last, strict=True)]
            cache, following, _ = self.decode_step(cache, np.asarray(fed, np.int32))
            last = np.asarray(following)
            for row, (prompt, text) in enumerate(zip(prompts, new, strict=True)):
                ended = len(text) == max_new_tokens or bool(text and text[-1] in eos)
                if i >= len(prompt) - 1 and not ended:
                    text.append(int(last[row]))
        return new

    def _device(self) -> Any:
        return next(iter(next(iter(self.weights.values())).devices()))

    def _check_sizes(self, function: str, name: str, shape: tuple[int, ...]) -> None:
        about = self.description[function]
        wanted = about["inputs"][name]["shape"]
        fits = len(shape) == len(wanted) and all(
            1 <= size <= about["largest"].get(want, size) if isinstance(want, str) else size == want
            for size, want in zip(shape, wanted, strict=True)
        )
        if not fits:
            raise ValueError(
                f"{function} takes {name} of shape {wanted} with sizes up to {about['largest']}, "
                f"got {list(shape)}: pad or cut the input, or export with another --length."
            )

    def _check_ids(self, ids: np.ndarray) -> None:
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise ValueError(
                f"token ids must lie in 0..{self.vocab_size - 1}: use the model's tokenizer."
            )


def load(directory: str | pathlib.Path, platform: str) -> Program:
    """Load the artefacts of ``platform`` (``cpu``, ``tpu`` or ``cuda``) after checking their files.

    Raises:
        FileNotFoundError: no manifest, or a file that it names is missing.
        ValueError: another schema, a platform that was not exported or has no device here, a file
            whose sha256 is not the manifest's, or artefacts that this jax cannot read.
    """
    folder = pathlib.Path(directory)
    manifest = read_manifest(folder)
    if platform not in manifest["platforms"]:
        raise ValueError(
            f"{folder} has no artefacts for {platform!r}, only for "
            f"{', '.join(manifest['platforms'])}: export with --stablehlo={platform}."
        )
    about = manifest["platforms"][platform]
    names = [manifest["weights"], *(function["file"] for function in about.values())]
    paths = {name: _checked(folder, name, manifest["sha256"]) for name in names}
    try:
        device = jax.local_devices(backend=platform)[0]
    except RuntimeError as error:
        raise ValueError(
            f"jax finds no {platform} device on this machine: load the artefacts of another "
            "platform."
        ) from error
    functions = {}
    for name, function in about.items():
        try:
            call = export.deserialize(bytearray(paths[function["file"]].read_bytes())).call
        except Exception as error:  # the format check raises many kinds
            raise ValueError(
                f"jax {jax.__version__} cannot read {function['file']}, written by jax "
                f"{manifest['jax']}: export it again with a jax of about this version."
            ) from error
        functions[name] = jax.jit(call, donate_argnums=1 if name == "decode_step" else ())
    try:
        arrays = load_file(paths[manifest["weights"]])
    except SafetensorError as error:
        raise ValueError(f"{paths[manifest['weights']]} is corrupt: export it again.") from error
    weights = {name: jax.device_put(array, device) for name, array in arrays.items()}
    return Program(weights, functions, about, manifest["vocab_size"])


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: not JSON, or of another schema.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: name the stablehlo folder of an export that used --stablehlo."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): export it again.") from error
    found = manifest.get("schema") if isinstance(manifest, dict) else None
    if found != SCHEMA:
        raise ValueError(
            f"{path} has schema {found} and this loader reads {SCHEMA}: use the exported.py of the "
            "version that wrote it."
        )
    return manifest


def _checked(folder: pathlib.Path, name: str, hashes: dict[str, str]) -> pathlib.Path:
    """The path of a file of the folder whose contents are what the manifest promises."""
    if pathlib.PurePath(name).name != name or "\\" in name:
        raise ValueError(f"{folder / MANIFEST} names {name!r}, outside its folder: export again.")
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy the whole folder, or export it again.")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != hashes.get(name):
        raise ValueError(
            f"{path} is truncated or changed (its sha256 is not the manifest's): copy or export it "
            "again."
        )
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Print the greedy continuation of some token ids; returns the exit status."""
    parser = argparse.ArgumentParser(description="Continue token ids with an exported model.")
    parser.add_argument("directory")
    parser.add_argument("--tokens", required=True, help="ids of the prompt, as 1,2,3")
    parser.add_argument("--new", type=int, default=16, help="how many tokens to add")
    parser.add_argument("--platform", default="cpu")
    values = parser.parse_args(argv)
    try:
        prompt = [int(x) for x in values.tokens.split(",")]
        model = load(values.directory, values.platform)
        print(",".join(map(str, model.generate([prompt], values.new)[0])))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
