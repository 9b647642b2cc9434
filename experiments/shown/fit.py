"""What the documents show of which context fits where."""

import dataclasses
import re
from typing import Any

from experiments import record
from experiments.report import Table, markdown

_GIB = re.compile(r"(\d+\.\d+)G\b")
HEADER = (
    "model",
    "slice",
    "mesh",
    "slots",
    "fits",
    "arguments, GiB",
    "temporaries, GiB",
    "of the chip's memory",
    "decoding step, ms",
    "prompt chunk, ms",
)
POLICY_HEADER = (HEADER[0], "policy", *HEADER[1:])


def slots(length: int) -> str:
    """32768 as 32k, 1048576 as 1M; others in full."""
    for size, unit in ((2**20, "M"), (2**10, "k")):
        if length % size == 0:
            return f"{length // size}{unit}"
    return str(length)


def _seconds(found: dict[str, Any]) -> str:
    if not found["fits"]:
        return ""
    if found["least_seconds"] is None:
        return "not counted"
    return f"{1e3 * found['least_seconds']:.2f} to {1e3 * found['counted_seconds']:.2f}"


def refused(programs: dict[str, Any]) -> str:
    """What the compiler wanted and what the chip has, in its own numbers: those of the larger."""
    sizes = []
    for found in programs.values():
        if not found["fits"]:
            numbers = [float(number) for number in _GIB.findall(found["refusal"])]
            sizes.append(tuple(numbers[:2]))
    wanted = max(sizes)
    return "refused: {:.2f} of {:.2f} GiB".format(*wanted) if len(wanted) == 2 else "refused"


def row(found: dict[str, Any]) -> tuple[str, ...]:
    """Cells of one model at one length on one slice: memory of the larger of its two programs."""
    programs = found["programs"]
    start = (
        found["model"],
        found["slice"],
        found["mesh"],
        slots(found["length"]),
        "yes" if found["fits"] else "no",
    )
    times = (_seconds(programs["decode"]), _seconds(programs["prefill"]))
    if not found["fits"]:
        return (*start, "", "", refused(programs), *times)
    largest = max(programs.values(), key=lambda program: program["total_gib"])
    return (
        *start,
        f"{largest['arguments_gib']:.2f}",
        f"{largest['temporaries_gib']:.2f}",
        f"{100 * largest['memory_share']:.0f}% of {found['chip_gib']} GiB",
        *times,
    )


def policy_row(found: dict[str, Any]) -> tuple[str, ...]:
    """The same with the attention policy, for tables of several."""
    model, *rest = row(found)
    return (model, found["policy"], *rest)


@dataclasses.dataclass(frozen=True)
class FitTable(Table):
    """A table of compilations: its caption names the compiler and the settings, and no seeds."""

    def render(self) -> str:
        """The table's Markdown, with its caption."""
        result = record.load(self.result)
        config = result["config"]
        rows = [self.row(r) for r in result["rows"] if self.keep(r)]
        caption = (
            f"Per device, {config['rows']} row(s), weights {config['dtype']}, cache "
            f"{config['cache_dtype']}, chunks of {config['prefill_size']} tokens; compiled by "
            f"libtpu {result['timing']['libtpu']} with jax {result['versions']['jax']}, commit "
            f"{(result['commit'] or 'unknown')[:10]}"
            f"{' (with changes)' if result['modified'] else ''}, {result['date']}: "
            f"`{result['command']}`"
        )
        return f"{markdown(self.header, rows)}\n\n{caption}"


PAGE = "research/context/README.md"
TABLES = (
    FitTable("fit", PAGE, "fit", HEADER, row),
    FitTable("fit-refused", PAGE, "fit_refused", HEADER, row),
    FitTable("fit-smollm2", PAGE, "fit_smollm2", HEADER, row),
    FitTable("fit-policies", PAGE, "fit_policies", POLICY_HEADER, policy_row),
)
