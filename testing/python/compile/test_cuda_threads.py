"""Kernels for cards without tensor cores: what they compute, in the emulator; and what nvcc makes of them."""

import hashlib
import itertools
import re
import subprocess
from dataclasses import replace

import pytest
import torch
import tvm
from testing import emulator

import reference
from bitblas import MatmulConfig, build, packing
from bitblas.cuda.nvcc import compile_library, find_nvcc
from bitblas.cuda.source import cuda_source
from bitblas.formats import FORMATS
from bitblas.layout import PackedLayout, stream_period
from bitblas.schedule import Problem
from bitblas.schedule.cuda.threads import GEMV_ROWS, ThreadGemvRule, ThreadRule
from bitblas.schedule.cuda.threads_tiling import ThreadTiling
from bitblas.target import resolve_target
from bitblas.transform import described_func

GEMV, TILES = ThreadGemvRule(), ThreadRule()
RULES = (GEMV, TILES)
INTEGERS = [name for name, fmt in FORMATS.items() if fmt.is_integer]
#: The rows that a kernel is made for, and those that it is called with: a full tile, one more, fewer.
ROWS = {GEMV: (3, (3, 1, 4)), TILES: (16, (16, 17, 5))}
needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="there is no nvcc")
both = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


def config(**fields):
    return MatmulConfig(**{"N": 24, "K": 128, "A_dtype": "float16", "W_dtype": "uint4", **fields})


def problem_of(cfg, m, arch="sm_80"):
    """A problem with weights row by row, whether or not tensor cores would take it."""
    kernel = cfg.kernel
    layout = PackedLayout(kernel.N, kernel.K, kernel.format.bits, "packed")
    return Problem(kernel, layout, resolve_target(f"cuda -arch={arch}"), m)


def function(rule, problem, name, tiling=None):
    tiling = tiling or rule.tilings(problem)[0]
    assert rule.decline(problem) is None
    return rule.apply(described_func(problem, rule.name, tiling, name), problem, tiling)


def text_of(functions, arch="sm_80"):
    return cuda_source(build.compile_module(tvm.IRModule(functions), resolve_target(f"cuda -arch={arch}")).mod)


def arguments(problem):
    """A, W, what comes with them, and an output that is all wrong."""
    cfg, kernel = problem.config, problem.config.kernel
    A = problem.A.view(torch.int8) if problem.A.element_size() == 1 else problem.A
    W = reference.pack_bits(problem.codes, reference.width(cfg.W_dtype)).view(-1)
    extras = dict(problem.extras)
    if "scale" in extras:
        extras["scale"] = extras["scale"].to(getattr(torch, kernel.scale_dtype))
    if "zeros" in extras:
        zeros = extras["zeros"]
        extras["zeros"] = zeros.view(-1) if kernel.zeros_packed else zeros.to(getattr(torch, kernel.scale_dtype))
    dtype = getattr(torch, cfg.out_dtype)
    out = torch.full((A.shape[0], cfg.N), float("nan") if dtype.is_floating_point else 99, dtype=dtype)
    return [A, W, *(tensor.contiguous() for tensor in extras.values()), out]


def draw(cfg, m, exact):
    bias = getattr(torch, cfg.kernel.bias_dtype) if cfg.with_bias else None
    return reference.draw(cfg, m, seed=m, exact=exact, bias_dtype=bias)


def check(call, cfg, rows):
    """Compare with float64, in two orders of the threads each: bit by bit, and for one number of rows within bounds."""
    for m, exact in ((rows[0], False), *((m, True) for m in rows)):
        problem = draw(cfg, m, exact)
        given = arguments(problem)
        emulator.run(call, *given, seeds=(m, m + 1))
        (reference.assert_exact if exact else reference.assert_close)(given[-1], problem)


def check_all(rule, configs, directory, arch="sm_80", rows=None):
    """Build kernels for all configs into one text, and check each."""
    made_for, called_with = rows or ROWS[rule]
    functions = {f"f{i}": function(rule, problem_of(cfg, made_for, arch), f"f{i}") for i, cfg in enumerate(configs)}
    found = emulator.load(emulator.build(text_of(functions, arch), directory, arch))
    for i, cfg in enumerate(configs):
        check(found[f"f{i}"], cfg, called_with)


