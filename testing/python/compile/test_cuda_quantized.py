"""Kernels for tensor cores that quantize float activations by row: their text, run thread by thread in the emulator."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

import reference
from bitblas import Matmul, MatmulConfig
from bitblas.formats import FORMATS
from bitblas.plan import native_layout, plan_matmul
from bitblas.schedule import RULES, Problem
from bitblas.target import resolve_target

FLOATS = ("float16", "bfloat16", "float32")
#: Those that a layer of ternary weights has, first.
NAMES = (
    "int2",
    "int4",
    "uint4",
    "int8",
    "uint8",
    "int1",
    *(f"{kind}{bits}" for kind in ("uint", "int") for bits in (3, 5, 6, 7)),
)
#: N, K and group: whole tiles, a tail of a tile with groups within a block, K of an odd number of blocks, one block of all.
SHAPES = ((128, 256, 128), (48, 256, 32), (80, 192, 64), (16, 64, -1))
RULE_NAMES = ("cuda_mma_gemv", "cuda_mma")


def config(N=48, K=256, **fields):
    defaults = {"W_dtype": "int2", "out_dtype": "float32", "accum_dtype": "float32", "dynamic_quantization": "row"}
    return MatmulConfig(**{"M": (1, 32), "N": N, "K": K, **defaults, **fields})


def operator(target="cuda -arch=sm_80", **fields):
    """An operator whose kernels, with up to eight rows and with more, are those for tensor cores."""
    op = Matmul(config(**fields), target=target)
    assert [kernel.rule for kernel in op.plan.kernels] == list(RULE_NAMES)
    return op


def check(op, rows):
    for exact in (True, False):
        problem = reference.draw(op.config, max(rows), exact=exact)
        W = op.transform_weight(problem.weights)
        for m in rows:
            part = replace(problem, A=problem.A[:m])
            (reference.assert_exact if exact else reference.assert_close)(op(part.A, W, **part.extras), part)


def covering():
    """Every integer format with every A; shapes, what scales weights, zero points, bias and output in turn."""
    for i, (name, a_dtype) in enumerate(itertools.product(NAMES, FLOATS)):
        N, K, group = SHAPES[(i + i // len(SHAPES)) % len(SHAPES)]
        scaled = ("tensor", "group", "column", "no")[(i // 3 + i) % 4]
        modes = [
            None,
            "original",
            "rescale",
            *(["quantized"] if FORMATS[name].kind == "uint" and name != "uint8" else []),
        ]
        mode = None if scaled == "tensor" or name == "int1" else modes[(i // 2) % len(modes)]
        fields = {
            "N": N,
            "K": K,
            "A_dtype": a_dtype,
            "W_dtype": name,
            "with_bias": i % 2 == 0,
            "out_dtype": FLOATS[(i + i // 3) % 3] if i % 5 == 0 else "float32",
            "with_scaling": scaled != "no",
            "scale_per_tensor": scaled == "tensor",
            "group_size": group if scaled == "group" or mode is not None else -1,
        }
        if mode is not None:
            fields |= {"with_zeros": True, "zeros_mode": mode}
        short = i < 18 and (i + i // 3) % 2 == 0
        yield pytest.param(fields, id=f"{name}-{a_dtype}", marks=() if short else (pytest.mark.slow,))


@pytest.mark.usefixtures("emulated")
class TestSemantics:
    """What kernels compute."""

    @pytest.mark.parametrize("fields", [*covering()])
    def test_formats(self, fields):
        check(operator(**fields), (1, 3, 8, 19, 33))

    @pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
    @pytest.mark.parametrize("a_dtype", FLOATS)
    def test_other_cards(self, arch, a_dtype):
        fields = {"A_dtype": a_dtype, "out_dtype": a_dtype, "with_scaling": True, "with_bias": True}
        check(operator(f"cuda -arch={arch}", scale_per_tensor=True, **fields), (1, 9))

    @pytest.mark.parametrize("arch", ["sm_75", "sm_80"])
    @pytest.mark.parametrize("a_dtype", FLOATS)
    def test_each_rounded_value_is_the_documented_one(self, arch, a_dtype):
        """Weights of one pick single activations: q · s to the last bit, by division, of rows of every size, and at ties."""
        K = 128
        op = operator(f"cuda -arch={arch}", N=K, K=K, A_dtype=a_dtype)
        info = torch.finfo(getattr(torch, a_dtype))
        generator = torch.Generator().manual_seed(3)
        low, high = math.log2(info.smallest_normal * info.eps), math.log2(info.max / 8)
        sizes = 2 ** (low + (high - low) * torch.linspace(0, 1, 24, dtype=torch.float64))
        A = torch.randn(36, K, generator=generator, dtype=torch.float64)
        A[:24] *= sizes[:, None]
        ties = torch.arange(K) % 127 + 0.5
        A[24], A[25] = ties, -ties
        A[24:26, -1] = 127
        # beside a tie, below and above, of scales that are no powers of two
        for row in range(26, 34):
            largest = torch.rand((), generator=generator, dtype=torch.float64).to(getattr(torch, a_dtype)) * 3 + 1
            A[row] = ties / 127 * largest * (1 + (torch.arange(K) % 5 - 2) * 2.0**-24)
            A[row, -1] = largest
        A[34], A[35] = 0, -0.0
        A = A.to(getattr(torch, a_dtype))
        W = op.transform_weight(torch.eye(K, dtype=torch.int8))
        whole, scale = reference.quantize(A, 1)
        expected = torch.from_numpy(whole * scale).view(36, K)
        assert torch.equal(op(A, W), expected)
        assert torch.equal(op(A[24:32], W), expected[24:32])

    @pytest.mark.parametrize("m", [3, 20])
    def test_eps_stands_for_smaller_magnitudes(self, m):
        K, eps = 128, 1e-3
        op = operator(N=K, K=K, A_dtype="float16", activation_eps=eps)
        A = torch.randn(m, K, generator=torch.Generator().manual_seed(1)) * 1e-4
        A[1], A[2] = 0, A[2] * 1e4
        A = A.half()
        whole, scale = reference.quantize(A, 1, eps)
        out = op(A, op.transform_weight(torch.eye(K, dtype=torch.int8)))
        assert torch.equal(out, torch.from_numpy(whole * scale).view(m, K))
        assert not torch.equal(out[0], torch.from_numpy(math.prod(reference.quantize(A, 1))).view(m, K)[0])

    @pytest.mark.parametrize("a_dtype", FLOATS)
    def test_rows_that_are_not_like_others(self, a_dtype):
        """NaN and infinity make a whole row NaN, and no other; a row of zeros has the bias."""
        fields = {"with_scaling": True, "with_zeros": True, "with_bias": True, "group_size": 64}
        op = operator(A_dtype=a_dtype, W_dtype="uint4", **fields)
        problem = reference.draw(op.config, 20)
        W = op.transform_weight(problem.weights)
        clean = op(problem.A, W, **problem.extras)
        bad = {0: math.nan, 3: math.inf, 6: -math.inf, 17: math.nan}
        for row, value in bad.items():
            problem.A[row, 37 * (row + 1) % 256] = value
        problem.A[17, 0] = math.inf
        problem.A[5] = 0
        for m in (7, 20):
            out = op(problem.A[:m], W, **problem.extras)
            rows = [row for row in bad if row < m]
            assert bool(out[rows].isnan().all())
            others = [row for row in range(m) if row not in (*bad, 5)]
            assert torch.equal(out[others], clean[others])
            assert torch.equal(out[5], problem.bias.float())

    def test_a_row_is_quantized_as_on_the_cpu(self):
        """… with all that weights have, to the last bit where sums are integers."""
        fields = {"A_dtype": "float16", "with_scaling": True, "with_bias": True, "scale_per_tensor": True}
        there, here = operator(N=64, K=512, **fields), Matmul(config(N=64, K=512, **fields), target="x86-64-v2")
        problem = reference.draw(there.config, 17)
        outs = [op(problem.A, op.transform_weight(problem.weights), **problem.extras) for op in (there, here)]
        assert torch.equal(*outs)

    def test_one_flipped_code_is_noticed(self):
        op = operator(A_dtype="float16", with_scaling=True)
        problem = reference.draw(op.config, 9, exact=True)
        for at in ((0, 0), (47, 255)):
            codes = problem.codes.clone()
            codes[at] ^= 1
            W = op.transform_weight(replace(problem, codes=codes).weights)
            for m in (2, 9):
                part = replace(problem, A=problem.A[:m])
                with pytest.raises(AssertionError, match="results are wrong"):
                    reference.assert_exact(op(part.A, W, **part.extras), part)

    @pytest.mark.slow
    @pytest.mark.parametrize(("m", "a_dtype"), [*zip((1, 16, 32, 64, 128), itertools.cycle(FLOATS), strict=False)])
    @pytest.mark.parametrize(
        "arch", ["sm_90", *(pytest.param(arch, marks=pytest.mark.exhaustive) for arch in ("sm_75", "sm_86"))]
    )
    def test_every_tiling(self, arch, m, a_dtype):
        """A long K and few columns, so that parts of K are among them."""
        fields = {"A_dtype": a_dtype, "with_scaling": True, "scale_per_tensor": True}
        cfg, target = config(M=(m,), N=272, K=1536, **fields), resolve_target(f"cuda -arch={arch}")
        rule = next(rule for rule in RULES if rule.name == RULE_NAMES[m > 8])
        tilings = rule.tilings(Problem(cfg, native_layout(cfg, target), target, m))
        assert len(set(tilings)) == len(tilings)
        assert any(tiling.split_k > 1 for tiling in tilings)
        problem = reference.draw(cfg, min(m, 33) + 1, exact=True)
        for tiling in tilings:
            op = Matmul.restore(cfg, plan_matmul(cfg, target, {m: tiling}))
            assert op.plan.kernels[0].tiling == tiling
            reference.assert_exact(op(problem.A, op.transform_weight(problem.weights), **problem.extras), problem)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_90"])
@pytest.mark.parametrize("a_dtype", FLOATS)
@pytest.mark.parametrize("w_dtype", ["int2", "int8"])
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (16, 1 << 16), (65536, 64)])
def test_tilings_fit_every_card(arch, a_dtype, w_dtype, N, K):
    target = resolve_target(f"cuda -arch={arch}")
    cfg = config(N=N, K=K, A_dtype=a_dtype, W_dtype=w_dtype)
    layout = native_layout(cfg, target)
    assert layout.name == "mma8"
    for m in (1, 8, 9, 64, 4096):
        rule = next(rule for rule in RULES if rule.name == RULE_NAMES[m > 8])
        for tiling in rule.tilings(Problem(cfg, layout, target, m)):
            assert tiling.shared_bytes(cfg) <= target.card.shared_bytes
            assert tiling.stages == 0 or tiling.stages >= 3
            assert K % tiling.block_k == 0


def test_what_tensor_cores_leave_to_threads():
    target = resolve_target("cuda -arch=sm_80")
    for fields in (
        {"dynamic_quantization": "group", "group_size": 64},
        {"N": 40},
        {"K": 96},
        {"K": 1 << 17, "W_dtype": "uint8"},  # sums beyond int32
    ):
        assert native_layout(config(**fields).kernel, target).name == "packed"
    one_group = config(dynamic_quantization="group")
    assert native_layout(one_group.kernel, target).name == "mma8"
