"""Operators that are saved, and loaded by another process: without TVM, with their tilings, and whatever happened meanwhile."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import bitblas
from bitblas import env, tuner
from bitblas.artifacts import artifact_key
from bitblas.build import LIBRARY
from bitblas.cache import OperatorCache, get_database_path, global_operator_cache, load_global_ops_cache
from bitblas.plan import native_layout, plan_matmul
from bitblas.runtime import load_kernels
from bitblas.schedule import RULES, Problem
from bitblas.target import host_target
from scripts import finish, report, start

N, K = 48, 64
FLOAT = {"A_dtype": "float32", "out_dtype": "float32", "accum_dtype": "float32"}
PLAIN = bitblas.MatmulConfig(M=1, N=N, K=K, W_dtype="uint4", **FLOAT)
SCALED = bitblas.MatmulConfig(M=[1, 8], N=N, K=K, W_dtype="int4", with_scaling=True, group_size=32, **FLOAT)
CONFIGS = (PLAIN, SCALED)

#: Loads a database into a cache, and answers with what it found; `check` compares an operator with float64.
LOAD = """
import json, sys
import torch, bitblas
from bitblas.cache import global_operator_cache as cache
def check(op):
    c = op.config
    low, high = c.format.value_range
    codes = (torch.arange(c.N * c.K) * 7 % (high - low + 1) + low).view(c.N, c.K)
    a = (torch.arange(c.K) % 5 - 2.0).view(1, c.K)
    scale = [torch.full((c.N, c.num_groups), 0.5)] if c.with_scaling else []
    expected = a.double() @ codes.double().T * (0.5 if scale else 1)
    return torch.equal(op(a, op.transform_weight(codes), *scale).double(), expected)
cache.clear()
cache.load_from_database({path!r}, {target!r})
configs = {configs}
ops = [cache.get(c) for c in configs]
report = dict(size=cache.size(), found=[op is not None for op in ops], right=[check(op) for op in ops if op is not None],
              origins=[op.origin for op in ops if op is not None], tvm="tvm" in sys.modules)
