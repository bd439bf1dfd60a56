"""Operators for cards are built, stored, loaded and refused on machines without one: with nvcc, with NVRTC, with neither."""

import ctypes
import json
import pickle
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bitblas import ArgumentError, BuildError, Matmul, MatmulConfig, UnsupportedError, env
from bitblas.build import compile_cuda, find_compiler
from bitblas.cache.database import Database
from bitblas.cuda import compile as compiling
from bitblas.cuda import driver
from bitblas.cuda.launches import Launch, read_launches
from bitblas.cuda.nvcc import find_nvcc
from bitblas.cuda.nvrtc import find_nvrtc
from bitblas.cuda.resources import read_resources
from bitblas.machines import Card
from bitblas.ops import provider
from bitblas.plan import plan_matmul
from bitblas.runtime import Kernels, load_kernels
from bitblas.target import resolve_target
from naive_cuda import NaiveTiling, naive_rules
from scripts import report

HERE = Path(__file__).parents[1]
CONFIG = MatmulConfig(M=[1, 16], N=48, K=64, W_dtype="uint4", accum_dtype="float32", with_scaling=True, group_size=32)
TARGET = "cuda -arch=sm_90"

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="there is no nvcc")
needs_nvrtc = pytest.mark.skipif(find_nvrtc() is None, reason="there is no NVRTC: pip install nvidia-cuda-nvrtc")
no_card = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")


@pytest.fixture(autouse=True)
def _naive():
    with naive_rules():
        yield


@pytest.fixture
def without_nvcc(monkeypatch):
    monkeypatch.setattr(compiling, "find_nvcc", lambda: None)


def operands(m=1):
    return [
        torch.zeros(m, 64, dtype=torch.float16),
        torch.zeros(48, 32, dtype=torch.int8),
        torch.ones(48, 2, dtype=torch.float16),
    ]


@needs_nvcc
def test_nvcc_builds_what_a_machine_without_a_card_stores_and_loads(store):
    op = Matmul(CONFIG, target=TARGET)
    assert op.origin == "compiled"
    assert sorted(op.artifact.files) == ["kernel.cu", "kernel.so", "schedule.py"]
    manifest = op.artifact.manifest
    assert manifest["compiler"].startswith("nvcc ")
    assert {name: one.spill_stores for name, one in read_resources(manifest).items()} == {
        "matmul_0_kernel": 0,
        "matmul_1_kernel": 0,
    }
    assert all(0 < one.registers <= 64 for one in read_resources(manifest).values())
    assert "__global__" in op.get_source()
    again = Matmul(CONFIG, target=TARGET)
    assert (again.origin, again.artifact.key) == ("loaded", op.artifact.key)
    # the compiler is no part of the key, cards of one capability share, capabilities do not
    assert Matmul(CONFIG, target="nvidia/nvidia-h200").artifact.key == op.artifact.key
    assert provider.plan_key(plan_matmul(CONFIG, resolve_target("cuda -arch=sm_80"))) != op.artifact.key


@no_card
@needs_nvcc
def test_a_call_without_a_card_is_refused_before_a_kernel_runs():
    op = Matmul(CONFIG, target=TARGET)
    a, w, scale = operands()
    with pytest.raises(ArgumentError, match=r"^A is on device cpu; this operator runs on cuda$"):
        op(a, w, scale)
    with pytest.raises(ArgumentError, match=r"^A is on device meta; this operator runs on cuda$"):
        op(a.to("meta"), w.to("meta"), scale.to("meta"))
    # the launcher itself finds no driver, and says so
    with pytest.raises(RuntimeError, match="CUDA"):
        op._kernels.launch(1, operands(), torch.empty(1, 48, dtype=torch.float16))


@needs_nvcc
def test_a_warm_process_loads_without_tvm(store):
    Matmul(CONFIG, target=TARGET)
    script = (
        f"import sys, json, time; sys.path.insert(0, {str(HERE)!r})\n"
        "import torch, bitblas, tvm_ffi\n"
        "from naive_cuda import naive_rules\n"
        f"config = bitblas.MatmulConfig(**{CONFIG.fields()!r})\n"
        "with naive_rules():\n"
        f"    bitblas.Matmul(config, target={TARGET!r}, from_database=True)\n"
        "    began = time.perf_counter()\n"
        f"    op = bitblas.Matmul(config, target={TARGET!r})\n"
        "taken = time.perf_counter() - began\n"
        "print(json.dumps([op.origin, 'tvm' in sys.modules, torch.cuda.is_initialized(), taken]))"
    )
    (origin, tvm, initialized, taken), warnings = report(script, BITBLAS_CACHE_DIR=store)
    assert (origin, tvm, initialized, warnings) == ("loaded", False, False, [])
    assert taken < 0.2  # 0.02 on a machine that does nothing else


