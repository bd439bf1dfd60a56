"""``python -m benchmark.model``: a stack of Llama's blocks, quantized, beside the dense model of the same weights."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bitblas.bench.machine import Machine, measure_machine

from .goals import Goal
from .report import goal_table, line, versions

#: What is asked: seconds of starting, times the dense float32 model's speed, bytes beside float16.
COLD_SECONDS, WARM_SECONDS, DECODE, PREFILL, BYTES = 20.0, 1.0, 3.0, 1.2, 0.3
_VERSIONS = ("python", "bitblas", "kernels", "torch", "apache-tvm", "apache-tvm-ffi", "transformers", "safetensors")
#: Tokens of a prompt, of the prompt before decoding, and that are decoded in a turn.
PROMPT, CONTEXT, DECODED = 128, 16, 16


@dataclass(frozen=True)
class Shape:
    """Of the model.

    Attributes
    ----------
    vocab_size : int
        4096 for 4 blocks is what 32000 is for 31: so much of a whole model's time goes to the dense lm_head.
    """

    blocks: int = 4
    hidden: int = 2048
    heads: int = 16
    intermediate: int = 5632
    vocab_size: int = 4096
    group_size: int = 128

    def config(self) -> Any:
        """Of transformers."""
        from transformers import LlamaConfig

        return LlamaConfig(
            num_hidden_layers=self.blocks,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocab_size,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
        )


@dataclass
class Findings:
    """All of a run.

    Attributes
    ----------
    starts : dict
        By what is started, the parts of `model_start`, each the median of some processes.
    speeds : dict
        By model, the median seconds of a token that is decoded (``"decode"``) and of a prompt (``"prefill"``).
    errors : dict
        By model, the largest distance of a logit from the same model's in float64, over the largest logit.
    ratio : float
        Bytes of all quantized layers, with scales, zero points and all, over those of their weights in float16.
    """

    shape: Shape
    machine: Machine
    versions: dict[str, str]
    date: str
    starts: dict[str, dict[str, float]] = field(default_factory=dict)
    speeds: dict[str, dict[str, float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    ratio: float | None = None

    def faster(self, name: str, what: str) -> float:
        """How many times as fast as the dense float32 model another is."""
        return self.speeds["torch float32"][what] / self.speeds[name][what]


# -- folders and models ----------------------------------------------------------------------------------------------------


def make_folders(shape: Shape, root: Path) -> None:
    """Write a random model, rounded, "bitblas"; a dense one of the same weights, "dense"; and logits in float64, "exact.pt"."""
    import transformers

    from bitblas_transformers import BitBLASConfig

    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    dense = transformers.LlamaForCausalLM(shape.config())
    dense.save_pretrained(root / "dense")
    wanted = BitBLASConfig(W_dtype="uint4", group_size=shape.group_size, symmetric=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "dense", quantization_config=wanted)
    model.save_pretrained(root / "bitblas")
    for name, layer in quantized_layers(model).items():
        dense.get_submodule(name).weight.data = layer.to_quantized().dequantize()
    dense.save_pretrained(root / "dense")
    prompt = torch.randint(shape.vocab_size, (1, PROMPT))
    with torch.inference_mode():
        exact = dense.double()(prompt).logits
    torch.save({"shape": asdict(shape), "prompt": prompt, "logits": exact}, root / "exact.pt")


def has_folders(shape: Shape, root: Path) -> bool:
    """Whether the folders of a shape are there already."""
    path = root / "exact.pt"
    return path.exists() and torch.load(path)["shape"] == asdict(shape)


def quantized_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The quantized layers of a model by their names."""
    import bitblas

    return {name: module for name, module in model.named_modules() if isinstance(module, bitblas.Linear)}


def load(name: str, root: Path) -> torch.nn.Module:
    """One of the candidates: ``"torch"`` or ``"bitblas"``, and the dtype of activations."""
    import transformers

    import bitblas

    library, _, dtype = name.partition(" ")
    if library == "bitblas":
        return bitblas.load_model(root / "bitblas", dtype=getattr(torch, dtype), device="cpu")
    return transformers.AutoModelForCausalLM.from_pretrained(root / "dense", dtype=getattr(torch, dtype))


# -- starting --------------------------------------------------------------------------------------------------------------


