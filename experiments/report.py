"""Tables and figures, made from ``experiments/results/*.json`` and nothing else.

``python -m experiments.report`` rewrites every table between its markers and every figure;
``--check`` only says what is out of date (the test suite runs it). A table stands between
``<!-- table: NAME -->`` and ``<!-- end table -->``; a figure carries the hash of its result.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from absl import app, flags

from experiments import figures, record

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Table:
    """One generated table: where it stands, which result it shows, how rows become cells."""

    name: str
    document: str
    result: str
    header: tuple[str, ...]
    row: Callable[[dict[str, Any]], tuple[str, ...]]
    keep: Callable[[dict[str, Any]], bool] = lambda row: True

    def render(self) -> str:
        """The table's Markdown, with its caption."""
        result = record.load(self.result)
        rows = [self.row(r) for r in result["rows"] if self.keep(r)]
        return f"{markdown(self.header, rows)}\n\n{caption(result)}"


@dataclasses.dataclass(frozen=True)
class Statements:
    """What a result's protocol says must hold, each with its answer; ``chosen`` texts, or all.

    ``unit`` says what the samples are.
    """

    name: str
    document: str
    result: str
    chosen: tuple[str, ...] = ()
    unit: str = "seeds"

    def render(self) -> str:
        """The statements as a Markdown list.

        Raises:
            ValueError: the result answers not all of the chosen ones.
        """
        lines = []
        answers = {a["statement"]: a for a in record.load(self.result)["statements"]}
        if unknown := sorted(set(self.chosen) - answers.keys()):
            raise ValueError(f"{self.result} does not answer {unknown[0]!r}: measure it again.")
        for answer in (answers[text] for text in self.chosen or answers):
            words = {True: "holds", False: "**does not hold**", None: "not measured"}
            seeds = answer["seeds"]
            count = (
                f" in the mean, {sum(seeds)} of {len(seeds)} {self.unit}" if len(seeds) > 1 else ""
            )
            told = f" ({answer['numbers']})" if "numbers" in answer else ""
            lines.append(f"- {words[answer['holds']]}{count}{told}: {answer['statement']}")
        return "\n".join(lines)


@runtime_checkable
class Rendered(Protocol):
    """What the report keeps current: a table of a result, its statements, or all methods."""

    @property
    def name(self) -> str:
        """Of its markers."""
        ...

    @property
    def document(self) -> str:
        """Where it stands, relative to the repository's root."""
        ...

    def render(self) -> str:
        """Its Markdown."""
        ...


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, *rows]
    cells = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([cells[0], "|" + " --- |" * len(header), *cells[1:]])


def number(value: dict[str, Any], digits: int = 2) -> str:
    """``mean ± spread`` of a sample, or the mean alone if all are the same."""
    if value["spread"] == 0:
        return f"{value['mean']:.{digits}f}"
    return f"{value['mean']:.{digits}f} ± {value['spread']:.{digits}f}"


def caption(result: dict[str, Any]) -> str:
    """One line under a table: hardware, versions, commit and the command."""
    host, versions = result["host"], result["versions"]
    parts = [made(part) for part in (*result.get("earlier", ()), result)]
    return (
        f"{host['processor']}, {cores(host['cores'])}, {host['platform']}, float32, "
        f"jax {versions['jax']}, seeds {result['seeds']}, {'; then '.join(parts)}"
    )


def cores(number: int) -> str:
    """So many cores, in words."""
    return f"{number} core" + ("s" if number != 1 else "")


def made(result: dict[str, Any]) -> str:
    """At which commit, when and by which command."""
    commit = (result["commit"] or "unknown")[:10]
    changed = " (with changes)" if result["modified"] else ""
    return f"commit {commit}{changed}, {result['date']}: `{result['command']}`"


def insert(document: str, name: str, body: str) -> str:
    """``document`` with the part between the markers of table ``name`` replaced.

    Raises:
        ValueError: the markers are not there exactly once.
    """
    pattern = re.compile(
        rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end table -->)", re.DOTALL
    )
    new, found = pattern.subn(lambda m: f"{m[1]}{body}\n{m[2]}", document)
    if found != 1:
        raise ValueError(f"found {found} places for table {name}: put its two markers in once.")
    return new


def source_hash(result: str) -> str:
    """Hash of a result file, kept in the figures made from it."""
    return hashlib.sha256((record.RESULTS / f"{result}.json").read_bytes()).hexdigest()[:16]


def stale(tables: Sequence[Rendered], drawn: Sequence[figures.Figure]) -> list[str]:
    """Names of the tables and figures that differ from what their results would give now."""
    names = []
    for table in tables:
        document = (ROOT / table.document).read_text()
        if insert(document, table.name, table.render()) != document:
            names.append(f"table {table.name} in {table.document}")
    for figure in drawn:
        path = ROOT / figure.path
        if not path.exists() or source_hash(figure.result) not in path.read_text():
            names.append(f"figure {figure.path}")
    return names


def update(tables: Sequence[Rendered], drawn: Sequence[figures.Figure]) -> None:
    """Rewrite every table and every figure."""
    for table in tables:
        path = ROOT / table.document
        path.write_text(insert(path.read_text(), table.name, table.render()))
    for figure in drawn:
        figures.save(
            figure, record.load(figure.result), ROOT / figure.path, source_hash(figure.result)
        )


def main(_: list[str]) -> None:
    """Update, or with ``--check`` list what is stale and fail."""
    from experiments.shown import FIGURES, TABLES

    if not flags.FLAGS.check:
        update(TABLES, FIGURES)
    if names := stale(TABLES, FIGURES):
        raise SystemExit("out of date: " + "; ".join(names) + ". Run python -m experiments.report.")


if __name__ == "__main__":
    flags.DEFINE_bool("check", False, "Only check, and fail if anything is out of date.")
    app.run(main)
