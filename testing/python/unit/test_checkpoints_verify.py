"""The plain formulas of the verification, against weights that were packed bit by bit."""

import numpy as np
import pytest
import torch

import checkpoint_folders as folders
from bitblas import CheckpointError
from bitblas.checkpoints import verify
from bitblas.codecs import QuantizedWeight, from_gptq, quantize

N, K = 64, 96


def values(reference, n=N, k=K):
    """All that a reference says, float64 (N, K), from its codes, and from its other forms, which must say the same."""
    rows = slice(0, n)
    codes = reference.codes(rows)
    assert torch.equal(torch.cat([reference.codes(slice(0, 8)), reference.codes(slice(8, n))]), codes)
    if reference.columns is not None:
        assert torch.equal(reference.columns(rows).T, codes)
    groups = reference.groups
    if groups is None:
        groups = torch.arange(k) // (k // reference.scales.shape[1])
    whole = codes.to(torch.int64) - reference.zeros[:, groups]
    return whole.double().numpy() * reference.scales[:, groups].double().numpy()


def same_stream(reference, bits, n=N, k=K):
    stream = reference.stream(slice(0, n))
    return torch.equal(verify.unpack_stream(stream, k, bits), reference.codes(slice(0, n)))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 13, 64])
def test_a_stream_is_unpacked(bits, count):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (5, count))
    stream = folders.words(codes, bits).view(torch.uint8)[:, : -(-count * bits // 8)]
    assert np.array_equal(verify.unpack_stream(stream.contiguous(), count, bits).numpy(), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq(bits, version, act_order):
    tensors, dense = folders.gptq_layer(N, K, bits=bits, version=version, act_order=act_order)
    reference = verify.gptq_reference(tensors, bits, version)
    assert np.array_equal(values(reference), dense)
    assert same_stream(reference, bits)
    wrong = verify.gptq_reference(tensors, bits, 3 - version)
    assert not np.array_equal(values(wrong), dense)


@pytest.mark.parametrize("k", [96, 33])
def test_awq(k):
    tensors, dense = folders.awq_layer(N, k, group=k // 3)
    reference = verify.awq_reference(tensors)
    assert np.array_equal(values(reference, k=k), dense)
    assert (reference.stream is None) == (k % 2 == 1)
    assert reference.stream is None or same_stream(reference, 4)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    "options",
    [{}, {"sym": False}, {"act_order": True}, {"sym": False, "signed_zeros": True}, {"group": -1}],
    ids=str,
)
def test_compressed(bits, options):
    tensors, dense = folders.compressed_layer(N, K, bits=bits, **options)
    reference = verify.compressed_reference(tensors, bits)
    assert np.array_equal(values(reference), dense)
    assert same_stream(reference, bits)


def gptq(**options):
    tensors, _ = folders.gptq_layer(N, K, **options)
    return verify.gptq_reference(tensors, 4, 1), from_gptq(**tensors)


def replaced(weight, **change):
    names = ("W_dtype", "packed", "in_features", "scales", "zeros", "zeros_mode", "perm", "bias")
    return QuantizedWeight(**{name: change.get(name, getattr(weight, name)) for name in names})


def flip(tensor, place):
    changed = tensor.clone()
    changed.view(torch.uint8).view(-1)[place] ^= 4
    return changed


@pytest.mark.parametrize("options", [{}, {"sym": True}, {"act_order": True}, {"act_order": True, "sym": True}], ids=str)
@pytest.mark.parametrize("place", [0, 777, -1])
def test_a_flipped_bit_is_noticed(options, place):
    reference, weight = gptq(**options)
    verify.check_weight("x", reference, weight)
    for part in ("packed", "scales", "zeros"):
        tensor = getattr(weight, part)
        if tensor is not None:
            changed = flip(tensor, place % (tensor.nbytes - 1) if place > 0 else place)
            with pytest.raises(CheckpointError, match=r"x: what was written differs from the source: the .* at "):
                verify.check_weight("x", reference, replaced(weight, **{part: changed}))


def test_a_wrong_permutation_is_noticed():
    reference, weight = gptq(act_order=True)
    perm = weight.perm.clone()
    perm[0], perm[1] = weight.perm[1], weight.perm[0]  # of one group
    with pytest.raises(CheckpointError, match="x: what was written differs"):
        verify.check_weight("x", reference, replaced(weight, perm=perm))
    perm = weight.perm.clone()
    perm[0], perm[-1] = weight.perm[-1], weight.perm[0]
    with pytest.raises(CheckpointError, match="columns of different groups were put into one"):
        verify.check_weight("x", reference, replaced(weight, perm=perm))
    with pytest.raises(CheckpointError, match="columns of different groups were put into one"):
        verify.check_weight("x", reference, replaced(weight, perm=None))
    reference, straight = gptq()
    reference = verify.Reference(reference.codes, reference.zeros, reference.scales)
    with pytest.raises(CheckpointError, match="permuted for no reason"):
        verify.check_weight("x", reference, replaced(straight, perm=torch.arange(K, dtype=torch.int32)))


def test_another_number_of_groups_is_noticed():
    reference, weight = gptq(sym=True)
    halves = weight.scales.repeat_interleave(2, dim=1)
    with pytest.raises(CheckpointError, match=r"x: the scales have shape \(64, 6\); expected \(64, 3\)|differs"):
        verify.check_weight(
            "x", verify.Reference(reference.codes, reference.zeros, reference.scales), replaced(weight, scales=halves)
        )


@pytest.mark.parametrize(
    "W_dtype", ["uint1", "int1", "uint3", "int5", "uint8", "int8", "nf4", "fp4_e2m1", "float8_e5m2"]
)
def test_dense_values(W_dtype):
    """The values that a dense folder is held against are those of the product's own decoding."""
    dense = torch.randn(16, K, dtype=torch.bfloat16)
    weight = quantize(dense, W_dtype, 32)
    verify.check_rounding("x", dense, weight)
    verify.check_dense("x", weight, weight.dequantize(torch.float16))
    wrong = weight.dequantize(torch.float16)
    wrong[3, 5] += 1
    with pytest.raises(CheckpointError, match=r"x: what was written differs from the source: the value at \(3, 5\)"):
        verify.check_dense("x", weight, wrong)
    changed = dense.clone()
    changed[2, 32] = -4 * dense.abs().max() * (weight.dequantize()[2, 32].sign() or 1)
    with pytest.raises(CheckpointError, match=r"x: what was written differs from the source: the value at \(2, 1, 0\)"):
        verify.check_rounding("x", changed, weight)


@pytest.mark.parametrize("mode", ["original", "rescale", "quantized"])
def test_dense_values_of_zeros_modes(mode):
    tensors, _ = folders.gptq_layer(N, K, act_order=True)
    weight = from_gptq(**tensors, zeros_mode=mode)
    verify.check_dense("x", weight, weight.dequantize(torch.float32))
