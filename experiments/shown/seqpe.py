"""What the documents show of SeqPE: perplexity by length, and accuracy by grid."""

from typing import Any

from experiments.report import Rendered, Statements, Table, number
from experiments.shown.long_context import percent

PAGE = "research/context/seqpe/README.md"
NAMES = {
    "seqpe": "**SeqPE**",
    "no_contrastive": "SeqPE without contrastive loss",
    "no_transfer": "SeqPE without transfer loss",
    "no_both": "SeqPE without both",
    "rope": "rotary positions",
    "rope_linear": "rotary positions, interpolated",
    "rope_ntk": "rotary positions, NTK scaling",
    "learned": "learned table, interpolated",
    "sinusoidal": "sinusoids",
    "sinusoidal_squeezed": "sinusoids, interpolated",
    "alibi": "ALiBi",
    "none": "no positions",
}


TIMES = (1, 2, 4, 8, 16)
TEXT_HEADER = ("method", *(f"{n}x" for n in TIMES), "contrastive loss", "nearest found")


def text_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a method: perplexity by length in trained ones, and what the encoder learned."""
    return (
        NAMES[row["method"]],
        *(number(row[f"at_{n}x"], 1) for n in TIMES),
        number(row["contrastive"], 2) if "contrastive" in row else "",
        percent(row["nearest"]) if "nearest" in row else "",
    )


IMAGES = ("scaled_28", "scaled_44", "placed_44", "scaled_56", "placed_56")
IMAGE_HEADER = ("method", "parameters", *(name.replace("_", " to ") for name in IMAGES))


def image_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a method: accuracy by kind and size of images."""
    accuracies = (percent(row[name], 1) for name in IMAGES)
    return (NAMES[row["method"]], f"{row['parameters']:,}", *accuracies)


TABLES: tuple[Rendered, ...] = (
    Table("seqpe-text", PAGE, "seqpe", TEXT_HEADER, text_row),
    Statements("seqpe-text-statements", PAGE, "seqpe"),
    Table("seqpe-vit", PAGE, "seqpe_vit", IMAGE_HEADER, image_row),
    Statements("seqpe-vit-statements", PAGE, "seqpe_vit"),
)
