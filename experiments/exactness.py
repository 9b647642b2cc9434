"""Whether a comparison's texts equal plain decoding."""

from typing import Any

from experiments.statements import Row, Statement


def _equals(entry: dict[str, Any]) -> bool:
    return entry["differing"] == entry["near_ties"] and entry["same_width_mismatches"] == 0


def is_exact(row: Row) -> bool:
    """Whether no greedy token differs from plain decoding except by near-ties between widths."""
    return all(map(_equals, row["exactness"]))


def _all_exact(rows: dict[str, Row], seed: int) -> bool:
    if seed < 0:
        return all(map(is_exact, rows.values()))
    return all(_equals(row["exactness"][seed]) for row in rows.values())


EXACT = Statement("every greedy text is exact", (), _all_exact)
"""Of whatever methods were compared."""
