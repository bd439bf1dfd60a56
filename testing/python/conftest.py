"""What all tests share: options, the hypothesis profile, the artifact store, seeds."""

import functools
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `import emulator`
sys.path.insert(0, str(Path(__file__).parent))  # for `import reference`

import devices

_MADE_STORE = pytest.StashKey[Path]()
_DEVICE = pytest.StashKey[str]()


def pytest_addoption(parser):
    group = parser.getgroup("bitblas")
    group.addoption("--examples", type=int, default=60, help="number of examples of each hypothesis test")
    group.addoption(
        "--device",
        choices=devices.DEVICES,
        help="where the tests of run/ run operators (cpu; with -m cuda: cuda); emulated: a card's text, on this CPU; mirrored: "
        "this CPU, on copies",
    )
    group.addoption(
        "--every", type=int, default=1, metavar="N", help="run every N-th test only, of those that were chosen"
    )
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
    config.stash[_DEVICE] = devices.wanted(config.getoption("--device"), config.getoption("markexpr"))
    if config.stash[_DEVICE] != "cuda" or torch.cuda.is_available():
        devices.install(config.stash[_DEVICE])
    if config.stash[_DEVICE] == "cpu":
        os.environ.setdefault("BITBLAS_TARGET", "llvm")  # also where there is a card
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


def pytest_ignore_collect(collection_path, config):
    """Files that say nothing about cards are not even imported where operators are for one: they may need what is not there."""
    if config.stash[_DEVICE] != "cpu" and collection_path.parent.name == "run":
        return True if collection_path.name in devices.NOT_ON_CARDS else None
    return None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Before tests are chosen by their marks, give them theirs; afterwards leave all but every N-th out."""
    _mark_for_cards(config, items)
    result = yield
    step = config.getoption("--every")
    left_out = [item for place, item in enumerate(items) if place % step]
    if left_out:
        items[:] = items[::step]
        config.hook.pytest_deselected(items=left_out)
    return result


def _mark_for_cards(config, items):
    """Mark what says something about cards, where operators are for one; leave out what does not."""
    device, kept, left_out = config.stash[_DEVICE], [], []
    no_card = pytest.mark.skip(reason="there is no CUDA device")
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        elsewhere = item.path.parent.name != "run" or devices.why_not(item.path.name, item.originalname, parameters)
        about_cards = item.path.parent.name == "run" and bool(devices.ONLY_ON_CARDS.search(item.path.name))
        if device != "cpu" and elsewhere and not about_cards and item.get_closest_marker("cuda") is None:
            left_out.append(item)
            continue
        if item.get_closest_marker("exhaustive") and not re.search(r"\b(slow|exhaustive)\b", config.option.markexpr):
            left_out.append(item)
            continue
        kept.append(item)
        if about_cards or (device == "cuda" and not elsewhere):
            item.add_marker(pytest.mark.cuda)
        if item.get_closest_marker("cuda") is not None and not torch.cuda.is_available():
            item.add_marker(no_card)
    items[:] = kept
    if left_out:
        config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """What one test does is nothing to the next: the seed is the same, and what is said once a process is said again."""
    from bitblas import logs

    torch.manual_seed(0)
    logs._warned.clear()


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


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """Operators for cards run in the emulator; they have the keys of what nvcc builds, and so a store of their own."""
    from bitblas import env

    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("store")
        path.chmod(0o700)
        patch.setenv("BITBLAS_CACHE_DIR", str(path))
        devices.emulate(patch.setattr)
        with env.scope(BITBLAS_CACHE_DIR=path):
            yield
