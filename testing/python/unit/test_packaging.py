"""What the distribution declares and ships: pinned dependencies, one version, the sources in the wheel."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import bitblas

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DECLARED = {canonicalize_name(Requirement(text).name): Requirement(text) for text in PROJECT["dependencies"]}
EXTRAS = {
    canonicalize_name(Requirement(text).name): Requirement(text)
    for extra in ("test", "lint")
    for text in PROJECT["optional-dependencies"][extra]
}


def read_constraints() -> dict[str, Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    parsed = [Requirement(line) for line in lines if line]
    assert all(len(pin.specifier) == 1 and next(iter(pin.specifier)).operator == "==" for pin in parsed)
    return {canonicalize_name(pin.name): pin for pin in parsed}


CONSTRAINTS = read_constraints()


def test_the_version_is_above_the_one_that_clients_ask_for():
    assert Version(bitblas.__version__) > Version("0.1.0.post1")


def test_the_installed_metadata_is_of_this_version():
    try:
        installed = importlib.metadata.version("bitblas")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("bitblas is not installed here, only on the path")
    assert installed == bitblas.__version__


def test_the_dependencies():
    wanted = {
        "apache-tvm",
        "apache-tvm-ffi",
        "cloudpickle",
        "torch",
        "numpy",
        "tqdm",
        "psutil",
        "safetensors",
        "thefuzz",
        "filelock",
    }
    assert wanted == set(DECLARED)
    assert str(DECLARED["apache-tvm"].specifier) == "<0.28,>=0.27"
    assert Requirement("torch>=2.4").specifier == DECLARED["torch"].specifier


@pytest.mark.parametrize(
    ("version", "accepted"),
    [
        ("0.1.14.post0", True),
        ("0.1.14.post1", True),
        ("0.1.13", False),
        ("0.1.15", False),
        ("0.1.15.post2", False),  # with which Schedule.tensorize crashes the process
        ("0.2.0", False),
    ],
)
def test_the_ffi_that_crashes_is_excluded(version, accepted):
    assert DECLARED["apache-tvm-ffi"].specifier.contains(version) is accepted


def test_the_reason_stands_beside_the_pin():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'#[^\n]*0\.1\.15[^\n]*\n(\s*#[^\n]*\n)*\s*"apache-tvm-ffi', text)


@pytest.mark.parametrize("name", sorted(DECLARED))
def test_what_is_installed_satisfies_what_is_declared(name):
    assert DECLARED[name].specifier.contains(importlib.metadata.version(name), prereleases=True)


@pytest.mark.parametrize(("name", "requirement"), sorted({**DECLARED, **EXTRAS}.items()))
def test_the_constraints_hold_every_requirement(name, requirement):
    (pin,) = CONSTRAINTS[name].specifier
    assert requirement.specifier.contains(pin.version)


def test_the_constraints_hold_the_whole_tree():
    """Every package that ours need, directly or not, is pinned; setuptools is the environment's own."""
    environment = {**default_environment(), "extra": ""}
    pending, seen = [*DECLARED, *EXTRAS], set()
    while pending:
        name = pending.pop()
        if name in seen or name == "setuptools" or re.match(r"(nvidia|cuda)-|triton$", name):
            continue
        seen.add(name)
        assert name in CONSTRAINTS, f"{name} is not in constraints.txt"
        for text in importlib.metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate(environment):
                pending.append(canonicalize_name(requirement.name))


def copy_tree(target: Path) -> Path:
    """Copy what a distribution is made from, with a file in a folder of `src/` to look for."""
    target.mkdir()
    for name in (
        "pyproject.toml",
        "setup.py",
        "MANIFEST.in",
        "LICENSE",
        "CHANGELOG.md",
        "constraints.txt",
        "README.md",
    ):
        shutil.copy(ROOT / name, target)
    for name in ("python", "src", "integration"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    (target / "src" / "probe" / "deep").mkdir(parents=True)
    (target / "src" / "probe" / "deep" / "probe.h").write_text("/* probe */\n")
    return target


def test_both_packages_are_on_the_path_of_an_editable_install(tmp_path):
    """What `pip install -e .` asks setuptools for: a wheel with names of folders, or with an importer that knows them.

    -S: a bitblas that is installed itself, as where these tests run, would be found first.
    """
    setuptools = pytest.importorskip("setuptools")
    if Version(setuptools.__version__) < Version("77"):
        pytest.skip("building the wheel needs setuptools 77")
    tree = copy_tree(tmp_path / "tree")
    setup_py(tree, "editable_wheel", "--dist-dir", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "site")
    script = (
        f"import site; site.addsitedir({str(tmp_path / 'site')!r})\n"
        "from importlib.util import find_spec\n"
        "print(find_spec('bitblas').origin, find_spec('bitblas_transformers').origin)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    wanted = [tree / "python" / "bitblas", tree / "integration" / "transformers" / "bitblas_transformers"]
    assert done.stdout.split() == [str(path / "__init__.py") for path in wanted]


def setup_py(tree: Path, *command: str) -> None:
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", *command], cwd=tree, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("through_sdist", [False, True], ids=["checkout", "sdist"])
def test_the_wheel_is_pure_and_ships_the_sources(tmp_path, through_sdist):
    setuptools = pytest.importorskip("setuptools")
    if Version(setuptools.__version__) < Version("77"):
        pytest.skip("building the wheel needs setuptools 77")
    tree = copy_tree(tmp_path / "tree")
    if through_sdist:
        setup_py(tree, "sdist", "-d", str(tmp_path))
        (archive,) = tmp_path.glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(tmp_path / "unpacked", filter="data")
        (tree,) = (tmp_path / "unpacked").iterdir()
    setup_py(tree, "bdist_wheel", "-d", str(tmp_path))

    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"bitblas-{bitblas.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        (metadata,) = (packed.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
        (scripts,) = (packed.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    sources = {f"bitblas/src/{path.relative_to(ROOT / 'src')}" for path in (ROOT / "src").rglob("*") if path.is_file()}
    assert names >= sources | {"bitblas/src/probe/deep/probe.h", "bitblas/py.typed", "bitblas/artifacts/store.py"}
    adapter = (ROOT / "integration" / "transformers" / "bitblas_transformers").glob("*.py")
    assert names >= {f"bitblas_transformers/{path.name}" for path in adapter} | {"bitblas_transformers/quantizer.py"}
    information = f"bitblas-{bitblas.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"bitblas", "bitblas_transformers", information}
    assert "Requires-Dist: apache-tvm-ffi<0.1.15,>=0.1.14.post0" in metadata
    assert "License-Expression: MIT" in metadata
    assert "bitblas = bitblas.cli:main" in scripts
