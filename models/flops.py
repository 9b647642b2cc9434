"""Work of a model's parts: floating-point operations of products, two per multiply-add."""

import math
from collections.abc import Callable
from typing import Any

import jax

from models.decoder import Config
from ops.platform import target


def layer_flops(cfg: Config, context: int) -> float:
    """FLOPs of one layer for one token that attends to ``context`` others and to itself."""
    q_width, kv_width = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    projections = 2.0 * cfg.hidden_size * (2 * q_width + 2 * kv_width)
    attention = 4.0 * (context + 1) * q_width
    matrices = 3 if cfg.gated_mlp else 2
    return projections + attention + 2.0 * matrices * cfg.hidden_size * cfg.intermediate_size


def product_flops(
    function: Callable[..., Any], *arguments: Any, turns: float | None = None
) -> float:
    """FLOPs of all matrix products of one call, from its jaxpr.

    A ``scan`` counts every turn (the compiler's own cost analysis counts one), a ``cond`` its
    dearest branch. Rows that products are filled up with on a CPU do not count.

    Args:
        turns: of every ``while`` loop.

    Raises:
        ValueError: a product in a ``while`` loop whose number of turns is not given.
    """
    with target("gpu"):  # plain products, as asked for
        return _count(jax.make_jaxpr(function)(*arguments).jaxpr, turns)


def product_depth(jaxpr: Any, around: int = 0) -> int:
    """The most loops that stand around one matrix product or kernel of a jaxpr; 0 if there is none.

    The compiler's own cost analysis counts one turn of each. A scan of one turn is no loop here.

    Args:
        around: the loops that the jaxpr itself stands in.
    """
    deepest = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in ("dot_general", "pallas_call"):
            deepest = max(deepest, around)
            continue
        loops = name == "while" or (name == "scan" and equation.params["length"] > 1)
        for part in _jaxprs(equation.params):
            deepest = max(deepest, product_depth(part, around + loops))
    return deepest


def _count(jaxpr: Any, turns: float | None) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        inner = [_count(part, turns) for part in _jaxprs(equation.params)]
        match equation.primitive.name:
            case "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
                total += 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)
            case "scan":
                total += equation.params["length"] * sum(inner)
            case "cond":
                total += max(inner)
            case "while" if sum(inner) > 0:
                if turns is None:
                    raise ValueError(
                        "a product in a while loop has no known cost: use a scan, or give turns."
                    )
                total += turns * sum(inner)
            case _:
                total += sum(inner)
    return total


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    found = []
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)  # a closed one holds an open one
            if hasattr(part, "eqns"):
                found.append(part)
    return found