def start(folder: Path, dtype: str, store: Path, threads: int) -> dict[str, float]:
    """What `model_start` finds in a fresh process, with an artifact store."""
    env = {**os.environ, "BITBLAS_CACHE_DIR": str(store), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "benchmark.model_start", str(folder), dtype, repr(time.time())]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def starts(root: Path, count: int, threads: int) -> dict[str, dict[str, float]]:
    """Starts with an empty store, with a full one, and of the dense model, in turns."""
    found: dict[str, list[dict[str, float]]] = {"bitblas, cold": [], "bitblas, warm": [], "torch float32": []}
    for index in range(count):
        with tempfile.TemporaryDirectory(dir=root, prefix=f"store{index}-") as store:
            for name in found:
                folder = root / ("dense" if name.startswith("torch") else "bitblas")
                found[name].append(start(folder, "float32", Path(store), threads))
    return {name: medians(each) for name, each in found.items()}


def medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each field."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


# -- turns -----------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def decode(model: torch.nn.Module, prompt: torch.Tensor, tokens: int = DECODED) -> list[float]:
    """Seconds of each token that is chosen greedily, one at a time, after a prompt."""
    found = []
    out = model(prompt, use_cache=True, logits_to_keep=1)
    for _ in range(tokens):
        began = time.perf_counter()
        chosen = out.logits[:, -1:].argmax(-1)
        out = model(chosen, past_key_values=out.past_key_values, use_cache=True)
        found.append(time.perf_counter() - began)
    return found


@torch.inference_mode()
def prefill(model: torch.nn.Module, prompt: torch.Tensor) -> list[float]:
    """Seconds until the logits of what follows a prompt are there."""
    began = time.perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1)
    return [time.perf_counter() - began]


def in_turns(calls: dict[str, Callable[[], list[float]]], rounds: int) -> dict[str, float]:
    """The median of what each call finds; the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, call in calls.items():
            taken = call()
            found[name] += taken if index else []
    return {name: statistics.median(each) for name, each in found.items()}


def speeds(models: dict[str, torch.nn.Module], prompt: torch.Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Of all models, in turns A B A B."""
    decoding = in_turns({name: lambda m=m: decode(m, prompt[:, :CONTEXT]) for name, m in models.items()}, rounds)
    reading = in_turns({name: lambda m=m: prefill(m, prompt) for name, m in models.items()}, rounds)
    return {name: {"decode": decoding[name], "prefill": reading[name]} for name in models}


@torch.inference_mode()
def errors(models: dict[str, torch.nn.Module], exact: torch.Tensor, prompt: torch.Tensor) -> dict[str, float]:
    """How far the logits of a prompt are from those in float64."""
    most = exact.abs().max()
    return {name: float((model(prompt).logits.double() - exact).abs().max() / most) for name, model in models.items()}


# -- results ---------------------------------------------------------------------------------------------------------------


def judge(found: Findings) -> list[Goal]:
    """The goals of the issue, as far as they were measured."""
    goals = []
    if found.starts:
        cold, warm = found.starts["bitblas, cold"]["in all"], found.starts["bitblas, warm"]
        beyond = warm["import bitblas"] + warm["load"] + warm["first token"] - warm["reading the weights"]
        goals.append(_goal("cold start, without tuning", COLD_SECONDS, cold, "s"))
        goals.append(
            _goal(
                "warm start, beyond reading the weights and importing torch and transformers", WARM_SECONDS, beyond, "s"
            )
        )
    if found.speeds:
        for what, limit in (("decode", DECODE), ("prefill", PREFILL)):
            times = found.faster("bitblas float32", what)
            goals.append(
                Goal(what, f"≥ {limit:g}× torch float32", f"{times:.2f}×", times >= limit, margin=times / limit)
            )
    if found.ratio is not None:
        goals.append(_goal("bytes of quantized layers", BYTES, found.ratio, "× float16"))
    return goals


def _goal(name: str, limit: float, value: float, unit: str) -> Goal:
    return Goal(name, f"≤ {limit:g} {unit}", f"{value:.3g} {unit}", value <= limit, margin=limit / value)


