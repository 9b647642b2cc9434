"""What the documents show of SeqPE: accuracy by grid."""

import dataclasses

from experiments import record
from experiments.report import Rendered, Statements, caption, markdown
from experiments.shown.long_context import percent

PAGE = "research/context/seqpe/README.md"
NAMES = {
    "seqpe": "**SeqPE**",
    "no_contrastive": "SeqPE without contrastive loss",
    "no_transfer": "SeqPE without transfer loss",
    "no_both": "SeqPE without both",
    "learned": "learned table, interpolated",
    "sinusoidal": "sinusoids",
}


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
    Accuracies("seqpe-vit", "seqpe_vit"),
    Statements("seqpe-vit-statements", PAGE, "seqpe_vit"),
)
