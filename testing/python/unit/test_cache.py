"""The operator cache in memory, and the path of its database; nothing is built."""

import os
import threading

import pytest

import bitblas
from bitblas import cache, env
from bitblas.cache import OperatorCache, get_database_path, load_global_ops_cache, set_database_path
from bitblas.locks import ForkLock


def config(n=16, **fields):
    return bitblas.MatmulConfig(M=1, N=n, K=32, W_dtype="uint4", **fields)


@pytest.fixture
def chosen():
    """The default path, as it was before."""
    yield
    set_database_path(None)


@pytest.fixture
def lazy():
    """An operator that is not built."""
    return bitblas.Matmul(config(), target="llvm", from_database=True)


# -- in memory -------------------------------------------------------------------------------------------------------------


def test_in_memory(lazy):
    found = OperatorCache()
    assert found.size() == 0
    assert found.get(config()) is None
    assert not found.exists(config())
    found.add(config(), lazy)
    assert found.size() == 1
    assert found.get(config()) is lazy
    assert found.exists(config())
    assert found.get(config(32)) is None
    found.add(config=config(), op=lazy)
    assert found.size() == 1
    assert repr(found) == "OperatorCache(size=1)"
    found.clear()
    assert found.size() == 0
    assert found.get(config()) is None


def test_an_equal_config_finds_it(lazy):
    found = OperatorCache()
    found.add(config(), lazy)
    assert found.get(config(storage_dtype="uint8", fast_decoding=True)) is lazy  # hints
    assert found.get(config(with_scaling=True)) is None


def test_attentions_and_matmuls_side_by_side(lazy):
    found, asked = OperatorCache(), bitblas.FlashAttenConfig(heads=4, seq_len=8, dim=16)
    attention = bitblas.FlashAtten(asked, target="llvm", from_database=True)
    assert found.get(asked) is None
    found.add(config(), lazy)
    found.add(asked, attention)
    assert found.size() == 2
    assert found.get(bitblas.FlashAttenConfig(None, 4, 8, 16, heads_kv=4, softmax_scale=0.25)) is attention
    assert found.get(config()) is lazy
    assert not found.exists(bitblas.FlashAttenConfig(heads=4, seq_len=8, dim=16, seq_len_kv=None))
    with pytest.raises(bitblas.ArgumentError, match="must be that of the operator"):
        found.add(asked, lazy)


def test_caches_are_apart_and_one_is_shared(lazy):
    one, other = OperatorCache(), OperatorCache()
    one.add(config(), lazy)
    assert other.size() == 0
    assert bitblas.cache.global_operator_cache is cache.global_operator_cache
    assert isinstance(cache.global_operator_cache, OperatorCache)


def test_many_threads_add_get_and_clear():
    found, errors = OperatorCache(), []
    configs = [config(16 * (n + 1)) for n in range(8)]
    ops = [bitblas.Matmul(c, from_database=True) for c in configs]

    def work(seed):
        try:
            for i in range(300):
                c, op = configs[(seed + i) % 8], ops[(seed + i) % 8]
                found.add(c, op)
                assert found.get(c) in (op, None)
                assert 0 <= found.size() <= 8
                if i % 50 == 49:
                    found.clear()
        except Exception as error:  # noqa: BLE001 - what goes wrong in a thread would pass unseen
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert not any(thread.is_alive() for thread in threads)


# -- paths -----------------------------------------------------------------------------------------------------------------


def test_the_default_path(monkeypatch, tmp_path):
    with env.scope(BITBLAS_CACHE_DIR=tmp_path):
        assert get_database_path() == str(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with env.scope(BITBLAS_CACHE_DIR=None):
        assert get_database_path() == str(tmp_path / ".cache" / "bitblas")


@pytest.mark.usefixtures("chosen")
def test_a_chosen_path(tmp_path):
    assert set_database_path(str(tmp_path / "a")) == str(tmp_path / "a")
    assert get_database_path() == str(tmp_path / "a")
    assert set_database_path(tmp_path / "b") == str(tmp_path / "b")
    with env.scope(BITBLAS_CACHE_DIR=tmp_path):
        assert set_database_path(None) == str(tmp_path)


@pytest.mark.parametrize("path", ["", 3, b"", "a\0b"])
def test_a_path_that_is_none(path):
    found = OperatorCache()
    for call in (found.load_from_database, found.save_into_database, set_database_path):
        with pytest.raises(bitblas.ArgumentError, match=r"database_path is .*; it must be the path of a directory"):
            call(path)


# -- what is not there -----------------------------------------------------------------------------------------------------

TARGETS = ["llvm", "nvidia/nvidia-a100", "cuda -arch=sm_90", "no such target at all", None]


@pytest.mark.parametrize("target", TARGETS)
def test_a_missing_path_is_nothing(tmp_path, target, caplog):
    found = OperatorCache()
    found.load_from_database(str(tmp_path / "missing"), target)
    found.load_from_database(database_path=tmp_path / "missing", target=target)
    (tmp_path / "file").write_text("")
    found.load_from_database(str(tmp_path / "file"), target)
    assert found.size() == 0
    assert caplog.records == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_directory_of_other_things_is_nothing(tmp_path, caplog):
    (tmp_path / "nvidia" / "nvidia-a100" / "0123").mkdir(parents=True)  # what the original BitBLAS leaves
    (tmp_path / "nvidia" / "nvidia-a100" / "0123" / "mapping.json").write_text("{}")
    found = OperatorCache()
    for target in TARGETS:
        found.load_from_database(tmp_path, target)
    assert found.size() == 0
    assert caplog.records == []


@pytest.mark.usefixtures("chosen")
def test_the_global_cache_is_loaded_and_returned(tmp_path):
    set_database_path(tmp_path / "missing")
    assert load_global_ops_cache() is cache.global_operator_cache
    assert load_global_ops_cache(str(tmp_path / "missing"), "llvm") is cache.global_operator_cache


def test_saving_nothing(tmp_path):
    OperatorCache().save_into_database(tmp_path / "missing", "cuda -arch=sm_90")
    assert not (tmp_path / "missing").exists()


def test_an_operator_of_another_kind_is_not_saved(tmp_path, caplog):
    found = OperatorCache()
    found.add(config(), object())
    found.save_into_database(tmp_path / "db")
    assert "operators of type object are not saved" in caplog.text
    assert not (tmp_path / "db").exists()


# -- locks -----------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_lock_that_another_thread_holds_is_free_in_a_forked_child():
    lock, taken, done = ForkLock(), threading.Event(), threading.Event()

    def hold():
        with lock.held():
            taken.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert taken.wait(60)
    pid = os.fork()
    if pid == 0:
        with lock.held():
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    done.set()
    holder.join(60)
    with lock.held():
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_that_is_forked_inside_leaves_as_its_parent_does():
    lock = ForkLock()
    with lock.held():
        pid = os.fork()
        if pid == 0:
            with lock.held():
                pass
    if pid == 0:
        with lock.held():
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    with lock.held():
        pass