SCALED = {"with_scaling": True, "group_size": 64}
#: Whole words; bytes, since rows end within one; chunks that fill no words, in groups of ten, with a tail of rows of weights.
SHAPES = {
    "words": {**SCALED, "K": 192},
    "bytes": {"N": 7, "K": 33},
    "groups": {"N": 19, "K": 30, "with_scaling": True, "group_size": 10},
}


class TestSemantics:
    """What kernels compute: their text, run thread by thread on this CPU."""

    @both
    @pytest.mark.parametrize("shape", SHAPES)
    def test_every_format(self, rule, shape, tmp_path):
        check_all(rule, [config(W_dtype=name, out_dtype="float32", **SHAPES[shape]) for name in FORMATS], tmp_path)

    @both
    @pytest.mark.parametrize("shape", SHAPES)
    def test_int8_with_every_format(self, rule, shape, tmp_path):
        modes = itertools.cycle(["original", "rescale"])
        zeros = {"with_zeros": True} if shape != "bytes" else {}
        configs = [
            config(W_dtype=name, A_dtype="int8", zeros_mode=next(modes), **SHAPES[shape], **zeros) for name in INTEGERS
        ]
        sums = [config(W_dtype=name, A_dtype="int8", out_dtype="int32", N=9, K=64) for name in INTEGERS]
        check_all(rule, [*configs, *(sums if shape == "words" else ())], tmp_path)

    @both
    @pytest.mark.parametrize(
        "a_dtype", ["float32", "float16", "bfloat16", "int8", "int4", "float8_e4m3", "float8_e5m2"]
    )
    def test_every_activation(self, rule, a_dtype, tmp_path):
        whole = {**SCALED, "A_dtype": a_dtype, "with_bias": True}
        configs = [
            config(out_dtype="float32", with_zeros=True, **whole),
            config(out_dtype="bfloat16", with_zeros=True, zeros_mode="rescale", **{**whole, "K": 30, "group_size": 10}),
            config(out_dtype="float16", with_zeros=True, zeros_mode="quantized", **{**whole, "N": 13}),
            config(out_dtype="bfloat16", W_dtype="nf4", **{**whole, "group_size": 16}),
            config(W_dtype="float8_e4m3", **{**whole, "K": 37, "group_size": -1}),
        ]
        check_all(rule, configs, tmp_path)

    @both
    @pytest.mark.parametrize("accum", ["float32", "int32"])
    def test_every_output_of_integers(self, rule, accum, tmp_path):
        base = {"A_dtype": "int8", "accum_dtype": accum, "with_bias": True}
        quantized = {"with_zeros": True, "zeros_mode": "quantized", "with_scaling": True}
        configs = [
            config(out_dtype=out, **base, **extra)
            for out in ("float16", "bfloat16", "float32", "int8", "int32")
            for extra in ({**quantized, "group_size": 64}, quantized, {"W_dtype": "int7", "K": 96})
        ]
        check_all(rule, configs, tmp_path)

    @both
    @pytest.mark.parametrize("how", ["row", "group"])
    def test_activations_that_are_quantized(self, rule, how, tmp_path):
        a_dtypes = itertools.cycle(["float16", "bfloat16", "float32"])
        shapes = [(64, 192), (-1, 128), (7, 35), (4, 64), (-1, 99), (2, 2048)]
        configs = [
            config(
                A_dtype=next(a_dtypes),
                K=K,
                group_size=group,
                with_scaling=True,
                with_zeros=True,
                dynamic_quantization=how,
            )
            for group, K in shapes
        ]
        one = {"W_dtype": "int2", "with_scaling": True, "scale_per_tensor": True, "with_bias": True}
        configs += [
            config(A_dtype=a_dtype, N=7, K=K, dynamic_quantization=how, activation_eps=1e-6, **one)
            for a_dtype, K in (("float16", 99), ("bfloat16", 96), ("float32", 33))
        ]
        check_all(rule, configs, tmp_path)

    @both
    def test_each_rounded_value_is_the_documented_one(self, rule, tmp_path):
        """Weights of one pick single activations: q · s to the last bit, at ties as well, and with an eps larger than a row."""
        K, rows = 96, ROWS[rule][0]
        configs = [
            config(N=K, K=K, W_dtype="int2", A_dtype=a_dtype, out_dtype="float32", **quantized)
            for a_dtype in ("float16", "bfloat16", "float32")
            for quantized in (
                {"dynamic_quantization": "row", "activation_eps": 0.7},
                {"dynamic_quantization": "group", "group_size": 32},
            )
        ]
        functions = {f"f{i}": function(rule, problem_of(cfg, rows), f"f{i}") for i, cfg in enumerate(configs)}
        found = emulator.load(emulator.build(text_of(functions), tmp_path))
        A = torch.randn(rows, K, generator=torch.Generator().manual_seed(3))
        ties = torch.arange(K) % 127 + 0.5
        A[0] = ties * 1.2345 / 127
        A[1, 1:], A[1, 0], A[2] = ties[1:], 127, A[2] * 1e-3
        for i, cfg in enumerate(configs):
            given = A.to(getattr(torch, cfg.A_dtype))
            problem = replace(draw(cfg, rows, exact=True), A=given, codes=torch.eye(K, dtype=torch.int64) + 2)
            call = arguments(problem)
            emulator.run(found[f"f{i}"], *call)
            groups = K // cfg.group_size if cfg.group_size > 0 else 1
            whole, scale = reference.quantize(given, groups, cfg.activation_eps)
            assert torch.equal(call[-1], torch.from_numpy(whole * scale).view(rows, K))

    @both
    def test_odd_shapes(self, rule, tmp_path):
        configs = [
            config(N=1, K=1),
            config(N=1, K=2, with_scaling=True, group_size=1),
            config(N=70, K=8, with_scaling=True, with_zeros=True, group_size=1),
            config(N=9, K=1042, with_scaling=True, group_size=521),
            config(N=5, K=4 * 521, A_dtype="int8", W_dtype="uint8", out_dtype="int32"),
            config(N=17, K=521, A_dtype="int8", W_dtype="int3", with_scaling=True),
            config(N=33, K=1000, W_dtype="uint3"),
        ]
        check_all(rule, configs, tmp_path)

    def test_sums_that_need_64_bits(self, tmp_path):
        """Of parts of K that several warps sum."""
        cfg = config(N=2, K=1 << 17, A_dtype="int8", W_dtype="uint8", out_dtype="int32", with_bias=True)
        assert cfg.sum_dtype == "int64"
        assert GEMV.tilings(problem_of(cfg, 1))[0].lanes > 32
        check_all(GEMV, [cfg], tmp_path, rows=(1, (1,)))

    @both
    @pytest.mark.parametrize("arch", ["sm_75", pytest.param("sm_90", marks=pytest.mark.slow)])
    def test_other_cards(self, rule, arch, tmp_path):
        bfloat16 = {"A_dtype": "bfloat16", "out_dtype": "bfloat16", "with_bias": True, "with_zeros": True}
        check_all(rule, [config(**SCALED, **bfloat16), config(A_dtype="int8", **SCALED)], tmp_path, arch)

    @pytest.mark.parametrize("m", [1, 6, pytest.param(16, marks=pytest.mark.slow), 200])
    def test_every_tiling(self, m, tmp_path):
        rule = GEMV if m <= GEMV_ROWS else TILES
        calls = {}
        for fields in (SCALED, {**SCALED, "A_dtype": "int8"}, {**SCALED, "dynamic_quantization": "group"}):
            cfg = config(N=40, K=1024, with_zeros=True, **fields)
            problem = problem_of(cfg, m)
            calls.update({(cfg, tiling): function(rule, problem, f"f{len(calls) + i}", tiling)
                          for i, tiling in enumerate(rule.tilings(problem))})  # fmt: skip
        functions = {f"f{i}": made for i, made in enumerate(calls.values())}
        found = emulator.load(emulator.build(text_of(functions), tmp_path))
        for i, (cfg, _) in enumerate(calls):
            problem = draw(cfg, min(m, 33), exact=True)
            given = arguments(problem)
            emulator.run(found[f"f{i}"], *given)
            reference.assert_exact(given[-1], problem)

    @both
    def test_special_values(self, rule, tmp_path):
        configs = [config(W_dtype="float8_e5m2", out_dtype="bfloat16", K=64), config(W_dtype="float8_e4m3", K=64)]
        configs += [config(A_dtype="bfloat16", K=64, with_scaling=True, dynamic_quantization="row")]
        functions = {f"f{i}": function(rule, problem_of(cfg, 3), f"f{i}") for i, cfg in enumerate(configs)}
        found = emulator.load(emulator.build(text_of(functions), tmp_path))
        for i, cfg in enumerate(configs):
            problem = draw(cfg, 3, exact=True)
            A, codes = torch.ones_like(problem.A), torch.zeros_like(problem.codes)
            codes[0, 5], codes[1, 6], codes[2, 7] = {0: (0x7C, 0x7F, 0xFC), 1: (0x38, 0x7F, 0xFF), 2: (1, 1, 1)}[i]
            A[1, 33], A[2, 34] = float("nan"), float("inf")
            given = arguments(replace(problem, A=A, codes=codes, scale=None if i < 2 else problem.scale))
            emulator.run(found[f"f{i}"], *given)
            out = given[-1]
            assert bool(out[1:].isnan().all()) if i == 2 else bool(out[1].isnan().all())
            first = {0: ("inf", "nan", "-inf"), 1: ("1", "nan", "nan")}.get(i)
            if first is not None:
                assert torch.equal(
                    out[0, :3].float().nan_to_num(7.0), torch.tensor([*map(float, first)]).nan_to_num(7.0)
                )
                assert bool((out[0, 3:] == 0).all())

    @both
    @pytest.mark.parametrize("fields", [{}, {"A_dtype": "int8"}], ids=str)
    def test_one_flipped_code_is_noticed(self, rule, fields, tmp_path):
        cfg = config(**SCALED, **fields)
        found = emulator.load(emulator.build(text_of({"f": function(rule, problem_of(cfg, 2), "f")}), tmp_path))
        problem = draw(cfg, 2, exact=True)
        for at in ((0, 0), (23, 127), (11, 64)):
            codes = problem.codes.clone()
            codes[at] ^= 1
            given = arguments(replace(problem, codes=codes))
            emulator.run(found["f"], *given)
            with pytest.raises(AssertionError, match="results are wrong"):
                reference.assert_exact(given[-1], problem)

    def test_packed_weights_are_those_of_the_operator(self):
        cfg = config(W_dtype="int3")
        problem = draw(cfg, 1, exact=True)
        packed = packing.pack(problem.codes.to(packing.code_dtype(cfg.format)), problem_of(cfg, 1).layout)
        assert torch.equal(packed.view(-1), arguments(problem)[1])