print(json.dumps(report))
"""
FLOATS = 'A_dtype="float32", out_dtype="float32", accum_dtype="float32"'
CODE = (
    f'[bitblas.MatmulConfig(M=1, N={N}, K={K}, W_dtype="uint4", {FLOATS}), '
    f'bitblas.MatmulConfig(M=[1, 8], N={N}, K={K}, W_dtype="int4", with_scaling=True, group_size=32, {FLOATS})]'
)


def load_elsewhere(path, target="llvm", **environment):
    """What a fresh process with an empty store finds in a database, and its warnings."""
    environment.setdefault("BITBLAS_CACHE_DIR", Path(path).parent / "nothing")
    return report(LOAD.format(path=str(path), target=target, configs=CODE), **environment)


EVERYTHING = {"size": 2, "found": [True] * 2, "right": [True] * 2, "origins": ["loaded"] * 2, "tvm": False}


@pytest.fixture
def operators(build):
    """Built in the store that all tests share."""
    return [build(config) for config in CONFIGS]


@pytest.fixture
def filled(operators):
    found = OperatorCache()
    for op in operators:
        found.add(op.config, op)
    return found


@pytest.fixture
def database(filled, tmp_path):
    filled.save_into_database(tmp_path / "db", "llvm")
    return tmp_path / "db"


def entries(database):
    return sorted((database / "operators").glob("*/*.json"))


def rewrite(path, **changes):
    """Change an entry as somebody would who knows how: with a right checksum."""
    record = json.loads(path.read_text())
    record.pop("checksum")
    record.update(changes)
    path.write_text(json.dumps({**record, "checksum": artifact_key(record)}))


def loaded(database, target="llvm"):
    found = OperatorCache()
    found.load_from_database(database, target)
    return found


def assert_right(op):
    codes = (torch.arange(N * K) % 15 - (8 if op.config.format.kind == "int" else 0)).view(N, K)
    a = (torch.arange(K) % 5 - 2.0).view(1, K)
    extra = [torch.full((N, op.config.num_groups), 0.5)] if op.config.with_scaling else []
    expected = a.double() @ codes.double().T * (0.5 if extra else 1)
    assert torch.equal(op(a, op.transform_weight(codes), *extra).double(), expected)


# -- saving and loading ----------------------------------------------------------------------------------------------------


def test_another_process_loads_what_was_saved(database):
    found, warnings = load_elsewhere(database)
    assert found == EVERYTHING
    assert warnings == []


@pytest.mark.parametrize(
    "missing", [{"PATH": ""}, {"PYTHONSTARTUP": None, "BITBLAS_CC": "/no/such/cc"}], ids=["path", "compiler"]
)
def test_without_a_compiler(database, missing):
    assert load_elsewhere(database, **missing)[0] == EVERYTHING


def test_where_tvm_cannot_be_imported(database):
    script = "import sys\nsys.modules['tvm'] = None\n" + LOAD.replace('"tvm" in sys.modules', "False")
    script = script.format(path=str(database), target="llvm", configs=CODE)
    assert report(script, BITBLAS_CACHE_DIR=database.parent / "nothing")[0] == EVERYTHING


def test_where_tvm_is_not_installed_any_version_of_it_serves(database):
    script = (
        "from importlib import metadata\nversion = metadata.version\n"
        "def lookup(name):\n    if name == 'apache-tvm':\n        raise metadata.PackageNotFoundError(name)\n"
        "    return version(name)\nmetadata.version = lookup\n"
    ) + LOAD.format(path=str(database), target="llvm", configs=CODE)
    found, warnings = report(script, BITBLAS_CACHE_DIR=database.parent / "nothing")
    assert (found, warnings) == (EVERYTHING, [])


def test_the_store_itself_is_a_database(store, tmp_path):
    with env.scope(BITBLAS_CACHE_DIR=store):
        cache = OperatorCache()
        for config in CONFIGS:
            cache.add(config, bitblas.Matmul(config, target="llvm"))
        before = sorted((store / "artifacts").iterdir())
        cache.save_into_database(get_database_path(), "llvm")
        assert sorted((store / "artifacts").iterdir()) == before
        assert loaded(get_database_path()).size() == 2
    assert load_elsewhere(store)[0] == EVERYTHING
    assert load_elsewhere(store, BITBLAS_CACHE_DIR=store)[0] == EVERYTHING


def test_defaults_and_keywords(store, operators):
    cache = OperatorCache()
    cache.add(PLAIN, operators[0])
    cache.save_into_database()
    assert len(entries(store)) == 1
    other = OperatorCache()
    other.load_from_database(database_path=get_database_path(), target=None)
    assert_right(other.get(PLAIN))
    other = OperatorCache()
    other.load_from_database(None)
    assert other.size() == 1
    global_operator_cache.clear()
    try:
        assert load_global_ops_cache() is global_operator_cache
        assert_right(global_operator_cache.get(PLAIN))
    finally:
        global_operator_cache.clear()


@pytest.mark.parametrize("make", ["str", "Target", "dict", "tvm", "None"])
def test_a_target_of_any_kind(database, make):
    if make == "tvm":
        import tvm

        target = tvm.target.Target(host_target().as_tvm())
    else:
        values = {"str": str(host_target()), "Target": host_target(), "dict": host_target().as_tvm(), "None": None}
        target = values[make]
    found = loaded(database, target)
    assert found.size() == 2
    assert_right(found.get(SCALED))


def test_each_target_has_its_own(tmp_path):
    """An operator is filed under what it was built for, whatever target is named beside it."""
    cache, old = OperatorCache(), "llvm -mcpu=x86-64"
    op = bitblas.Matmul(PLAIN, target=old)
    cache.add(PLAIN, op)
    cache.save_into_database(tmp_path / "db", "llvm")
    assert loaded(tmp_path / "db", "llvm").size() == 0
    (found,) = [loaded(tmp_path / "db", old).get(PLAIN)]
    assert found.target == op.target
    assert_right(found)
    for other in ("cuda -arch=sm_90", "nvidia/nvidia-a100", "cuda"):
        assert loaded(tmp_path / "db", other).size() == 0
    with pytest.raises(bitblas.ConfigError, match="target is 'rubbish'"):
        loaded(tmp_path / "db", "rubbish")


def test_a_target_that_this_machine_cannot_run(database, monkeypatch, caplog):
    monkeypatch.setattr("bitblas.target.host_features", frozenset)
    target = host_target()
    if not target.features:
        pytest.skip("every machine can run this one's target")
    assert loaded(database, target).size() == 0
    assert "cannot run on this machine" in caplog.text


def test_loading_builds_and_writes_nothing(database, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("something is built")

    monkeypatch.setattr("bitblas.ops.provider.build_library", refuse)
    monkeypatch.setattr("bitblas.ops.provider.compile_plan", refuse)
    before = {path: path.stat().st_mtime_ns for path in database.rglob("*")}
    with env.scope(BITBLAS_CACHE_DIR=tmp_path / "nothing"):
        found = loaded(database)
        for config in CONFIGS:
            assert found.get(config).origin == "loaded"
            assert found.get(config).lib is not None
            assert_right(found.get(config))
    assert not (tmp_path / "nothing").exists()
    assert {path: path.stat().st_mtime_ns for path in database.rglob("*")} == before


def test_loading_replaces_and_clearing_forgets(database, operators):
    found = OperatorCache()
    found.add(PLAIN, operators[0])
    found.load_from_database(database, "llvm")
    assert found.size() == 2
    assert found.get(PLAIN) is not operators[0]
    found.clear()
    assert found.size() == 0
    assert_right(operators[0])


def test_what_was_loaded_outlives_its_database_and_is_saved_from_memory(database, filled, tmp_path):
    found = loaded(database)
    shutil.copytree(database, tmp_path / "moved")
    (tmp_path / "moved").chmod(0o700)
    found.save_into_database(tmp_path / "copy")
    shutil.rmtree(database)
    assert_right(found.get(SCALED))
    found.save_into_database(tmp_path / "again", "llvm")  # from the store, since its own files are gone
    for path in ("moved", "copy", "again"):
        assert load_elsewhere(tmp_path / path)[0] == EVERYTHING, path


def test_an_operator_that_was_never_called_is_built_to_be_saved(store, tmp_path):
    cache = OperatorCache()
    cache.add(PLAIN, bitblas.Matmul(PLAIN, target="llvm", from_database=True))
    cache.save_into_database(tmp_path / "db")
    assert_right(loaded(tmp_path / "db").get(PLAIN))


def test_other_kinds_and_other_layouts(tmp_path):
    split = bitblas.ops.MatmulConfigWithSplitK(M=1, N=N, K=K, W_dtype="uint4", k_split=2, **FLOAT)
    by_k = bitblas.MatmulConfig(M=1, N=N, K=K, W_dtype="uint4", layout="nn", **FLOAT)
    cache = OperatorCache()
    cache.add(split, bitblas.ops.MatmulWithSplitK(split, target="llvm"))
    cache.add(by_k, bitblas.Matmul(by_k, target="llvm"))
    cache.save_into_database(tmp_path / "db", "llvm")
    found = loaded(tmp_path / "db")
    assert found.size() == 2
    assert (type(found.get(split)), found.get(split).k_split) == (bitblas.ops.MatmulWithSplitK, 2)
    assert_right(found.get(split))
    assert found.get(by_k).config == by_k
    weight = torch.arange(N * K).view(K, N) % 16
    a = torch.ones(1, K)
    assert torch.equal(found.get(by_k)(a, found.get(by_k).transform_weight(weight)), a @ weight.float())


# -- tunings ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tuned(store):
    """An operator whose record says something else than the default, and the tiling that it says."""
    default = plan_matmul(PLAIN, host_target()).tilings[1]
    from bitblas.schedule import RULES, Problem, select_rule

    plan = plan_matmul(PLAIN, host_target())
    problem = Problem(PLAIN, plan.layout, plan.target, 1)
    other = next(tiling for tiling in select_rule(RULES, problem).tilings(problem) if tiling != default)
    tuner.save_record(PLAIN, host_target(), {1: tuner.TunedBucket(other, ((other, 1e-6), (default, 2e-6)))})
    op = bitblas.Matmul(PLAIN, target="llvm")
    assert op.plan.tilings == {1: other}
    return op, other


def tell_tiling(path, **environment):
    script = LOAD.format(path=str(path), target="llvm", configs=CODE) + (
        "\nprint(json.dumps([ops[0].plan.kernels[0].tiling.fields(), check(ops[0]), ops[0].origin]))"
    )
    return report(script, **environment)[0]


def test_tunings_are_saved(tuned, tmp_path):
    op, tiling = tuned
    cache = OperatorCache()
    cache.add(PLAIN, op)
    cache.save_into_database(tmp_path / "db")
    assert tell_tiling(tmp_path / "db", BITBLAS_CACHE_DIR=tmp_path / "nothing") == [tiling.fields(), True, "loaded"]
    assert loaded(tmp_path / "db").get(PLAIN).plan == op.plan


def test_a_default_does_not_replace_a_tuning_and_a_tuning_replaces_a_default(tuned, operators, tmp_path):
    op, tiling = tuned
    for order in ([op, operators[0]], [operators[0], op], [op, op]):
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        for one in order:
            cache = OperatorCache()
            cache.add(PLAIN, one)
            cache.save_into_database(path)
        assert loaded(path).get(PLAIN).plan.tilings == {1: tiling}
        assert len(entries(path)) == 1


def test_a_default_replaces_a_tuning_whose_library_is_gone(tuned, operators, tmp_path):
    cache = OperatorCache()
    cache.add(PLAIN, tuned[0])
    cache.save_into_database(tmp_path / "db")
    shutil.rmtree(next((tmp_path / "db" / "artifacts").iterdir()))
    cache.add(PLAIN, operators[0])
    cache.save_into_database(tmp_path / "db")
    assert loaded(tmp_path / "db").get(PLAIN).plan == operators[0].plan


def test_finetuning_is_saved(store, tmp_path):
    op = bitblas.Matmul(PLAIN, target="llvm", enable_tuning=False)
    op.hardware_aware_finetune(topk=2)
    global_operator_cache.add(PLAIN, op)
    try:
        global_operator_cache.save_into_database(str(tmp_path / "db"), "llvm")
        global_operator_cache.clear()
        global_operator_cache.load_from_database(str(tmp_path / "db"), "llvm")
        assert global_operator_cache.get(PLAIN).plan.tilings == op.plan.tilings
        assert_right(global_operator_cache.get(PLAIN))
    finally:
        global_operator_cache.clear()


# -- damage ----------------------------------------------------------------------------------------------------------------


def corrupt_record(path, damage):
    text = path.read_text()
    contents = {
        "truncated": text[: len(text) // 2],
        "empty": "",
        "binary": "\xff\x00",
        "list": "[]",
        "number": "3",
        "no checksum": json.dumps({k: v for k, v in json.loads(text).items() if k != "checksum"}),
        "changed": text.replace('"K": 64', '"K": 32'),
    }
    assert contents[damage] != text
    path.write_text(contents[damage], encoding="latin-1")


@pytest.mark.parametrize("damage", ["truncated", "empty", "binary", "list", "number", "no checksum", "changed"])
def test_a_damaged_entry_is_a_miss_with_a_warning(database, damage, caplog):
    victim = entries(database)[0]
    hit, missed = CONFIGS if json.loads(victim.read_text())["config"]["M"] != 1 else CONFIGS[::-1]
    corrupt_record(victim, damage)
    found = loaded(database)
    assert found.get(missed) is None
    assert_right(found.get(hit))
    assert len(caplog.records) == 1
    assert str(victim) in caplog.text
    assert "left out" in caplog.text
    loaded(database)
    assert len(caplog.records) == 1  # once is enough


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"operator": "NoSuchOperator"},
        {"config": {"M": 1}},
        {"config": {"M": 1, "N": 16, "K": 16, "W_dtype": "uint99"}},
        {"tilings": {"1": {"block_m": 1, "block_n": 3, "block_k": 1}}},
        {"tilings": {"one": {}}},
        {"tilings": []},
        {"target": {"kind": "llvm", "arch": "x86_64", "mcpu": "haswell", "mattr": []}},
        {"config": {**PLAIN.fields(), "N": 80}},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_an_entry_that_makes_no_sense_is_a_miss_with_a_warning(database, changes, caplog):
    for victim in entries(database):
        rewrite(victim, **changes)
    assert loaded(database).size() == 0
    assert len(caplog.records) == 2
    assert "left out" in caplog.text


@pytest.mark.parametrize("damage", ["flipped", "gone", "no library", "manifest"])
def test_a_damaged_library_is_a_miss_with_a_warning(database, damage, caplog):
    for artifact in (database / "artifacts").iterdir():
        library = artifact / LIBRARY
        if damage == "gone":
            shutil.rmtree(artifact)
        elif damage == "manifest":
            (artifact / "manifest.json").unlink()
        elif damage == "no library":
            library.unlink()
        else:
            content = bytearray(library.read_bytes())
            content[len(content) // 2] ^= 1
            library.chmod(0o644)
            library.write_bytes(content)
    assert loaded(database).size() == 0
    assert "missing or damaged" in caplog.text
    caplog.clear()
    (first, *_) = entries(database)
    assert first.is_file()


def test_a_library_that_cannot_be_loaded_is_a_miss_with_a_warning(database, monkeypatch, caplog):
    def refuse(*_):
        raise RuntimeError("failed to map segment from shared object")

    monkeypatch.setattr("bitblas.ops.provider.load_kernels", refuse)
    assert loaded(database).size() == 0
    assert "failed to map segment" in caplog.text
    monkeypatch.setattr("bitblas.ops.provider.load_kernels", load_kernels)
    assert loaded(database).size() == 2


def test_saving_mends_what_is_damaged(database, filled):
    for path in entries(database):
        path.write_text("rubbish")
    for artifact in (database / "artifacts").iterdir():
        (artifact / LIBRARY).unlink()
    filled.save_into_database(database)
    assert load_elsewhere(database)[0] == EVERYTHING


# -- other versions --------------------------------------------------------------------------------------------------------


def age(database, **versions):
    for path in entries(database):
        rewrite(path, toolchain={**json.loads(path.read_text())["toolchain"], **versions})


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"bitblas": "0.0.1"}, r"bitblas 0\.0\.1, here"),
        ({"apache-tvm": "0.26.0"}, r"apache-tvm 0\.26\.0, here"),
        ({"sources": "0" * 64}, "other kernel sources"),
        ({"generator": "0" * 64}, "other kernel sources"),
    ],
)
def test_another_version_is_left_out_with_one_warning(database, versions, words, caplog):
    age(database, **versions)
    for _ in range(3):
        assert loaded(database).size() == 0
    (record,) = caplog.records
    assert re.search(words, record.getMessage())
    assert "2 saved operators" in record.getMessage()
    assert str(database) in record.getMessage()


def test_what_was_saved_again_by_this_version_is_loaded_without_a_warning(database, filled, caplog):
    age(database, bitblas="0.0.1")
    for path in entries(database):
        path.rename(path.with_name(f"{artifact_key({'of': path.name})}.json"))  # as the other version names it
    filled.save_into_database(database)
    assert len(entries(database)) == 4
    assert loaded(database).size() == 2
    assert caplog.records == []


# -- places that are not as they should be ---------------------------------------------------------------------------------


def test_a_directory_that_others_may_write_is_refused(database, filled):
    database.chmod(0o777)
    with pytest.raises(bitblas.ArtifactError, match="may be written by others"):
        loaded(database)
    with pytest.raises(bitblas.ArtifactError, match="may be written by others"):
        filled.save_into_database(database)


def test_what_cannot_be_written_is_a_warning(filled, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    filled.save_into_database(tmp_path / "file" / "db")
    assert len(caplog.records) == 2
    assert "could not be saved in" in caplog.text
    assert filled.size() == 2


def test_in_memory_kernels_are_not_saved(tmp_path):
    script = (
        "import bitblas, json\nfrom bitblas.cache import OperatorCache\n"
        f"cache = OperatorCache()\nop = bitblas.Matmul({CODE}[0])\ncache.add(op.config, op)\n"
        f"cache.save_into_database({str(tmp_path / 'db')!r})\nprint(json.dumps(op.origin))"
    )
    found, warnings = report(script, BITBLAS_CACHE_DIR=tmp_path / "nothing", PATH="", BITBLAS_CC=None)
    assert found == "in memory"
    assert any("compiled in memory have no library to save" in line for line in warnings)
    assert entries(tmp_path / "db") == []


# -- the way that other projects use it ------------------------------------------------------------------------------------

CLIENT = """
import json
import bitblas
from bitblas import Matmul, auto_detect_nvidia_target
from bitblas.cache import get_database_path, global_operator_cache
from bitblas.ops import MatmulConfig
path, target = f"{{get_database_path()}}_{{bitblas.__version__}}", auto_detect_nvidia_target()
target = target if target == "llvm" else "llvm"
def operator(config, enable_tuning=True):
    if global_operator_cache.size() == 0:
        global_operator_cache.load_from_database(path, target)
    op = global_operator_cache.get(config)
    if op is None:
        op = Matmul(config, target=target, enable_tuning=False)
        if enable_tuning:
            op.hardware_aware_finetune(topk=1)
            global_operator_cache.add(config, op)
            global_operator_cache.save_into_database(path, target)
    assert getattr(op, "lib", None) is not None or callable(op.torch_func)
    return op
