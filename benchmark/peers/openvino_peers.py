"""OpenVINO's matmul with compressed weights: activations as they are, in bfloat16, or quantized to int8 in groups."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from bitblas.bench import Candidate, Peer, Skipped, Verdict, Workload

from .operands import LIMITS, Codes, graph_copies, integer_codes, keep

if TYPE_CHECKING:
    import openvino

EXACT, BF16, DYNAMIC = "OpenVINO", "OpenVINO bf16", "OpenVINO dynamic {}"
#: Its types of weights by width of integer codes: those that its matmul reads packed.
_TYPES = {2: "u2", 4: "u4", 8: "u8"}


def compressed_matmul(name: str, precision: str = "f32", dynamic_group: int = 0) -> Peer:
    """A matmul on weights that are decompressed on the way.

    Parameters
    ----------
    name : str
        What the candidate is called.
    precision : str
        Its `INFERENCE_PRECISION_HINT`: "f32", or "bf16", which rounds the activations; "f16" means "bf16" on CPUs without
        half-precision arithmetic.
    dynamic_group : int
        Its `DYNAMIC_QUANTIZATION_GROUP_SIZE`: k of the activations that share a scale in int8; 0 leaves them as they are.
    """
    exact = dynamic_group == 0

    def make(workload: Workload, budget: int) -> Candidate | Skipped:
        config = workload.config
        if exact and config.A_dtype == "int8":
            return Skipped(name, "has no use for int8 activations")
        if config.with_bias:
            return Skipped(name, "has no bias in this benchmark")
        try:
            import openvino
        except ImportError as error:
            return Skipped(name, f"{error}: pip install 'bitblas[bench]'", missing=True)
        found = _weight(workload)
        if found is None:
            return Skipped(name, "serves nf4 and integers of 2, 4 and 8 bits")
        kind, weight = found
        if kind == "nf4" and not exact:
            return Skipped(name, "leaves activations as they are for nf4")
        copies, threads = graph_copies(weight, workload.m, budget), torch.get_num_threads()
        asked = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": dynamic_group,
            "PERFORMANCE_HINT": "LATENCY",
        }
        try:
            compiled = keep(
                name,
                workload,
                (copies, threads),
                lambda: openvino.Core().compile_model(_model(kind, weight, copies), "CPU", asked),
            )
        except RuntimeError as error:
            return Skipped(name, f"this OpenVINO cannot: {str(error).splitlines()[0]}")
        held = _held_types(compiled)
        if held != {kind}:
            return Skipped(name, f"decodes {kind} to {', '.join(sorted(held))} ahead of time")
        return _candidate(name, compiled, workload, copies, "int8" if not exact else _COMPUTES[precision])

    return make


_COMPUTES = {"f32": "float32", "bf16": "bfloat16", "f16": "bfloat16"}


def _candidate(
    name: str, compiled: openvino.CompiledModel, workload: Workload, copies: int, computes: str
) -> Candidate:
    request, feed = compiled.create_infer_request(), {0: workload.a.float().numpy()}

    def check(result: Any) -> Verdict:
        parts = [torch.from_numpy(result[index]) for index in range(copies)]
        return workload.check_turned(parts, LIMITS[computes])

    return Candidate(
        name,
        lambda index: request.infer(feed, share_inputs=True, share_outputs=True),
        check,
        "int8 in groups" if computes == "int8" else computes,
        exact=computes != "int8",
        repeats=copies,
    )


def _weight(workload: Workload) -> tuple[str, Codes] | None:
    """OpenVINO's type and the codes; nf4 has the codebook that ours has."""
    config = workload.config
    if config.W_dtype == "nf4" and workload.scale is not None:
        scale = workload.scale.float()
        return "nf4", Codes(workload.weight, 4, scale, torch.zeros_like(scale), config.group)
    weight = integer_codes(workload)
    if weight is None or weight.bits not in _TYPES or not weight.has_whole_points:
        return None
    return _TYPES[weight.bits], weight


def _model(kind: str, weight: Codes, copies: int) -> openvino.Model:
    """(codes - points) · scale in float32, and a matmul, for each copy.

    Copies are turned by a row each, as no two weights of a model are equal.
    """
    import openvino
    from openvino import opset13 as ops

    (N, K), group, packed = weight.codes.shape, weight.group, weight.packed()
    a = ops.parameter([-1, K], openvino.Type.f32, name="a")

    def constant(codes: torch.Tensor, last: int) -> Any:
        stored = openvino.Tensor(getattr(openvino.Type, kind), openvino.Shape([N, K // group, last]))
        stored.data.reshape(-1)[:] = codes.contiguous().view(-1).numpy()  # its own memory: it would not keep ours alive
        return ops.convert(ops.constant(stored), "f32")

    results = []
    for index in range(copies):
        value = constant(packed.roll(index, 0), group)
        if weight.points.any():
            points = weight.points.roll(index, 0).to(torch.uint8).view(1, -1)
            value = ops.subtract(value, constant(replace(weight, codes=points).packed(), 1))
        value = ops.multiply(value, ops.constant(weight.scale.roll(index, 0).view(N, -1, 1).numpy()))
        value = ops.reshape(value, ops.constant([N, K]), False)
        results.append(ops.matmul(a, value, False, True))
    return openvino.Model(results, [a])


def _held_types(compiled: openvino.CompiledModel) -> set[str]:
    """What its matmuls hold their weights in."""
    found = set()
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = op.get_rt_info()
        if "layerType" in info and info["layerType"].astype(str) == "FullyConnected":
            found.add(info["runtimePrecision"].astype(str))
    return found