class TestTilings:
    """Which tilings are offered, and what follows from them; nothing is built."""

    @pytest.mark.parametrize("m", [1, 3, 8, 9, 64, 4096])
    @pytest.mark.parametrize("N", [1, 48, 4096, (1 << 26) - 1])
    @pytest.mark.parametrize("fields", [{}, {"A_dtype": "int8"}, {"dynamic_quantization": "group"}], ids=str)
    def test_tilings_are_legal_and_differ(self, m, N, fields):
        problem = problem_of(config(N=N, K=1024, **SCALED, **fields), m)
        rule = GEMV if GEMV.decline(problem) is None else TILES
        assert (rule is GEMV) == (m <= GEMV_ROWS)
        tilings = rule.tilings(problem)
        assert len(set(tilings)) == len(tilings) > 1
        for tiling in tilings:
            assert tiling.block_m % tiling.thread_m == tiling.block_n % tiling.thread_n == 0
            assert 1 <= tiling.num_threads <= 1024
            assert tiling.lanes & (tiling.lanes - 1) == 0
            assert tiling.dot == ("s8s8" if fields else "")

    @pytest.mark.parametrize(
        ("fields", "block_k", "chunk"),
        [
            ({"group_size": 64, "with_scaling": True}, 32, 32),
            ({"W_dtype": "uint3", "group_size": 64, "with_scaling": True}, 32, 32),
            ({"K": 1000, "group_size": 100, "with_scaling": True}, 32, 25),
            ({"K": 1042, "group_size": 521, "with_scaling": True}, 32, 1),
            ({"K": 4099}, 32, 32),
            ({"K": 33}, 32, 11),
            ({"K": 67}, 32, 24),
            ({"K": 1}, 32, 1),
            ({"K": 8 * 521}, 32, 8),
        ],
        ids=str,
    )
    def test_a_chunk_divides_its_group_or_ends_beyond_k(self, fields, block_k, chunk):
        cfg = config(**fields)
        found = ThreadTiling(1, 4, block_k).chunk(cfg, problem_of(cfg, 1).layout)
        assert found == chunk
        assert cfg.group % found == 0 or cfg.num_groups == 1

    @pytest.mark.parametrize("name", INTEGERS)
    def test_words_hold_whole_codes(self, name):
        bits = FORMATS[name].bits
        assert stream_period(bits) * bits % 32 == 0
        assert all(k * bits % 32 for k in range(1, stream_period(bits)))


