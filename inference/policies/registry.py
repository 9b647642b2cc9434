"""Attention policies by name, as ``--policy`` takes them.

Each entry names a function ``load(arguments, cfg) -> policy`` as ``module:attribute``. It is
looked up when asked for, because some live in packages that this one must not import.
"""

import pathlib
import pkgutil
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct

from inference.policies.dual_chunk import DualChunkPolicy
from inference.policies.interpolated import InterpolatedPolicy, check_model
from inference.policies.split_tree import SplitTreePolicy, split_tree
from inference.policies.vertical_slash import (
    THRESHOLD,
    VerticalSlashPolicy,
    read_budgets,
    with_budgets,
)
from models.attention import DensePolicy, Rope, Step, make_rope
from models.decoder import NO_WINDOW, Config, default_policy
from models.positions import RopeScaling

POLICIES = {
    "dense": "inference.policies.registry:load_dense",
    "window:SIZE": "inference.policies.registry:load_window",
    "linear:FACTOR": "inference.policies.registry:load_linear",
    "ntk:FACTOR": "inference.policies.registry:load_ntk",
    "dynamic:FACTOR": "inference.policies.registry:load_dynamic",
    "yarn:FACTOR": "inference.policies.registry:load_yarn",
    "split_tree": "inference.policies.registry:load_split_tree",
    "interpolated": "inference.policies.registry:load_interpolated",
    "power:K": "research.context.giraffe.bases:load_power",
    "truncated:N": "research.context.giraffe.bases:load_truncated",
    "giraffe:DIR": "research.context.giraffe.bases:load_policy",
    "clex:DIR": "research.context.clex.scheme:load_policy",
    "seqpe:DIR": "research.context.seqpe.policy:load_policy",
    "dual_chunk:CHUNK:LOCAL": "inference.policies.registry:load_dual_chunk",
    "dual_chunk:CHUNK:LOCAL:TRAINED": "inference.policies.registry:load_dual_chunk",
    "vertical_slash:CHUNK:LOCAL:FILE": "inference.policies.registry:load_vertical_slash",
    "vertical_slash:CHUNK:LOCAL:V:S": "inference.policies.registry:load_vertical_slash",
    "vertical_slash:CHUNK:LOCAL:V:S:THRESHOLD": "inference.policies.registry:load_vertical_slash",
}
"""What can be asked for. Sizes are in tokens; ``FACTOR`` is the ratio of the wanted to the trained
length; ``TRAINED`` switches dual chunk attention's temperature on beyond that many tokens; ``DIR``
is an exported run of the method; ``V`` and ``S`` are columns and diagonals per head, ``FILE`` holds
them for each, and prompts up to ``THRESHOLD`` tokens are read densely."""


@struct.dataclass
class ScaledRope:
    """A registered rotary scheme in place of the model's own, as a scheme of the dense policy."""

    scaling: RopeScaling = struct.field(pytree_node=False)

    def rope(self, cfg: Config, step: Step, has_cache: bool) -> Rope:
        """See :class:`models.attention.PositionScheme`."""
        return make_rope(self.scaling, cfg.rotary_dim, cfg.rope_base, step, has_cache)


def check_policy(name: str) -> tuple[str, list[str]]:
    """The form in :data:`POLICIES` that a policy's name has, and the name's arguments.

    Raises:
        ValueError: an unknown policy, or arguments that are missing or superfluous.
    """
    kind, *arguments = name.split(":")
    forms = [form for form in POLICIES if form.split(":")[0] == kind]
    if not forms:
        raise ValueError(f"unknown policy {name!r}: choose one of {', '.join(POLICIES)}.")
    for form in forms:
        if form.count(":") == len(arguments) and all(arguments):
            return form, arguments
        if form.endswith(":DIR") and arguments:
            return form, [":".join(arguments)]
    raise ValueError(f"policy {name!r} has the wrong arguments: write {' or '.join(forms)}.")


def make_policy(name: str, cfg: Config) -> Any:
    """The policy called ``name`` for a model of config ``cfg``.

    Raises:
        ValueError: see :func:`check_policy`, or what it names does not fit the model.
        FileNotFoundError: nothing at the place that the name gives.
    """
    form, arguments = check_policy(name)
    return pkgutil.resolve_name(POLICIES[form])(arguments, cfg)


