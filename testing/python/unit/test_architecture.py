"""The code keeps to docs/architecture.md: imports go up the list, modules and functions stay small, nothing prints."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "python" / "bitblas"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
FREE = {"__init__", "__main__"}  # may import everything
BASE = {"_version"}  # imports nothing, and everything may import it
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 500, 80


def parse_order(text: str) -> list[str]:
    """Return the names of the first indented block below the heading "The flow"."""
    block = re.search(r"^## The flow.*?\n((?: {4}\S.*\n(?: {5,}.*\n)*)+)", text, re.MULTILINE | re.DOTALL)
    assert block, "docs/architecture.md has no indented block below its heading 'The flow'"
    return re.findall(r"^ {4}(\w+)/? {2,}\S", block[1], re.MULTILINE)


ORDER = parse_order((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))


def parse(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text(encoding="utf-8"), module)


def dotted(module: str) -> str:
    """Return the dotted name of a file, relative to bitblas: "expr/decode.py" -> "expr.decode"."""
    name = module.removesuffix(".py").replace("/", ".")
    return name.removesuffix(".__init__")


NAMES = {dotted(module): module for module in MODULES}


def imports(module: str, tree: ast.Module) -> list[tuple[str, int]]:
    """Return the modules of bitblas that a file imports, anywhere in it, each with its line."""
    package = dotted(module).split(".")
    package = package if module.endswith("/__init__.py") else package[:-1]
    package = [] if module == "__init__.py" else package
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "bitblas"]
            found += [(resolve(name.split(".")[1:]), node.lineno) for name in names]
        elif isinstance(node, ast.ImportFrom):
            path = node.module.split(".") if node.module else []
            if node.level == 0 and path[:1] != ["bitblas"]:
                continue
            base = package[: len(package) - node.level + 1] + path if node.level else path[1:]
            found += [(resolve([*base, alias.name]), node.lineno) for alias in node.names]
    return found


def resolve(path: list[str]) -> str:
    """Return the longest prefix of a path that is a module; the rest is a name in it."""
    for length in range(len(path), 0, -1):
        if ".".join(path[:length]) in NAMES:
            return ".".join(path[:length])
    return "__init__"


def violations(module: str, tree: ast.Module) -> list[str]:
    """Return what a file imports from below its own line of the list."""
    unit = dotted(module).split(".")[0]
    if unit in FREE | BASE:
        return []
    problems = []
    for name, line in imports(module, tree):
        other = name.split(".")[0]
        if other == unit or other in BASE:
            continue
        if other not in ORDER or ORDER.index(other) > ORDER.index(unit):
            problems.append(f"{module}:{line} imports {other}, which is not above {unit}")
    return problems


def test_the_list_is_read_whole():
    assert ORDER[:4] == ["errors", "env", "logs", "sources"]
    assert {"formats", "config", "plan", "artifacts", "ops", "nn", "cli"} <= set(ORDER)
    assert len(ORDER) == len(set(ORDER))


def test_every_module_is_in_the_list():
    units = {name.split(".")[0] for name in NAMES} - FREE - BASE
    assert sorted(units - set(ORDER)) == []


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_up_the_list(module):
    assert violations(module, parse(module)) == []


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("errors.py", "from .env import scope", "imports env"),
        ("errors.py", "def f():\n    from bitblas import logs", "imports logs"),
        ("artifacts/store.py", "from ..cli import main", "imports cli"),
        ("artifacts/store.py", "from .. import env, cli", "imports cli"),
        ("env.py", "import bitblas.logs", "imports logs"),
        ("env.py", "from . import __version__", "imports __init__"),
        ("logs.py", "from . import env\nfrom ._version import __version__\nimport os.path", None),
        ("artifacts/store.py", "from .record import Artifact\nfrom .. import env\nfrom ..logs import get_logger", None),
    ],
)
def test_the_rule_notices(module, source, problem, monkeypatch):
    monkeypatch.setitem(NAMES, "cli", "cli.py")
    found = violations(module, ast.parse(source))
    assert found == [] if problem is None else problem in "\n".join(found)


def test_no_module_imports_itself_in_a_circle():
    graph = {name: {other for other, _ in imports(file, parse(file))} - {name} for name, file in NAMES.items()}
    graph = {name: edges - FREE for name, edges in graph.items() if name not in FREE}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle of imports: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("module", MODULES)
def test_size(module):
    lines = (PACKAGE / module).read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_MODULE_LINES, f"{module} has {lines} lines: split it"
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(parse(module))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert not long, f"{module} has functions of more than {MAX_FUNCTION_LINES} lines: {long}"


@pytest.mark.parametrize("module", MODULES)
def test_habits(module):
    tree = parse(module)
    assert ast.get_docstring(tree), f"{module} has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{module}:{node.lineno} has a bare except"
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), f"{module}:{node.lineno} imports *"
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and module.split("/")[0] not in ("cli.py", "cli")
        ):
            assert node.func.id != "print", f"{module}:{node.lineno} prints"
