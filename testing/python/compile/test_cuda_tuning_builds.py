"""What tuning builds for cards is built by nvcc and loaded, also where no card could run it."""

import shutil

import pytest

from bitblas import MatmulConfig
from bitblas.build import expression_module
from bitblas.plan import plan_matmul
from bitblas.target import resolve_target
from bitblas.tuner import local, measure_module
from naive_cuda import naive_rules

TARGET = resolve_target("cuda -arch=sm_90")
CONFIG = MatmulConfig(M=16, N=64, K=128, W_dtype="uint4", with_scaling=True, group_size=32)

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc"),
    pytest.mark.slow,
]


@pytest.fixture(autouse=True)
def rules():
    with naive_rules():
        yield


def test_the_pass_builds_each_tiling_and_hands_over_its_kernels(monkeypatch):
    from bitblas.schedule import RULES
    from bitblas.transform import ApplyFastTuning

    seen = []

    def time_on(target, kernels, call):
        function, _ = kernels._functions[0]
        seen.append((target, call.m, type(function).__name__, kernels.module["matmul_0"] is not None))
        return 1.0 / len(seen)

    monkeypatch.setattr(local, "time_on", time_on)
    mod = expression_module(plan_matmul(CONFIG, TARGET))
    tuned = ApplyFastTuning(RULES, measure_module, target=TARGET)(mod)
    assert [row[:2] for row in seen] == [(TARGET, 16)] * 2
    assert "_WithWorkspace" not in seen[0]
    assert "_WithWorkspace" in seen[1]  # the second tiling asks for room
    (_, func), *_ = tuned.functions_items()
    assert len(func.params) == 6


def test_a_job_builds_a_library(tmp_path):
    from bitblas.build import find_compiler

    plan = plan_matmul(CONFIG, TARGET)
    assert local.build_job(plan, tmp_path, find_compiler(TARGET)) == ("", "kernel.so")
    assert (tmp_path / "kernel.so").is_file()
    error, library = local.build_job(plan, tmp_path, "false")
    assert "false" in error
    assert library == ""