def markdown(found: Findings) -> str:
    """Tables for a document."""
    shape, machine = found.shape, found.machine
    head = (
        f"{found.date}, {machine.cpu} ({machine.isa}), {machine.threads} threads; "
        + ", ".join(f"{name} {version}" for name, version in found.versions.items())
        + f".\n{shape.blocks} of Llama's blocks, hidden {shape.hidden}, {shape.heads} heads, intermediate "
        f"{shape.intermediate}, vocabulary {shape.vocab_size} with a dense lm_head; uint4 in groups of "
        f"{shape.group_size} with zeros; prompts of {CONTEXT} (decode) and {PROMPT} tokens (prefill)."
    )
    parts = [head, goal_table(judge(found))]
    if found.speeds:
        rows = [
            line(["", "tokens/s", "beside float32", "prefill, ms", "beside float32", "error of logits"]),
            "|---" * 6 + "|",
        ]
        for name, row in found.speeds.items():
            decoded, read = found.faster(name, "decode"), found.faster(name, "prefill")
            cells = [name, f"{1 / row['decode']:.1f}", f"{decoded:.2f}×", f"{row['prefill'] * 1e3:.0f}", f"{read:.2f}×"]
            rows.append(line([*cells, f"{found.errors[name]:.1e}"]))
        parts.append("\n".join(rows))
    if found.starts:
        names = list(next(iter(found.starts.values())))
        rows = [line(["start", *(f"{name}, {_unit(name)}" for name in names)]), "|---" * (1 + len(names)) + "|"]
        for name, row in found.starts.items():
            rows.append(line([name, *(_number(part, row[part]) for part in names)]))
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _unit(part: str) -> str:
    from .model_start import FIELDS

    return "MB" if part in FIELDS else "s"


def _number(part: str, value: float) -> str:
    return f"{value / 1e6:.0f}" if _unit(part) == "MB" else f"{value:.2f}"


def fields(found: Findings) -> dict[str, object]:
    """As JSON values."""
    return {**asdict(found), "goals": [asdict(goal) for goal in judge(found)]}


# -- the command -----------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, root: Path) -> Findings:
    """Measure all that is asked."""
    shape = Shape(options.blocks, options.hidden, options.heads, options.intermediate, options.vocab)
    named = {name: text for name, text in versions().items() if name in _VERSIONS}
    named |= {name: metadata.version(name) for name in _VERSIONS if name not in named}
    found = Findings(shape, measure_machine(options.threads), named, time.strftime("%Y-%m-%d", time.gmtime()))
    if options.resume:
        take_over(found, options.out / "model.json")
    if not has_folders(shape, root):
        make_folders(shape, root)
    if options.starts:
        found.starts = starts(root, options.starts, options.threads)
    if options.rounds:
        known = torch.load(root / "exact.pt")
        models = {name: load(name, root) for name in options.models.split(",")}
        found.errors = errors(models, known["logits"], known["prompt"])
        found.speeds = speeds(models, known["prompt"], options.rounds)
        ours = next(quantized_layers(model) for name, model in models.items() if name.startswith("bitblas"))
        dense = sum(2 * layer.in_features * layer.out_features for layer in ours.values())
        found.ratio = sum(bytes_of(layer) for layer in ours.values()) / dense
    return found


def take_over(found: Findings, path: Path) -> None:
    """What an earlier run has measured, with the same of everything."""
    if not path.exists():
        return
    earlier = json.loads(path.read_text())
    if earlier["versions"] == found.versions and earlier["shape"] == asdict(found.shape):
        for name in ("starts", "speeds", "errors", "ratio"):
            setattr(found, name, earlier[name])


def bytes_of(layer: torch.nn.Module) -> int:
    """Of all tensors that a layer holds."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*layer.buffers(), *layer.parameters()))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write model.json and model.md, print the tables; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(prog="benchmark.model", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7, help="turns of each model (7); 0: no speeds")
    parser.add_argument("--starts", type=int, default=3, help="fresh processes of each kind (3); 0: none")
    parser.add_argument(
        "--models",
        default="torch float32,bitblas float32,torch bfloat16,bitblas bfloat16",
        help="what to time in turns: a library and the dtype of activations, the first of all dense and float32",
    )
    parser.add_argument("--blocks", type=int, default=Shape.blocks)
    parser.add_argument("--hidden", type=int, default=Shape.hidden)
    parser.add_argument("--heads", type=int, default=Shape.heads)
    parser.add_argument("--intermediate", type=int, default=Shape.intermediate)
    parser.add_argument("--vocab", type=int, default=Shape.vocab_size)
    parser.add_argument("--folder", type=Path, help="where models are, or are made and stay (a temporary folder)")
    parser.add_argument(
        "--resume", action="store_true", help="keep what an earlier run has measured, and this does not"
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="where model.json and model.md go (results)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.folder:
        found = run(options, options.folder)
    else:
        with tempfile.TemporaryDirectory(prefix="bitblas-model-") as root:
            found = run(options, Path(root))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "model.json").write_text(json.dumps(fields(found), indent=1) + "\n")
    text = markdown(found)
    (options.out / "model.md").write_text(text)
    print(text)
    return int(any(goal.passed is False for goal in judge(found)))


if __name__ == "__main__":
    sys.exit(main())
