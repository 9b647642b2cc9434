"""Attention over listed ranges and columns of keys."""

from ops.block_sparse.api import block_sparse_attention
from ops.block_sparse.plan import BLOCK, SparsePlan
from ops.block_sparse.reference import attended

__all__ = ["BLOCK", "SparsePlan", "attended", "block_sparse_attention"]
