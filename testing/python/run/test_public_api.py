"""The public API as other projects call it, name by name; their data types against the float64 reference."""

import dataclasses
import inspect
import logging
import threading

import numpy as np
import pytest
import torch
from packaging.version import Version

import attention_reference
import bitblas
import reference
from bitblas import ArgumentError, Matmul, MatmulConfig, tuner
from bitblas.cache import (
    OperatorCache,
    get_database_path,
    global_operator_cache,
    load_global_ops_cache,
    set_database_path,
)
from bitblas.ops import (
    LadderPermutate,
    LadderPermutateConfig,
    LOP3Permutate,
    LOP3PermutateConfig,
    MatmulConfigWithSplitK,
    MatmulWithSplitK,
    QuantCompress,
    QuantCompressConfig,
)
from bitblas.quantization import gen_quant4, general_compress, interleave_weight
from bitblas.schedule import RULES, Problem, select_rule
from bitblas.target import Target, resolve_target
from scripts import report

ORDER = [
    *("M", "N", "K", "A_dtype", "W_dtype", "out_dtype", "accum_dtype", "layout", "with_bias", "group_size"),
    *("with_scaling", "with_zeros", "zeros_mode"),
    *("storage_dtype", "fast_decoding", "propagate_a", "propagate_b", "optimize_stratety"),
]
DEFAULT_M = (1, 16, 32, 64, 128, 256, 512, 1024)
N, K, GROUP = 32, 64, 16


def uint4(**changes):
    """A config with scales; without M's default, which would build eight kernels."""
    values = {"M": [1, 16], "N": N, "K": K, "W_dtype": "uint4", "group_size": GROUP, "with_scaling": True}
    return MatmulConfig(**{**values, **changes})


def plan_only(config, **options):
    return Matmul(config, from_database=True, **options)


def right(op, m=3, **options):
    """Whether a call with the extra tensors by name is right; raises where not."""
    problem = reference.draw(op.config, m, **options)
    reference.assert_close(op(problem.A, op.transform_weight(problem.weights), **problem.extras), problem)
    return True


# -- names that are loaded when they are touched -----------------------------------------------------------------------------


def test_attention_is_loaded_when_it_is_touched():
    script = (
        "import json, sys, bitblas\nbefore = 'bitblas.ops.attention' in sys.modules\nbitblas.FlashAttenConfig(1, 8, 128, 64)\n"
        "op = bitblas.FlashAtten\nfrom bitblas.ops import FlashAtten, FlashAttenConfig\nimport torch\n"
        "print(json.dumps([before, op is FlashAtten, FlashAttenConfig is bitblas.FlashAttenConfig, 'tvm' in sys.modules, "
        "hasattr(torch.ops.bitblas, 'flash_atten')]))"
    )
    assert report(script) == ([False, True, True, False, True], [])


def test_attention_by_position():
    """As upstream: a config, then by name."""
    config = bitblas.FlashAttenConfig(1, 4, 16, 16, "float16", "float16", "float16", "float32", "float16", "nnn", True)
    parameters = inspect.signature(bitblas.FlashAtten).parameters
    assert list(parameters) == ["config", "name", "target", "enable_tuning", "from_database", "backend"]
    op = bitblas.FlashAtten(config=config, enable_tuning=False, backend="tl")
    q, k, v = (torch.randn(1, 16, 4, 16).half() for _ in range(3))
    problem = attention_reference.Problem(config, q, k, v)
    attention_reference.assert_close(op(q, k, v), problem)
    attention_reference.assert_close(op(q, k, v, output=torch.empty_like(q)), problem)
    attention_reference.assert_close(op(q, k, v, torch.empty_like(q)), problem)


# -- MatmulConfig ----------------------------------------------------------------------------------------------------------


def test_config_by_position():
    values = (
        [1, 2], 48, 96, "bfloat16", "uint4", "float32", "float32", "nn", True, 32, True, True, "rescale",
        "int8", False, 0, 0, 0,
    )  # fmt: skip
    config = MatmulConfig(*values)
    assert [getattr(config, name) for name in ORDER] == [(1, 2), *values[1:]]
    assert list(inspect.signature(MatmulConfig).parameters)[: len(ORDER)] == ORDER
    assert config == MatmulConfig(**dict(zip(ORDER, values, strict=True)))


