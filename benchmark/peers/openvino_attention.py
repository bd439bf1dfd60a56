"""OpenVINO's scaled_dot_product_attention, on tensors of the dtype that is asked, without copies."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from bitblas.bench import Candidate, Skipped, Verdict

if TYPE_CHECKING:
    from ..attention_cells import Attention

NAME = "OpenVINO SDPA"
#: Its names of dtypes, by ours: of elements, and of what it computes in.
_TYPES = {"float32": ("f32", "f32"), "bfloat16": ("bf16", "bf16")}


def openvino_sdpa(work: Attention, cache: int | None) -> Candidate | Skipped:
    """A model of this one operation; its output lies in memory that it keeps."""
    config, count = work.config, work.copies(cache)
    if work.q.device.type != "cpu" or config.Q_dtype not in _TYPES:
        return Skipped(NAME, "is timed on CPUs, in float32 and bfloat16")
    if work.group > 1 or (config.is_causal and config.seq_len != config.seq_len_kv):
        return Skipped(NAME, "knows no heads that share keys, and aligns a causal mask at the first key")
    try:
        import openvino
    except ImportError as error:
        return Skipped(NAME, f"{error}: pip install 'bitblas[bench]'", missing=True)
    kind, hint = _TYPES[config.Q_dtype]
    request = _request(config.heads, config.dim, kind, hint, config.is_causal, torch.get_num_threads())
    held = [tensor.transpose(1, 2).contiguous() for tensor in (work.q, work.k, work.v)]
    copies = [held[:1] + [tensor.clone() for tensor in held[1:]] for _ in range(count)]
    # with what they share, which they would not keep alive
    given = [(each, [_shared(openvino, tensor, kind) for tensor in each]) for each in copies]

    def call(index: int) -> object:
        request.infer(given[index % count][1], share_inputs=True, share_outputs=True)
        return request.get_output_tensor(0).data

    def check(out: Any) -> Verdict:
        found = torch.from_numpy(out) if kind == "f32" else torch.from_numpy(out.view("int16")).view(torch.bfloat16)
        return work.check(found.transpose(1, 2))

    return Candidate(NAME, call, check, config.Q_dtype, copies=count)


def _shared(openvino: Any, tensor: torch.Tensor, kind: str) -> Any:
    """A tensor as OpenVINO reads it, in the same memory."""
    values = tensor.numpy() if kind == "f32" else tensor.view(torch.int16).numpy()
    return openvino.Tensor(values, list(tensor.shape), getattr(openvino.Type, kind))


@lru_cache(maxsize=1)
def _request(heads: int, dim: int, kind: str, hint: str, causal: bool, threads: int) -> Any:
    """A compiled model for any lengths."""
    import openvino
    from openvino import opset13

    inputs = [opset13.parameter([1, heads, -1, dim], getattr(openvino.Type, kind)) for _ in range(3)]
    found = opset13.scaled_dot_product_attention(*inputs, causal=causal)
    asked = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    model = openvino.Model([opset13.result(found)], inputs)
    return openvino.Core().compile_model(model, "CPU", asked).create_infer_request()
