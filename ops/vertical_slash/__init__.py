"""Vertical-slash sparsity: the keys that a run of queries attends to, found from its last ones."""

from ops.vertical_slash.api import select, vertical_slash_plan
from ops.vertical_slash.blocks import share_of, to_plan
from ops.vertical_slash.geometry import Geometry, geometry
from ops.vertical_slash.select import Selection, by_segment, raised

__all__ = [
    "Geometry",
    "Selection",
    "by_segment",
    "geometry",
    "raised",
    "select",
    "share_of",
    "to_plan",
    "vertical_slash_plan",
]
