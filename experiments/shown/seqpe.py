"""What the documents show of SeqPE: perplexity by length, and accuracy by grid."""

import dataclasses

from experiments import record
from experiments.report import Rendered, Statements, caption, markdown, number
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


@dataclasses.dataclass(frozen=True)
class Perplexities:
    """Perplexity of every method by length, in trained lengths; and what the encoder learned."""

    name: str
    result: str
    document: str = PAGE

    def render(self) -> str:
        """Its Markdown."""
        result = record.load(self.result)
        columns = [f"at_{times}x" for times in result["config"]["times"]]
        header = ("method", *(key[3:] for key in columns), "contrastive loss", "nearest found")
        rows = [
            (
                NAMES[row["method"]],
                *(number(row[key], 1) for key in columns),
                number(row["contrastive"], 2) if "contrastive" in row else "",
                percent(row["nearest"]) if "nearest" in row else "",
            )
            for row in result["rows"]
        ]
        return f"{markdown(header, rows)}\n\n{caption(result)}"


@dataclasses.dataclass(frozen=True)
class Accuracies:
    """Accuracy of every method by kind and size of images."""

    name: str
    result: str
    document: str = PAGE

    def render(self) -> str:
        """Its Markdown."""
        result = record.load(self.result)
        columns = [key for key in result["rows"][0] if key.startswith(("scaled_", "placed_"))]
        header = ("method", "parameters", *(key.replace("_", " to ") for key in columns))
        rows = [
            (
                NAMES[row["method"]],
                f"{row['parameters']:,}",
                *(percent(row[key], 1) for key in columns),
            )
            for row in result["rows"]
        ]
        return f"{markdown(header, rows)}\n\n{caption(result)}"


TABLES: tuple[Rendered, ...] = (
    Perplexities("seqpe-text", "seqpe"),
    Statements("seqpe-text-statements", PAGE, "seqpe"),
    Accuracies("seqpe-vit", "seqpe_vit"),
    Statements("seqpe-vit-statements", PAGE, "seqpe_vit"),
)
