"""Decoding all weights for torch's own product: the kernel in the emulator, and what keeps its result."""

import gc
import itertools

import pytest
import reference
import torch
import tvm

from bitblas import MatmulConfig, build, packing
from bitblas.cuda.dense import DenseMatmul
from bitblas.cuda.source import cuda_source
from bitblas.formats import FORMATS
from bitblas.plan import plan_matmul
from bitblas.schedule import Problem, cuda
from bitblas.schedule.cuda.dense import DenseRule, is_dense
from bitblas.target import resolve_target
from bitblas.transform import described_func
from testing import emulator

TARGET = resolve_target("cuda -arch=sm_80")
BASE = {"M": 2048, "out_dtype": "float16", "A_dtype": "float16", "accum_dtype": "float32"}
PACKED = [name for name, fmt in FORMATS.items() if not fmt.is_native]
ZEROS = ("original", "rescale", "quantized")


def config(**changes):
    return MatmulConfig(**{**BASE, "N": 32, "K": 128, "W_dtype": "uint4", **changes})


def module(cfg, layout, tiling=None):
    problem = Problem(cfg.kernel, layout, TARGET, 2048)
    rule = DenseRule()
    tiling = tiling or rule.tilings(problem)[0]
    func = rule.apply(described_func(problem, rule.name, tiling, "decode"), problem, tiling)
    return build.compile_module(tvm.IRModule({"decode": func}), TARGET)


def decoder(cfg, layout, directory, tiling=None):
    text = cuda_source(module(cfg, layout, tiling).mod)
    found = emulator.load(emulator.build(text, directory))["decode"]
    return lambda *tensors: emulator.run(found, *tensors)


def expected(problem):
    """float64 weights."""
    cfg = problem.config
    q, s, z = problem.parts()
    value = q * s - z if cfg.zeros_mode == "rescale" else (q - z) * s
    return value.broadcast_to(q.shape)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


@pytest.mark.parametrize("shape", [(32, 128), (19, 37)], ids=["fragments", "odd"])
@pytest.mark.parametrize("fmt", PACKED)
def test_every_format_is_decoded_exactly(fmt, shape, directory):
    n, k = shape
    cfg = config(W_dtype=fmt, N=n, K=k, with_scaling=True)
    layout = cuda.cuda_layout(cfg.kernel, TARGET)
    problem = reference.draw(cfg, 1, exact=True)
    weight = packing.pack(problem.codes, layout)
    out = torch.full(shape, float("nan"), dtype=torch.float16)
    decoder(cfg, layout, directory)(weight.view(-1), problem.scale, out)
    assert torch.equal(out.double(), expected(problem))
    assert layout.name.startswith("mma" if shape == (32, 128) else "packed")


@pytest.mark.parametrize(("mode", "dtype"), [*itertools.product(ZEROS, ["float16", "bfloat16"])])
def test_scales_and_zeros_of_groups(mode, dtype, directory):
    cfg = config(
        N=48, A_dtype=dtype, out_dtype=dtype, with_scaling=True, with_zeros=True, zeros_mode=mode, group_size=32
    )
    layout = cuda.cuda_layout(cfg.kernel, TARGET)
    problem = reference.draw(cfg, 1)
    out = torch.full((48, 128), float("nan"), dtype=getattr(torch, dtype))
    zeros = problem.zeros.view(-1) if mode == "quantized" else problem.zeros
    decoder(cfg, layout, directory)(packing.pack(problem.codes, layout).view(-1), problem.scale, zeros, out)
    wanted = expected(problem)
    # float32 arithmetic on exact operands, and one rounding
    assert torch.allclose(out.double(), wanted, rtol=reference.ROUNDOFF[dtype] * 1.01, atol=1e-6)


def test_which_operators_it_takes():
    def rules(**changes):
        return {kernel.rule for kernel in plan_matmul(config(**changes), TARGET).kernels}

    assert rules() == {"cuda_dense"}
    assert rules(M=512) != {"cuda_dense"}
    assert "cuda_dense" not in rules(out_dtype="float32")
    assert "cuda_dense" in {
        kernel.rule for kernel in plan_matmul(config(M=512), resolve_target("cuda -arch=sm_90")).kernels
    }
    assert rules(M=1, W_dtype="float16") == {"cuda_dense"}
    assert is_dense(config(W_dtype="float16"))
    assert not is_dense(config(W_dtype="float16", with_scaling=True))


# -- the product -----------------------------------------------------------------------------------------------------------


class Decoding:
    """Instead of a kernel: w · scale, and how often that was asked for."""

    def __init__(self):
        self.count = 0

    def __call__(self, w, scale, out):
        self.count += 1
        out.copy_(w.view(out.shape).to(out.dtype) * scale)


@pytest.fixture
def operands():
    cfg = config(N=4, K=8, W_dtype="int8", with_scaling=True, with_bias=True)
    w = torch.randint(-8, 8, (4, 8), dtype=torch.int8)
    return cfg.kernel, torch.randn(3, 8).half(), w, torch.full((4, 1), 0.5).half(), torch.ones(4).half()


def product(a, w, scale, bias):
    return (a.double() @ (w.double() * scale.double()).T + bias.double()).half()


def test_the_product_and_its_bias(operands):
    cfg, a, w, scale, bias = operands
    decode, out = Decoding(), torch.empty(3, 4, dtype=torch.float16)
    function = DenseMatmul(decode, cfg)
    for _ in range(2):
        function(a, torch.nn.Parameter(w, requires_grad=False), scale, bias, out)
        assert torch.allclose(out, product(a, w, scale, bias), rtol=1e-2, atol=1e-2)
    assert decode.count == 2


def test_what_is_kept_follows_its_sources(operands):
    cfg, a, w, scale, bias = operands
    decode, out = Decoding(), torch.empty(3, 4, dtype=torch.float16)
    function = DenseMatmul(decode, cfg).keeping()

    def check(count):
        function(a, w, scale, bias, out)
        assert torch.allclose(out, product(a, w, scale, bias), rtol=1e-2, atol=1e-2)
        assert decode.count == count

    check(1)
    check(1)
    w.add_(1)
    check(2)
    scale.mul_(2)
    check(3)
    check(3)
    scale = scale.clone()  # another tensor with the same contents
    check(4)
    w.data = w.data.clone()
    check(5)


def test_what_is_kept_dies_with_the_weight(operands):
    cfg, a, w, scale, bias = operands
    function, out = DenseMatmul(Decoding(), cfg).keeping(), torch.empty(3, 4, dtype=torch.float16)
    other = w.clone()
    for one in (w, other):
        function(a, one, scale, bias, out)
    assert len(function._kept) == 2
    del other, one
    gc.collect()
    assert len(function._kept) == 1
    function(a, w, scale.clone(), bias, out)  # which dies at once
    gc.collect()
    assert function._kept == {}


def test_nothing_is_kept_that_changes_unseen(operands):
    cfg, a, w, scale, bias = operands
    decode, out = Decoding(), torch.empty(3, 4, dtype=torch.float16)
    function = DenseMatmul(decode, cfg).keeping()
    with torch.inference_mode():
        unseen = w.clone()
        for count in (1, 2):
            function(a, unseen, scale, bias, out)
            assert decode.count == count
            unseen.add_(1)


def test_a_weight_that_is_dense_is_multiplied_as_it_is():
    cfg = config(W_dtype="float16", N=5, K=8)
    a, w, out = torch.randn(3, 8).half(), torch.randn(5, 8).half(), torch.empty(3, 5).half()
    DenseMatmul(None, cfg.kernel)(a, w.view(-1), out)
    assert torch.equal(out, a @ w.T)
