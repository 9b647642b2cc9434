"""The table of all methods in WORKSPACE.md, read off the tree."""

import dataclasses
import importlib
import re
from pathlib import Path

from experiments.report import ROOT, markdown

HEADER = ("method", "papers", "configs", "golden", "results")


@dataclasses.dataclass(frozen=True)
class MethodTable:
    """A row per folder of ``research/<family>/<method>/``."""

    name: str
    document: str

    def render(self) -> str:
        """The table's Markdown.

        Raises:
            ValueError: a method's README lacks its title or its paper.
        """
        tasks = {path.stem: _task(path.stem) for path in sorted(ROOT.glob("configs/*.py"))}
        pages = sorted(ROOT.glob("research/*/*/README.md"))
        return markdown(HEADER, [_row(page.parent, tasks) for page in pages])


def _row(folder: Path, tasks: dict[str, str]) -> tuple[str, ...]:
    text = (folder / "README.md").read_text(encoding="utf-8")
    title = re.match(r"# (.+)\n", text)
    papers = list(dict.fromkeys(re.findall(r"arXiv[: ](\d{4}\.\d{5})", text)))
    place = folder.relative_to(ROOT).as_posix()
    if title is None or not papers:
        raise ValueError(
            f"{place}/README.md must begin with '# NAME' and name its paper as 'arXiv 1234.56789'."
        )
    package = place.replace("/", ".")
    configs = [f"`{name}`" for name, task in tasks.items() if task.startswith(f"{package}.")]
    golden = ROOT / "tests" / "goldens" / f"test_{folder.name}.py"
    return (
        f"[{title[1].split(':')[0]}]({place}/README.md)",
        ", ".join(papers),
        ", ".join(configs) or "-",
        "tested" if golden.is_file() else "none",
        "in its README" if "<!-- table:" in text else "none yet",
    )


def _task(config: str) -> str:
    """The task that a config names; empty for a module that is no config."""
    module = importlib.import_module(f"configs.{config}")
    return module.get_config().task.name if hasattr(module, "get_config") else ""
