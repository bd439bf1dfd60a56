"""`bitblas repack` and `bitblas unpack` in processes of their own: what they print, killed at any point, and their memory."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import checkpoint_folders as folders
from bitblas import cli
from bitblas.checkpoints import read_layers

ROOT = Path(__file__).resolve().parents[3]
VARIABLES = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"}


def python(script, *arguments):
    """A script in a fresh process."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=VARIABLES, timeout=300)


def command(*arguments):
    """The command in a fresh process."""
    return python("import sys; from bitblas.cli import main; sys.exit(main(sys.argv[1:]))", *arguments)


def source(path, shards=3, **more):
    tensors, _ = folders.model(folders.gptq_layer, **more)
    return folders.write(path, tensors, folders.gptq_config(), shards)


# -- what is printed -------------------------------------------------------------------------------------------------------


def test_there_and_back(tmp_path):
    src = source(tmp_path / "src")
    done = command("repack", src, tmp_path / "ours")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path / 'ours'}: 10 layers (10 uint4), 0.1 MB -> 0.1 MB in ")
    assert done.stdout.endswith(" MB/s, verified\n")
    done = command("unpack", tmp_path / "ours", tmp_path / "back", "--dtype", "bfloat16", "--no-verify")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(" MB/s, not verified\n")
    config = json.loads((tmp_path / "back" / "config.json").read_text(encoding="utf-8"))
    assert config["torch_dtype"] == "bfloat16"


