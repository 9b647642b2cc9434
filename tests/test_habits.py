"""Habits of the code that a formatter does not check, read from the source."""

import ast
import pathlib
import re
import tokenize
import tomllib
from collections.abc import Iterator

import pytest

from tests.source_tree import PACKAGES, ROOT, files, python_files, read

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80
Function = ast.FunctionDef | ast.AsyncFunctionDef

# Written in parts, so that this file does not contain what it forbids.
UNFINISHED = tuple(a + b for a, b in (("TO", "DO"), ("FIX", "ME"), ("X", "XX"), ("HA", "CK")))
MACHINE_TEXTS = tuple(
    a + b
    for a, b in (
        ("/wo", "rk/"),
        ("/ro", "ot/"),
        ("/ho", "me/"),
        ("/Us", "ers/"),
        ("/op", "t/"),
        ("../sha", "red"),
        ("py", "pi.org"),
        ("python", "hosted.org"),
        ("registry.np", "mjs"),
        ("conda.ana", "conda.org"),
    )
)
# Loaders that run code from the file they read. (Torch archives are interpreted, not unpickled.)
UNSAFE_LOADERS = ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
TEXT_SUFFIXES = (".py", ".md", ".toml", ".json", ".yml", ".yaml", ".txt", ".ipynb", ".cfg", ".csv")

CODE = python_files(*PACKAGES, "tests")


def functions(tree: ast.AST) -> Iterator[Function]:
    """Every function of a module, however deep."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def called_names(function: ast.AST) -> set[str]:
    """The last part of the name of everything that a function calls."""
    names = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            match node.func:
                case ast.Name(id=name) | ast.Attribute(attr=name):
                    names.add(name)
    return names


def asserts_itself(function: ast.AST) -> bool:
    """An assert that can fail, `pytest.raises`, `pytest.warns` or a call of an `assert_...`."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant):
            return True
    names = called_names(function)
    return bool(names & {"raises", "warns", "fail"}) or any(n.startswith("assert_") for n in names)


def without_assertions(sources: dict[str, str]) -> list[str]:
    """`file:test` of every test function that neither asserts nor calls a helper that does."""
    trees = {name: ast.parse(source, name) for name, source in sources.items()}
    helpers = [f for tree in trees.values() for f in functions(tree)]
    asserting = {f.name for f in helpers if asserts_itself(f)}
    while grown := {f.name for f in helpers if called_names(f) & asserting} - asserting:
        asserting |= grown
    return [
        f"{name}:{f.name}"
        for name, tree in trees.items()
        for f in functions(tree)
        if f.name.startswith("test_") and not asserts_itself(f) and not called_names(f) & asserting
    ]


def undocumented(name: str, source: str) -> list[str]:
    """The module, and its public functions, classes and methods, if they have no docstring."""
    tree = ast.parse(source, name)
    if not tree.body:
        return []  # an empty __init__.py
    faults = [] if ast.get_docstring(tree) else [f"{name}: module"]
    scopes: list[tuple[str, ast.Module | ast.ClassDef]] = [("", tree)]
    for prefix, scope in scopes:
        for node in scope.body:
            if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
                continue
            overloaded = any("overload" in ast.unparse(d) for d in node.decorator_list)
            if not ast.get_docstring(node) and not overloaded:
                faults.append(f"{name}: {prefix}{node.name}")
            if isinstance(node, ast.ClassDef):
                scopes.append((f"{prefix}{node.name}.", node))
    return faults


def unexplained_bounds(pyproject: str) -> list[str]:
    """Requirements without a lower bound, an upper bound or a comment that gives the reason."""
    project = tomllib.loads(pyproject)["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    faults = []
    for requirement in (r for requirements in lists for r in requirements):
        line = next(x for x in pyproject.splitlines() if x.strip().startswith(f'"{requirement}"'))
        bounded = (">=" in requirement and "<" in requirement) or "==" in requirement
        if not bounded or not re.search(r",\s*# \w.{10,}", line):
            faults.append(requirement)
    return faults


def machine_texts(text: str) -> list[str]:
    """The forbidden places in a text; a path counts only where it begins, not inside another."""
    start = {t: r"(?<![\w.\-])" if t.startswith("/") else "" for t in MACHINE_TEXTS}
    return [t for t in MACHINE_TEXTS if re.search(start[t] + re.escape(t), text)]


def test_files_and_functions_stay_short():
    lines = {name: len(read(name).splitlines()) for name in CODE}
    assert {name: n for name, n in lines.items() if n > MAX_FILE_LINES} == {}
    lengths = {
        f"{name}:{f.name}": (f.end_lineno or f.lineno) - f.lineno + 1
        for name in CODE
        for f in functions(ast.parse(read(name), name))
    }
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}


