"""QuantCompress, LOP3Permutate and LadderPermutate: bit by bit against scalar formulas of their own."""

import dataclasses
import importlib
import pickle

import numpy as np
import pytest
import torch

from bitblas import ops
from bitblas.errors import ArgumentError, ConfigError
from bitblas.ops import (
    LadderPermutate,
    LadderPermutateConfig,
    LOP3Permutate,
    LOP3PermutateConfig,
    QuantCompress,
    QuantCompressConfig,
)
from bitblas.ops.common import OptimizeStrategy, TransformKind
from bitblas.quantization import general_compress, interleave_weight

CONFIGS = [
    (QuantCompress, QuantCompressConfig(4, 8)),
    (LOP3Permutate, LOP3PermutateConfig(4, 8)),
    (LadderPermutate, LadderPermutateConfig(16, 16)),
]
IDS = [operator.__name__ for operator, _ in CONFIGS]


def sample(op):
    """An input of the usual shape and dtype, as bytes of all kinds."""
    dtype = op._input_dtypes()[0]
    small = torch.randint(0, 2, op._input_shape(), dtype=torch.uint8)
    return small.to(dtype)


# -- what they share -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("operator", "config"), CONFIGS, ids=IDS)
def test_configs_are_frozen_hashable_and_pickled(operator, config):
    same = dataclasses.replace(config)
    assert same == config
    assert hash(same) == hash(config)
    assert pickle.loads(pickle.dumps(config)) == config
    assert repr(config).startswith(f"{operator.__name__}Config(M=")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.M = 3
    assert pickle.loads(pickle.dumps(operator(config))).config == config


@pytest.mark.parametrize(("operator", "config"), CONFIGS, ids=IDS)
@pytest.mark.parametrize("target", ["llvm", None, "cuda", {"kind": "llvm"}, "llvm -mcpu=haswell"])
def test_constructor_arguments(operator, config, target):
    op = operator(config=config, name="a", target=target, enable_tuning=True, from_database=True, backend="tl")
    assert (op.config, op.name, op.backend, op.M) == (config, "a", "tl", config.M)
    assert str(op.target).startswith("cuda" if target == "cuda" else "llvm")
    assert all(getattr(op, field.name) == getattr(config, field.name) for field in dataclasses.fields(config))
    assert op.profile_latency() > 0
    assert repr(op) == f"{operator.__name__}({config!r})"


@pytest.mark.parametrize(("operator", "config"), CONFIGS, ids=IDS)
def test_defaults_of_the_constructor(operator, config):
    op = operator(config)
    assert op.name == ("quant_compress" if operator is QuantCompress else "permutate")
    with torch.device("meta"):
        assert operator(config).profile_latency() > 0


@pytest.mark.parametrize(("operator", "config"), CONFIGS, ids=IDS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": 3}, r"config is 3; it must be a \w+Config$"),
        ({"backend": "tvm"}, "backend is 'tvm'; allowed: tl, tir"),
        ({"target": 3}, "target is 3; allowed: "),
        ({"target": "no such machine"}, "target is 'no such machine'"),
    ],
)
def test_constructor_refuses(operator, config, arguments, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        operator(**{"config": config, **arguments})


@pytest.mark.parametrize(("operator", "config"), CONFIGS, ids=IDS)
def test_output(operator, config):
    op = operator(config)
    inp = sample(op)
    before = inp.clone()
    expected = op(inp)
    assert torch.equal(op.forward(inp), expected)
    out = torch.full_like(expected, 7)
    assert op(inp, out) is out
    assert torch.equal(out, expected)
    assert torch.equal(op(inp, out=torch.ones_like(expected)), expected)
    assert torch.equal(inp, before)
    flat = torch.ones_like(expected).view(-1)
    found = op(inp, flat)
    assert found.shape == expected.shape
    assert found.data_ptr() == flat.data_ptr()
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("operator", "config"), CONFIGS, ids=IDS)
def test_strides_of_the_input(operator, config):
    op = operator(config)
    inp = sample(op)
    wide = torch.zeros((inp.shape[0], 2 * inp.shape[1]), dtype=inp.dtype)[:, ::2]
    wide.copy_(inp)
    assert torch.equal(op(wide), op(inp))
    assert torch.equal(op(inp.t().contiguous().t()), op(inp))


