"""Where heads look: the share of attention on the evidence when an answer begins, and maps of it.

Any policy can be asked, because attention is linear in the values: with values that are 1 on some
tokens and 0 elsewhere, what a head mixes for a query is the share of its attention that those
tokens get. What a sparse policy keeps of dense attention is another number, see
:mod:`research.context.qwen25_1m.retention`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from experiments import record
from experiments.long_context_tasks import PromptEncoder, TaskSet
from models import decoder
from models.attention import Attended, Step
from models.load import Model
from models.tokenizer import Tokenizer
from train.data.long_tasks.example import Example

WITHOUT_EVIDENCE = ("infilling",)
"""Tasks with a place but no evidence there: what is asked for stands nowhere."""


@struct.dataclass
class Probe:
    """A policy that mixes as ``policy`` does, and reports as ``aux`` what marked tokens get.

    Without a cache only.
    """

    policy: Any

    def per_layer(self, num_layers: int) -> Any:
        """Those of the policy."""
        return self.policy.per_layer(num_layers)

    def key_width(self, cfg: Any) -> int:
        """That of the policy."""
        return self.policy.key_width(cfg)

    def prepare(self, cfg: Any, step: Step) -> Any:
        """What the policy shares."""
        return self.policy.prepare(cfg, step)

    def attend(
        self,
        layer: Any,
        shared: Any,
        q: Float[Array, "b t h d"],
        k: Float[Array, "b t g d"],
        v: Float[Array, "b t g dv"],
        x: Any,
        step: Step,
        cache: Any,
    ) -> Attended:
        """See :class:`models.attention.AttentionPolicy`."""
        mixed = self.policy.attend(layer, shared, q, k, v, x, step, cache)

        def shares(marks: Float[Array, "b t dv"]) -> Float[Array, "b t h dv"]:
            """What the tokens of each mark get; as many marks as values are wide."""
            values = jnp.broadcast_to(marks[:, :, None], v.shape).astype(v.dtype)
            return self.policy.attend(layer, shared, q, k, values, x, step, None).out

        return Attended(out=mixed.out, cache=mixed.cache, aux=self.report(shares, v.shape[-1]))

    def report(self, shares: Callable[[Array], Array], marks: int) -> dict[str, Array]:
        """What one layer reports; ``shares`` takes ``marks`` marks at a time."""
        raise TypeError(f"{type(self).__name__} must define report().")


@struct.dataclass
class EvidenceProbe(Probe):
    """``aux["evidence"]`` is (b, h) per layer: what the evidence gets of the query at ``last``."""

    evidence: Any  # (b, t), 1 on evidence and 0 elsewhere
    last: Any  # (b,) int32

    def report(self, shares: Callable[[Array], Array], marks: int) -> dict[str, Array]:
        """See :class:`Probe`."""
        evidence = jnp.broadcast_to(self.evidence[..., None], (*self.evidence.shape, marks))
        mass = shares(evidence)[..., 0]
        return {"evidence": jnp.take_along_axis(mass, self.last[:, None, None], axis=1)[:, 0]}


@struct.dataclass
class MapProbe(Probe):
    """``aux["map"]`` is (b, h, t, blocks) per layer: what each query gives to blocks of keys."""

    blocks: Any  # (b, t) int32, the block that each key belongs to
    count: int = struct.field(pytree_node=False)

    def report(self, shares: Callable[[Array], Array], marks: int) -> dict[str, Array]:
        """See :class:`Probe`."""
        parts = []
        for first in range(0, self.count, marks):
            number = first + jnp.arange(marks, dtype=jnp.int32)[None, None]
            parts.append(shares((self.blocks[..., None] == number).astype(jnp.float32)))
        return {"map": jnp.swapaxes(jnp.concatenate(parts, -1)[..., : self.count], 1, 2)}


@functools.partial(jax.jit, static_argnames="cfg")
def evidence_mass(
    params: decoder.Params,
    cfg: decoder.Config,
    policy: Any,
    tokens: Int[Array, "b t"],
    evidence: Float[Array, "b t"],
    lengths: Int[Array, " b"],
) -> Float[Array, "layers b heads"]:
    """Share of each head's attention on the evidence, from the last of ``lengths`` tokens."""
    probe = EvidenceProbe(policy, evidence, lengths - 1)
    step = _prefill(tokens, lengths)
    return decoder.forward(params, cfg, tokens, step=step, policy=probe).aux["evidence"]