def load_dense(arguments: list[str], cfg: Config) -> DensePolicy:
    """The model's own attention."""
    return default_policy(cfg)


def load_split_tree(arguments: list[str], cfg: Config) -> SplitTreePolicy:
    """The model's own attention, over drafts in two parts."""
    return split_tree(default_policy(cfg))


def load_window(arguments: list[str], cfg: Config) -> DensePolicy:
    """Only the nearest tokens, or fewer where the model has a narrower window."""
    size = _whole(arguments[0], "window")
    own = cfg.windows or (None,) * cfg.num_layers
    return DensePolicy(jnp.asarray([min(size, w or NO_WINDOW) for w in own], jnp.int32))


def load_linear(arguments: list[str], cfg: Config) -> DensePolicy:
    """Position interpolation."""
    return _scaled("linear", arguments, cfg)


def load_ntk(arguments: list[str], cfg: Config) -> DensePolicy:
    """NTK-aware scaling of the rotary base."""
    return _scaled("ntk", arguments, cfg)


def load_dynamic(arguments: list[str], cfg: Config) -> DensePolicy:
    """NTK-aware scaling by the length of the text."""
    return _scaled("dynamic", arguments, cfg)


def load_yarn(arguments: list[str], cfg: Config) -> DensePolicy:
    """YaRN."""
    return _scaled("yarn", arguments, cfg)


def load_interpolated(arguments: list[str], cfg: Config) -> InterpolatedPolicy:
    """Learned positions or sinusoids of a long text squeezed into the model's length."""
    check_model(cfg)
    return InterpolatedPolicy(default_policy(cfg).windows, trained=cfg.max_length)


def load_dual_chunk(arguments: list[str], cfg: Config) -> DualChunkPolicy:
    """Dual chunk attention, with a temperature if a trained length is given."""
    sizes = [_whole(argument, "dual_chunk") for argument in arguments]
    _check_chunk(sizes[0], cfg)
    trained = sizes[2] if len(sizes) > 2 else 0
    return DualChunkPolicy(sizes[0], sizes[1], original_max_position=trained)


def load_vertical_slash(arguments: list[str], cfg: Config) -> VerticalSlashPolicy:
    """Sparse prefill with one budget for all heads, or with a file of budgets."""
    chunk = _whole(arguments[0], "vertical_slash")
    local = 0 if arguments[1] == "0" else _whole(arguments[1], "vertical_slash")
    _check_chunk(chunk, cfg)
    if len(arguments) == 3:
        return read_budgets(pathlib.Path(arguments[2]), chunk, local)
    vertical, slash, *rest = (_whole(argument, "vertical_slash") for argument in arguments[2:])
    every = np.ones((cfg.num_layers, cfg.num_heads), np.int32)
    threshold = rest[0] if rest else THRESHOLD
    return with_budgets(DualChunkPolicy(chunk, local), vertical * every, slash * every, threshold)


def _check_chunk(size: int, cfg: Config) -> None:
    if size > cfg.max_length:
        raise ValueError(
            f"a chunk of {size} tokens exceeds the model's {cfg.max_length}: no relative "
            "position is kept within the trained range, so take a smaller chunk."
        )


def _scaled(kind: str, arguments: list[str], cfg: Config) -> DensePolicy:
    if cfg.position != "rope" or cfg.rope.rope_type != "default":
        raise ValueError(
            f"policy {kind!r} replaces plain rotary positions, and the model has "
            f"{cfg.position!r}, {cfg.rope.rope_type!r}: use 'dense'."
        )
    try:
        factor = float(arguments[0])
    except ValueError:
        factor = 0.0
    if not 1 <= factor < float("inf"):
        raise ValueError(
            f"policy {kind!r} takes a factor of 1 or more, got {arguments[0]!r}: write '{kind}:4'."
        )
    scaling = RopeScaling(kind, factor=factor, original_max_position=cfg.max_length)
    return default_policy(cfg, ScaledRope(scaling))


def _whole(text: str, kind: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"policy {kind!r} takes whole numbers of 1 or more, got {text!r}.")
    return int(text)
