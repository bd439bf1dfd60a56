"""Operators among threads, in forked and in spawned processes: right results, one build for each key, and nothing hangs."""

import multiprocessing
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import bitblas
from bitblas.build import build_library, find_compiler
from bitblas.cache import OperatorCache
from bitblas.schedule import RULES, Problem, select_rule
from scripts import finish, report, start

pytestmark = pytest.mark.timeout(300)  # a deadlock fails
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")

MANY = 32
FLOAT = {"A_dtype": "float32", "out_dtype": "float32", "accum_dtype": "float32"}
#: Large enough for its kernels to use several threads, and integers that float32 adds exactly in any order.
N, K = 1024, 256
PARALLEL = bitblas.MatmulConfig(M=[1, 16], N=N, K=K, W_dtype="uint4", **FLOAT)


def codes(config, seed=0):
    return (torch.arange(config.N * config.K) * 7 + seed).view(config.N, config.K) % 16


def rows(config, m, seed=0):
    return ((torch.arange(m * config.K) + seed) % 5 - 2).view(m, config.K).float()


def expected(config, a):
    return (a.double() @ codes(config).double().T).float()


@pytest.fixture
def parallel(build):
    op = build(PARALLEL)
    assert any(kernel.tiling.parallel for kernel in op.plan.kernels)
    return op


@pytest.fixture(autouse=True)
def _torch_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def at_once(count, work):
    """What `work(i)` returns for each i, all begun at the same moment, each in a thread of its own."""
    barrier = threading.Barrier(count)

    def begin(index):
        barrier.wait(60)
        return work(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count), timeout=240))


# -- threads ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torch_threads", [1, 2])
def test_many_threads_call_one_operator(parallel, torch_threads):
    torch.set_num_threads(torch_threads)
    weight = parallel.transform_weight(codes(PARALLEL))
    inputs = [rows(PARALLEL, 1 + index % 5, seed=index) for index in range(MANY)]

    def work(index):
        torch.set_num_threads(torch_threads)  # which holds for the thread that says so
        results = [parallel(inputs[index], weight) for _ in range(10)]
        buffer = torch.full_like(results[0], -1)
        assert parallel(inputs[index], weight, output=buffer) is buffer
        return [*results, buffer]

    found = at_once(MANY, work)
    assert len({result.data_ptr() for results in found for result in results}) == MANY * 11
    for index, results in enumerate(found):
        reference = expected(PARALLEL, inputs[index])
        assert all(torch.equal(result, reference) for result in results), f"thread {index}"


def test_threads_first_call_of_one_lazy_operator(parallel):
    """Of all that call first, one loads."""
    lazy = bitblas.Matmul(PARALLEL, target="llvm", from_database=True)
    weight = parallel.transform_weight(codes(PARALLEL))
    found = at_once(MANY, lambda index: (lazy(rows(PARALLEL, 1, index), weight), lazy.lib))
    assert len({id(library) for _, library in found}) == 1
    for index, (result, _) in enumerate(found):
        assert torch.equal(result, expected(PARALLEL, rows(PARALLEL, 1, index)))


@pytest.fixture
def builds(monkeypatch):
    """The configs that are built, as they are."""
    built = []

    def count(plan, *arguments):
        built.append(plan.config)
        return build_library(plan, *arguments)

    if find_compiler() is None:
        pytest.skip("there is no C compiler")
    monkeypatch.setattr("bitblas.ops.provider.build_library", count)
    return built


def small(n):
    return bitblas.MatmulConfig(M=1, N=16 * n, K=32, W_dtype="uint4", **FLOAT)


@pytest.mark.usefixtures("store")
def test_many_threads_construct_equal_operators(builds):
    ops = at_once(MANY, lambda _: bitblas.Matmul(small(1), target="llvm"))
    assert builds == [small(1)]
    assert sorted(op.origin for op in ops) == ["compiled", *["loaded"] * (MANY - 1)]
    for op in ops:
        a = rows(op.config, 1)
        assert torch.equal(op(a, op.transform_weight(codes(op.config))), expected(op.config, a))