def compiled(functions, arch, directory):
    """What each kernel takes of a card."""
    text = text_of(functions, arch)
    source = directory / f"{hashlib.sha256(text.encode()).hexdigest()[:8]}.cu"
    source.write_text(text)
    return text, compile_library(find_nvcc(), source, source.with_suffix(".so"), arch)


def kernels(name, arch):
    """Of a format with each kind of activation, for each kind of kernel."""
    fmt, functions, used = FORMATS[name], {}, {}
    kinds = [{"A_dtype": "float16", "with_zeros": fmt.is_integer}]
    if fmt.is_integer:
        kinds += [{"A_dtype": "int8", "with_zeros": True, "zeros_mode": "original"}, {"dynamic_quantization": "group"}]
    for fields, m in itertools.product(kinds, (1, 4, 64)):
        cfg = config(N=4096, K=4096, W_dtype=name, with_scaling=True, group_size=128, **fields)
        problem, rule = problem_of(cfg, m, arch), GEMV if m <= GEMV_ROWS else TILES
        label = f"f{len(functions)}"
        functions[label] = function(rule, problem, label)
        used[label] = rule.tilings(problem)[0]
    return functions, used


def of_cards():
    for i, (name, arch) in enumerate(itertools.product(FORMATS, ("sm_75", "sm_80", "sm_90"))):
        short = name in ("uint4", "int3", "nf4", "int8") and i % 4 == 0
        marks = () if short else (pytest.mark.slow, pytest.mark.exhaustive)
        yield pytest.param(name, arch, id=f"{name}-{arch}", marks=marks)