@pytest.mark.parametrize(("operator", "config"), CONFIGS, ids=IDS)
def test_call_refuses(operator, config):
    op = operator(config)
    inp, out = sample(op), op(sample(op))
    refused = [
        ((inp.numpy(),), "inp is a ndarray; it must be a torch.Tensor"),
        ((inp.to("meta"),), "inp is on device meta; it must have data"),
        ((inp.to(torch.float64),), r"inp has dtype torch.float64; allowed: torch\."),
        ((inp[1:],), r"inp has shape \("),
        ((inp, out.numpy()), "out is a ndarray; it must be a torch.Tensor"),
        ((inp, out.to(torch.float64)), r"out has dtype torch.float64; allowed: torch\."),
        ((inp, out[:0]), r"out has shape \(.* and 0 bytes; expected \("),
        ((inp, torch.stack([out, out], -1)[..., 0]), r"out has strides \(.*; it must be contiguous"),
        ((inp, out.to("meta")), "out is on device meta; it must have data"),
    ]
    for arguments, message in refused:
        with pytest.raises(ArgumentError, match=f"^{message}"):
            op(*arguments)


@pytest.mark.parametrize("config_class", [type(config) for _, config in CONFIGS])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"M": 0}, "M is 0; it must be an integer of at least 1"),
        ({"M": None}, "M is None; "),
        ({"N": 16.0}, "N is 16.0; "),
        ({"N": True}, "N is True; "),
        ({"storage_dtype": "int3"}, r"storage_dtype is 'int3'; allowed: .*int8, "),
        ({"dequantize_bits": 3}, "dequantize_bits is 3; allowed: "),
        ({"dequantize_bits": None}, "dequantize_bits is None; allowed: "),
        ({"dequantize_bits": True}, "dequantize_bits is True; allowed: "),
    ],
)
def test_configs_refuse(config_class, changes, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        config_class(**{"M": 16, "N": 32, **changes})


@pytest.mark.parametrize("module", ["quant_compress", "lop3_permutate", "ladder_permutate", "general_matmul_splitk"])
def test_names(module):
    found = importlib.import_module(f"bitblas.ops.{module}")
    assert all(getattr(ops, name) is getattr(found, name) for name in found.__all__)


def test_other_names():
    found = importlib.import_module("bitblas.ops.general_matmul")
    assert (found.Matmul, found.MatmulConfig) == (ops.Matmul, ops.MatmulConfig)
    assert [kind.value for kind in TransformKind] == [0, 1, 2, 3]
    assert OptimizeStrategy.ContigousBatching == 1
    config = ops.MatmulConfig(1, 16, 16, optimize_stratety=found.OptimizeStrategy.SingleBatchDecodeOnly)
    assert config == ops.MatmulConfig(1, 16, 16)


# -- QuantCompress ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("input_dtype", ["int8", "uint8", "int32", "uint32"])
@pytest.mark.parametrize("storage_dtype", ["int8", "uint8", "int32", "uint32"])
def test_compress(bits, input_dtype, storage_dtype):
    op = QuantCompress(QuantCompressConfig(3, 64, input_dtype, storage_dtype, bits))
    weight = torch.randint(0, 1 << bits, (3, 64))
    weight = (
        weight.to(torch.uint8).view(torch.int8) if input_dtype == "int8" else weight.to(getattr(torch, input_dtype))
    )
    found = op(weight)
    per_element = getattr(torch, storage_dtype).itemsize * 8 // bits
    assert found.dtype is getattr(torch, storage_dtype)
    assert tuple(found.shape) == op.retrieve_qweight_shape() == (3, 64 // per_element)
    values = weight.tolist()
    for m in range(3):
        for j in range(64 // per_element):
            expected = sum((values[m][j * per_element + i] % 256) << (bits * i) for i in range(per_element))
            assert int(found[m, j]) % (1 << (bits * per_element)) == expected


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("low", [0, -128])
def test_compress_as_general_compress(bits, low):
    weight = torch.randint(low, 128, (16, 32), dtype=torch.int8)
    expected = general_compress(weight.numpy(), bits)
    op = QuantCompress(QuantCompressConfig(16, 32, dequantize_bits=bits))
    assert np.array_equal(op(weight).numpy(), expected)
    assert np.array_equal(op(weight.view(torch.uint8)).numpy(), expected)
    assert np.array_equal(op(weight.view(1, 2, 16, 16)).numpy(), expected)


def test_compress_refuses_what_is_no_byte():
    op = QuantCompress(QuantCompressConfig(1, 8, "int32"))
    with pytest.raises(ArgumentError, match=r"^inp holds 300; allowed: -128 to 255$"):
        op(torch.full((1, 8), 300, dtype=torch.int32))


def test_compress_config_refuses():
    with pytest.raises(
        ConfigError, match=r"^N is 6; it must be a multiple of 8, the values of 4 bits in an element of int32"
    ):
        QuantCompressConfig(4, 6, storage_dtype="int32")
    with pytest.raises(ConfigError, match=r"^input_dtype is 'float16'; allowed: int8, uint8, int32, uint32$"):
        QuantCompressConfig(4, 8, "float16")


# -- LOP3Permutate ---------------------------------------------------------------------------------------------------------

LOP3_CASES = [
    (datatype, bits)
    for datatype, width in (("float16", 16), ("bfloat16", 16), ("int8", 8), ("int4", 4))
    for bits in (1, 2, 4, 8)
    if bits <= width
]


def lop3_place(code, bits, datatype):
    """Where a code of a word goes, in codes."""
    if (datatype, bits) in (("float16", 1), ("float16", 2)):  # a byte, or two, hold 8 codes: even ones first
        return code // 8 * 8 + code % 2 * 4 + code % 8 // 2
    if (datatype, bits) == ("int8", 1):  # a nibble for each lane, in the order 0 2 1 3, of 16 codes
        return code // 16 * 16 + [0, 2, 1, 3][code % 4] * 4 + code % 16 // 4
    width = {"float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}[datatype]
    lanes = 32 // width
    return code % lanes * (width // bits) + code // lanes


@pytest.mark.parametrize(("datatype", "bits"), LOP3_CASES)
@pytest.mark.parametrize("storage_dtype", ["int8", "uint8", "int32", "uint32"])
def test_lop3(datatype, bits, storage_dtype):
    per_word = 32 // bits
    op = LOP3Permutate(LOP3PermutateConfig(3, 2 * per_word, datatype, storage_dtype, bits))
    raw = torch.randint(0, 256, (3, 8), dtype=torch.uint8)
    inp = raw.view(getattr(torch, storage_dtype))
    assert tuple(inp.shape) == op.retrieve_2d_weight_shape()
    found = op(inp)
    assert found.dtype is inp.dtype
    assert found.shape == inp.shape
    words, moved = raw.numpy().view(np.uint32), found.view(torch.uint8).numpy().view(np.uint32)
    places = [lop3_place(code, bits, datatype) for code in range(per_word)]
    assert sorted(places) == list(range(per_word))
    for word, result in zip(words.flat, moved.flat, strict=True):
        for code, place in enumerate(places):
            assert int(word) >> bits * code & ((1 << bits) - 1) == int(result) >> bits * place & ((1 << bits) - 1)


@pytest.mark.parametrize("datatype", ["float16", "int8"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_lop3_as_interleave_weight(datatype, bits):
    packed = torch.randint(-128, 128, (8, 16), dtype=torch.int8)
    op = LOP3Permutate(LOP3PermutateConfig(8, 128 // bits, datatype, dequantize_bits=bits))
    expected = torch.from_numpy(interleave_weight(packed.numpy(), bits, datatype))
    for given in (packed, packed.view(torch.uint8), packed.view(torch.int32), packed.view(2, 4, 4, 4)):
        found = op(given)
        assert (found.dtype, found.shape) == (given.dtype, given.shape)
        assert torch.equal(found.view(torch.int8).view(8, 16), expected)
    words = torch.ones((8, 4), dtype=torch.int32)
    found = op(packed, words)  # what is in an output does not matter
    assert found.dtype is torch.int8
    assert torch.equal(found, expected)
    assert torch.equal(words.view(torch.int8), expected)


def test_lop3_config_refuses():
    with pytest.raises(ConfigError, match=r"^N is 12; it must be a multiple of 8, the codes of 4 bits in a word$"):
        LOP3PermutateConfig(4, 12)
    with pytest.raises(ConfigError, match=r"^datatype is 'float64'; allowed: float16, bfloat16, int8, int4$"):
        LOP3PermutateConfig(4, 8, "float64")
    with pytest.raises(ConfigError, match=r"^dequantize_bits is 8; allowed: 1, 2, 4$"):
        LOP3PermutateConfig(4, 8, "int4", dequantize_bits=8)


# -- LadderPermutate -------------------------------------------------------------------------------------------------------

#: (datatype, propagate_kind, transpose_matrix)
LADDER_KINDS = [
    *(
        (datatype, side, transpose)
        for datatype in ("float16", "bfloat16")
        for side in "AB"
        for transpose in (False, True)
    ),
    *((datatype, *pair) for datatype in ("int8", "e4m3_float8", "e5m2_float8") for pair in (("A", False), ("B", True))),
]


def loaded_from(i, j, r, transpose):
    """Row and column of a 16 x r tile that ldmatrix reads for place (i, j): two threads share a row of places."""
    load = r // 2
    thread, local = i * 2 + j // load, j % load
    if transpose:
        return 8 * (thread // 16) + thread % 8, load * (thread % 16 // 8) + local
    return thread % 16, load * (thread // 16) + local


def handed_to(i, j, r):
    """The place at which mma's registers hold what ldmatrix read for place (i, j)."""
    load, register = r // 2, r // 8
    thread, local = divmod(i * r + j, load)
    new_thread = thread % 8 * 4 + local // register
    new_local = thread // 8 * register + local % register
    return divmod(new_thread * load + new_local, r)


def ladder(matrix, r, transpose, kind):
    """The permuted tiles of a list of rows, by loops over every number."""
    down, across = len(matrix) // 16, len(matrix[0]) // r
    found = np.zeros((down, across, 16, r), dtype=np.int64)
    for i in range(down):
        for j in range(across):
            for ii in range(16):
                for jj in range(r):
                    row, column = loaded_from(ii, jj, r, transpose) if kind >= 2 else (ii, jj)
                    place = handed_to(ii, jj, r) if kind >= 3 else (ii, jj)
                    found[(i, j, *place)] = matrix[i * 16 + row][j * r + column]
    return found


@pytest.mark.parametrize("kind", [1, 2, 3])
@pytest.mark.parametrize(("datatype", "side", "transpose"), LADDER_KINDS)
def test_ladder(datatype, side, transpose, kind):
    r = 16 if datatype.endswith("16") else 32
    config = LadderPermutateConfig(
        32,
        3 * r,
        datatype,
        storage_dtype=datatype,
        propagate_kind=side,
        transpose_matrix=transpose,
        transform_kind=kind,
    )
    op = LadderPermutate(config)
    shape, dtype = op.retrieve_output_shape()
    assert shape == [2, 3, 16, r]
    assert dtype.itemsize * 8 == (16 if r == 16 else 8)
    mover = torch.int16 if r == 16 else torch.uint8
    bits = torch.randint(0, 1 << (15 if r == 16 else 8), (32, 3 * r)).to(mover)  # any bits, NaNs among them
    found = op(bits.view(dtype))
    assert found.dtype is dtype
    assert list(found.shape) == shape
    assert np.array_equal(found.view(mover).numpy(), ladder(bits.tolist(), r, transpose, kind))


@pytest.mark.parametrize("kind", [1, 2, 3])
@pytest.mark.parametrize("bytes_", [1, 2])
@pytest.mark.parametrize("transpose", [False, True])
def test_ladder_is_a_bijection(kind, bytes_, transpose):
    datatype, r = ("int8", 32) if bytes_ == 1 else ("float16", 16)
    op = LadderPermutate(
        LadderPermutateConfig(
            16, r, datatype, -1, "int32", "B" if transpose else "A", transpose_matrix=transpose, transform_kind=kind
        )
    )
    numbers = torch.arange(16 * r, dtype=torch.int32).view(16, r)
    sources = op(numbers).view(-1).long()
    assert sorted(sources.tolist()) == list(range(16 * r))
    back = torch.empty_like(numbers).view(-1)
    back[sources] = op(numbers).view(-1)
    assert torch.equal(back.view(16, r), numbers)


def test_ladder_by_hand():
    op = LadderPermutate(LadderPermutateConfig(16, 16, storage_dtype="int32", transpose_matrix=True))
    tile = op(torch.arange(256, dtype=torch.int32).view(16, 16))[0, 0]
    assert tile[0].tolist() == [*range(8), *range(16, 24)]  # rows 0 and 1, left half
    assert tile[4].tolist() == [*range(8, 16), *range(24, 32)]  # the same rows, right half
    assert tile[8].tolist() == [*range(128, 136), *range(144, 152)]  # rows 8 and 9


PACKED_CASES = [
    (datatype, bits, storage, kind, transpose)
    for datatype, transpose in (("float16", False), ("float16", True), ("int8", True))
    for storage, width in (("int8", 8), ("uint8", 8), ("float16", 16), ("int32", 32))
    for bits in (1, 2, 4)
    for kind, together in ((1, 32), (2, 16), (3, 4))
    if width // bits <= together // (2 if datatype == "float16" else 1)
]


@pytest.mark.parametrize(("datatype", "bits", "storage", "kind", "transpose"), PACKED_CASES)
def test_ladder_of_packed_codes(datatype, bits, storage, kind, transpose):
    """Packing and permuting elements is the same as permuting numbers and packing them."""
    r = 16 if datatype == "float16" else 32
    config = LadderPermutateConfig(16, 2 * r, datatype, bits, storage, transpose_matrix=transpose, transform_kind=kind)
    op = LadderPermutate(config)
    codes = torch.randint(0, 1 << bits, (16, 2 * r), dtype=torch.uint8)

    def pack(values):
        return torch.from_numpy(general_compress(values, bits)).view(getattr(torch, storage))

    found = op(pack(codes.numpy()))
    assert list(found.shape) == op.retrieve_output_shape()[0]
    expected = pack(ladder(codes.tolist(), r, transpose, kind).astype(np.uint8))
    assert torch.equal(found.view(torch.int8), expected.view(torch.int8))


def test_bits_of_the_datatype_are_not_packed():
    wide = LadderPermutateConfig(16, 32, "int8", 8, "int8", transpose_matrix=True)
    assert wide.numbers_per_element == 1
    assert LadderPermutateConfig(16, 16, "float16", 16).numbers_per_element == 1
    assert LadderPermutateConfig(16, 16, transform_kind=TransformKind.LDMatrixTransform) == LadderPermutateConfig(
        16, 16, transform_kind=3
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"M": 24}, "M x N is 24 x 32; it must be a multiple of 16 x 16, a tile of float16"),
        ({"N": 8}, "M x N is 16 x 8; it must be a multiple of 16 x 16, a tile of float16"),
        ({"datatype": "int8", "N": 16, "transpose_matrix": True}, "M x N is 16 x 16; .* 16 x 32, a tile of int8"),
        ({"datatype": "int4"}, "datatype is 'int4'; allowed: float16, bfloat16, int8, float8_e4m3, float8_e5m2"),
        (
            {"datatype": "int8"},
            "transpose_matrix is False for propagate_kind 'B' and datatype int8; allowed: A with False",
        ),
        (
            {"datatype": "int8", "propagate_kind": "A", "transpose_matrix": True},
            "transpose_matrix is True for propagate_kind 'A' and datatype int8",
        ),
        ({"propagate_kind": "C"}, "propagate_kind is 'C'; allowed: A, B"),
        ({"transpose_matrix": "yes"}, "transpose_matrix is 'yes'; it must be True or False"),
        ({"transform_kind": 0}, "transform_kind is .*0.*; allowed: 1, 2, 3"),
        ({"transform_kind": TransformKind.NonTransform}, "transform_kind is .*; allowed: 1, 2, 3"),
        ({"transform_kind": True}, "transform_kind is True; allowed: 1, 2, 3"),
        ({"target_instruction": "cdna-mfma"}, "target_instruction is 'cdna-mfma'; allowed: nvidia-mma"),
        (
            {"dequantize_bits": 2, "storage_dtype": "int8", "transform_kind": 3},
            "dequantize_bits is 2: an element of int8 holds 4 codes, but transform_kind 3 of float16 keeps 2 together",
        ),
        (
            {"dequantize_bits": 2, "storage_dtype": "int32"},
            "dequantize_bits is 2: an element of int32 holds 16 codes, but transform_kind 2 of float16 keeps 8 together",
        ),
    ],
)
def test_ladder_config_refuses(changes, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        LadderPermutateConfig(**{"M": 16, "N": 32, **changes})


def test_the_chain_of_a_weight():
    """As the original prepares a weight: permute the unpacked codes, pack them, interleave the packed ones."""
    codes = torch.randint(0, 16, (32, 64), dtype=torch.int8)
    permute = LadderPermutate(LadderPermutateConfig(32, 64, "float16", -1, "int8", "B", True, 2))
    compress = QuantCompress(QuantCompressConfig(32, 64))
    interleave = LOP3Permutate(LOP3PermutateConfig(32, 64))
    found = interleave(compress(permute(codes)))
    assert found.shape == (32, 32)
    expected = ladder(codes.tolist(), 16, True, 2).astype(np.int8).reshape(32, 64)
    assert np.array_equal(found.numpy(), interleave_weight(general_compress(expected)))
