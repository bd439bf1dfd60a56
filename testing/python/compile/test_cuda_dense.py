"""Decoding all weights for torch's own product: the kernel in the emulator, and what keeps its result."""

import gc

import pytest
import torch
import tvm
from testing import emulator

import reference
from bitblas import MatmulConfig, build, packing
from bitblas.cuda.dense import DenseMatmul
from bitblas.cuda.source import cuda_source
from bitblas.formats import FORMATS
from bitblas.plan import plan_matmul
from bitblas.schedule import Problem, cuda
from bitblas.schedule.cuda.dense import DenseRule, is_dense
from bitblas.target import resolve_target
from bitblas.transform import described_func

TARGET = resolve_target("cuda -arch=sm_80")
BASE = {"M": 2048, "out_dtype": "float16", "A_dtype": "float16", "accum_dtype": "float32"}
PACKED = [name for name, fmt in FORMATS.items() if not fmt.is_native]


def config(**changes):
    return MatmulConfig(**{**BASE, "N": 32, "K": 128, "W_dtype": "uint4", **changes})


def function(cfg, layout, name):
    problem = Problem(cfg.kernel, layout, TARGET, 2048)
    rule = DenseRule()
    tiling = rule.tilings(problem)[0]
    return rule.apply(described_func(problem, rule.name, tiling, name), problem, tiling)


def check_all(configs, directory, exact):
    """Build a kernel for each config into one text, run them in the emulator, and compare with float64."""
    layouts = {name: cuda.cuda_layout(cfg.kernel, TARGET) for name, cfg in configs.items()}
    functions = {name: function(cfg, layouts[name], name) for name, cfg in configs.items()}
    text = cuda_source(build.compile_module(tvm.IRModule(functions), TARGET).mod)
    found = emulator.load(emulator.build(text, directory))
    for name, cfg in configs.items():
        problem = reference.draw(cfg, 1, exact=exact)
        out = torch.full((cfg.N, cfg.K), float("nan"), dtype=getattr(torch, cfg.A_dtype))
        extras = [problem.scale]
        if cfg.with_zeros:
            extras.append(problem.zeros.view(-1) if cfg.zeros_mode == "quantized" else problem.zeros)
        codes = problem.codes.to(packing.code_dtype(cfg.format))
        emulator.run(found[name], packing.pack(codes, layouts[name]).view(-1), *extras, out)
        wanted = problem.dense()
        if exact:
            assert torch.equal(out.double(), wanted), name
        else:  # float32 arithmetic on exact operands, and one rounding
            roundoff = reference.ROUNDOFF[cfg.A_dtype] * 1.01
            assert torch.allclose(out.double(), wanted, rtol=roundoff, atol=1e-6), name
    return {layout.name for layout in layouts.values()}


#: In rows of whole words codes of these cross words.
CROSSING = ["uint3", "uint4", "int5", "uint6", "int7"]


@pytest.mark.parametrize(
    ("n", "k", "layouts", "formats"),
    [(16, 64, {"mma16"}, PACKED), (9, 37, {"packed"}, PACKED), (5, 160, {"packed"}, CROSSING)],
    ids=["fragments", "bytes", "words"],
)
def test_every_format_is_decoded_exactly(n, k, layouts, formats, tmp_path):
    configs = {f"decode_{fmt}": config(W_dtype=fmt, N=n, K=k, with_scaling=True) for fmt in formats}
    assert check_all(configs, tmp_path, exact=True) == layouts


def test_scales_and_zeros_of_groups(tmp_path):
    zeros = {"with_scaling": True, "with_zeros": True, "group_size": 32}
    configs = {
        f"{mode}_{dtype}": config(N=48, A_dtype=dtype, out_dtype=dtype, zeros_mode=mode, **zeros)
        for mode in ("original", "rescale", "quantized")
        for dtype in ("float16", "bfloat16")
    }
    assert check_all(configs, tmp_path, exact=False) == {"mma16"}


def test_which_operators_it_takes():
    def rules(target=TARGET, **changes):
        return {kernel.rule for kernel in plan_matmul(config(**changes), target).kernels}

    assert rules() == {"cuda_dense"}
    assert "cuda_dense" not in rules(M=512)
    assert "cuda_dense" not in rules(out_dtype="float32")
    assert "cuda_dense" not in rules(dynamic_quantization="row")
    assert rules(resolve_target("cuda -arch=sm_90"), M=512) == {"cuda_dense"}
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
