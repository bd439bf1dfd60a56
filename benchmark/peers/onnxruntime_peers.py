"""onnxruntime's MatMulNBits, with activations as they are (level 0), and quantized to int8 in blocks (level 4)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from bitblas.bench import Candidate, Peer, Skipped, Workload

from .operands import LIMITS, Codes, graph_copies, integer_codes, keep

if TYPE_CHECKING:
    import onnxruntime

NAME = "onnxruntime MatMulNBits {}"
_BITS, _BLOCKS = (2, 4, 8), (16, 32, 64, 128, 256)
#: The block where a weight has one scale for all k: the operator knows none longer than 256.
_BLOCK = 128


def matmul_nbits(accuracy_level: int) -> Peer:
    """With float32 activations, into which others are converted ahead of time.

    The graph holds a node for each copy of the weight, and a call runs all: what a call costs beside them is shared out.
    """
    name = NAME.format(accuracy_level)
    exact = accuracy_level != 4

    def make(workload: Workload, budget: int) -> Candidate | Skipped:
        config, weight = workload.config, integer_codes(workload)
        if weight is None or weight.bits not in _BITS or config.with_bias or not weight.has_whole_points:
            return Skipped(name, "serves integers of 2, 4 and 8 bits, with whole zero points")
        if exact and config.A_dtype == "int8":
            return Skipped(name, "has no use for int8 activations")
        if exact and weight.bits != 4:
            return Skipped(name, "has a kernel for 4 bits alone (others took 47 to 49 ms for 4096 × 4096, M=1)")
        group = weight.group if weight.group in _BLOCKS else _BLOCK
        if weight.group % group:
            return Skipped(name, f"serves groups of {', '.join(map(str, _BLOCKS))}")
        try:
            import onnx  # noqa: F401
            import onnxruntime
        except ImportError as error:
            return Skipped(name, f"{error}: pip install 'bitblas[bench]'", missing=True)
        copies, threads = graph_copies(weight, workload.m, budget), torch.get_num_threads()
        failures = onnxruntime.capi.onnxruntime_pybind11_state
        try:
            session = keep(
                name,
                workload,
                (copies, threads),
                lambda: _session(_model(weight.in_groups(group), accuracy_level, copies), threads),
            )
        except (failures.Fail, failures.NotImplemented, failures.InvalidGraph, RuntimeError, ValueError) as error:
            return Skipped(name, f"this onnxruntime cannot: {str(error).splitlines()[0]}")
        feed = {"A": workload.a.float().numpy()}
        limit = LIMITS["float32" if exact else "int8"]
        return Candidate(
            name,
            lambda index: session.run(None, feed),
            lambda out: workload.check_turned([torch.from_numpy(part) for part in out], limit),
            "float32" if exact else "int8 in blocks",
            exact=exact,
            repeats=copies,
        )

    return make


def _session(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _model(weight: Codes, accuracy_level: int, copies: int) -> bytes:
    """A node for each copy. Copies are turned by a row each, as no two weights of a model are equal."""
    from onnx import TensorProto, helper, numpy_helper

    N, K = weight.codes.shape
    bits, groups, per_byte = weight.bits, K // weight.group, 8 // weight.bits
    codes = weight.packed().view(N, groups, -1)
    points = torch.nn.functional.pad(weight.points.to(torch.uint8), (0, -groups % per_byte))
    points = replace(weight, codes=points).packed()
    attributes = {"K": K, "N": N, "bits": bits, "block_size": weight.group, "accuracy_level": accuracy_level}
    nodes, initializers, outputs = [], [], []
    for index in range(copies):
        names = [f"{kind}{index}" for kind in ("B", "S", "Z")]
        turned = [codes.roll(index, 0), *(tensor.roll(index, 0).view(-1) for tensor in (weight.scale, points))]
        initializers += [
            numpy_helper.from_array(tensor.numpy(), name) for tensor, name in zip(turned, names, strict=True)
        ]
        nodes.append(
            helper.make_node("MatMulNBits", ["A", *names], [f"Y{index}"], domain="com.microsoft", **attributes)
        )
        outputs.append(helper.make_tensor_value_info(f"Y{index}", TensorProto.FLOAT, ["m", N]))
    inputs = [helper.make_tensor_value_info("A", TensorProto.FLOAT, ["m", K])]
    graph = helper.make_graph(nodes, "matmul", inputs, outputs, initializers)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9).SerializeToString()
