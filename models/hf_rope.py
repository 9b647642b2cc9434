"""Rotary settings of Hugging Face's ``config.json``, in its newer and its older style."""

import json
from typing import Any, NoReturn

from models.positions import RopeScaling, ntk_base

# Field of RopeScaling by key of config.json.
_ROPE_FIELDS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_position",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "attention_factor": "attention_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "short_factor": "short_factor",
    "long_factor": "long_factor",
    "truncate": "truncate",
}
_ROPE_USED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "attention_factor", "truncate"),
    ),
    "llama3": (
        *("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    ),
    "longrope": (
        *("factor", "original_max_position_embeddings", "short_factor", "long_factor"),
        "attention_factor",
    ),
}
_ROPE_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": _ROPE_USED["llama3"],
    "longrope": ("short_factor", "long_factor"),
}


def refuse(key: str, value: Any, hint: str = "this decoder does not compute it") -> NoReturn:
    """Raise ValueError that names an unsupported setting with its value."""
    text = json.dumps(value)
    text = text if len(text) <= 200 else f"{text[:200]}..."
    raise ValueError(f"config.json sets {key} to {text}, which is not supported: {hint}.")


def read_rope(found: dict[str, Any], max_length: int) -> tuple[float, RopeScaling]:
    """Base and scaling from ``rope_parameters``, or from ``rope_theta`` and ``rope_scaling``.

    Raises:
        ValueError: an unknown or incomplete scheme, or two styles that contradict each other.
    """
    key = "rope_parameters" if found.get("rope_parameters") is not None else "rope_scaling"
    given = dict(found.get(key) or {})
    base = given.pop("rope_theta", found.get("rope_theta", 10000.0))
    if "rope_theta" in found and found["rope_theta"] != base:
        refuse("rope_theta", found["rope_theta"], f"rope_parameters says {base}; keep one of them")
    if any(isinstance(value, dict) for value in given.values()):
        refuse(key, given, "settings per layer type are not carried")
    kind = given.pop("rope_type", given.get("type", "default"))
    given.pop("type", None)
    if kind not in _ROPE_USED:
        refuse(f"{key}.rope_type", kind, f"known are {', '.join(_ROPE_USED)}")
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        refuse(f"{key}.partial_rotary_factor", found[key]["partial_rotary_factor"])
    if "original_max_position_embeddings" in found:
        given.setdefault(
            "original_max_position_embeddings", found["original_max_position_embeddings"]
        )
    for name in _ROPE_REQUIRED.get(kind, ()):
        if given.get(name) is None:
            raise ValueError(
                f"config.json sets {key}.rope_type to {kind!r} without {name}: add {name} to it."
            )
    values = {n: given[n] for n in _ROPE_USED[kind] if given.get(n) is not None}
    if "original_max_position_embeddings" in _ROPE_USED[kind]:
        values.setdefault("original_max_position_embeddings", max_length)
    if kind == "longrope":
        ratio = max_length / values["original_max_position_embeddings"]
        # Where the trained length stands beside the sizes, the ratio of lengths is the factor.
        outside = "original_max_position_embeddings" in found
        values["factor"] = ratio if outside else values.get("factor", ratio)
        for table in ("short_factor", "long_factor"):
            values[table] = tuple(float(x) for x in values[table])
    fields = {_ROPE_FIELDS[name]: value for name, value in values.items()}
    return float(base), RopeScaling(rope_type=kind, **fields)


def write_rope(base: float, rope: RopeScaling, dim: int) -> dict[str, Any]:
    """The rotary keys of ``config.json``, in both styles, for heads that rotate ``dim`` channels.

    NTK-aware scaling has no name there and needs none: it is another base.

    Raises:
        ValueError: the scheme is not one of Hugging Face's.
    """
    if rope.rope_type == "ntk":
        base = ntk_base(base, rope.factor, dim)
        rope = RopeScaling(attention_factor=rope.attention_factor)
    kind = rope.rope_type
    if kind not in _ROPE_USED:
        raise ValueError(
            f"rope type {kind!r} has no Hugging Face form: exportable are {', '.join(_ROPE_USED)}."
        )
    if rope.attention_factor is not None and "attention_factor" not in _ROPE_USED[kind]:
        raise ValueError(
            f"rope type {kind!r} with attention_factor {rope.attention_factor} has no Hugging Face "
            "form: only yarn and longrope carry one."
        )
    fields = {name: getattr(rope, _ROPE_FIELDS[name]) for name in _ROPE_USED[kind]}
    fields = {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}
    scaling = {"rope_type": kind} | {n: v for n, v in fields.items() if v is not None}
    return {
        "rope_parameters": {"rope_theta": base, **scaling},
        "rope_theta": base,
        "rope_scaling": None if kind == "default" else scaling,
    }
