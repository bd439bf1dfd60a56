"""Each tensor intrinsic computes what its meaning says."""

import pytest
import torch

from bitblas.formats import FORMATS
from bitblas.schedule.cpu.dots import DOT_UNITS
from bitblas.target import host_features, resolve_target

TABLES = [name for name, fmt in FORMATS.items() if fmt.bits <= 4]


def run(func, *arguments):
    import tvm

    executable = tvm.compile(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), resolve_target().as_tvm())
    executable["main"](*arguments)


def both(name, codes, dtype):
    """Outputs of an intrinsic's meaning and of its implementation."""
    from tvm.s_tir import TensorIntrin

    outputs = []
    for func in (TensorIntrin.get(name).desc, TensorIntrin.get(name).impl):
        out = torch.zeros(16, dtype=dtype)
        run(func, codes, out)
        outputs.append(out)
    return outputs


@pytest.mark.parametrize("instruction", ["vpermps_512", "vpermps_256"])
@pytest.mark.parametrize("name", TABLES)
def test_look_up(instruction, name):
    from bitblas.schedule.cpu.lookups import look_up

    if {"vpermps_512": "avx512f", "vpermps_256": "avx2"}[instruction] not in host_features():
        pytest.skip(f"this CPU has no {instruction}")
    fmt = FORMATS[name]
    garbage = torch.randint(0, 1 << 20, (16,), dtype=torch.int32) << fmt.bits
    codes = (torch.arange(16, dtype=torch.int32) % (1 << fmt.bits)) | garbage
    meaning, implementation = both(look_up(instruction, name), codes, torch.float32)
    assert torch.equal(meaning, implementation)
    assert torch.equal(meaning, torch.tensor([fmt.code_values[i % (1 << fmt.bits)] for i in range(16)]))


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.is_integer and fmt.bits <= 5])
def test_look_up_pairs(name):
    from bitblas.schedule.cpu.lookups import look_up_pairs

    if "avx512bw" not in host_features():
        pytest.skip("this CPU has no vpermw")
    fmt = FORMATS[name]
    above = 1 << fmt.bits  # what lies above the lower code
    garbage = torch.randint(0, 1 << (16 - fmt.bits), (16,), dtype=torch.int32) * above
    places = torch.arange(16, dtype=torch.int32)
    low, high = places % (1 << fmt.bits), (places * 7 + 3) % (1 << fmt.bits)
    meaning, implementation = both(look_up_pairs(name), low | garbage | high << 16, torch.int32)
    assert torch.equal(meaning, implementation)
    values = torch.tensor(fmt.code_values).bfloat16()
    assert torch.equal(
        meaning.view(torch.bfloat16).view(16, 2), torch.stack([values[low.long()], values[high.long()]], dim=1)
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_unpack_zeros(bits):
    from bitblas.schedule.cpu.intrinsics import unpack_zeros

    stream = torch.randint(-128, 128, (2 * bits,), dtype=torch.int8)
    meaning, implementation = both(unpack_zeros(bits), stream, torch.float32)
    assert torch.equal(meaning, implementation)
    number = int.from_bytes(stream.numpy().tobytes(), "little")
    assert meaning.tolist() == [number >> (bits * lane) & ((1 << bits) - 1) for lane in range(16)]


@pytest.mark.parametrize("unit", DOT_UNITS, ids=lambda unit: unit.name)
@pytest.mark.parametrize("bits", range(1, 9))
def test_dot_quads_at_the_ends_of_the_ranges(unit, bits):
    """Every A is -128 or 127 and every byte the smallest or largest: where anything saturates, it is here."""
    from tvm.s_tir import TensorIntrin

    from bitblas.schedule.cpu.products import dot_quads

    fmt, host = FORMATS[f"uint{bits}"], resolve_target()
    # the instruction for 256 bits has a second encoding, with AVX-512
    there = unit.feature in host.features or (unit.name == "avx_vnni" and "avx512vnni" in host.features)
    if not there:
        pytest.skip(f"this CPU has no {unit.feature}")
    if bits > unit.most_bits:
        pytest.skip(f"{unit.instruction} is not used for {bits} bits")
    depth = unit.depth(fmt)
    name = dot_quads(unit.instruction, unit.vector_lanes, unit.dot, depth)
    for low, high in ((-128, -128), (127, 127), (-128, 127)):
        A = torch.where(torch.rand(4 * depth) < 0.5, low, high).to(torch.int8)
        for codes in (torch.full((depth, 16, 4), (1 << bits) - 1), torch.randint(0, 1 << bits, (depth, 16, 4))):
            Q = codes.to(torch.uint8).view(torch.int32).view(*([depth] if depth > 1 else []), 16)
            expected = 5 + (A.to(torch.int32).view(depth, 1, 4) * codes).sum(dim=(0, 2))
            for func in (TensorIntrin.get(name).desc, TensorIntrin.get(name).impl):
                out = torch.full((16,), 5, dtype=torch.int32)
                run(func, A, Q, out)
                assert torch.equal(out, expected.to(torch.int32))


@pytest.mark.parametrize("width", [2, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows_ahead", [0, 128])
def test_transpose_lanes(width, dtype, rows_ahead):
    from tvm.s_tir import TensorIntrin

    from bitblas.schedule.cpu.intrinsics import transpose_lanes

    name = transpose_lanes(str(dtype).removeprefix("torch."), width, rows_ahead)
    scales = torch.randn(16, width).to(dtype)
    for func in (TensorIntrin.get(name).desc, TensorIntrin.get(name).impl):
        out = torch.zeros(width, 16)
        run(func, scales, out)
        assert torch.equal(out, scales.float().t())


@pytest.mark.parametrize("word_bytes", [1, 2, 4])
@pytest.mark.parametrize("prefetch", [0, 1024])
def test_load_words(word_bytes, prefetch):
    from bitblas.schedule.cpu.intrinsics import load_words

    data = torch.randint(-128, 128, (16 * word_bytes,), dtype=torch.int8)
    meaning, implementation = both(load_words(word_bytes, prefetch), data, torch.int32)
    assert torch.equal(meaning, implementation)
    words = [int.from_bytes(bytes(b & 255 for b in row), "little") for row in data.view(16, word_bytes).tolist()]
    assert [word & 0xFFFFFFFF for word in meaning.tolist()] == words
