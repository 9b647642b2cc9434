"""Dual chunk attention: rotary positions that never exceed the trained range."""

from ops.dual_chunk.api import dual_chunk_attention, kernel_serves, pairwise_attention
from ops.dual_chunk.positions import ChunkPositions, check_sizes, chunk_positions

__all__ = [
    "ChunkPositions",
    "check_sizes",
    "chunk_positions",
    "dual_chunk_attention",
    "kernel_serves",
    "pairwise_attention",
]
