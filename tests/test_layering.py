"""Which package may import which, read from the source without importing it."""

import ast
import pathlib
import sys

from tests.source_tree import PACKAGES, ROOT, python_files, read

# package -> packages of ours that it may import, besides itself
MAY_IMPORT = {
    "ops": set(),
    "models": {"ops"},
    "inference": {"ops", "models"},
    "train": {"ops", "models", "inference"},
    "research": {"ops", "models", "inference", "train"},
    "configs": set(),
    "experiments": {"ops", "models", "inference", "train", "research", "configs"},
    "tests": set(PACKAGES),
}
# package -> the only module that it may import of another package
ONLY = {"train": ("configs", "configs.sweep")}  # what a sweep is: plain data, read at launch
# Optional or absent at run time, so nothing that is imported by default may need them.
HEAVY = ("tensorflow", "torch", "transformers")


def imported(name: str, source: str) -> list[tuple[int, str, bool]]:
    """(line, dotted module, at module level) of every import in a file, relative ones resolved.

    `from a.b import c` counts as `a.b.c`, because `c` may be a module.
    """
    tree = ast.parse(source, name)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = name.split("/")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            modules = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [(node.lineno, module, id(node) not in inside) for module in modules]
    return found


def _fault(name: str, module: str, top_level: bool) -> str | None:
    """What is wrong with the file `name` importing `module`, or None."""
    here, there = name.split("/"), module.split(".")
    ours, target = here[0], there[0]
    if target in HEAVY:
        optional = ours == "experiments" and here[-1].startswith("bench")
        return "imported when the module loads" if top_level and not optional else None
    if ours == "configs" and target not in {"configs", "ml_collections", *sys.stdlib_module_names}:
        return "configs may import ml_collections only"
    if target not in MAY_IMPORT:
        return None
    package, only = ONLY.get(ours, ("", ""))
    if target == package and f"{module}.".startswith(f"{only}."):
        return None
    if target != ours and target not in MAY_IMPORT[ours]:
        return f"{ours} may not import {target}"
    if (
        ours == target == "research"
        and len(here) > 3
        and len(there) > 2
        and here[1:3] != there[1:3]
    ):
        return "a method imports another method's folder; move what they share down"
    return None


def violations(root: pathlib.Path) -> list[str]:
    """One line per forbidden import of the tree under `root`."""
    return [
        f"{name}:{line}: {module}: {fault}"
        for name in python_files(*MAY_IMPORT, root=root)
        for line, module, top_level in imported(name, read(name, root))
        if (fault := _fault(name, module, top_level))
    ]


def test_the_tree_keeps_the_layers():
    seen = python_files(*MAY_IMPORT)
    assert {name.split("/")[0] for name in seen} == set(MAY_IMPORT), "a package has no file"
    assert violations(ROOT) == []


def test_planted_violations_are_found(tmp_path):
    planted = {
        "ops/a.py": "def f():\n    from models import decoder",
        "models/b.py": "import inference.cache as cache",
        "inference/c.py": "from train.loop import run",
        "train/d.py": "import research.context.clex",
        "train/d2.py": "from configs import clover",
        "research/x/one/e.py": "from research.x import two",
        "research/x/one/f.py": "from ..two.drafter import init",
        "research/y/three/g.py": "import experiments.report",
        "configs/h.py": "import jax",
        "configs/i.py": "from models import decoder",
        "experiments/j.py": "if True:\n    import torch.nn",
        "tests/k.py": "import transformers",
        "ops/l/m.py": "from tests import golden",
    }
    for name, source in planted.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    assert [line.split(":")[0] for line in violations(tmp_path)] == sorted(planted)


def test_allowed_imports_pass(tmp_path):
    allowed = {
        "ops/a.py": "import jax\nfrom . import b\nfrom .b import c",
        "train/d.py": "from inference import loop\nfrom models import decoder",
        "train/d2.py": "from configs.sweep import Sweep\nfrom configs import sweep",
        "research/x/one/e.py": "from research.x.one import loss\nfrom . import loss\nimport train",
        "configs/h.py": "import math\nimport ml_collections\nfrom configs import sweep",
        "experiments/bench_decode.py": "import torch\nimport research.x.one.e",
        "experiments/j.py": "def main():\n    import torch",
    }
    for name, source in allowed.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    assert violations(tmp_path) == []
