"""Attention over listed ranges and columns of keys."""

from ops.block_sparse.plan import BLOCK, SparsePlan

__all__ = ["BLOCK", "SparsePlan"]