def test_config_is_frozen_hashable_and_readable():
    config = uint4()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.N = 5
    assert {config: 1}[uint4()] == 1
    assert config != uint4(group_size=32)
    assert eval(repr(config)) == config
    assert "W_dtype='uint4'" in repr(config)


@pytest.mark.parametrize(("m", "kept"), [(7, 7), ([1, 16], (1, 16)), ((16, 1), (16, 1)), (None, DEFAULT_M)])
def test_rows_of_a_config(m, kept):
    found = MatmulConfig(M=m, N=N, K=K).M
    assert found == kept
    assert type(found) is type(kept)


def test_a_config_without_rows_is_one_with_the_default_list():
    implicit, explicit = MatmulConfig(N=N, K=K), MatmulConfig(M=list(DEFAULT_M), N=N, K=K)
    assert implicit == explicit == MatmulConfig(None, N, K)
    assert hash(implicit) == hash(explicit)


def test_none_means_the_default():
    names = ("with_bias", "group_size", "with_scaling", "with_zeros", "zeros_mode")
    config = MatmulConfig(1, N, K, **dict.fromkeys(names))
    assert config == MatmulConfig(1, N, K)
    assert [getattr(config, name) for name in names] == [False, -1, False, False, "original"]


def test_default_dtypes():
    config = MatmulConfig(1, N, K, "int8")
    assert (config.W_dtype, config.out_dtype, config.accum_dtype, config.layout) == ("int8", "float16", "float16", "nt")
    assert MatmulConfig(1, N, K).A_dtype == "float16"


def test_hints_have_no_effect(build):
    hints = {
        "storage_dtype": "uint8",
        "fast_decoding": True,
        "propagate_a": 2,
        "propagate_b": True,
        "optimize_stratety": 1,
    }
    config = uint4(**hints)
    assert config == uint4()
    assert hash(config) == hash(uint4())
    assert (config.storage_dtype, config.fast_decoding) == ("uint8", True)
    op, plain = Matmul(config), build(uint4())
    problem = reference.draw(config, 2)
    weight = op.transform_weight(problem.weights)
    assert torch.equal(weight, plain.transform_weight(problem.weights))
    assert torch.equal(op(problem.A, weight, problem.scale), plain(problem.A, weight, problem.scale))
    assert not op.propagate_b


def test_bias_is_another_name():
    assert MatmulConfig(1, N, K, bias=True).with_bias
    assert MatmulConfig(1, N, K, bias=True) == MatmulConfig(1, N, K, with_bias=True)
    assert not MatmulConfig(1, N, K, bias=None).with_bias
    assert not MatmulConfig(1, N, K, bias=False).with_bias


# -- Matmul: construction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((uint4(),), {}),
        ((), {"config": uint4()}),
        ((uint4(), "matmul", "llvm", True, False, "tl"), {}),
        ((uint4(), "name", None, False), {"backend": "tir"}),
        ((), {"config": uint4(), "target": "llvm", "enable_tuning": False}),
        ((uint4(),), {"from_database": True, "backend": "tir"}),
    ],
)
def test_constructor_forms(args, options):
    assert right(Matmul(*args, **options))


def test_constructor_defaults():
    parameters = inspect.signature(Matmul).parameters.values()
    assert [(p.name, p.default) for p in parameters if p.name != "config"] == [
        ("name", "matmul"),
        ("target", None),
        ("enable_tuning", True),
        ("from_database", False),
        ("backend", "tl"),
        ("dense_cache", False),
    ]


def tvm_target(spec):
    return bitblas.tvm.target.Target(spec)


@pytest.mark.parametrize(
    "form", [None, "llvm", {"kind": "llvm"}, tvm_target, Target], ids=["None", "text", "dict", "tvm", "Target"]
)
def test_targets_that_are_this_machine(form):
    here = plan_only(uint4()).target
    target = tvm_target("llvm") if form is tvm_target else here if form is Target else form
    op = Matmul(uint4(), target=target)
    assert op.target == here
    assert right(op)
    assert Matmul(uint4(), target=str(here)).target == here


