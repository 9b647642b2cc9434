"""DeepONet: a network of two nets that maps a function, known at fixed sensors, to a function.

Source: Lu, Jin, Karniadakis, arXiv 1910.03193. The branch net reads the input function's values at
``m`` sensors, the trunk net a location ``y`` of ``d`` coordinates; their outputs of ``p`` values
meet in a dot product, ``G(u)(y) = sum_k B_k(u) T_k(y) + b0``. Also here: the stacked form (``p``
branch nets of one output), POD-DeepONet (arXiv 2111.05512: a fixed basis for, or in front of, the
trunk) and the modified form of Wang, Wang and Perdikaris (arXiv 2103.10974).

Axes: ``n`` functions, ``m`` sensors, ``q`` queries, ``d`` coordinates, ``c`` outputs, ``p`` width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from models import fnn
from models.fnn import ACTIVATIONS
from models.layers import linear
from models.params import Constant, ParamSpec
from ops.weights import Weight

KINDS = ("vanilla", "pod", "modified")
MULTI_OUTPUT = ("independent", "split_both", "split_branch", "split_trunk")


@dataclasses.dataclass(frozen=True)
class DeepONetConfig:
    """Shape of the operator network.

    Attributes:
        branch: widths of the branch net, from the number of sensors to p. Several input functions
            are concatenated to one vector of sensor values.
        trunk: widths of the trunk net, from the number of query coordinates to p. A POD-DeepONet
            without trunk features has the first alone; with them, p of the branch is ``modes`` plus
            p of the trunk.
        activation: relu, tanh, sin or gelu: on the hidden layers of both nets and, but for the
            modified form, on the trunk's last layer.
        kind: vanilla, pod or modified. All hidden layers of the modified form are equally wide.
        stacked: p branch nets of one output each, with the hidden widths of ``branch``.
        use_bias: add a trainable number per output; a POD basis alone never has one.
        outputs: components of the output function.
        multi_output: independent (a network each), split_both (both last layers have a group of p
            per output), split_branch or split_trunk (only that net has groups).
        modes: POD modes.
        points: grid points that the POD basis is known on.
        periods: per query coordinate its period, which becomes ``cos(2 pi y / period)`` and
            ``sin(2 pi y / period)`` before the trunk, or 0; empty: all 0.
        multiply_by: number of the query coordinate that multiplies the output, so that it is zero
            where the coordinate is.
    """

    branch: tuple[int, ...]
    trunk: tuple[int, ...]
    activation: str = "relu"
    kind: str = "vanilla"
    stacked: bool = False
    use_bias: bool = True
    outputs: int = 1
    multi_output: str = "split_both"
    modes: int = 0
    points: int = 0
    periods: tuple[float, ...] = ()
    multiply_by: int | None = None

    def __post_init__(self):
        for name, value, known in (
            ("kind", self.kind, KINDS),
            ("multi_output", self.multi_output, MULTI_OUTPUT),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(known)}.")
        fnn.check_activation(self.activation)
        fnn.check_widths("branch", self.branch)
        if self.has_trunk or self.kind != "pod":
            fnn.check_widths("trunk", self.trunk)
        if not self.trunk or self.outputs < 1:
            raise ValueError("a DeepONet needs trunk=(coordinates, ...) and one output or more.")
        if (self.kind == "pod") != (self.modes > 0 and self.points > 0):
            raise ValueError(
                f"kind {self.kind!r} does not go with {self.modes} modes on {self.points} points: "
                "kind='pod' needs both, the others neither."
            )
        wanted = self.modes + (self.trunk[-1] if self.has_trunk else 0)
        if self.branch[-1] != wanted:
            raise ValueError(
                f"the branch ends in {self.branch[-1]} values, the trunk and basis give {wanted}: "
                "make them equal."
            )
        if self.kind == "modified" and self.stacked:
            raise ValueError("the modified form has one branch net: give stacked=False.")
        if self.kind == "modified" and len({*self.branch[1:-1], *self.trunk[1:-1]}) != 1:
            raise ValueError(
                f"the modified form mixes hidden layers of equal width, not those of {self.branch} "
                f"and {self.trunk}: give one hidden width, and a hidden layer or more."
            )
        d = self.trunk[0]
        if self.periods and len(self.periods) != d:
            raise ValueError(f"periods {self.periods}: give one for each of {d} coordinates, or 0.")
        if self.multiply_by is not None and not 0 <= self.multiply_by < d:
            raise ValueError(f"multiply_by {self.multiply_by}: the coordinates are 0..{d - 1}.")

    @property
    def has_trunk(self) -> bool:
        """Whether there is a trunk net."""
        return len(self.trunk) > 1

    @property
    def width(self) -> int:
        """The number of products that make one output."""
        return self.branch[-1]

    @property
    def groups(self) -> tuple[int, int]:
        """How many groups of features branch and trunk have; 1 serves all outputs."""
        return (
            1 if self.multi_output == "split_trunk" else self.outputs,
            1 if self.multi_output == "split_branch" else self.outputs,
        )


@struct.dataclass
class Fixed:
    """What is taken from data and not trained: ``G = mean + scale * (network)``."""

    mean: Weight  # (c,), with a POD basis (q, c)
    scale: Weight  # (c,)
    basis: Weight = None  # (q, groups of the trunk, modes)


@struct.dataclass
class Params:
    """Parameters; with independent outputs or stacked branches their first axis counts copies."""

    branch: Any  # fnn.Params
    trunk: Any  # fnn.Params, None without a trunk net
    encoders: Any  # of the modified form: (Linear of u, Linear of y)
    bias: Weight  # (c,)
    fixed: Any  # Fixed; Any because a partition puts None there


def specs(cfg: DeepONetConfig) -> Params:
    """Specs of all parameters. The fixed ones begin as mean 0, scale 1 and a basis of zeros."""
    independent = cfg.multi_output == "independent" and cfg.outputs > 1

    def copied(tree: Any, count: int) -> Any:
        return jax.tree.map(lambda s: s.stacked(count), tree)

    branch_groups, trunk_groups = (1, 1) if independent else cfg.groups
    inner = (cfg.trunk[0] + sum(p > 0 for p in cfg.periods), *cfg.trunk[1:])
    trunk = encoders = None
    if cfg.has_trunk:
        trunk = fnn.layer_specs((*inner[:-1], trunk_groups * inner[-1]))
    if cfg.kind == "modified":
        encoders = tuple(
            fnn.linear_specs(fan_in, cfg.branch[1]) for fan_in in (cfg.branch[0], inner[0])
        )
    if cfg.stacked:
        branch = copied(fnn.layer_specs((*cfg.branch[:-1], 1)), cfg.groups[0] * cfg.width)
    else:
        branch = fnn.layer_specs((*cfg.branch[:-1], branch_groups * cfg.width))
    if independent:
        branch = branch if cfg.stacked else copied(branch, cfg.outputs)
        trunk, encoders = copied(trunk, cfg.outputs), copied(encoders, cfg.outputs)
    c, pod = (cfg.outputs,), cfg.kind == "pod"
    fixed = Fixed(
        mean=ParamSpec((cfg.points, *c) if pod else c, (None,) * (1 + pod), Constant(0.0)),
        scale=ParamSpec(c, (None,), Constant(1.0)),
        basis=ParamSpec((cfg.points, cfg.groups[1], cfg.modes), (None,) * 3, Constant(0.0))
        if pod
        else None,
    )
    has_bias = cfg.use_bias and cfg.has_trunk
    bias = ParamSpec(c, (None,), Constant(0.0)) if has_bias else None
    return Params(branch, trunk, encoders, bias, fixed)


def aligned(
    params: Params, cfg: DeepONetConfig, u: Float[Array, "n m"], y: Float[Array, "n d"]
) -> Float[Array, "n *c"]:
    """Row i of the result is ``G(u_i)(y_i)``; see :func:`at_queries`."""
    return at_queries(params, cfg, u, "aligned")(y)


def cartesian(
    params: Params, cfg: DeepONetConfig, u: Float[Array, "n m"], y: Float[Array, "q d"]
) -> Float[Array, "n q *c"]:
    """All functions at the same queries; see :func:`at_queries`."""
    return at_queries(params, cfg, u, "cartesian")(y)


def batched(
    params: Params,
    cfg: DeepONetConfig,
    u: Float[Array, "n m"],
    y: Float[Array, "n q d"],
    mask: Bool[Array, "n q"] | None = None,
) -> Float[Array, "n q *c"]:
    """Every function at queries of its own; see :func:`at_queries`.

    Where the mask is False the query is padding: it is not looked at (it may be NaN, which reaches
    no gradient either) and the result is 0.
    """
    run = at_queries(params, cfg, u, "batched")
    if mask is None:
        return run(y)
    s = run(jnp.where(mask[..., None], y, 0.0))
    return jnp.where(mask.reshape(mask.shape + (1,) * (s.ndim - 2)), s, 0.0)


def at_queries(
    params: Params, cfg: DeepONetConfig, u: Float[Array, "n m"], form: str
) -> Callable[[Array], Array]:
    """``G(u)`` as a function of the queries alone: what depends on ``u`` only is computed here.

    Differentiate the function to get derivatives with respect to ``y`` that never run the branch
    net again. (In the modified form the two nets exchange gates, and it runs from its second
    layer on.) Its argument and result are, by form:

    - aligned: ``y (n, d)``, a query per function, to ``(n,)``;
    - cartesian: ``y (q, d)``, queries of all functions, to ``(n, q)``;
    - batched: ``y (n, q, d)``, queries of each function, to ``(n, q)``;

    with a last axis of outputs if there are several. With a POD basis the queries are the rows that
    the basis is known on, in their order (:func:`models.pod.at_rows` chooses some), and the form is
    aligned or cartesian.

    Raises:
        ValueError: an unknown form, other numbers of sensors, coordinates or grid points than the
            config's, or a POD basis in batched form.
    """
    if form not in ("aligned", "cartesian", "batched"):
        raise ValueError(f"unknown form {form!r}: choose aligned, cartesian or batched.")
    if u.shape[-1] != cfg.branch[0]:
        raise ValueError(
            f"the branch reads {cfg.branch[0]} sensor values, got {u.shape[-1]}: interpolate the "
            "functions to the sensors that the network was trained with."
        )
    if cfg.kind == "pod" and form == "batched":
        raise ValueError("a POD basis is known on one grid: use the cartesian or aligned form.")
    if cfg.kind == "modified":
        core = _modified(params, cfg, u, form)
    else:
        branch = branch_features(params, cfg, u)
        core = lambda y: _contract(form, branch, trunk_features(params, cfg, y))

    def run(y: Array) -> Array:
        if y.shape[-1] != cfg.trunk[0]:
            raise ValueError(
                f"a query has {cfg.trunk[0]} coordinates, got {y.shape[-1]}: "
                "give y with that last axis."
            )
        s = core(y)
        row = lambda x: x.reshape((1,) * (s.ndim - x.ndim) + x.shape)
        if params.bias is not None:
            s = s + row(params.bias)
        s = row(params.fixed.mean) + row(params.fixed.scale) * s
        if cfg.multiply_by is not None:
            factor = y[..., cfg.multiply_by, None]
            s = s * (factor[None] if form == "cartesian" else factor)
        return s[..., 0] if cfg.outputs == 1 else s

    return run


def partial(f: Callable[[Array], Array], coordinate: int) -> Callable[[Array], Array]:
    """The partial derivative of a function of :func:`at_queries` by one query coordinate.

    Forward mode; nest it for higher derivatives: ``partial(partial(f, 0), 0)``.
    """

    def derivative(y: Array) -> Array:
        direction = jnp.zeros_like(y).at[..., coordinate].set(1.0)
        return jax.jvp(f, (y,), (direction,))[1]

    return derivative


def branch_features(
    params: Params, cfg: DeepONetConfig, u: Float[Array, "n m"]
) -> Float[Array, "n groups p"]:
    """The branch net's outputs (not of the modified form)."""
    activation = ACTIVATIONS[cfg.activation]
    if cfg.stacked or _independent(cfg):
        run = jax.vmap(lambda layers: fnn.run_layers(layers, activation, u), out_axes=1)
        out = run(params.branch.layers)
    else:
        out = fnn.run_layers(params.branch.layers, activation, u)
    return out.reshape(u.shape[0], cfg.groups[0], cfg.width)


