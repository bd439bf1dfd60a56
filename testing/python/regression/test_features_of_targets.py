"""Instruction sets were taken one by one: without what they build upon, planning failed and LLVM ended the process."""

import platform

import pytest

from bitblas import ConfigError, MatmulConfig, UnsupportedError
from bitblas.machines import ARM_CPUS, LINUX_FLAGS, NEEDS, X86_CPUS, with_needs
from bitblas.plan import plan_matmul
from bitblas.target import resolve_target

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names x86-64 targets")
CONFIGS = [MatmulConfig((1, 16), 64, 128, a, w) for a, w in (("int8", "uint4"), ("int8", "int8"), ("float16", "nf4"))]


def llvm(function, **spec):
    import tvm

    target = tvm.target.Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu", **spec})
    return {str(name) for name in tvm.get_global_func(f"target.llvm_get_cpu_{function}")(target)}


@pytest.mark.parametrize("cpu", X86_CPUS)
def test_the_table_says_what_llvm_says(cpu):
    assert X86_CPUS[cpu] == llvm("features", mcpu=cpu) & set(LINUX_FLAGS.values())


@pytest.mark.parametrize("name", [name for name in NEEDS if "neon" not in NEEDS[name]])
def test_what_an_instruction_set_needs_comes_with_it_in_llvm(name):
    assert with_needs(name) <= llvm("features", mcpu="x86-64", mattr=[f"+{name}"])


def test_every_cpu_of_llvm_has_a_plan():
    cpus = llvm("archlist")
    assert len(cpus) > 50
    for cpu in sorted(cpus):
        for config in CONFIGS:
            assert plan_matmul(config, resolve_target(f"llvm -mcpu={cpu}")).kernels


@pytest.mark.parametrize("cpu", ["x86-64-v2", "haswell", "skylake-avx512", "sapphirerapids"])
@pytest.mark.parametrize("sign", "+-")
@pytest.mark.parametrize("name", [name for name in LINUX_FLAGS.values() if name not in ("neon", "dotprod", "i8mm")])
def test_every_feature_more_or_less_has_a_plan(cpu, sign, name):
    target = resolve_target(f"llvm -mcpu={cpu} -mattr={sign}{name}")
    assert (name in target.features) == (sign == "+")
    assert all(with_needs(found) <= target.features for found in target.features)
    for config in CONFIGS:
        assert plan_matmul(config, target).kernels


def test_a_cpu_with_instructions_that_no_rule_asks_for_is_not_run():
    target = resolve_target("llvm -mcpu=bdver4")  # no CPU of today has xop
    with pytest.raises(UnsupportedError, match=r"cannot run on this machine, which lacks: .*xop"):
        target.check_runnable()


@pytest.mark.parametrize("triple", ["nonsense", "riscv64-linux-gnu"])
def test_a_triple_of_another_architecture_is_refused(triple):
    with pytest.raises(ConfigError, match="its triple must begin with one of x86_64, aarch64, arm64"):
        resolve_target(f"llvm -mtriple={triple}")


def test_arm_cpus_have_what_they_build_upon():
    assert all(with_needs(name) <= features for features in ARM_CPUS.values() for name in features)
