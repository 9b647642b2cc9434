"""The README's Python is run as it stands, its commands exist, its links lead somewhere."""

import re
import subprocess
import sys

import pytest

from tests.source_tree import ROOT, files, read

README = read("README.md")


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) > 3


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m ([\w.]+)", README))))
def test_commands_exist(module: str) -> None:
    path = ROOT / module.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def test_targets_exist() -> None:
    targets = set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", README, re.M))
    help_text = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {"demo", "test"} <= targets <= set(re.findall(r"^make ([a-z0-9-]+)", help_text, re.M))


@pytest.mark.parametrize("document", files(".md"))
def test_links_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", read(document)):
        if "://" not in target:
            assert ((ROOT / document).parent / target).exists(), target


@pytest.mark.slow
def test_flags_of_the_readme_are_known() -> None:
    """Every flag that stands after a module of the README is one that it lists under --help."""
    checked = 0
    for module, line in re.findall(r"python -m ([\w.]+)((?:[^\n`\\]|\\\n)*)", README):
        flags = set(re.findall(r"--([a-z_]+)(?=[=\s]|$)", line))
        if not flags:
            continue
        text = "".join(
            subprocess.run(
                [sys.executable, "-m", module, option], cwd=ROOT, capture_output=True, text=True
            ).stdout
            for option in ("--help", "--helpfull")
        )
        for name in flags:
            assert f"--{name}" in text or f"--[no]{name}" in text, f"{module} --{name}"
        checked += 1
    assert checked > 4
