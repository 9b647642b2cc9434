"""The files of this repository, for the tests that read its text."""

import fnmatch
import functools
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("ops", "models", "inference", "train", "research", "configs", "experiments")


@functools.cache
def files(suffix: str = "", root: pathlib.Path = ROOT) -> tuple[str, ...]:
    """Paths relative to `root`, with forward slashes, of all files that git tracks or would add.

    Without a usable git (a source archive, a tree of another owner) it walks the folder and leaves
    out what `.gitignore` names.
    """
    names = _git_files(root) if (root / ".git").exists() else None
    names = _walk(root) if names is None else names
    return tuple(sorted({n for n in names if n.endswith(suffix) and (root / n).is_file()}))


def python_files(*folders: str, root: pathlib.Path = ROOT) -> tuple[str, ...]:
    """The Python files under the named top-level folders."""
    return tuple(n for n in files(".py", root) if n.split("/")[0] in folders)


def read(name: str, root: pathlib.Path = ROOT) -> str:
    """The text of a file of the repository."""
    return (root / name).read_text(encoding="utf-8")


def _git_files(root: pathlib.Path) -> list[str] | None:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return listed.stdout.split("\0") if listed.returncode == 0 else None


def _walk(root: pathlib.Path) -> list[str]:
    ignore = root / ".gitignore"
    lines = ignore.read_text().splitlines() if ignore.is_file() else []
    patterns = [line.rstrip("/") for line in lines if line and not line.startswith("#")]
    patterns.append(".git")
    names = [p.relative_to(root) for p in root.rglob("*")]
    return [
        n.as_posix()
        for n in names
        if not any(fnmatch.fnmatch(part, q) for part in n.parts for q in patterns)
    ]