@needs_nvcc
def test_threads_that_want_one_operator_build_it_once(store, monkeypatch):
    built = []
    real = provider.build_library

    def count(plan, *arguments):
        built.append(plan)
        return real(plan, *arguments)

    monkeypatch.setattr(provider, "build_library", count)
    with ThreadPoolExecutor(4) as pool:
        ops = list(pool.map(lambda _: Matmul(CONFIG, target=TARGET), range(4)))
    assert len(built) == 1
    assert len({op.artifact.key for op in ops}) == 1


@needs_nvcc
def test_a_failing_nvcc_shows_its_command_and_output(store, tmp_path):
    broken = tmp_path / "nvcc"
    broken.write_text(
        '#!/bin/sh\ncase "$1" in --*) exec nvcc "$@";; esac\necho "kernel.cu: no such luck" >&2; exit 3\n'
    )
    broken.chmod(0o755)
    with env.scope(BITBLAS_NVCC=str(broken)), pytest.raises(BuildError) as caught:
        Matmul(CONFIG, target=TARGET)
    assert str(broken) in caught.value.command
    assert "-gencode" in caught.value.command
    assert caught.value.output == "kernel.cu: no such luck\n"


@needs_nvcc
def test_a_capability_that_nvcc_does_not_know(store):
    op = Matmul(CONFIG, target="cuda -arch=sm_130")  # PTX, for the driver to translate
    assert op.origin == "compiled"


def test_without_a_compiler_the_error_names_a_package(store, without_nvcc, monkeypatch):
    monkeypatch.setattr(compiling, "find_nvrtc", lambda: None)
    with pytest.raises(
        BuildError, match="pip install nvidia-cuda-nvrtc nvidia-cuda-runtime; or name an nvcc in BITBLAS_NVCC"
    ):
        Matmul(CONFIG, target=TARGET)


@needs_nvcc
def test_what_one_card_saved_another_of_its_capability_loads(store, tmp_path):
    large = replace(resolve_target(TARGET), card=Card(200, 1 << 17, 1 << 26, 4000))
    op = Matmul(CONFIG, target=large)
    assert pickle.loads(pickle.dumps(op)).target == large
    database = Database(tmp_path / "database")
    database.save(op)
    (found,) = database.load(resolve_target(TARGET))
    assert (found.origin, found.target, found.plan) == ("loaded", large, op.plan)
    assert database.find(CONFIG, resolve_target(TARGET)).artifact.key == op.artifact.key
    assert database.load(resolve_target("cuda -arch=sm_80")) == []


# -- workspaces ------------------------------------------------------------------------------------------------------------


def test_kernels_that_ask_for_a_workspace_get_one(monkeypatch):
    target = resolve_target(TARGET)
    plan = plan_matmul(CONFIG, target, {16: NaiveTiling(1, 64, 16, partial_rows=2)})
    calls = []
    module = {name: lambda *tensors, name=name: calls.append((name, tensors)) for name in ("matmul_0", "matmul_1")}
    monkeypatch.setattr("bitblas.runtime.tvm_ffi.load_module", lambda path: module)
    monkeypatch.setattr(
        "bitblas.runtime.workspaces.get",
        lambda device, sums, counters: (torch.empty(sums), torch.zeros(counters, dtype=torch.int32)),
    )
    kernels = load_kernels(Path("kernel.so"), plan)
    assert isinstance(kernels, Kernels)
    for m in (1, 13):
        kernels.launch(m, operands(m), torch.empty(m, 48))
    (first, few), (second, many) = calls
    assert (first, len(few)) == ("matmul_0", 4)
    assert (second, len(many)) == ("matmul_1", 6)
    assert [one.numel() for one in many[-2:]] == [2 * 13 * 48, 13]


# -- NVRTC -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_driver(tmp_path, monkeypatch):
    """The library of testing/python/fake_driver.c in the place of the driver; torch's stream is number 9."""
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("there is no C compiler")
    path = tmp_path / "libfake.so"
    subprocess.run([*compiler.split(), "-shared", "-fPIC", "-o", path, HERE / "fake_driver.c"], check=True)
    library = ctypes.CDLL(str(path))
    library.fake_log.restype = ctypes.c_char_p
    monkeypatch.setattr(driver, "library", lambda: library)
    monkeypatch.setattr(driver, "current_stream", lambda device: 9)

    def log():
        lines = library.fake_log().decode().splitlines()
        library.fake_reset(0)
        return lines

    log.fail = lambda: library.fake_reset(1)
    log.set_current = library.fake_set_current
    library.fake_reset(0)
    return log


def on(device, *tensors):
    """Stand-ins on a device for tensors of the CPU."""
    return [
        SimpleNamespace(shape=one.shape, data_ptr=one.data_ptr, get_device=lambda: device, numel=one.numel)
        for one in tensors
    ]