def test_json(tmp_path, capsys):
    src = source(tmp_path / "src")
    assert cli.main(["repack", str(src), str(tmp_path / "ours"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"] == 10
    assert found["formats"] == {"uint4": 10}
    assert found["verified"] is True
    assert found["bytes_in"] == found["converted_bytes"] > 0
    assert found["bytes_out"] > 0
    assert found["seconds"] > 0
    assert found["mb_per_second"] == pytest.approx(found["bytes_in"] / 1e6 / found["seconds"])
    assert 50e6 < found["peak_memory_bytes"] < 50e9


def test_a_dense_model(tmp_path, capsys):
    tensors, _ = folders.model(folders.dense_layer)
    src = folders.write(tmp_path / "src", tensors)
    options = ["--format", "int4", "--group-size", "32", "--exclude", "*.o_proj", "--exclude", "model.layers.1.mlp.*"]
    assert cli.main(["repack", str(src), str(tmp_path / "ours"), *options]) == 0
    assert "6 layers (6 int4)" in capsys.readouterr().out
    assert len(read_layers(tmp_path / "ours")) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["repack", "{none}", "{dst}"], "SRC is .*none, which is no directory"),
        (["repack", "{src}", "{src}"], "neither may be or hold the other"),
        (["repack", "{src}", "{full}"], "which holds mine and no unfinished repack"),
        (["repack", "{src}", "{dst}", "--format", "uint4"], "is quantized already"),
        (["repack", "{src}", "{dst}", "--symmetric"], "name a --format"),
        (["repack", "{dense}", "{dst}"], "is not quantized: name a format"),
        (["repack", "{dense}", "{dst}", "--format", "uint9"], "W_dtype is 'uint9', which is no format"),
        (["repack", "{dense}", "{dst}", "--format", "float16"], "W_dtype is 'float16', which is not quantized"),
        (["repack", "{dense}", "{dst}", "--format", "uint4"], "which groups of 128 do not divide"),
        (["repack", "{broken}", "{dst}"], "model.layers.0.mlp.up_proj.scales in .* holds nan"),
        (["unpack", "{src}", "{dst}"], "quant_method is 'gptq'; expected 'bitblas'"),
        (["unpack", "{full}", "{dst}"], "config.json cannot be read"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(tmp_path, capsys, arguments, message):
    places = {name: tmp_path / name for name in ("none", "src", "dense", "broken", "full", "dst")}
    tensors, _ = folders.model(folders.gptq_layer)
    folders.write(places["src"], tensors, folders.gptq_config())
    tensors["model.layers.0.mlp.up_proj.scales"][0] = float("nan")
    folders.write(places["broken"], tensors, folders.gptq_config())
    folders.write(places["dense"], folders.model(folders.dense_layer)[0])
    places["full"].mkdir()
    (places["full"] / "mine").write_text("keep", encoding="utf-8")
    assert cli.main([argument.format(**places) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("bitblas: error: ")
    assert output.err.count("\n") == 1
    assert re.search(message, output.err)
    assert not places["dst"].exists()


# -- killed ----------------------------------------------------------------------------------------------------------------

#: Runs a command in children, of which each kills itself, as SIGKILL does, at the n-th of what changes files: a tensor
#: written, a sync, a rename, a removal. Prints how each ended, and what it left.
KILLED = """
import json, os, signal, sys
from pathlib import Path
from bitblas import checkpoints, cli
from bitblas.checkpoints import writing

points, changes, dst = json.loads(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[5])

def counted(work, left):
    def do(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return work(*arguments, **options)
    return do

for point in points:
    child = os.fork()
    if child == 0:
        left, owners = [point], {"ShardWriter": writing.ShardWriter, "Path": Path, "writing": writing}
        for owner, name in changes:
            setattr(owners[owner], name, counted(getattr(owners[owner], name), left))
        os._exit(cli.main(sys.argv[3:]))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([status, sorted(path.name for path in dst.iterdir())]), flush=True)
    if status != -9:
        break
"""
EVERYTHING = [["ShardWriter", "_append"], ["Path", "replace"], ["Path", "unlink"], ["writing", "sync"]]


def killed(points, changes, *arguments):
    """(exit code, names left) of each child."""
    done = python(KILLED, json.dumps(points), json.dumps(changes), *arguments)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["repack", "unpack"])
def test_killed_anywhere_and_continued(tmp_path, verb):
    """Killed at several points of one run after the other, each of which goes on; the result is that of one run."""
    src = source(tmp_path / "src")
    assert cli.main(["repack", str(src), str(tmp_path / "ours")]) == 0
    start = src if verb == "repack" else tmp_path / "ours"
    assert cli.main([verb, str(start), str(tmp_path / "whole")]) == 0
    whole, dst = folders.tree(tmp_path / "whole"), tmp_path / "dst"
    ended = killed([1, 2, 3, 4, 9, 30, 45, 20, 25, 14, 11, 9, 8, 7, 6, 5, 4, 3], EVERYTHING, verb, start, dst)
    codes = [code for code, _ in ended]
    assert len(codes) >= 7
    assert set(codes[:-1]) == {-9}
    for _, left in ended:
        assert "config.json" not in left or set(left) >= set(whole)
    if codes[-1]:
        assert command(verb, start, dst).returncode == 0
    assert folders.tree(dst) == whole


@pytest.mark.slow
def test_killed_between_the_config_and_the_end(tmp_path):
    """All is there but the journal is, too: a further run only removes it."""
    src = source(tmp_path / "src", shards=1)
    assert cli.main(["repack", str(src), str(tmp_path / "whole")]) == 0
    ((code, left),) = killed([1], [["Path", "unlink"]], "repack", src, tmp_path / "dst")
    assert code == -9
    assert set(left) == {*folders.tree(tmp_path / "whole"), ".repack.json"}
    assert command("repack", src, tmp_path / "dst").returncode == 0
    assert folders.tree(tmp_path / "dst") == folders.tree(tmp_path / "whole")


#: Files may have no more bytes than are given.
LIMITED = """
import resource, sys
from bitblas import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(cli.main(sys.argv[2:]))
"""


def test_a_file_that_cannot_grow(tmp_path):
    """The system refuses a write in the middle of a file: it is removed, and a later run goes on."""
    src, dst = source(tmp_path / "src"), tmp_path / "dst"
    done = python(LIMITED, 10000, "repack", src, dst)
    assert done.returncode == 2
    assert done.stderr.startswith("bitblas: error: ")
    assert done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert not dst.exists()
    assert command("repack", src, dst).returncode == 0
    assert len(read_layers(dst)) == 10


# -- memory ----------------------------------------------------------------------------------------------------------------

#: Imports what a run imports, then tells how much its peak of memory grew in the run, beside that before.
MEASURED = """
import resource, sys
from bitblas import cli
from bitblas.checkpoints import repack, unpack
import torch
torch.ones(1024, 1024) @ torch.ones(1024, 1024)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
{"repack": repack, "unpack": unpack}[sys.argv[1]](sys.argv[2], sys.argv[3])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
def test_memory_is_bounded_by_two_shards(tmp_path, act_order):
    """Four shards of 70 MB: what is held does not grow with the model."""
    src, generator = tmp_path / "src", torch.Generator().manual_seed(0)
    src.mkdir()
    weight_map, n, k = {}, 4096, 2048
    for shard in range(4):
        tensors = {}
        for layer in range(16):
            groups = torch.arange(k, dtype=torch.int32) // 128
            parts = {
                "qweight": torch.randint(0, 1 << 31, (k // 8, n), dtype=torch.int32, generator=generator),
                "qzeros": torch.full((k // 128, n // 8), 0x44444444, dtype=torch.int32),
                "scales": torch.rand(k // 128, n, generator=generator).half(),
                "g_idx": groups[torch.randperm(k, generator=generator)] if act_order else groups,
            }
            tensors |= {f"model.layers.{shard * 16 + layer}.{part}": tensor for part, tensor in parts.items()}
        file = f"model-{shard + 1:05}-of-00004.safetensors"
        save_file(tensors, src / file)
        weight_map |= dict.fromkeys(tensors, file)
    (src / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    (src / "config.json").write_text(
        json.dumps({"quantization_config": folders.gptq_config(group=128)}), encoding="utf-8"
    )
    size = max(path.stat().st_size for path in src.glob("*.safetensors"))
    assert size > 65e6
    done = python(MEASURED, "repack", src, tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2 * size
    size = max(path.stat().st_size for path in (tmp_path / "ours").glob("*.safetensors"))
    done = python(MEASURED, "unpack", tmp_path / "ours", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2 * size * 4  # a dense shard has four times the size