@pytest.mark.parametrize(
    ("form", "arch"),
    [
        ("cuda -arch=sm_90", "sm_90"),
        ("nvidia/nvidia-a100", "sm_80"),
        ("nvidia/geforce-rtx-3090", "sm_86"),
        ({"kind": "cuda", "arch": "sm_80"}, "sm_80"),
    ],
)
def test_targets_of_graphics_cards(form, arch):
    target = resolve_target(form)
    assert (target.kind, target.arch) == ("cuda", arch)
    assert resolve_target(tvm_target({"kind": "cuda", "arch": arch})) == target


@pytest.mark.parametrize("circumstances", [("meta",), ("inference",), ("meta", "inference")], ids="-".join)
def test_construction_on_no_device_and_without_gradients(circumstances, store):
    with (
        torch.device("meta" if "meta" in circumstances else "cpu"),
        torch.inference_mode("inference" in circumstances),
    ):
        op = Matmul(uint4())
        assert op.origin == "compiled"
        problem = None
        if "meta" not in circumstances:
            problem = reference.draw(op.config, 2)
            inside = op(problem.A, op.transform_weight(problem.weights), problem.scale)
            reference.assert_close(inside, problem)
    assert right(op)
    if problem is not None:
        again = op(problem.A, op.transform_weight(problem.weights), problem.scale)
        assert torch.equal(again, inside)
    problem = reference.draw(op.config, 2)
    with torch.device("meta"), torch.inference_mode():
        out = op(problem.A, op.transform_weight(problem.weights), problem.scale)
    assert out.device.type == "cpu"
    reference.assert_close(out, problem)


def test_a_weight_from_inference_mode_serves_beside_gradients(build):
    op = build(uint4())
    problem = reference.draw(op.config, 2)
    with torch.inference_mode():
        weight = op.transform_weight(problem.weights)
    gain = torch.ones(1, requires_grad=True)
    (op(problem.A, weight, problem.scale).float() * gain).sum().backward()
    assert torch.isfinite(gain.grad)


def test_from_database_builds_nothing_until_called(store):
    op = plan_only(uint4())
    assert op.lib is None
    assert not list(store.rglob("*.so"))
    assert right(op)
    assert op.lib is not None
    assert list(store.rglob("*.so"))


def test_enable_tuning_takes_a_record_and_never_measures(store, monkeypatch):
    default = Matmul(uint4(M=1), enable_tuning=False).plan
    problem = Problem(default.config, default.layout, default.target, 1)
    other = select_rule(RULES, problem).tilings(problem)[1]
    tuner.save_record(uint4(M=1), default.target, {1: tuner.TunedBucket(other, ((other, 1e-6),))})
    monkeypatch.setattr("bitblas.operands.time_kernels", None)
    monkeypatch.setattr("bitblas.tuner.runs.tune_here", None)
    assert Matmul(uint4(M=1), enable_tuning=True).plan.tilings == {1: other} != default.tilings
    assert Matmul(uint4(M=1), enable_tuning=True).tuning_record["buckets"]["1"]["candidates"][0]["seconds"] == 1e-6
    assert Matmul(uint4(M=1), enable_tuning=False).plan == default
    assert Matmul(uint4(M=1), enable_tuning=False).tuning_record is None
    assert right(Matmul(uint4(M=1)), m=1)


# -- calls -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3), (2, 1, 2, 2), (0,)])
def test_activations_of_any_rank(build, leading):
    op = build(uint4())
    rows = int(np.prod(leading))
    problem = reference.draw(op.config, rows)
    out = op(problem.A.reshape(*leading, K), op.transform_weight(problem.weights), problem.scale)
    assert out.shape == (*leading, N)
    assert out.dtype is torch.float16
    reference.assert_close(out.view(rows, N), problem)


@pytest.mark.parametrize("layout", ["tn", "tt"])
def test_the_output_of_transposed_activations(build, layout):
    op = build(uint4(layout=layout))
    problem = reference.draw(op.config, 3)
    weight = problem.weights.T if layout == "tn" else problem.weights
    out = op(problem.A.T.contiguous().expand(2, K, 3), op.transform_weight(weight), problem.scale)
    assert out.shape == (2, 3, N)
    reference.assert_close(out[1], problem)


EXTRAS = ("scale", "zeros", "bias")