@needs_nvrtc
def test_nvrtc_builds_and_its_kernels_are_launched_by_the_driver(store, without_nvcc, fake_driver):
    op = Matmul(CONFIG, target=TARGET)
    assert sorted(op.artifact.files) == ["kernel.cu", "kernel.cubin", "kernel.json", "schedule.py"]
    assert op.artifact.manifest["compiler"].startswith("nvrtc ")
    assert Matmul(CONFIG, target=TARGET).origin == "loaded"
    tensors = [*operands(5), torch.empty(5, 48, dtype=torch.float16)]
    call = op.lib["matmul_1"]
    call(*on(1, *tensors))
    a, *_, _out = tensors
    launch = f"launch {ord('1')} 1 5 1 64 1 1 0 9 {a.data_ptr()} "
    lines = fake_driver()
    assert lines[:2] == ["retain 1", "push 101"]
    assert lines[2].startswith("load \x7fELF")
    assert [line.split()[0] for line in lines[3:]] == ["pop", "push", "function", "launch", "pop"]
    assert lines[5] == "function matmul_1_kernel"
    assert lines[6].startswith(launch)
    call(*on(1, *tensors))  # loaded, and found, once
    assert [line.split()[0] for line in fake_driver()] == ["push", "launch", "pop"]
    call(*on(0, *tensors))  # another device loads it for itself
    assert [line.split()[0] for line in fake_driver()][:3] == ["retain", "push", "load"]
    fake_driver.set_current(1)  # as torch has it
    call(*on(1, *tensors))
    assert [line.split()[0] for line in fake_driver()] == ["launch"]
    call(*on(0, *tensors))
    assert [line.split()[0] for line in fake_driver()] == ["push", "launch", "pop"]
    fake_driver.fail()
    with pytest.raises(RuntimeError, match=r"^CUDA: cuLaunchKernel failed: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES$"):
        call(*on(1, *tensors))
    assert fake_driver()[-1] == "pop"  # the context is given back


def test_dynamic_shared_memory_is_allowed_once(fake_driver):
    launch = Launch("matmul_0_kernel", (("pointer", ["data", 0]),) * 2 + (("int32", 3),), (4, 1, 1), (32, 1, 1), 65536)
    module = driver.CubinModule(b"code", {"matmul_0": [launch]})
    for _ in range(2):
        module["matmul_0"](*on(0, torch.empty(1)))
    lines = fake_driver()
    assert [line for line in lines if line.startswith("attribute")] == [f"attribute {ord('0')} 8 65536"]
    assert len([line for line in lines if line.startswith("launch")]) == 2


def test_the_driver_tells_captures_apart(fake_driver):
    assert driver.capture_id(0) == 0
    assert driver.capture_id(3) == 44


def test_launches_are_read_from_the_host_functions():
    plan = plan_matmul(CONFIG, resolve_target(TARGET), {16: NaiveTiling(1, 64, 16, partial_rows=2)})
    compiled, _ = compile_cuda(plan)
    found = read_launches(compiled.host)
    assert sorted(found) == ["matmul_0", "matmul_1"]
    (launch,) = found["matmul_1"]
    # arguments by name: A, W, out, scale; then m
    assert launch.arguments == (
        *(("pointer", ["data", place]) for place in (0, 1, 3, 2)),
        ("int32", ["dim", 0, 0]),
    )
    assert (launch.grid, launch.block, launch.shared) == ((1, ["dim", 0, 0], 1), (64, 1, 1), 0)
    assert Launch.parse(json.loads(json.dumps(launch.fields()))) == launch


def test_without_a_driver_a_launch_says_so(monkeypatch):
    driver.library.cache_clear()

    def absent(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(driver.ctypes, "CDLL", absent)
    module = driver.CubinModule(b"", {"matmul_0": []})
    with pytest.raises(RuntimeError, match=r"^CUDA: there is no driver: libcuda"):
        module["matmul_0"](*on(0, torch.empty(1)))
    assert driver.capture_id(3) == 0


@needs_nvrtc
def test_nvrtc_says_what_is_wrong():
    with pytest.raises(BuildError, match="NVRTC_ERROR_COMPILATION") as caught:
        compiling.compile_cubin(find_nvrtc(), "__global__ void broken() { nonsense; }", "sm_90")
    assert "--gpu-architecture=sm_90" in caught.value.command
    assert "nonsense" in caught.value.output


@needs_nvrtc
def test_a_capability_that_nvrtc_does_not_know():
    text = "__global__ void fill(float* out) { out[threadIdx.x] = 1; }"
    assert compiling.compile_cubin(find_nvrtc(), text, "sm_90").startswith(b"\x7fELF")
    assert b".target sm_" in compiling.compile_cubin(find_nvrtc(), text, "sm_999")


def test_refusals_pass_unchanged(store):
    with pytest.raises(UnsupportedError, match="is for tests"):
        Matmul(MatmulConfig(N=64, K=64, W_dtype="uint4", with_bias=True), target=TARGET)
