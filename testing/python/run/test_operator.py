"""What an operator offers beside being called: sources, facts, tuning, lifecycle."""

import copy
import logging
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import bitblas
from bitblas import ArgumentError, BuildError, ConfigError, Matmul, MatmulConfig, UnsupportedError, build, tuner
from bitblas.formats import FORMATS
from bitblas.ops import provider
from bitblas.schedule import LaneTiling

PYTHON = str(Path(bitblas.__file__).parents[1])
SMALL = {"N": 64, "K": 64, "A_dtype": "float16", "group_size": 32, "with_scaling": True}


def small(**changes):
    return MatmulConfig(**{"M": [1, 16], "W_dtype": "uint4", **SMALL, **changes})


@pytest.fixture(scope="module")
def op():
    return Matmul(small())


def call(op, m=3):
    """(result, expected) of one random call."""
    A = torch.randn(m, op.K).half()
    codes = torch.randint(0, 16, (op.N, op.K))
    scale = (torch.rand(op.N, op.K // 32) + 0.5).half()
    expected = A.double() @ (codes.double() * scale.double().repeat_interleave(32, 1)).t()
    return op(A, op.transform_weight(codes), scale).double(), expected


def test_the_script_the_schedule_and_the_code_can_be_read(op):
    assert 'T.sblock("decode")' in op.prim_func.script()
    assert "T.vectorized(16)" not in op.prim_func.script()
    assert "T.vectorized(16)" in op.scheduled_ir_module.script()
    assert "define" in op.get_source()
    assert "@matmul_0" in op.get_source().replace("@__tvm_ffi_", "@")


def test_facts_that_clients_read(op):
    assert (op.M, op.N, op.K, op.bit, op.source_format) == ((1, 16), 64, 64, 4, "uint")
    assert (op.with_scaling, op.with_zeros, op.with_bias, op.group_size) == (True, False, False, 32)
    assert (op.A_dtype, op.W_dtype, op.out_dtype, op.zeros_mode) == ("float16", "uint4", "float16", "original")
    assert not op.propagate_b
    assert op.lib is not None
    assert op.lut is None
    assert "W_dtype='uint4'" in repr(op)
    assert op.retrieve_weight_shape() == [64, 32]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_family_name(name):
    families = {"uint", "int", "nf", "fp", "fp_e4m3", "fp_e5m2", "bf"}
    assert Matmul(MatmulConfig(1, 16, 16, "float16", name), from_database=True).source_format in families


def test_the_table_of_nf4():
    lut = Matmul(small(W_dtype="nf4"), from_database=True).lut
    assert lut.shape == (16,)
    assert lut.dtype is torch.float16
    assert (lut[0], lut[7], lut[15]) == (-1, 0, 1)


def test_weight_transform_packs_unsigned_codes(op):
    codes = torch.randint(0, 16, (64, 64), dtype=torch.int8)
    assert torch.equal(op.weight_transform(codes), op.transform_weight(codes))
    signed = Matmul(small(W_dtype="int4"), from_database=True)
    assert torch.equal(signed.weight_transform(codes), signed.transform_weight(codes - 8))
    assert Matmul(small(N=5), from_database=True).weight_transform is None
    for N in (48, 5):
        bytes_ = Matmul(small(N=N, W_dtype="int8"), from_database=True)
        values = torch.randint(-128, 128, (N, bytes_.K))
        held = (values + 128).to(torch.uint8).view(torch.int8)
        assert torch.equal(bytes_.weight_transform(held), bytes_.transform_weight(values))


def test_from_database_builds_at_the_first_call(store):
    op = Matmul(small(), from_database=True)
    assert op.lib is None
    assert op.origin == "not built"
    result, expected = call(op)
    assert torch.allclose(result, expected, rtol=1e-2, atol=0.2)
    assert op.origin == "compiled"
    again = Matmul(small())
    assert again.origin == "loaded"


def test_an_operator_is_built_once_by_many_threads(store):
    built, threads = [], []
    barrier = threading.Barrier(6)

    def construct():
        barrier.wait()
        built.append(Matmul(small(N=80)).origin)

    for _ in range(6):
        threads.append(threading.Thread(target=construct))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert sorted(built) == ["compiled", *["loaded"] * 5]


def test_threads_share_one_operator(op):
    failures = []

    def work():
        for _ in range(20):
            result, expected = call(op)
            if not torch.allclose(result, expected, rtol=1e-2, atol=0.2):
                failures.append((result - expected).abs().max())

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_construction_under_meta_and_inference():
    with torch.device("meta"), torch.inference_mode():
        op = Matmul(small())
    result, expected = call(op)
    assert torch.allclose(result, expected, rtol=1e-2, atol=0.2)


def test_names_that_are_not_taken():
    with pytest.raises(ConfigError, match="backend is 'cutlass'; allowed: tl, tir"):
        Matmul(small(), backend="cutlass")
    with pytest.raises(ConfigError, match="config is 'uint4'"):
        Matmul("uint4")
    with pytest.raises(UnsupportedError, match=r"^target cuda -arch=sm_70: cards of compute capability"):
        Matmul(small(), target="nvidia/tesla-v100")


def test_old_forms_of_a_target():
    assert Matmul(small(), "name", "llvm -mcpu=x86-64-v3", False, True, "tir").target.mcpu == "x86-64-v3"
    assert Matmul(small(), target={"kind": "llvm", "mcpu": "haswell"}, from_database=True).target.mcpu == "haswell"


# -- what it says --------------------------------------------------------------------------------------------------------------


def test_a_build_says_what_for_which_rows_and_where_it_is_kept(store, caplog):
    caplog.set_level("INFO", logger="bitblas")
    first, second = Matmul(small()), Matmul(small())
    building, compiled, loaded = (record.getMessage() for record in caplog.records)
    what = (
        f"float16 x uint4 -> {first.out_dtype}, N=64 K=64, groups of 32, scales for buckets 1, 16 on {first.target.isa}"
    )
    assert building == f"building {what} into {store}"
    assert compiled.startswith(f"compiled {what} in ")
    assert loaded.startswith(f"loaded {what} in ")
    for message in (compiled, loaded):
        assert message.endswith(f" s, kept in {second.artifact.path}")
    assert second.artifact.path.is_relative_to(store)


def test_a_build_is_quiet_by_default(store, capfd, caplog):
    Matmul(small())
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


# -- tuning ----------------------------------------------------------------------------------------------------------------


def test_a_damaged_record_counts_as_none(store, caplog):
    cfg = small(N=96)
    op = Matmul(cfg, enable_tuning=False)
    tuner.save_record(cfg, op.target, {1: tuner.TunedBucket(LaneTiling(1, 16, 8), ())})
    (record,) = store.glob("tuning/*.json")
    record.write_text(record.read_text()[:-20])
    with caplog.at_level(logging.WARNING, "bitblas"):
        assert Matmul(cfg, enable_tuning=True).plan == op.plan
    assert "is ignored" in caplog.text


def test_latency_is_measured_in_milliseconds(op):
    assert 0 < op.profile_latency() < 1000
    assert 0 < op.profile_latency({"m": 5}) < 1000
    for wrong in (-1, 0, 2.5, "7"):
        with pytest.raises(ArgumentError, match=r"m is .*; it must be an integer of at least 1"):
            op.profile_latency({"m": wrong})
    with pytest.raises(ArgumentError, match="m is 7; this operator was built for M = 1"):
        Matmul(small(M=1), from_database=True).profile_latency({"m": 7})


@pytest.mark.parametrize("topk", [0, -3, "x", 2.0, True])
def test_a_wrong_number_of_candidates(op, topk):
    with pytest.raises(ArgumentError, match=r"topk is .*; it must be an integer of at least 1"):
        op.hardware_aware_finetune(topk)


@pytest.mark.parametrize("seconds", [0, -3, "x", True, float("nan")])
def test_a_wrong_time(op, seconds):
    with pytest.raises(ArgumentError, match=r"seconds is .*; it must be a number above 0"):
        op.hardware_aware_finetune(seconds=seconds)


def test_operators_can_be_copied_and_pickled(op):
    assert copy.deepcopy(op) is op
    again = pickle.loads(pickle.dumps(op))
    assert (again.config, again.plan, again.origin) == (op.config, op.plan, "loaded")


def test_a_record_with_another_content_counts_as_none(store):
    cfg = small(N=96)
    op = Matmul(cfg, enable_tuning=False)
    tuner.save_record(cfg, op.target, {1: tuner.TunedBucket(LaneTiling(1, 16, 8), ())})
    (record,) = store.glob("tuning/*.json")
    for content in ('{"buckets": []}', '{"buckets": {"1": 3}}', "[]", '{"buckets": {"1": {"tiling": {"made_up": 1}}}}'):
        record.write_text(content)
        assert tuner.load_record(cfg, op.target) is None


def test_a_record_makes_a_store_as_private_as_it_must_be(tmp_path):
    cfg = small(N=96)
    before = os.umask(0o002)
    try:
        with bitblas.env.scope(BITBLAS_CACHE_DIR=tmp_path / "new"):
            target = Matmul(cfg, from_database=True).target
            tuner.save_record(cfg, target, {1: tuner.TunedBucket(LaneTiling(1, 16, 8), ())})
            assert Matmul(cfg).origin == "compiled"
    finally:
        os.umask(before)


def test_the_log_says_what_is_built_and_where(store):
    code = "import bitblas; bitblas.Matmul(bitblas.MatmulConfig(M=1, N=16, K=16, W_dtype='int4'))"
    for level, expected in (("INFO", "building float16 x int4"), ("WARNING", "")):
        environment = {**os.environ, "BITBLAS_LOG_LEVEL": level, "BITBLAS_CACHE_DIR": str(store), "PYTHONPATH": PYTHON}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert expected in done.stderr
        assert bool(expected) == bool(done.stderr.strip())


def test_a_compiler_may_have_options(store):
    with bitblas.env.scope(BITBLAS_CC="cc -O1"):
        assert Matmul(small(N=160)).origin == "compiled"


# -- building --------------------------------------------------------------------------------------------------------------


def test_a_failing_compiler_shows_its_command_and_output(store, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'ld: the moon is full' >&2\nexit 7\n")
    compiler.chmod(0o755)
    with bitblas.env.scope(BITBLAS_CC=str(compiler)), pytest.raises(BuildError) as caught:
        Matmul(small(N=112))
    assert "ld: the moon is full" in str(caught.value)
    assert caught.value.command.startswith(str(compiler))
    with bitblas.env.scope(BITBLAS_CC="no-such-compiler"), pytest.raises(BuildError, match="'no-such-compiler'"):
        Matmul(small(N=112))
    assert Matmul(small(N=112)).origin == "compiled"


def test_artifacts_depend_on_the_question_and_not_on_hints(store):
    keys = {provider.plan_key(Matmul(cfg, from_database=True).plan) for cfg in (small(), small(fast_decoding=True))}
    assert len(keys) == 1
    assert provider.plan_key(Matmul(small(with_bias=True), from_database=True).plan) not in keys


def test_a_machine_without_tvm_loads_what_another_built(store, monkeypatch):
    cfg = small(N=144)
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch, **{build.COMPILER: "0.27.9"})
        assert Matmul(cfg).origin == "compiled"
    pretend(monkeypatch, **{build.COMPILER: ""})
    op = Matmul(cfg)
    assert op.origin == "loaded"
    result, expected = call(op)
    assert torch.allclose(result, expected, rtol=1e-2, atol=0.2)
    pretend(monkeypatch, **{build.COMPILER: "", "sources": "others"})
    monkeypatch.setattr(provider, "build_library", no_tvm)
    with pytest.raises(BuildError, match="no TVM"):
        Matmul(cfg)


def pretend(patch, **versions):
    """Be a machine with other versions installed."""
    found = {**build.toolchain(), **versions}
    for module in (build, provider):
        patch.setattr(module, "toolchain", lambda: found)


def no_tvm(*_):
    raise BuildError("no TVM here")
