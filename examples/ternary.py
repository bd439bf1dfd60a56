"""A net with ternary weights: trained with straight-through gradients, deployed to two bits a weight, saved and loaded."""

import sys
import tempfile
import time
from pathlib import Path

import torch

import bitblas

CLASSES, FEATURES, HIDDEN, STEPS = 10, 256, 1024, 60


def make_net() -> torch.nn.Sequential:
    """Two BitLinears; `bitblas.ternarize_` makes such a net of any with torch.nn.Linear layers."""
    return torch.nn.Sequential(bitblas.BitLinear(FEATURES, HIDDEN), torch.nn.SiLU(), bitblas.BitLinear(HIDDEN, CLASSES))


def draw(centres: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around the centres of classes, and their classes."""
    labels = torch.randint(0, CLASSES, (count,))
    return centres[labels] + 2 * torch.randn(count, FEATURES), labels


def accuracy(net: torch.nn.Module, points: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float((net(points).argmax(1) == labels).float().mean())


def num_bytes(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def main() -> int:
    """Show it; the exit status says whether everything was as it should be."""
    torch.manual_seed(0)
    centres = torch.randn(CLASSES, FEATURES) / 2
    points, labels = draw(centres, 2000)
    net = make_net()
    untrained, floats = accuracy(net, points, labels), num_bytes(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(STEPS):
        batch, wanted = draw(centres, 256)
        loss = torch.nn.functional.cross_entropy(net(batch), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = accuracy(net, points, labels)
    print(f"accuracy {untrained:.1%} -> {trained:.1%} in {STEPS} steps")

    with torch.no_grad():
        before = net(points)
    began = time.perf_counter()
    bitblas.deploy(net)
    seconds, packed = time.perf_counter() - began, num_bytes(net)
    print(f"deployed, and kernels ready, in {seconds:.2f} s: {floats / 1e6:.2f} MB -> {packed / 1e6:.2f} MB")
    deployed = accuracy(net, points, labels)
    with torch.no_grad():
        error = float((net(points) - before).norm() / before.norm())
    print(f"accuracy {deployed:.1%}; outputs differ by {error:.0e} of their size from those in training")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.pt"
        torch.save(net.state_dict(), path)  # packed: any machine can load it
        again = make_net()
        again.load_state_dict(torch.load(path, weights_only=True))  # and is deployed by that
    with torch.no_grad():
        same = torch.equal(again(points), net(points))
    print(f"saved and loaded: {'the same outputs' if same else 'OTHER OUTPUTS'}")
    return 0 if trained > 0.9 and abs(deployed - trained) < 0.01 and error < 1e-2 and same else 1


if __name__ == "__main__":
    sys.exit(main())
