"""Each tensor intrinsic computes what its meaning says."""

import pytest
import torch

from bitblas.formats import FORMATS
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


@pytest.mark.skipif("avx512f" not in host_features(), reason="this CPU has no AVX-512")
@pytest.mark.parametrize("name", TABLES)
def test_avx512_table(name):
    from bitblas.schedule.intrinsics import avx512_table

    fmt = FORMATS[name]
    garbage = torch.randint(0, 1 << 20, (16,), dtype=torch.int32) << fmt.bits
    codes = (torch.arange(16, dtype=torch.int32) % (1 << fmt.bits)) | garbage
    meaning, implementation = both(avx512_table(name), codes, torch.float32)
    assert torch.equal(meaning, implementation)
    assert torch.equal(meaning, torch.tensor([fmt.code_values[i % (1 << fmt.bits)] for i in range(16)]))


@pytest.mark.parametrize("width", [2, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows_ahead", [0, 128])
def test_transpose_lanes(width, dtype, rows_ahead):
    from tvm.s_tir import TensorIntrin

    from bitblas.schedule.intrinsics import transpose_lanes

    name = transpose_lanes(str(dtype).removeprefix("torch."), width, rows_ahead)
    scales = torch.randn(16, width).to(dtype)
    for func in (TensorIntrin.get(name).desc, TensorIntrin.get(name).impl):
        out = torch.zeros(width, 16)
        run(func, scales, out)
        assert torch.equal(out, scales.float().t())


@pytest.mark.parametrize("word_bytes", [1, 2, 4])
@pytest.mark.parametrize("prefetch", [0, 1024])
def test_load_words(word_bytes, prefetch):
    from bitblas.schedule.intrinsics import load_words

    data = torch.randint(-128, 128, (16 * word_bytes,), dtype=torch.int8)
    meaning, implementation = both(load_words(word_bytes, prefetch), data, torch.int32)
    assert torch.equal(meaning, implementation)
    words = [int.from_bytes(bytes(b & 255 for b in row), "little") for row in data.view(16, word_bytes).tolist()]
    assert [word & 0xFFFFFFFF for word in meaning.tolist()] == words