@pytest.mark.parametrize("wanted", [(), ("scale",), ("bias",), ("scale", "bias"), ("scale", "zeros"), EXTRAS], ids=str)
def test_extra_tensors_are_bound_in_order(build, wanted):
    flags = {f"with_{'scaling' if name == 'scale' else name}": name in wanted for name in EXTRAS}
    op = build(uint4(M=2, **flags))
    problem = reference.draw(op.config, 2)
    weight, extras = op.transform_weight(problem.weights), problem.extras
    assert tuple(extras) == wanted
    out = torch.empty(2, N, dtype=torch.float16)
    assert op(problem.A, weight, *extras.values(), output=out) is out
    reference.assert_close(out, problem)
    all_places = [extras.get(name) for name in EXTRAS]
    for result in (
        op(problem.A, weight, **extras),
        op.forward(problem.A, weight, *all_places),
        op.torch_func(problem.A, weight, *all_places, torch.empty_like(out)),
        op(A=problem.A, W=weight, **extras, output=torch.empty_like(out)),
    ):
        assert torch.equal(result, out)
    for name in set(EXTRAS) - set(wanted):
        with pytest.raises(ArgumentError, match=f"{name} was given"):
            op(problem.A, weight, **extras, **{name: torch.zeros(N, dtype=torch.float16)})
    for name in wanted:
        with pytest.raises(ArgumentError, match=f"{name} is missing"):
            op(problem.A, weight, **{other: extras[other] for other in wanted if other != name})
    with pytest.raises(ArgumentError, match="arguments were given by position"):
        op(problem.A, weight, *all_places, out, out)


def test_one_group_has_scales_of_one_dimension(build):
    op = build(uint4(group_size=-1))
    problem = reference.draw(op.config, 2)
    weight = op.transform_weight(problem.weights)
    assert problem.scale.shape == (N, 1)
    out = op(problem.A, weight, problem.scale)
    assert torch.equal(op(problem.A, weight, problem.scale.view(N)), out)


