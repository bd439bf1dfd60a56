"""On a card: layers that move there and back, their gradients, graphs of torch and of CUDA, and what a call costs the host."""

import copy
import statistics
import time

import pytest
import torch

import bitblas
import layers
import reference
import ternary

FORMATS = ("uint1", "uint2", "uint3", "uint4", "uint8", "int2", "int4", "int8", "nf4", "fp4_e2m1", "float8_e4m3")
ROWS = (1, 16, 128)


def config(W_dtype="uint4", A_dtype="float16", **fields):
    zeros = W_dtype.startswith("uint")
    base = {"N": 256, "K": 512, "M": ROWS, "group_size": 128, "out_dtype": A_dtype, "with_zeros": zeros}
    return layers.config(
        W_dtype=W_dtype, A_dtype=A_dtype, **{**base, "zeros_mode": "quantized" if zeros else "original", **fields}
    )


def on_card(cfg, m, **draw):
    problem = reference.draw(cfg, m, **draw)
    layer = layers.fill(layers.build(cfg, device="cpu"), problem)
    return layer.to("cuda"), reference.on_tensor_cores(problem)


@pytest.mark.parametrize("A_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("W_dtype", FORMATS)
def test_to_the_card_and_back(W_dtype, A_dtype):
    cfg = config(W_dtype, A_dtype)
    layer, problem = on_card(cfg, 16)
    packed = layers.fill(layers.build(cfg, device="cpu"), problem).state_dict()
    assert layer.bitblas_matmul.target.kind == "cuda"
    with torch.no_grad():
        for _ in range(2):
            reference.assert_close(layer(problem.A.cuda()).cpu(), problem)
    back = copy.deepcopy(layer).cpu()
    assert back.bitblas_matmul.target.kind == "llvm"
    for state in (layer.state_dict(), back.state_dict()):
        assert all(torch.equal(state[name].cpu(), tensor) for name, tensor in packed.items())


def test_a_layer_that_is_made_there_and_loads_what_a_cpu_saved(tmp_path):
    cfg = config()
    problem = reference.draw(cfg, 3)
    torch.save(layers.fill(layers.build(cfg, device="cpu"), problem).state_dict(), tmp_path / "state.pt")
    layer = layers.build(cfg, device="cuda")
    layer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with torch.no_grad():
        reference.assert_close(layer(problem.A.cuda()).cpu(), reference.on_tensor_cores(problem))


def test_gradients():
    cfg = config(group_size=64)
    layer, problem = on_card(cfg, 8)
    A = problem.A.cuda().requires_grad_()
    layer(A).float().sum().backward()
    wanted = layer.to_quantized().dequantize().double().sum(0)
    bound = 2**-9 * layer.to_quantized().dequantize().double().abs().sum(0)
    assert bool(((A.grad.double() - wanted).abs() <= bound).all())


def test_torch_compile():
    layer, problem = on_card(config(), 16)
    model = torch.nn.Sequential(layer, torch.nn.ReLU())
    A = problem.A.cuda()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True)(A), model(A))


@pytest.mark.parametrize("m", ROWS)
def test_a_graph_of_cuda(m):
    layer, problem = on_card(config(), m, exact=True)
    A = torch.zeros_like(problem.A, device="cuda")
    with torch.inference_mode():
        layer(A)  # loads the kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(A)
        A.copy_(problem.A)
        graph.replay()
        reference.assert_exact(out.cpu(), problem)


def test_what_a_call_costs_the_host():
    layer, problem = on_card(config(), 1)
    A = problem.A.cuda()
    with torch.inference_mode():
        for _ in range(100):
            layer(A)
        torch.cuda.synchronize()
        times = []
        for _ in range(50):
            began = time.perf_counter()
            layer(A)
            times.append(time.perf_counter() - began)
            torch.cuda.synchronize()
    assert statistics.median(times) < 100e-6, times  # the goal is a tenth of that; this only notices what is far off


def test_a_whole_model_there(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 128)).half().cuda()
    x = torch.randn(4, 256, dtype=torch.float16, device="cuda")
    before = model(x)
    bitblas.quantize_(model, "int8", 128)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0.05)


# -- BitLinear -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", ternary.DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["ai8pc_wpt", "ai8pc_wpc", "ai8pc_wpg"])
def test_ternary_layers(quant_type, dtype, bias):
    """Deployed there: the numbers of float64 and of training there; what a CPU saved, and what is saved for one."""
    layer, x = ternary.make(64, 256, quant_type, dtype, bias=bias), ternary.rows(128, 256, dtype)
    expected, saved = ternary.expect(layer, x), ternary.state_of(copy.deepcopy(layer).deploy())
    layer.to("cuda")
    with torch.no_grad():
        ternary.assert_right(layer(x.cuda()).cpu(), expected)
        layer.deploy()
        assert layer.bitblas_matmul.target.kind == "cuda"
        for m in (*ROWS, 128):
            part = ternary.Expected(
                expected.output[:m], expected.allowed[:m], expected.steps, expected.whole, expected.weight
            )
            ternary.assert_right(layer(x[:m].cuda()).cpu(), part)
        odd = x.cuda()
        odd[3], odd[4, 5] = 0, float("nan")
        out = layer(odd)
        assert torch.equal(out[3], layer.bias if bias else torch.zeros_like(out[3]))
        assert out[4].isnan().all()
        assert torch.equal(out[5], layer(x.cuda())[5])
    other = bitblas.BitLinear(256, 64, bias, quant_type=quant_type, dtype=dtype, device="cuda")
    other.load_state_dict(saved)
    assert torch.equal(other(x.cuda()), layer(x.cuda()))
    back = copy.deepcopy(layer).cpu()
    assert all(
        torch.equal(tensor.cpu(), saved[name]) for name, tensor in layer.state_dict().items() if name != "w_scale"
    )
    torch.testing.assert_close(
        layer.w_scale.cpu(), saved["w_scale"], rtol=4 * ternary.unit(layer.w_scale.dtype), atol=0
    )
    assert torch.equal(back.state_dict()["w_packed"], saved["w_packed"])


def test_a_ternary_call_is_one_kernel():
    layer, x = (
        ternary.make(64, 256, dtype=torch.float16).to("cuda").deploy(),
        ternary.rows(16, 256, torch.float16).cuda(),
    )
    with torch.inference_mode():
        layer(x)
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            layer(x)
            torch.cuda.synchronize()
    kernels = [
        e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA and "bitblas" not in e.name
    ]
    assert len(kernels) == 1, kernels


def test_ternary_layers_in_graphs():
    layer, x = (
        ternary.make(64, 256, dtype=torch.float16).to("cuda").deploy(),
        ternary.rows(16, 256, torch.float16).cuda(),
    )
    with torch.inference_mode():
        expected = layer(x)
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), expected)
        place, graph = torch.zeros_like(x), torch.cuda.CUDAGraph()
        layer(place)
        with torch.cuda.graph(graph):
            out = layer(place)
        place.copy_(x)
        graph.replay()
        assert torch.equal(out, expected)