@pytest.mark.usefixtures("store")
def test_many_threads_construct_different_operators(builds):
    ops = at_once(MANY, lambda index: bitblas.Matmul(small(1 + index % 4), target="llvm"))
    assert sorted(config.N for config in builds) == [16, 32, 48, 64]
    for index, op in enumerate(ops):
        assert small(1 + index % 4) == op.config
        a = rows(op.config, 1, index)
        assert torch.equal(op(a, op.transform_weight(codes(op.config))), expected(op.config, a))


def test_many_threads_save_and_load_one_database(build, tmp_path):
    cache = OperatorCache()
    for config in (small(1), small(2)):
        cache.add(config, build(config))

    def work(index):
        if index % 2:
            cache.save_into_database(tmp_path / "db", "llvm")
        mine = OperatorCache()
        mine.load_from_database(tmp_path / "db", "llvm")
        return mine

    at_once(MANY // 2, work)
    last = work(1)
    assert last.size() == 2
    a = rows(small(2), 1)
    op = last.get(small(2))
    assert torch.equal(op(a, op.transform_weight(codes(op.config))), expected(op.config, a))


@pytest.mark.usefixtures("builds")
def test_the_number_of_threads_changes_between_calls(parallel):
    weight = parallel.transform_weight(codes(PARALLEL))
    for count in (1, 2, 3, 1, 3, 2) * 3:
        torch.set_num_threads(count)
        for m in (1, 7, 40):
            a = rows(PARALLEL, m, seed=count)
            assert torch.equal(parallel(a, weight), expected(PARALLEL, a))
        assert torch.get_num_threads() == count


def test_a_tuning_while_others_call(build):
    """The operator of all is replaced under their hands, and every answer is right."""
    config = small(3)
    op = bitblas.Matmul(config, target="llvm")
    problem = Problem(config, op.layout, op.target, 1)
    assert len(select_rule(RULES, problem).tilings(problem)) > 1
    weight, done = op.transform_weight(codes(config)), threading.Event()

    def work(index):
        if index == 0:
            try:
                op.hardware_aware_finetune(topk=2)
            finally:
                done.set()
            return 1
        calls = 0
        while calls == 0 or not done.is_set():
            assert torch.equal(op(rows(config, 1, index), weight), expected(config, rows(config, 1, index)))
            calls += 1
        return calls

    assert all(at_once(4, work))


# -- forked processes ------------------------------------------------------------------------------------------------------

# Every child ends by itself after a minute at the latest, so that a hang is an exit status and not a stray process.
FORK = """
import json, os, signal, sys, threading
import torch
torch.set_num_threads(2)
import bitblas
config = bitblas.MatmulConfig(M=[1, 16], N=1024, K=256, W_dtype="uint4",
                              A_dtype="float32", out_dtype="float32", accum_dtype="float32")
op = bitblas.Matmul(config, target="llvm")
codes = torch.arange(1024 * 256).view(1024, 256) * 7 % 16
weight = op.transform_weight(codes)
a = (torch.arange(16 * 256) % 5 - 2).view(16, 256).float()
reference = a.double() @ codes.double().T
def right(rows=16):
    return torch.equal(op(a[:rows], weight).double(), reference[:rows])
def torch_works():
    return float(torch.ones(1 << 21).sum()) == 1 << 21
def child(work):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(60)
            status = 0 if work() else 3
        finally:
            os._exit(status)
    return pid
def end(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def threads():
    return len(os.listdir("/proc/self/task"))
assert right() and torch_works()
"""

FORKS = {
    "a child calls": "found = [end(child(right)) for _ in range(3)]",
    "one row": "found = [end(child(lambda: right(1)))]",
    "children at once": "found = [end(pid) for pid in [child(right) for _ in range(4)]]",
    "torch in the child, too": "found = [end(child(lambda: torch_works() and right() and torch_works()))]",
    "torch first in the parent": "torch_works(); found = [end(child(right)), end(child(torch_works))]",
    "the parent afterwards": "found = [end(child(right)), 0 if right() and torch_works() else 3, end(child(right))]",
    "a child of a child": "found = [end(child(lambda: right() and end(child(right)) == 0 and right()))]",
    "threads in the child": (
        "def work():\n"
        "    found = []\n"
        "    group = [threading.Thread(target=lambda: found.append(right())) for _ in range(4)]\n"
        "    [t.start() for t in group]; [t.join() for t in group]\n"
        "    return found == [True] * 4 and right()\n"
        "found = [end(child(work))]"
    ),
    "a thread forks": (
        "found = []\n"
        "def work():\n    assert right()\n    found.append(end(child(right)))\n"
        "t = threading.Thread(target=work); t.start(); t.join()"
    ),
    "while other threads call": (
        "stop = threading.Event()\n"
        "def work():\n    while not stop.is_set():\n        assert right()\n"
        "group = [threading.Thread(target=work) for _ in range(3)]\n"
        "[t.start() for t in group]\n"
        "found = [end(child(right)) for _ in range(10)]\n"
        "stop.set(); [t.join() for t in group]"
    ),
    "while a thread loads operators": (
        "stop = threading.Event()\n"
        "def work():\n    while not stop.is_set():\n        bitblas.Matmul(config, target='llvm')\n"
        "group = [threading.Thread(target=work) for _ in range(2)]\n"
        "[t.start() for t in group]\n"
        "def fresh():\n"
        "    again = bitblas.Matmul(config, target='llvm')\n"
        "    return right() and torch.equal(again(a, weight).double(), reference)\n"
        "found = [end(child(fresh)) for _ in range(10)]\n"
        "stop.set(); [t.join() for t in group]"
    ),
    "a lazy operator, while a thread of the parent provides it": (
        "from bitblas.ops import operator\n"
        "lazy = bitblas.Matmul(config, target='llvm', from_database=True)\n"
        "provide, busy, go = operator.provide, threading.Event(), threading.Event()\n"
        "def slow(plan):\n    busy.set(); go.wait(); return provide(plan)\n"
        "operator.provide = slow\n"
        "t = threading.Thread(target=lambda: lazy(a, weight)); t.start(); busy.wait()\n"
        "def work():\n    operator.provide = provide\n    return torch.equal(lazy(a, weight).double(), reference)\n"
        "found = [end(child(work))]; go.set(); t.join()"
    ),
    "a child builds another": (
        "other = bitblas.MatmulConfig(M=1, N=16, K=32, W_dtype='uint2')\n"
        "found = [end(child(lambda: bitblas.Matmul(other, target='llvm').origin in ('compiled', 'loaded')))]"
    ),
    "multiprocessing": (
        "import multiprocessing\n"
        "with multiprocessing.get_context('fork').Pool(2) as pool:\n"
        "    results = [pool.apply_async(op, (a, weight)).get(60) for _ in range(4)]\n"
        "found = [0 if torch.equal(result.double(), reference) else 3 for result in results]"
    ),
    "a child that ends as programs do": (
        "pid = os.fork()\nif pid == 0:\n    signal.alarm(60)\n    assert right()\n    sys.exit(0)\nfound = [end(pid)]"
    ),
}
TELL = "\nprint(json.dumps(found))"


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A store that holds the operator of `FORK`."""
    directory = tmp_path_factory.mktemp("forks")
    directory.chmod(0o700)
    report(FORK + "found = op.origin" + TELL, BITBLAS_CACHE_DIR=directory)
    return directory


@forks
@pytest.mark.parametrize("case", FORKS)
def test_fork_after_use(warm, case):
    found, warnings = report(FORK + FORKS[case] + TELL, BITBLAS_CACHE_DIR=warm)
    assert found
    assert set(found) == {0}
    assert warnings == []


@forks
@pytest.mark.parametrize("case", ["a child calls", "a child builds another", "the parent afterwards"])
def test_fork_after_compiling(tmp_path, case):
    found, _ = report(FORK + FORKS[case] + TELL, BITBLAS_CACHE_DIR=tmp_path / "cold")
    assert set(found) == {0}


@forks
@pytest.mark.parametrize(
    "case",
    [
        "a child calls",
        "threads in the child",
        "a thread forks",
        "a child of a child",
        "a child that ends as programs do",
    ],
)
def test_fork_with_kernels_in_memory(tmp_path, case):
    """They run on TVM's own threads, of which a child has none either."""
    keeps = (
        "\ndef same():\n    return os.sched_getaffinity(0) == now\n"
        "now = os.sched_getaffinity(0)\nfound.append(end(child(same)))"
    )
    environment = {"PATH": "", "BITBLAS_CC": None, "TVM_NUM_THREADS": 2, "BITBLAS_CACHE_DIR": tmp_path / "cold"}
    found, warnings = report(FORK + FORKS[case] + keeps + "\nassert op.origin == 'in memory'" + TELL, **environment)
    assert set(found) == {0}
    assert len(warnings) == 1


@forks
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")  # noqa: PTH112
def test_a_child_has_threads_of_its_own(warm):
    script = "found = [end(child(lambda: threads() == 1 and right() and threads() == 2)), 0 if right() else 3]"
    assert report(FORK + script + TELL, BITBLAS_CACHE_DIR=warm)[0] == [0, 0]


# -- spawned processes -----------------------------------------------------------------------------------------------------


def test_pickling(parallel):
    again = pickle.loads(pickle.dumps(parallel))
    assert again is not parallel
    assert (again.config, again.target, again.plan) == (parallel.config, parallel.target, parallel.plan)
    assert again.origin == "loaded"
    lazy = pickle.loads(pickle.dumps(bitblas.Matmul(PARALLEL, name="lazy", target="llvm", from_database=True)))
    assert (lazy.origin, lazy.name) == ("not built", "lazy")


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_an_operator_is_sent_to_other_processes(parallel, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"there is no {method}")
    weight, a = parallel.transform_weight(codes(PARALLEL)), rows(PARALLEL, 3)
    assert torch.equal(parallel(a, weight), expected(PARALLEL, a))
    with multiprocessing.get_context(method).Pool(2) as pool:
        results = pool.starmap_async(parallel, [(a, weight)] * 4).get(120)
    for result in results:
        assert torch.equal(result, expected(PARALLEL, a))


def test_an_operator_of_a_database_is_sent_with_its_place_and_tilings(build, tmp_path):
    """Where neither the default store nor a compiler could make up for them."""
    config = small(2)
    cache = OperatorCache()
    cache.add(config, build(config))
    cache.save_into_database(tmp_path / "db")
    cache.load_from_database(tmp_path / "db", "llvm")
    (tmp_path / "op").write_bytes(pickle.dumps(cache.get(config)))
    script = (
        "import json, pickle, sys\nfrom pathlib import Path\n"
        f"op = pickle.loads(Path({str(tmp_path / 'op')!r}).read_bytes())\n"
        "print(json.dumps([op.origin, str(op.artifact.path), 'tvm' in sys.modules]))"
    )
    origin, path, tvm = report(script, BITBLAS_CACHE_DIR=tmp_path / "nothing", PATH="")[0]
    assert (origin, tvm) == ("loaded", False)
    assert path.startswith(str(tmp_path / "db"))


def test_an_operator_whose_place_is_gone_is_provided_anew(parallel, tmp_path):
    op = bitblas.Matmul.restore(parallel.config, parallel.plan)
    content = pickle.dumps(op)
    assert pickle.loads(content).origin == "not built"
    cache = OperatorCache()
    cache.add(PARALLEL, parallel)
    cache.save_into_database(tmp_path / "db")
    cache.load_from_database(tmp_path / "db", "llvm")
    content = pickle.dumps(cache.get(PARALLEL))
    (tmp_path / "db").rename(tmp_path / "other")
    assert pickle.loads(content).origin == "loaded"
    (tmp_path / "db").mkdir()
    (tmp_path / "db").chmod(0o777)  # as unsafe as somebody else's
    assert pickle.loads(content).origin == "loaded"


# -- many processes --------------------------------------------------------------------------------------------------------

EQUAL = """
import json
import torch, bitblas
op = bitblas.Matmul(bitblas.MatmulConfig(M=1, N=32, K=32, W_dtype="uint4", accum_dtype="float32"), target="llvm")
codes = torch.arange(32 * 32).view(32, 32) % 16
a = torch.ones(1, 32, dtype=torch.float16)
right = torch.equal(op(a, op.transform_weight(codes)).double(), a.double() @ codes.double().T)
print(json.dumps([op.origin, right]))
"""


def test_processes_that_construct_equal_operators_build_once(tmp_path):
    (tmp_path / "store").mkdir(mode=0o700)
    running = [start(EQUAL, BITBLAS_CACHE_DIR=tmp_path / "store") for _ in range(4)]
    found = [finish(process) for process in running]
    assert sorted(origin for (origin, _), _ in found) == ["compiled", "loaded", "loaded", "loaded"]
    assert all(right for (_, right), _ in found)
    assert all(warnings == [] for _, warnings in found)