def trunk_features(
    params: Params, cfg: DeepONetConfig, y: Float[Array, "*batch d"]
) -> Float[Array, "*batch groups p"]:
    """The trunk net's outputs after the activation, behind the POD modes if there are any."""
    activation = ACTIVATIONS[cfg.activation]
    parts = []
    if cfg.kind == "pod":
        basis = params.fixed.basis
        if basis.shape[0] != y.shape[0]:
            raise ValueError(
                f"the POD basis is known on {basis.shape[0]} points and there are {y.shape[0]} "
                "queries: ask at those points, choose some with models.pod.at_rows, or bring the "
                "basis to others with models.pod.interpolate."
            )
        parts.append(basis)
    if cfg.has_trunk:
        x = expand_queries(cfg, y)
        if _independent(cfg):
            run = jax.vmap(lambda layers: fnn.run_layers(layers, activation, x), out_axes=-2)
            out = run(params.trunk.layers)
        else:
            out = fnn.run_layers(params.trunk.layers, activation, x)
            out = out.reshape(*y.shape[:-1], cfg.groups[1], cfg.trunk[-1])
        parts.append(activation(out))
    return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def expand_queries(
    cfg: DeepONetConfig, y: Float[Array, "*batch d"]
) -> Float[Array, "*batch features"]:
    """What the trunk net reads: every periodic coordinate as a cosine and a sine."""
    if not any(cfg.periods):
        return y
    columns = []
    for i, period in enumerate(cfg.periods):
        angle = y[..., i]
        if period:
            angle = angle * (2.0 * jnp.pi / period)
        columns += [jnp.cos(angle), jnp.sin(angle)] if period else [angle]
    return jnp.stack(columns, axis=-1)