@functools.partial(jax.jit, static_argnames=("cfg", "width"))
def attention_map(
    params: decoder.Params,
    cfg: decoder.Config,
    policy: Any,
    tokens: Int[Array, "b t"],
    width: int,
) -> Float[Array, "layers b heads t blocks"]:
    """Share of every query's attention on each block of ``width`` keys; 0 where it is not computed.

    Rows of a map sum to 1. Texts are prompts that are read at once.
    """
    rows, length = tokens.shape
    blocks = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None] // width, tokens.shape)
    probe = MapProbe(policy, blocks, -(-length // width))
    step = _prefill(tokens, jnp.full((rows,), length, jnp.int32))
    return decoder.forward(params, cfg, tokens, step=step, policy=probe).aux["map"]


def _prefill(tokens: Int[Array, "b t"], lengths: Int[Array, " b"]) -> Step:
    row = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return Step(jnp.broadcast_to(row, tokens.shape), lengths=lengths, mode="prefill")


def evidence_span(example: Example, ids: Sequence[int], tokenizer: Tokenizer) -> tuple[int, int]:
    """First token of the evidence and the one behind it: up to where its first answer is complete.

    Raises:
        ValueError: the example has no place, or its answer does not stand there.
    """
    start, wanted = example.answer_token, str(example.answers[0]).strip()
    if start is not None:
        for end in range(start + 1, len(ids) + 1):
            if wanted in tokenizer.decode(list(ids[start:end])):
                return start, end
    raise ValueError(f"an example of {example.task!r} has no evidence at a place: ask without it.")


def measure_set(
    model: Model, policy: Any, encoder: PromptEncoder, tasks: TaskSet, batch: int
) -> dict[str, Any]:
    """What the evidence of one task at one length gets, seeds kept apart.

    ``mass`` is the mean over heads and layers, ``best`` that of the head with the most over all of
    a seed's examples, and ``by_depth`` is that head's; ``share`` is the share of tokens that are
    evidence, what attention without preference would give it.
    """
    mass, best, by_depth, shares = [], [], [], []
    for examples in tasks.examples:
        found, share = _heads(model, policy, encoder, tasks, examples, batch)
        head = found[:, found.mean(0).argmax()]
        mass.append(float(found.mean()))
        best.append(float(head.mean()))
        by_depth.append(head.reshape(len(tasks.depths), -1).mean(1).tolist())
        shares.append(share)
    return {
        "kind": "attention",
        "task": tasks.task,
        "length": tasks.length,
        "mass": record.sample(mass),
        "best": record.sample(best),
        "share": record.sample(shares),
        "depths": list(tasks.depths),
        "by_depth": [record.sample(list(values)) for values in zip(*by_depth, strict=True)],
    }


def _heads(
    model: Model,
    policy: Any,
    encoder: PromptEncoder,
    tasks: TaskSet,
    examples: Sequence[Example],
    batch: int,
) -> tuple[Float[np.ndarray, "examples heads"], float]:
    """Mass by example and head of any layer, and the mean share of tokens that are evidence."""
    tokens = np.zeros((-(-len(examples) // batch) * batch, tasks.length), np.int32)
    evidence, lengths = np.zeros(tokens.shape, np.float32), np.ones(len(tokens), np.int32)
    for i, example in enumerate(examples):
        ids = encoder.encode(example.prompt)
        start, end = evidence_span(example, ids, model.tokenizer)
        tokens[i, : len(ids)], lengths[i] = ids, len(ids)
        evidence[i, start:end] = 1
    parts = []
    for i in range(0, len(tokens), batch):
        rows = slice(i, i + batch)
        found = evidence_mass(
            model.params, model.cfg, policy,
            jnp.asarray(tokens[rows]), jnp.asarray(evidence[rows]), jnp.asarray(lengths[rows]),
        )  # fmt: skip
        parts.append(np.moveaxis(np.asarray(found), 1, 0).reshape(batch, -1))
    share = evidence.sum(1)[: len(examples)] / lengths[: len(examples)]
    return np.concatenate(parts)[: len(examples)], float(share.mean())
