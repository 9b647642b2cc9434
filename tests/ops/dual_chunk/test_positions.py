import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.dual_chunk import check_sizes, chunk_positions


def relative(n: int, chunk_size: int, local_size: int) -> np.ndarray:
    """M(i, j), with -1 above the diagonal, from the rotations."""
    at = chunk_positions(jnp.arange(n), chunk_size, local_size)
    chunk = np.asarray(at.chunk)
    apart = chunk[:, None] - chunk[None]
    q = np.where(
        apart == 0,
        at.intra[:, None],
        np.where(apart == 1, at.successive[:, None], at.inter[:, None]),
    )
    return np.where(np.tri(n, dtype=bool), q - np.asarray(at.key)[None], -1)


@pytest.mark.parametrize(("c", "w"), [(16, 4), (16, 0), (16, 15), (7, 3), (12, 10), (1, 0)])
def test_relative_positions_stay_within_the_chunk_size(c, w):
    stride, n = check_sizes(c, w), 5 * c + 3
    m = relative(n, c, w)
    i, j = np.indices((n, n))
    causal = j <= i
    assert m[causal].min() >= 0 and m[causal].max() <= c
    apart = i // stride - j // stride
    exact = causal & ((apart == 0) | ((apart == 1) & (i % stride <= w)))
    np.testing.assert_array_equal(m[exact], (i - j)[exact])
    far = apart >= 2
    assert np.all(m[far] >= min(w, stride - 1) + 1)
    border = (i == j + 1) & (i % stride == 0)
    np.testing.assert_array_equal(m[border], np.ones(border.sum()))


def test_critical_rotations_keep_true_distances_to_the_chunk_before():
    at = chunk_positions(jnp.arange(60), 16, 4)
    at = jax.tree.map(np.asarray, at)
    i, j = 30, 20  # chunks 2 and 1
    assert at.critical_successive[i] - at.key[j] == i - j
    assert at.successive[i] - at.key[j] < i - j
    assert at.critical_inter[i] == 30 % 12 + 16


@pytest.mark.parametrize(("c", "w"), [(16, 16), (16, 20), (0, 0), (8, -1)])
def test_sizes_without_a_stride_are_refused(c, w):
    with pytest.raises(ValueError, match="0 <= local_size < chunk_size"):
        chunk_positions(jnp.arange(4), c, w)