@pytest.mark.parametrize("mode", ["original", "rescale", "quantized"])
def test_zeros(build, mode):
    op = build(uint4(with_zeros=True, zeros_mode=mode))
    problem = reference.draw(op.config, 3)
    shape, dtype = ((K // GROUP, N // 2), torch.int8) if mode == "quantized" else ((N, K // GROUP), torch.float16)
    assert (tuple(problem.zeros.shape), problem.zeros.dtype) == (shape, dtype)
    if mode == "quantized":
        packed = general_compress(problem.zero_values.T.numpy(), source_bits=4)
        assert np.array_equal(packed, problem.zeros.numpy())
    reference.assert_close(op(problem.A, op.transform_weight(problem.weights), problem.scale, problem.zeros), problem)


def test_forms_of_a_weight(build):
    op = build(uint4())
    problem = reference.draw(op.config, 2)
    weight = op.transform_weight(problem.weights)
    assert weight.dtype is torch.int8
    out = op(problem.A, weight, problem.scale)
    for form in (weight.view(torch.uint8), torch.nn.Parameter(weight, requires_grad=False), weight.clone().T.clone().T):
        assert torch.equal(op(problem.A, form, problem.scale), out)


# -- weights ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.uint8, torch.int8, torch.float32, torch.int32])
@pytest.mark.parametrize("fmt", ["uint1", "uint2", "uint4", "uint8"])
def test_unsigned_codes_in_any_dtype(fmt, dtype):
    op = plan_only(uint4(W_dtype=fmt))
    high = min(2**op.bit, 128 if dtype is torch.int8 else 256)
    codes = torch.arange(N * K).view(N, K) * 7 % high
    packed = op.transform_weight(codes.to(dtype))
    assert (packed.dtype, list(packed.shape)) == (torch.int8, op.retrieve_weight_shape())
    assert torch.equal(op.unpack_weight(packed).long(), codes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.int8, torch.float32])
@pytest.mark.parametrize("fmt", ["int1", "int2", "int4", "int8"])
def test_signed_values_in_any_dtype(fmt, dtype):
    op = plan_only(uint4(W_dtype=fmt))
    values = torch.arange(N * K).view(N, K) * 7 % 2**op.bit
    values = 2 * values - 1 if fmt == "int1" else values - 2 ** (op.bit - 1)
    codes = op.unpack_weight(op.transform_weight(values.to(dtype))).long()
    expected = {"int1": (values + 1) // 2, "int8": values % 256}.get(fmt, values + 2 ** (op.bit - 1))
    assert torch.equal(codes, expected)


@pytest.mark.parametrize(("name", "n"), [("float16", 5), ("float16", N), ("int8", 5), ("int8", N)])
def test_weights_of_the_activations_dtype(build, name, n):
    op = build(MatmulConfig(2, n, K, name, None, "float32", "float32"))
    weight = torch.randint(-8, 8, (n, K)).to(getattr(torch, name))
    A = torch.randint(-8, 8, (2, K)).to(getattr(torch, name))
    transformed = op.transform_weight(weight)
    assert (transformed.dtype, list(transformed.shape)) == (weight.dtype, op.retrieve_weight_shape())
    if op.layout.name == "packed":
        assert torch.equal(transformed, weight)  # row by row
    assert torch.equal(op(A, transformed), A.float() @ weight.float().T)


@pytest.mark.parametrize(("name", "dtype"), [("e4m3_float8", torch.float8_e4m3fn), ("e5m2_float8", torch.float8_e5m2)])
def test_float8_weights_and_their_bytes(name, dtype):
    op = plan_only(uint4(W_dtype=name))
    weight = torch.randn(N, K).to(dtype)
    packed = op.transform_weight(weight)
    for form in (torch.int8, torch.uint8):
        assert torch.equal(op.transform_weight(weight.view(form)), packed)
    assert torch.equal(op.unpack_weight(packed), weight.view(torch.uint8))


def test_transform_weight_returns_one_tensor():
    op = plan_only(uint4(with_zeros=True, with_bias=True))
    codes, scale = torch.zeros(N, K), torch.zeros(N, K // GROUP)
    packed = op.transform_weight(codes, scale=scale, zeros=scale, bias=torch.zeros(N))
    assert isinstance(packed, torch.Tensor)
    assert packed.device == codes.device
    assert torch.equal(op.transform_weight(codes, scale, scale), packed)


@pytest.mark.parametrize(("fmt", "bits"), [("uint1", 1), ("uint2", 2), ("int4", 4), ("uint8", 8), ("nf4", 4)])
def test_the_shape_of_a_weight(fmt, bits):
    op = plan_only(uint4(W_dtype=fmt))
    shape = op.retrieve_weight_shape()
    assert shape == [N, K * bits // 8]
    assert all(type(size) is int for size in shape)
    module = torch.nn.Module()
    module.register_buffer("qweight", torch.empty(shape, dtype=torch.int8))
    module.qweight.copy_(op.transform_weight(torch.ones(N, K)))
    assert module.qweight.shape[-2] == N


@pytest.mark.parametrize(
    ("fmt", "offset"), [("uint2", 0), ("uint4", 0), ("uint8", 0), ("int2", 2), ("int4", 8), ("int8", 128)]
)
def test_weight_transform_takes_unsigned_codes(fmt, offset):
    op, padded = plan_only(uint4(W_dtype=fmt)), plan_only(uint4(W_dtype=fmt, N=5))
    codes = torch.randint(0, 2**op.bit, (N, K))
    values = codes - offset
    for dtype in (torch.int8, torch.uint8):
        assert torch.equal(op.weight_transform(codes.to(dtype)), op.transform_weight(values))
    packed = padded.transform_weight(values[:5])
    if fmt == "int8":  # its bytes are two's complement, which unsigned codes are not
        assert torch.equal(packed.long(), values[:5])
        assert torch.equal(padded.weight_transform(codes[:5].to(torch.int8)), packed)
    else:
        assert padded.weight_transform is None
        assert np.array_equal(packed.numpy(), general_compress(codes[:5].numpy(), source_bits=padded.bit))


# -- what clients read and call besides ------------------------------------------------------------------------------------


def test_tuning_of_a_tiny_operator(store):
    op = Matmul(uint4(), enable_tuning=False)
    before = reference.draw(op.config, 3)
    weight = op.transform_weight(before.weights)
    op.hardware_aware_finetune(topk=2)
    reference.assert_close(op(before.A, weight, before.scale), before)  # the weight is still the right one
    op.hardware_aware_finetune(topk=1, target=None, parallel_build=True)


def test_latency_is_in_milliseconds(build, monkeypatch):
    op = build(uint4())
    assert 0 < op.profile_latency() < 1000
    assert 0 < op.profile_latency(dynamic_symbolic_constraints={"m": 2}) < 1000
    rows = []
    monkeypatch.setattr("bitblas.operands.time_kernels", lambda kernels, call: rows.append(call.m) or 0.25)
    assert op.profile_latency() == 250
    assert op.profile_latency({"m": 7}) == 250
    assert rows == [16, 7]


def test_the_source_is_text(build):
    assert "define" in build(uint4()).get_source()


def test_properties(build):
    config = uint4(with_zeros=True, with_bias=True, zeros_mode="rescale", accum_dtype="float32")
    op = build(config)
    for name in ORDER:
        assert hasattr(op.config, name)
    for name in ORDER[:7] + ORDER[8:14]:  # layout is another thing of an operator
        assert getattr(op, name) == getattr(config, name), name
    assert (op.M, op.N, op.K, op.group_size, op.zeros_mode) == ((1, 16), N, K, GROUP, "rescale")
    assert (op.bit, op.source_format) == (4, "uint")
    assert op.config is config
    assert not op.propagate_b
    assert op.lib is not None
    assert callable(op.torch_func)
    assert op.target.arch


@pytest.mark.parametrize(
    ("fmt", "bit", "family"),
    [
        ("uint2", 2, "uint"),
        ("int4", 4, "int"),
        ("nf4", 4, "nf"),
        ("fp4_e2m1", 4, "fp"),
        ("e4m3_float8", 8, "fp_e4m3"),
        ("e5m2_float8", 8, "fp_e5m2"),
    ],
)
def test_formats_of_an_operator(fmt, bit, family):
    op = plan_only(uint4(W_dtype=fmt))
    assert (op.bit, op.source_format) == (bit, family)


def test_the_table_of_nf4():
    with torch.device("meta"):
        lut = plan_only(uint4(W_dtype="nf4")).lut
    assert torch.equal(lut, torch.tensor(reference.NF4).half())
    assert plan_only(uint4()).lut is None


def test_what_tvm_sees(build):
    op = build(uint4())
    assert isinstance(op.prim_func, bitblas.tvm.tirx.PrimFunc)
    assert isinstance(op.scheduled_ir_module, bitblas.tvm.IRModule)
    assert "decode" in op.prim_func.script()


def test_tvm_is_loaded_when_touched():
    script = (
        "import json, sys, bitblas\n"
        "before = 'tvm' in sys.modules\n"
        "import tvm\n"
        "print(json.dumps([before, bitblas.tvm is tvm]))"
    )
    assert report(script) == ([False, True], [])


def test_the_version():
    assert Version(bitblas.__version__) > Version("0.1.0.post1")


@pytest.mark.parametrize(
    ("level", "number"),
    [
        ("debug", logging.DEBUG),
        ("Info", logging.INFO),
        ("WARNING", logging.WARNING),
        ("error", logging.ERROR),
        ("Critical", logging.CRITICAL),
        ("no such level", logging.INFO),
        (logging.ERROR, logging.ERROR),
        (17, 17),
    ],
)
def test_log_levels(level, number):
    logger = logging.getLogger("bitblas")
    assert bitblas.logger is logger
    before = logger.level
    try:
        bitblas.set_log_level(level)
        assert logger.level == number
        assert logger.isEnabledFor(number)
        assert not logger.isEnabledFor(number - 1)
    finally:
        logger.setLevel(before)


def test_the_target_detector(monkeypatch):
    found = bitblas.auto_detect_nvidia_target()
    assert isinstance(found, str)
    assert found == ("llvm" if not torch.cuda.is_available() else found)
    if found == "llvm":
        assert right(Matmul(uint4(), target=found))
    for gpu_id in (0, 1, -1, 99, None, "x"):
        assert isinstance(bitblas.auto_detect_nvidia_target(gpu_id), str)
    monkeypatch.setattr(bitblas, "auto_detect_nvidia_target", lambda gpu_id=0: "mine")
    assert bitblas.auto_detect_nvidia_target() == "mine"


def test_the_target_detector_where_the_driver_fails(monkeypatch):
    def fail(*_):
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "is_available", fail)
    monkeypatch.setattr(torch.cuda, "device_count", fail)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert bitblas.utils.auto_detect_nvidia_target(gpu_id=0) == "llvm"


def test_a_module_may_ask_for_the_target_when_it_is_imported():
    script = "import json\nfrom bitblas import auto_detect_nvidia_target as f\nT = f(0)\nprint(json.dumps(T))"
    found, warnings = report(script)
    assert found.startswith(("llvm", "cuda -arch="))
    assert warnings == []


# -- bitblas.cache ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def clean_cache():
    global_operator_cache.clear()
    yield global_operator_cache
    global_operator_cache.clear()
    set_database_path(None)


def test_the_operator_cache(clean_cache, build, tmp_path):
    cache, config = clean_cache, uint4()
    assert (cache.size(), cache.get(config), cache.exists(config)) == (0, None, False)
    op = build(config)
    cache.add(config, op)
    assert (cache.size(), cache.get(uint4()), cache.exists(config)) == (1, op, True)
    for target in ("llvm", op.target):
        path = tmp_path / str(type(target).__name__)
        cache.save_into_database(str(path), target)
        other = OperatorCache()
        other.load_from_database(str(path), target)
        assert other.get(config).origin == "loaded"
        assert right(other.get(config))
    cache.clear()
    assert cache.size() == 0


def test_a_missing_database_is_an_empty_one(clean_cache, tmp_path, caplog):
    clean_cache.load_from_database(str(tmp_path / "no"), "llvm")
    assert clean_cache.size() == 0
    assert not caplog.records
    assert not (tmp_path / "no").exists()
    assert load_global_ops_cache(str(tmp_path / "no"), "llvm") is clean_cache


def test_the_path_of_the_database(clean_cache, tmp_path, monkeypatch):
    monkeypatch.delenv("BITBLAS_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert get_database_path() == str(tmp_path / ".cache" / "bitblas")
    set_database_path(str(tmp_path / "mine"))
    assert get_database_path() == str(tmp_path / "mine")


def test_the_operator_cache_among_threads(clean_cache):
    failures = []

    def work(first):
        try:
            for i in range(50):
                config = uint4(K=GROUP * (1 + first * 50 + i))
                op = plan_only(config)
                clean_cache.add(config, op)
                if clean_cache.get(config) is not op or clean_cache.size() < 1:
                    failures.append(config)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test shall show it
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert clean_cache.size() == 300


# -- quantization and the operators on weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_general_compress(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (6, 32))
    packed = general_compress(codes.astype(np.float16), source_bits=bits, storage_dtype=np.int8)
    assert (packed.dtype, packed.shape) == (np.int8, (6, 4 * bits))
    assert np.array_equal(packed, reference.pack_bits(torch.from_numpy(codes), bits).numpy())
    assert bitblas.quantization.utils.general_compress is general_compress
    if bits == 4:
        assert np.array_equal(general_compress(codes), packed)
        words = general_compress(codes, 4, np.int32)
        assert np.array_equal(words.view(np.int8), packed)


def test_interleave_weight():
    packed = np.array([[0x10, 0x32, 0x54, 0x76]], dtype=np.int8)  # codes 0 to 7
    assert bitblas.quantization.utils.interleave_weight is interleave_weight
    assert interleave_weight(packed, 4, "float16").view(np.uint8).tolist() == [[0x20, 0x64, 0x31, 0x75]]


def test_a_random_weight_of_four_bits(build):
    w, linear, s, q = gen_quant4(K, N, groupsize=GROUP)
    assert (w.shape, s.shape, q.shape) == ((K, N), (K // GROUP, N), (K, N))
    assert w.dtype is torch.float16
    assert isinstance(linear, torch.nn.Linear)
    torch.testing.assert_close(linear.weight.T, (q.half() * s.repeat_interleave(GROUP, 0)), rtol=0, atol=0)
    assert (linear.weight.T - w).abs().max() <= s.max()
    op = build(uint4(W_dtype="int8", out_dtype="float32", accum_dtype="float32"))  # a q of 8 is no int4
    A = torch.randn(2, K).half()
    out = op(A, op.transform_weight(q.T), s.T.contiguous())
    torch.testing.assert_close(out, A.float() @ linear.weight.float().T, rtol=1e-3, atol=1e-2)
    assert gen_quant4(K, N)[2].shape == (1, N)


def test_quant_compress():
    op = QuantCompress(
        config=QuantCompressConfig(M=8, N=32, input_dtype="int8", storage_dtype="int8", dequantize_bits=2),
        target="llvm",
        enable_tuning=False,
    )
    codes = torch.randint(0, 4, (8, 32), dtype=torch.int8)
    assert torch.equal(op(codes), torch.from_numpy(general_compress(codes.numpy(), 2)))


def test_lop3_permutate():
    config = LOP3PermutateConfig(M=8, N=32, datatype="float16", storage_dtype="int8", dequantize_bits=4)
    packed = torch.randint(-128, 128, (8, 16), dtype=torch.int8)
    expected = torch.from_numpy(interleave_weight(packed.numpy(), 4, "float16"))
    assert torch.equal(LOP3Permutate(config, target="llvm")(packed), expected)


def test_ladder_permutate():
    config = LadderPermutateConfig(
        M=32,
        N=32,
        datatype="float16",
        storage_dtype="float16",
        propagate_kind="B",
        transpose_matrix=True,
        transform_kind=1,
    )
    matrix = torch.arange(1024).view(32, 32).half()
    tiles = LadderPermutate(config=config, target="llvm", enable_tuning=False)(matrix)
    assert torch.equal(tiles, matrix.view(2, 16, 2, 16).transpose(1, 2))


def test_split_k(build):
    op = MatmulWithSplitK(MatmulConfigWithSplitK(M=2, N=N, K=K, W_dtype="uint4", k_split=4))
    assert right(op, m=2)
    assert op.config.k_split == 4


# -- data types seen in the wild -------------------------------------------------------------------------------------------


def wild():
    """(A, W, out, accum)."""
    for kind in ("uint", "int"):
        for bits in (1, 2, 4, 8):
            for accum in ("float16", "float32"):
                yield "float16", f"{kind}{bits}", "float16", accum
    yield from (("bfloat16", "uint4", "bfloat16", accum) for accum in ("float32", "bfloat16"))
    yield "bfloat16", "int2", "float32", "float32"
    yield "bfloat16", "int4", "bfloat16", "float32"  # which the original has not
    yield from (("int8", "int2", out, "int32") for out in ("float32", "int32", "float16"))
    yield "int8", "int4", "float16", "int32"
    yield from (("int8", "int8", out, "int32") for out in ("int32", "float32"))
    yield from (("float16", name, "float16", "float16") for name in ("nf4", "fp4_e2m1", "e4m3_float8"))
    yield from (("int4", name, "int32", "int32") for name in ("int4", "int2"))
    yield from ((name, name, "float32", "float32") for name in ("e4m3_float8", "e5m2_float8"))
    yield "float16", "uint3", "float16", "float16"  # which the original has not


@pytest.mark.parametrize(("a", "w", "out", "accum"), list(wild()))
def test_data_types_seen_in_the_wild(build, a, w, out, accum):
    quantized = {"with_scaling": True, "group_size": GROUP} if a in ("float16", "bfloat16") else {}
    op = build(MatmulConfig([1, 16], N, K, a, w, out, accum, **quantized))
    # sums are formed in float32, whatever is asked for: no NaN, and no more error than that
    strict = dataclasses.replace(op.config, accum_dtype="int32" if accum == "int32" else "float32")
    problem = reference.draw(strict, 17)
    weight = op.transform_weight(problem.weights)
    for m in (1, 17):
        part = dataclasses.replace(problem, A=problem.A[:m])
        reference.assert_close(op(part.A, weight, **part.extras), part)


def test_sums_beyond_float16_are_finite(build):
    op = build(MatmulConfig(1, 16, 4096, "float16", "uint8", "float16", "float16", with_scaling=True))
    A = torch.full((1, 4096), 8.0, dtype=torch.float16)
    scale = torch.full((16, 1), 2.0**-13, dtype=torch.float16)
    out = op(A, op.transform_weight(torch.full((16, 4096), 255)), scale)
    assert torch.equal(out, torch.full((1, 16), 255 * 4.0, dtype=torch.float16))
