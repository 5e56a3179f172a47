"""The shape of the repository: what a reader, and an importer, can rely on."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("runtime", "toolchain", "training", "robot")
SOURCES = sorted(path for part in PARTS for path in (ROOT / part / "otau").rglob("*.py"))
PYTHON = SOURCES + sorted((ROOT / "tests").rglob("*.py"))
MODULES = [path for path in SOURCES if path.name != "__main__.py"]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tracked() -> list[Path]:
    """The files of the repository; all files where it is not a checkout, but for what is made in it."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def test_otau_is_a_namespace_package() -> None:
    assert [path for path in ROOT.glob("*/otau/__init__.py")] == []
    assert len(import_module("otau").__path__) >= 1
    for part in PARTS:
        assert (ROOT / part / "otau" / part / "__init__.py").is_file()


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PYTHON}
    assert {str(path): length for path, length in lengths.items() if length > 600} == {}
    assert statistics.median(lengths[path] for path in SOURCES) <= 200


def type_checking_imports(tree: ast.Module) -> list[ast.stmt]:
    """What only type checkers import: a package that loads its names when asked for them re-exports these."""
    guarded = [node for node in tree.body if isinstance(node, ast.If)]
    return [line for node in guarded if ast.unparse(node.test) == "TYPE_CHECKING" for line in node.body]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_all_is_the_public_namespace(path: Path) -> None:
    """`__all__` names every public definition and nothing else; packages may re-export on top."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    exported: list[str] = []
    defined: set[str] = set()
    imported: set[str] = set()
    for node in [*tree.body, *type_checking_imports(tree)]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
            if "__all__" in names:
                exported = ast.literal_eval(node.value)
            else:
                defined |= names
        elif isinstance(node, ast.ImportFrom):
            imported |= {alias.asname or alias.name for alias in node.names}
    public = {name for name in defined if not name.startswith("_")}
    if path.name == "__init__.py":
        assert public <= set(exported) <= public | imported
    else:
        assert set(exported) == public
    assert len(exported) == len(set(exported))


def test_names_tell_what_is_inside() -> None:
    vague = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert [path for path in SOURCES if path.stem in vague or vague & set(path.parts)] == []


def test_no_machine_is_named() -> None:
    """No path of somebody's machine is in a tracked file."""
    pattern = re.compile(r"/(?:root|home/[a-z]+|work|opt/wheels)/")
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if path != Path(__file__) and pattern.search(text):
            found.append(str(path.relative_to(ROOT)))
    assert found == []


def test_the_version_is_one() -> None:
    from importlib.metadata import version

    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {version('otau')}" in changelog
