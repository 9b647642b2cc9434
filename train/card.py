"""The README of an export: what is known of the model and of the run that made it."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from models import decoder
from models.params import count
from train.trained import Trained

USE = """
```
python -m inference.generate --model={title} --prompt="..."
```
"""


def model_facts(cfg: decoder.Config) -> dict[str, str]:
    """Size and shape of a decoder."""
    return {
        "parameters": f"{count(decoder.specs(cfg)):,}",
        "shape": f"{cfg.num_layers} layers of width {cfg.hidden_size}, {cfg.num_heads} heads over "
        f"{cfg.num_kv_heads} key heads of {cfg.head_dim}",
        "vocabulary": f"{cfg.vocab_size:,}",
        "context": f"{cfg.max_length:,} tokens",
    }


def run_facts(run: pathlib.Path, trained: Trained, windows_per_epoch: int | None) -> dict[str, str]:
    """What the folder of a run says of it; what it does not hold is left out.

    Args:
        run: the run's folder.
        trained: its newest checkpoint: metrics of later updates are not counted.
        windows_per_epoch: rows of one pass over the training data, where that is known.
    """
    config = trained.config
    facts = {
        "updates": f"{trained.step:,} of {config.steps:,}, {config.batch_size} rows each",
        "seed": str(config.seed),
        "weights": "moving average" if trained.averaged else "of the last update",
    }
    for name in ("corpus", "tokenizer", "target", "hidden"):
        value = config.task.get(name)
        if isinstance(value, str):
            facts[name] = f"`{_without_folders(value)}`"
    lines = [line for line in _metrics(run / "metrics.jsonl") if line["step"] <= trained.step]
    good = [row["weight"] for row in trained.pending if not row["bad_in_row"]]
    weight = sum(line.get("weight") or 0.0 for line in lines) + sum(good)
    if weight:
        facts["targets"] = f"{weight:,.0f} (tokens, for a language model)"
    if windows_per_epoch:
        facts["epochs"] = f"{trained.step * config.batch_size / windows_per_epoch:.2f}"
    if seconds := _seconds(lines):
        facts["time"] = f"{_duration(seconds)} by the metrics, evaluations included"
    evaluations = [line for line in lines if any(k.startswith("evaluation/") for k in line)]
    for name, value in (evaluations[-1] if evaluations else {}).items():
        if name.startswith("evaluation/") and value is not None:
            where = "" if evaluations[-1]["step"] == trained.step else " (an earlier update)"
            facts[name.removeprefix("evaluation/")] = f"{value:.4g}{where}"
    return facts | _launch_facts(run)


def write_card(
    folder: pathlib.Path, title: str, how: str, facts: Mapping[str, str], use: str = USE
) -> None:
    """Write ``README.md``: a sentence, a table of facts, how to use it."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    text = f"# {title}\n\n{how}\n\n| fact | value |\n|---|---|\n{rows}\n{use.format(title=title)}"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _launch_facts(run: pathlib.Path) -> dict[str, str]:
    """Commands, commit, versions and devices, from ``run.json``."""
    path = run / "run.json"
    if not path.is_file():
        return {}
    launches = json.loads(path.read_text(encoding="utf-8"))["launches"]
    last = launches[-1]
    facts = {"command": f"`{_without_folders(last['command'])}`"}
    if len(launches) > 1:
        facts["launches"] = f"{len(launches)}, each going on from the one before"
    commits = [
        launch["commit"] + (" with changes that were not committed" if launch["diff"] else "")
        for launch in launches
        if launch["commit"]
    ]
    if commits:
        facts["commit"] = ", then ".join(dict.fromkeys(commits))
    versions = {"python": last["python"], **last["versions"]}
    facts["versions"] = ", ".join(f"{k} {v}" for k, v in versions.items() if v)
    kind, number = last["devices"]
    facts["devices"] = f"{number} x {kind}, {last['processes']} process(es)"
    facts["host"] = last["processor"]
    return facts


def _metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; a live run may be in the middle of the last."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _seconds(lines: list[dict[str, Any]]) -> float:
    """Time of all updates, from the seconds per update of each line."""
    total, before = 0.0, 0
    for line in lines:
        if line.get("seconds_per_step") is not None:
            total += line["seconds_per_step"] * (line["step"] - before)
            before = line["step"]
    return total


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def _without_folders(text: str) -> str:
    """Absolute paths cut to their last part: where a folder lay is nobody's business."""
    return re.sub(r"(?<![\w.~-])/(?:[^/\s'\",:=]+/)+", "", text)
