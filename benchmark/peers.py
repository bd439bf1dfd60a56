"""Other libraries' ways to compute a matmul with low-bit weights; one that is missing or cannot says so."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bitblas.bench import Candidate, Peer, Skipped, Workload, rotate, torch_dense, torch_int_mm
from bitblas.bench.matmul import num_copies

#: How far a peer's result may be from the reference, over the reference's root mean square.
_LIMITS = {"float32": 1e-3, "bfloat16": 1e-1}
_QUANTIZED = 2e-1

_ORT = "onnxruntime MatMulNBits {}"
_INT4PACK = "torch int4pack"
#: Rows up to which a matmul is bound by memory.
_FEW_ROWS = 4


def _is_uint4(workload: Workload, groups: tuple[int, ...]) -> str:
    """Why a workload is not uint4 with scales in one of some group sizes, perhaps with zeros; empty where it is."""
    config = workload.config
    if config.W_dtype != "uint4" or not config.with_scaling or config.A_dtype == "int8":
        return "serves uint4 weights with scales"
    if config.with_zeros and config.zeros_mode == "rescale":
        return "has no zero points of this kind"
    if config.group not in groups or config.with_bias:
        return f"serves groups of {', '.join(map(str, groups))}"
    return ""


def _points(workload: Workload) -> torch.Tensor:
    """float32 (N, K / g) zero points, 0 where there are none."""
    if workload.zero_points is None:
        return torch.zeros(workload.config.N, workload.config.num_groups)
    return workload.zero_points.float()


def int4pack(workload: Workload, budget: int) -> Candidate | Skipped:
    """torch's own 4-bit kernel, which multiplies (q - 8)·s + z; with bfloat16 activations, the only ones it is fast for."""
    reason = _is_uint4(workload, (32, 64, 128, 256))
    if reason:
        return Skipped(_INT4PACK, reason)
    config, a, s = workload.config, workload.a.to(torch.bfloat16), workload.scale
    assert s is not None
    try:
        packed = torch._convert_weight_to_int4pack_for_cpu(workload.weight.to(torch.int32), 2)
    except (AttributeError, RuntimeError) as error:
        return Skipped(_INT4PACK, f"this torch cannot: {str(error).splitlines()[0]}")
    pairs = (
        torch.stack([s.float(), (8 - _points(workload)) * s.float()], dim=-1).transpose(0, 1).contiguous().to(a.dtype)
    )
    weights = rotate(packed, budget)
    return Candidate(
        _INT4PACK,
        lambda index: torch._weight_int4pack_mm_for_cpu(a, weights[index % len(weights)], config.group, pairs),
        lambda out: workload.check_within(out, _LIMITS["bfloat16"]),
        "bfloat16 in, float32 sums",
    )


def onnxruntime_nbits(accuracy_level: int) -> Peer:
    """onnxruntime's MatMulNBits, with float32 activations: level 0 keeps them, level 4 quantizes blocks of them to int8.

    The graph holds a node for each copy of the weight, and a call runs all: what a call costs beside them is shared out.
    """
    name = _ORT.format(accuracy_level)

    def make(workload: Workload, budget: int) -> Candidate | Skipped:
        reason = _is_uint4(workload, (16, 32, 64, 128, 256))
        if reason:
            return Skipped(name, reason)
        try:
            import onnx  # noqa: F401
            import onnxruntime
        except ImportError as error:
            return Skipped(name, f"{error}: pip install 'bitblas[bench]'")
        a = workload.a.float()
        # a run repeats all copies: few of them where one takes long, and memory matters less
        copies = num_copies(workload.weight.numel() // 2, budget) if workload.m <= _FEW_ROWS else 1
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        try:
            model = _nbits_model(workload, accuracy_level, copies)
            session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except (onnxruntime.capi.onnxruntime_pybind11_state.Fail, RuntimeError, ValueError) as error:
            return Skipped(name, f"this onnxruntime cannot: {str(error).splitlines()[0]}")
        feed = {"A": a.numpy()}
        limit = _QUANTIZED if accuracy_level == 4 else _LIMITS["float32"]
        return Candidate(
            name,
            lambda index: session.run(None, feed),
            lambda out: max(
                (workload.check_within(torch.from_numpy(part), limit) for part in out),
                key=lambda verdict: verdict.error,
            ),
            "int8 in blocks" if accuracy_level == 4 else "float32",
            exact=accuracy_level != 4,
            repeats=copies,
        )

    return make


def _nbits_model(workload: Workload, accuracy_level: int, copies: int) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    config = workload.config
    N, K, block = config.N, config.K, config.group
    codes = workload.weight.view(N, K // block, block)
    packed = (codes[..., 0::2] | (codes[..., 1::2] << 4)).numpy()
    assert workload.scale is not None
    scales = workload.scale.float().reshape(-1).numpy()
    points = torch.nn.functional.pad(_points(workload).to(torch.uint8), (0, config.num_groups % 2))
    points = (points[:, 0::2] | (points[:, 1::2] << 4)).reshape(-1).numpy()
    attributes = {"K": K, "N": N, "bits": 4, "block_size": block, "accuracy_level": accuracy_level}
    nodes, initializers, outputs = [], [], []
    for index in range(copies):
        names = [f"{kind}{index}" for kind in ("B", "S", "Z")]
        initializers += [
            numpy_helper.from_array(array, n) for array, n in zip((packed, scales, points), names, strict=True)
        ]
        nodes.append(
            helper.make_node("MatMulNBits", ["A", *names], [f"Y{index}"], domain="com.microsoft", **attributes)
        )
        outputs.append(helper.make_tensor_value_info(f"Y{index}", TensorProto.FLOAT, [workload.m, N]))
    inputs = [helper.make_tensor_value_info("A", TensorProto.FLOAT, [workload.m, K])]
    graph = helper.make_graph(nodes, "matmul", inputs, outputs, initializers)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=9)
    return model.SerializeToString()


#: Every peer, in the order of the tables. `torch float32` is what all are compared with.
PEERS: dict[str, Peer] = {
    "torch float32": torch_dense(torch.float32),
    "torch bfloat16": torch_dense(torch.bfloat16),
    _INT4PACK: int4pack,
    "torch _int_mm": torch_int_mm,
    _ORT.format(0): onnxruntime_nbits(0),
    _ORT.format(4): onnxruntime_nbits(4),
}


def select(names: Callable[[str], bool] = lambda name: True) -> list[Peer]:
    """The peers whose name passes."""
    return [peer for name, peer in PEERS.items() if names(name)]
