"""Attention with masks as data: `attention`, `AttentionMask`, `BlockSizes`, `merge`."""

from ops.attention.api import BlockSizes, attention
from ops.attention.mask import AttentionMask
from ops.attention.merge import merge

__all__ = ["AttentionMask", "BlockSizes", "attention", "merge"]