def _independent(cfg: DeepONetConfig) -> bool:
    return cfg.multi_output == "independent" and cfg.outputs > 1


_LETTERS = {
    "aligned": ("ncp", "ncp", "nc"),
    "cartesian": ("ncp", "qcp", "nqc"),
    "batched": ("ncp", "nqcp", "nqc"),
    "modified": ("...cp", "...cp", "...c"),
}


def _contract(form: str, branch: Array, trunk: Array) -> Array:
    """The dot products over p; a net with one group serves every output. Last axis: outputs."""
    left, right, out = _LETTERS[form]
    single = branch.shape[-2] == trunk.shape[-2] == 1
    if branch.shape[-2] == 1:
        branch, left = branch[..., 0, :], left.replace("c", "")
    if trunk.shape[-2] == 1:
        trunk, right = trunk[..., 0, :], right.replace("c", "")
    s = jnp.einsum(f"{left},{right}->{out.replace('c', '') if single else out}", branch, trunk)
    return s[..., None] if single else s


def _modified(params: Params, cfg: DeepONetConfig, u: Array, form: str) -> Callable[[Array], Array]:
    """The modified form: hidden layers of both nets mix two encodings, of u and of y."""
    activation = ACTIVATIONS[cfg.activation]
    u = u if form == "aligned" else u[:, None]

    def encode_u(p: Params) -> tuple[Array, Array]:
        return activation(linear(u, p.encoders[0])), activation(linear(u, p.branch.layers[0]))

    def features(p: Params, encoded: tuple[Array, Array], x: Array) -> tuple[Array, Array]:
        from_u, gate = encoded
        from_y = activation(linear(x, p.encoders[1]))
        mix = lambda z: (1.0 - z) * from_u + z * from_y
        b, t = mix(gate), mix(activation(linear(x, p.trunk.layers[0])))
        for layer in p.branch.layers[1:-1]:
            b = mix(activation(linear(b, layer)))
        for layer in p.trunk.layers[1:-1]:
            t = mix(activation(linear(t, layer)))
        return linear(b, p.branch.layers[-1]), linear(t, p.trunk.layers[-1])

    if _independent(cfg):
        nets = dataclasses.replace(params, bias=None, fixed=None)
        encoded = jax.vmap(encode_u)(nets)
        run = jax.vmap(features, in_axes=(0, 0, None), out_axes=-2)
        every = lambda x: run(nets, encoded, x)
    else:
        encoded = encode_u(params)
        every = lambda x: features(params, encoded, x)

    def core(y: Array) -> Array:
        x = expand_queries(cfg, y)
        outs = every(x[None] if form == "cartesian" else x)
        grouped = [
            z if _independent(cfg) else z.reshape(*z.shape[:-1], groups, cfg.width)
            for z, groups in zip(outs, cfg.groups, strict=True)
        ]
        return _contract("modified", *grouped)

    return core
