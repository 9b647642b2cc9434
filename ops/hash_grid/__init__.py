"""The multiresolution hash grid: coordinates to interpolated features."""

from ops.hash_grid.api import Lookup, hashgrid_encode, hashgrid_gather, hashgrid_lookup
from ops.hash_grid.reference import (
    HashGridConfig,
    HashGridMeta,
    hashgrid_indices,
    hashgrid_meta,
    hashgrid_row,
)

__all__ = [
    "HashGridConfig",
    "HashGridMeta",
    "Lookup",
    "hashgrid_encode",
    "hashgrid_gather",
    "hashgrid_indices",
    "hashgrid_lookup",
    "hashgrid_meta",
    "hashgrid_row",
]
