"""What all tests share: options, the hypothesis profile, the artifact store, seeds."""

import functools
import os
import shutil
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parents[1]),
]  # for `import reference` and `import emulator`

_MADE_STORE = pytest.StashKey[Path]()


def pytest_addoption(parser):
    group = parser.getgroup("bitblas")
    group.addoption("--examples", type=int, default=60, help="number of examples of each hypothesis test")
    group.addoption("--store", default=None, help="artifact store to use and keep; default: a fresh one for each run")


def pytest_configure(config):
    hypothesis.settings.register_profile(
        "bitblas",
        max_examples=config.getoption("--examples"),
        deadline=None,  # an example may compile
        print_blob=True,
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
    )
    hypothesis.settings.load_profile("bitblas")
    # Set before the workers of pytest-xdist start, which inherit it: they share one store and so each other's builds.
    if hasattr(config, "workerinput"):
        return
    store = config.getoption("--store")
    if store is None:
        store = config.stash[_MADE_STORE] = Path(tempfile.mkdtemp(prefix="bitblas-test-store-"))  # mode 0700
    os.environ["BITBLAS_CACHE_DIR"] = str(store)


def pytest_unconfigure(config):
    made = config.stash.get(_MADE_STORE, None)
    if made is not None:
        shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def store(tmp_path):
    """An empty artifact store of the test's own."""
    from bitblas import env

    path = tmp_path / "store"
    path.mkdir(mode=0o700)
    with env.scope(BITBLAS_CACHE_DIR=path):
        yield path


@pytest.fixture(scope="session")
def build():
    """Operators by config and target, this CPU where none is named, each built once."""
    import bitblas

    return functools.cache(lambda config, target="llvm": bitblas.Matmul(config, target=target))
