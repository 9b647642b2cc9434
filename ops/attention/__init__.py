"""Attention with masks as data, and hooks on its logits; `merge` joins the parts of a split one."""

from ops.attention.api import BlockSizes, attention
from ops.attention.hooks import LogitHook, alibi, temperature, window_decay
from ops.attention.hybrid import hybrid_tree_attention
from ops.attention.mask import AttentionMask
from ops.attention.merge import merge

__all__ = [
    "AttentionMask",
    "BlockSizes",
    "LogitHook",
    "alibi",
    "attention",
    "hybrid_tree_attention",
    "merge",
    "temperature",
    "window_decay",
]
