"""A huge K kept the planner busy for ever, a tile of twelve rows cut 512 rows in two, targets lost their options."""

import pytest

from bitblas import ConfigError, MatmulConfig, UnsupportedError
from bitblas.formats import parse_format
from bitblas.plan import plan_matmul
from bitblas.runtime import Kernels
from bitblas.target import resolve_target


@pytest.mark.parametrize("size", [{"K": 2**33, "N": 1}, {"K": 1, "N": 2**70}, {"K": 2**26 + 1, "N": 1}])
def test_sides_that_no_kernel_can_index_are_refused_at_once(size):
    with pytest.raises(UnsupportedError, match="kernels take at most"):
        plan_matmul(MatmulConfig(M=1, A_dtype="float16", W_dtype="uint1", **size), resolve_target("x86-64-v4"))


def test_each_kernel_has_its_own_slab_and_slabs_are_of_equal_size():
    calls = []
    module = {name: lambda a, out, name=name: calls.append((name, len(a))) for name in ("few", "many")}
    kernels = Kernels(module, [(16, "few", 100), (512, "many", 516)])
    for m in (5, 512, 516, 520, 1100):
        kernels.launch(m, [range(m)], range(m))
    few, *many = calls
    assert few == ("few", 5)
    assert many == [("many", n) for n in (512, 516, 260, 260, 367, 367, 366)]


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("llvm -mtripel=aarch64-linux-gnu", "mtripel is not understood"),
        ('{"kind": "llvm", "mattr": 5}', "mattr is 5; it must be a list"),
        ("llvm -mattr=", "must begin with"),
        ("llvm -mattr=avx2", "'avx2' must begin with"),
    ],
)
def test_options_of_a_target_are_kept_or_refused(target, match):
    with pytest.raises(ConfigError, match=match):
        resolve_target(target)
    assert "fma" not in resolve_target("haswell -mattr=-fma").features


def test_a_misspelt_format_is_recognised():
    with pytest.raises(ConfigError, match=r"W_dtype is 'unit4', .*Did you mean 'uint4'\?"):
        parse_format("unit4")


def test_hints_make_no_difference_and_contradictions_are_refused():
    assert MatmulConfig(1, 8, 8) == MatmulConfig(1, 8, 8, fast_decoding=True, propagate_a=[1])
    assert hash(MatmulConfig(1, 8, 8)) == hash(MatmulConfig(1, 8, 8, propagate_b={}))
    with pytest.raises(ConfigError, match="bias is False, but with_bias is True"):
        MatmulConfig(1, 8, 8, with_bias=True, bias=False)