def test_no_drawer_modules():
    drawers = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
    assert [n for n in files(".py") if pathlib.PurePath(n).name in drawers] == []


def test_nothing_is_left_unfinished():
    for name in (*CODE, "Makefile", ".ci/run", "pyproject.toml"):
        text = read(name)
        found = [w for w in UNFINISHED if re.search(rf"\b{w}\b", text)]
        assert not found, f"{name}: {found}"
    for name in CODE:
        for node in ast.walk(ast.parse(read(name), name)):
            stub = isinstance(node, ast.Raise) and "NotImplemented" in ast.unparse(node)
            empty = isinstance(node, ast.Assert) and isinstance(node.test, ast.Constant)
            assert not stub and not empty, f"{name}:{node.lineno}: {ast.unparse(node)}"


def test_no_text_names_a_machine_or_a_package_index():
    for name in files():
        if name.endswith(TEXT_SUFFIXES) or name in ("Makefile", ".ci/run", ".gitignore"):
            text = read(name)
            assert machine_texts(text) == [], name


def test_public_things_have_docstrings():
    faults = [f for n in python_files(*PACKAGES) for f in undocumented(n, read(n))]
    assert faults == []


def test_every_test_asserts_something():
    assert without_assertions({n: read(n) for n in python_files("tests")}) == []


def test_every_test_folder_is_a_package():
    folders = {str(pathlib.PurePosixPath(n).parent) for n in python_files("tests")}
    assert [f for f in sorted(folders) if not (ROOT / f / "__init__.py").is_file()] == []


def test_no_file_that_runs_code_is_loaded():
    for name in python_files(*PACKAGES):
        with tokenize.open(ROOT / name) as source:
            tree = ast.parse(source.read(), name)
        for node in ast.walk(tree):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            unsafe = [m for m in modules if m.split(".")[0] in UNSAFE_LOADERS]
            assert not unsafe, f"{name}:{node.lineno} imports {unsafe}"
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                value = ast.unparse(node.value)
                assert value == "False", f"{name}:{node.lineno} allow_pickle={value}"


def test_every_bound_has_its_reason():
    assert unexplained_bounds(read("pyproject.toml")) == []


def test_make_help_lists_every_target():
    makefile = read("Makefile")
    phony = re.findall(r"^\.PHONY:(.*)$", makefile, re.MULTILINE)
    targets = {t for line in phony for t in line.split()}
    described = set(re.findall(r"^([a-z0-9-]+):.*## \w", makefile, re.MULTILINE))
    assert targets == described
    assert {"help", "setup", "demo", "test", "test-quick", "test-aot", "lint"} <= targets


def test_the_machine_check_tells_paths_apart():
    home, index = MACHINE_TEXTS[2], MACHINE_TEXTS[7]
    assert machine_texts(f"--model={home}me/model, files.{index}") == [home, index]
    assert machine_texts(f"assets{home}x and https://example.org{home}") == []


@pytest.mark.parametrize(
    ("source", "bad"),
    [
        ("def test_a():\n    f()\ndef f():\n    pass", True),
        ("def test_a():\n    assert True", True),
        ("def test_a():\n    f()\ndef f():\n    g()\ndef g():\n    assert x == 1", False),
        ("def test_a():\n    with pytest.raises(ValueError):\n        f()", False),
        ("def test_a():\n    np.testing.assert_allclose(a, b)", False),
    ],
)
def test_the_assertion_check_tells_them_apart(source, bad):
    assert bool(without_assertions({"t.py": source})) == bad


def test_the_docstring_check_names_what_lacks_one():
    source = '"""M."""\ndef f(): ...\ndef _g(): ...\nclass C:\n    """C."""\n    def h(self): ...'
    assert undocumented("m.py", source) == ["m.py: f", "m.py: C.h"]
    assert undocumented("m.py", "x = 1") == ["m.py: module"]
    assert undocumented("__init__.py", "") == []


def test_the_bounds_check_names_what_lacks_a_reason():
    head = "[project]\noptional-dependencies = {}\ndependencies = [\n"
    good = '    "a>=1,<2",  # 2 renames the main entry point\n'
    assert unexplained_bounds(head + good + "]") == []
    for line in ('    "b>=1,<2",\n', '    "b>=1",  # the first with the reader\n'):
        assert unexplained_bounds(head + good + line + "]") == [line.split('"')[1]]