@needs_nvcc
class TestCompiled:
    """What nvcc makes of kernels."""

    @pytest.mark.parametrize(("name", "arch"), [*of_cards()])
    def test_nothing_spills(self, name, arch, tmp_path):
        functions, tilings = kernels(name, arch)
        _, resources = compiled(functions, arch, tmp_path)
        assert len(resources) == len(functions)
        for label, tiling in tilings.items():
            took = resources[f"{label}_kernel"]
            assert (took.spill_stores, took.spill_loads, took.stack) == (0, 0, 0), (label, tiling, took)
            assert took.registers * tiling.num_threads <= 65536
            assert took.shared <= 48 << 10

    @pytest.mark.parametrize(
        ("rule", "fields", "promised"),
        [
            (GEMV, {}, ("ld.global.nc.v4.u32", "shfl.sync", "fma.rn.f32")),
            (GEMV, {"A_dtype": "int8"}, ("ld.global.nc.v4.u32", "shfl.sync", "dp4a.s32.s32")),
            (TILES, {}, ("ld.shared.v4.f32", "bar.sync", "fma.rn.f32")),
            (TILES, {"A_dtype": "int8"}, ("ld.shared", "bar.sync", "dp4a.s32.s32")),
        ],
        ids=["lanes", "lanes of bytes", "tiles", "tiles of bytes"],
    )
    def test_promised_instructions(self, rule, fields, promised, tmp_path):
        cfg = config(N=4096, K=4096, **SCALED, **fields)
        text = text_of({"f": function(rule, problem_of(cfg, 1 if rule is GEMV else 1024), "f")})
        source = tmp_path / "k.cu"
        source.write_text(text[: text.index("#include <tvm/ffi/c_api.h>")])
        command = [
            find_nvcc(),
            "-ptx",
            "-std=c++17",
            "-O3",
            "-arch=compute_80",
            "-o",
            str(tmp_path / "k.ptx"),
            str(source),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        kernel = (tmp_path / "k.ptx").read_text()
        for instruction in promised:
            assert instruction in kernel, instruction
        assert not re.search(r"\bld\.local|\bst\.local", kernel)
