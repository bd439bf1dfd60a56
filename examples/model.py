"""A model quantized in place, compared with the dense one, fine-tuned by an adapter, saved and loaded again."""

import sys
import tempfile
import time
from pathlib import Path

import torch

import bitblas

HIDDEN, INNER, RANK = 1024, 4096, 8


class Adapter(torch.nn.Module):
    """LoRA (arXiv:2106.09685): what a frozen layer gives, and a product of two thin matrices that are trained."""

    def __init__(self, layer: bitblas.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = torch.nn.Parameter(torch.randn(RANK, layer.in_features) / layer.in_features**0.5)
        self.up = torch.nn.Parameter(torch.zeros(layer.out_features, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


def make_model() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(HIDDEN, INNER), torch.nn.SiLU(), torch.nn.Linear(INNER, HIDDEN))


def num_bytes(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def main() -> int:
    """Show it; the exit status says whether everything was as it should be."""
    torch.manual_seed(0)
    model, x = make_model(), torch.randn(32, HIDDEN)
    dense, before = num_bytes(model), model(x).detach()

    began = time.perf_counter()
    bitblas.quantize_(model, W_dtype="uint4", group_size=128)
    seconds, small = time.perf_counter() - began, num_bytes(model)
    print(f"quantized, and kernels ready, in {seconds:.2f} s: {dense / 1e6:.1f} MB -> {small / 1e6:.1f} MB")
    with torch.no_grad():
        error = float((model(x) - before).norm() / before.norm())
    print(f"outputs differ by {error:.1%} of their size, as four bits do")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        torch.save(model.state_dict(), path)  # packed: any machine can load it
        again = bitblas.quantize_(make_model(), W_dtype="uint4", group_size=128)
        again.load_state_dict(torch.load(path, weights_only=True))
    with torch.no_grad():
        same = torch.equal(again(x), model(x))
    print(f"saved and loaded: {'the same outputs' if same else 'OTHER OUTPUTS'}")

    tuned = torch.nn.Sequential(Adapter(model[0]), model[1], Adapter(model[2]))
    optimizer = torch.optim.Adam(tuned.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        loss = (tuned(x) - before).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"20 steps of an adapter over the frozen weights: loss {losses[0]:.2e} -> {losses[-1]:.2e}")
    return 0 if error < 0.2 and same and losses[-1] < losses[0] / 2 else 1


if __name__ == "__main__":
    sys.exit(main())