origins = [operator(config).origin for config in {configs} * 2]
import sys
print(json.dumps([origins, "tvm" in sys.modules]))
"""


def test_load_build_tune_save(tmp_path):
    script = CLIENT.format(configs=CODE)
    tmp_path.chmod(0o700)
    first, _ = report(script, BITBLAS_CACHE_DIR=tmp_path / "store")
    assert first[0][2:] == first[0][:2]
    assert (tmp_path / f"store_{bitblas.__version__}").is_dir()
    shutil.rmtree(tmp_path / "store")
    second, warnings = report(script, BITBLAS_CACHE_DIR=tmp_path / "store")
    assert second == [["loaded"] * 4, False]
    assert warnings == []


# -- many processes --------------------------------------------------------------------------------------------------------

SAVE = """
import json
import bitblas
from bitblas.cache import OperatorCache
cache = OperatorCache()
for config in {configs}[{part}]:
    cache.add(config, bitblas.Matmul(config, target="llvm"))
for _ in range(10):
    cache.save_into_database({path!r}, "llvm")
    seen = OperatorCache()
    seen.load_from_database({path!r}, "llvm")
    assert all(seen.exists(config) for config in {configs}[{part}])
print(json.dumps(seen.size()))
"""


def test_processes_save_and_load_one_database_at_once(operators, tmp_path):
    """Each sees its own operators at any time, and all are there in the end."""
    shared = Path(operators[0].artifact.path).parents[1]
    parts = ["0:1", "1:2", "0:2", "1:2"]
    path = tmp_path / "db"
    running = [start(SAVE.format(configs=CODE, part=part, path=str(path)), BITBLAS_CACHE_DIR=shared) for part in parts]
    sizes = [finish(process) for process in running]
    assert all(warnings == [] for _, warnings in sizes), sizes
    assert load_elsewhere(path) == (EVERYTHING, [])
    assert len(entries(path)) == 2
    assert [
        p
        for p in (path / "operators").rglob("*")
        if p.is_file() and p.suffix not in (".json", "") and p.name != ".lock"
    ] == []


def test_from_database_takes_what_was_saved(store, tmp_path):
    """With its tilings, from wherever the database is, where the store has nothing."""
    config = bitblas.MatmulConfig((1, 16), 48, 64, "float16", "uint4", group_size=32, with_scaling=True)
    target = host_target()
    rule = next(rule for rule in RULES if rule.name == plan_matmul(config, target).kernels[1].rule)
    problem = Problem(config, native_layout(config, target), target, 16)
    other = rule.tilings(problem)[1]
    plan = plan_matmul(config, target, {16: other})
    saved, database = OperatorCache(), tmp_path / "database"
    saved.add(config, bitblas.Matmul.restore(config, plan))
    saved.save_into_database(str(database))
    with env.scope(BITBLAS_CACHE_DIR=tmp_path / "empty"):
        before = bitblas.cache.set_database_path(str(database))
        try:
            op = bitblas.Matmul(config, from_database=True)
            assert op.origin == "not built"
            op(
                torch.zeros(1, 64, dtype=torch.float16),
                op.transform_weight(torch.ones(48, 64)),
                torch.ones(48, 2).half(),
            )
            assert op.origin == "loaded"
            assert op.plan.tilings[16] == other
            unsaved = bitblas.Matmul(bitblas.MatmulConfig(1, 16, 64, "float16", "uint4"), from_database=True)
            unsaved(torch.zeros(1, 64, dtype=torch.float16), unsaved.transform_weight(torch.ones(16, 64)))
            assert unsaved.origin == "compiled"
        finally:
            bitblas.cache.set_database_path(None)
    assert before == str(database)
