"""The entry to attention over what a plan lists."""

from jaxtyping import Array, Float, Int

from ops.block_sparse.plan import SparsePlan
from ops.block_sparse.reference import reference_attention
from ops.block_sparse.tpu import attend_plan
from ops.block_sparse.xla import sparse_attention
from ops.platform import implementation_of


def block_sparse_attention(
    q: Float[Array, "3 b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g dv"],
    q_positions: Int[Array, "b t"],
    plan: SparsePlan,
    *,
    stride: int,
    scale: float | Float[Array, ""] | None = None,
    implementation: str = "auto",
    first: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b t h"]]:
    """Causal dual chunk attention to the listed slots, slot j holding position j.

    Plain attention is the case of a stride of at least s, and three equal rotations. Head i reads
    key head i // (h / g). Sums are float32. A query that sees nothing gives zeros and lse -inf.

    Args:
      q: each query in its three rotations: intra, successive, inter.
      k: keys rotated at their position modulo the stride.
      q_positions: position of each query, consecutive in a row; all of a row's in one chunk.
      plan: which slots; see `SparsePlan`. Slots it does not list may hold any key, and any finite
        value.
      stride: c, static.
      scale: multiplies the scores in float32; default d ** -0.5.
      implementation: "reference" (holds all scores), "xla", "tpu" (the kernel, which has no
        gradient), "interpret" (the kernel on CPU); "auto" is the kernel on a TPU, else "xla".
      first: the position of slot 0, default 0: keys and values may be a run of a row's slots, of
        which the plan then lists none but these, by their positions.

    Returns:
      The output in v's dtype and the log-sum-exp of the scaled scores, float32.

    Raises:
      ValueError: a stride below 1, heads that do not divide, a plan that does not fit, or an
        unknown implementation.
    """
    if stride < 1:
        raise ValueError(f"the chunk stride is {stride}: make local_size less than chunk_size.")
    if q.shape[3] % k.shape[2]:
        raise ValueError(
            f"{q.shape[3]} query heads are not a multiple of {k.shape[2]} key heads: "
            "grouped-query attention needs h % g == 0."
        )
    plan.validate(*q.shape[1:4])
    scaled_by = q.shape[-1] ** -0.5 if scale is None else scale
    implementation = implementation_of(implementation)
    if implementation in ("tpu", "interpret"):
        interpret = implementation == "interpret"
        return attend_plan(
            q, k, v, q_positions, plan, stride, scaled_by, first, interpret=interpret
        )
    if implementation == "xla":
        return sparse_attention(q, k, v, q_positions, plan, stride, scaled_by, first)
    if implementation == "reference":
        return reference_attention(q, k, v, q_positions, plan, stride, scaled_by, first)
    raise ValueError(
        f"unknown block-sparse implementation {implementation!r}: name one of auto, reference, "
        "xla, tpu, interpret."
    )
