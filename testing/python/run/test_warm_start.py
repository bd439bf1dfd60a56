"""What a process does and does not do: nothing at import, no compiler when warm, and an answer whatever the machine lacks.

Most tests start fresh processes, on copies of a store that this one fills.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bitblas
from bitblas import env
from bitblas.build import LIBRARY, find_compiler

ROOT = Path(__file__).resolve().parents[3]
CONFIG = 'bitblas.MatmulConfig(M=4, N=64, K=128, A_dtype="float16", W_dtype="uint4", accum_dtype="float32")'
#: Builds or loads an operator, runs it, and checks the answer: integers of a size that float16 holds exactly.
PROGRAM = f"""
import json, sys
import torch, bitblas
op = bitblas.Matmul({CONFIG})
codes = torch.arange(64 * 128, dtype=torch.int64).view(64, 128) * 7 % 16
a = (torch.arange(4 * 128) % 3 - 1).to(torch.float16).view(4, 128)
out = op(a, op.transform_weight(codes))
assert torch.equal(out.double(), a.double() @ codes.double().T)
report = {{"origin": op.origin, "tvm": "tvm" in sys.modules}}
"""
#: The same for an attention: weights add up to one, so that a column of equal values comes back.
ATTENTION = """
import json, sys
import torch, bitblas
op = bitblas.FlashAtten(bitblas.FlashAttenConfig(2, 4, 8, 16, is_causal=True))
q, k, v = torch.randn(2, 8, 4, 16).half(), torch.randn(2, 8, 4, 16).half(), torch.arange(16).half().expand(2, 8, 4, 16)
assert torch.equal(op(q, k, v), v)
report = {"origin": op.origin, "tvm": "tvm" in sys.modules}
"""
TELL = "\nprint(json.dumps(report))\n"


def python(script, **environment):
    """A script in a fresh process; variables are set, or removed where None."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "BITBLAS_LOG_LEVEL": None, **environment}
    variables = {name: str(value) for name, value in variables.items() if value is not None}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables, timeout=300)


def report(script, **environment):
    """What a script printed last, as JSON, and the warnings it gave."""
    done = python(script, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), [line for line in done.stderr.splitlines() if line]


def build(directory):
    """Compile the operator of `PROGRAM` into a store."""
    with env.scope(BITBLAS_CACHE_DIR=directory):
        return bitblas.Matmul(eval(CONFIG, {"bitblas": bitblas}))


def fill(tmp_path_factory, construct):
    """A new store that holds what `construct` builds there."""
    if find_compiler() is None:
        pytest.skip("there is no C compiler to fill a store with")
    directory = tmp_path_factory.mktemp("warm")
    directory.chmod(0o700)
    assert construct(directory).origin == "compiled"
    return directory


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A store that holds the operator of `PROGRAM`."""
    return fill(tmp_path_factory, build)


@pytest.fixture(scope="module")
def warm_attention(tmp_path_factory):
    """A store that holds the operator of `ATTENTION`."""

    def construct(directory):
        with env.scope(BITBLAS_CACHE_DIR=directory):
            return bitblas.FlashAtten(bitblas.FlashAttenConfig(2, 4, 8, 16, is_causal=True))

    return fill(tmp_path_factory, construct)


def libraries(directory):
    return sorted((directory / "artifacts").glob(f"*/{LIBRARY}")) if (directory / "artifacts").is_dir() else []


# -- importing -------------------------------------------------------------------------------------------------------------

WATCH = """
import json, os, sys
import torch, numpy
events = []
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
def watch(event, arguments):
    if event == "open" and (arguments[2] or 0) & writing:
        events.append(f"opens {arguments[0]} to write")
    if event in ("subprocess.Popen", "os.system", "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn",
                 "os.mkdir", "os.rename", "os.remove", "socket.connect", "_thread.start_new_thread"):
        events.append(f"{event} {arguments}")
before = set(sys.modules)
sys.addaudithook(watch)
import bitblas
report = {"events": events, "modules": sorted({name.split(".")[0] for name in set(sys.modules) - before})}
"""


def test_importing_does_nothing(tmp_path):
    found, warnings = report(WATCH + TELL, HOME=tmp_path, BITBLAS_CACHE_DIR=None, PYTHONDONTWRITEBYTECODE=1)
    assert warnings == []
    assert found["events"] == []
    assert not {"tvm", "thefuzz", "filelock", "matplotlib", "onnxruntime"} & set(found["modules"])
    assert list(tmp_path.iterdir()) == []


def test_importing_looks_at_no_gpu():
    found, _ = report("import json, torch, bitblas\nreport = torch.cuda.is_initialized()" + TELL)
    assert found is False


def test_tvm_is_there_when_touched():
    script = (
        "import json, sys, bitblas\nbefore = 'tvm' in sys.modules\nname = bitblas.tvm.__name__\nreport = [before, name]"
    )
    assert report(script + TELL)[0] == [False, "tvm"]


# -- a warm start ----------------------------------------------------------------------------------------------------------


def test_a_warm_process_needs_no_tvm_and_no_compiler(warm):
    found, warnings = report(PROGRAM + TELL, BITBLAS_CACHE_DIR=warm, PATH="")
    assert found == {"origin": "loaded", "tvm": False}
    assert warnings == []


def test_attention_in_a_warm_process(warm_attention):
    """No TVM, no compiler, nothing started and nothing written."""
    files = {path: path.stat().st_mtime_ns for path in warm_attention.rglob("*")}
    script = WATCH + ATTENTION + "\nreport['events'] = [e for e in events if 'to write' in e or 'Popen' in e]"
    found, warnings = report(script + TELL, BITBLAS_CACHE_DIR=warm_attention, PATH="", PYTHONDONTWRITEBYTECODE=1)
    assert found == {"origin": "loaded", "tvm": False, "events": []}
    assert warnings == []
    assert {path: path.stat().st_mtime_ns for path in warm_attention.rglob("*")} == files


def test_a_warm_process_where_tvm_cannot_be_imported(warm):
    script = "import sys\nsys.modules['tvm'] = None\n" + PROGRAM.replace('"tvm" in sys.modules', "False")
    assert report(script + TELL, BITBLAS_CACHE_DIR=warm, PATH="")[0]["origin"] == "loaded"


def test_a_warm_process_starts_nothing_and_writes_nothing(warm):
    files = {path: path.stat().st_mtime_ns for path in warm.rglob("*")}
    script = WATCH + PROGRAM + "\nreport['events'] = [e for e in events if 'to write' in e or 'Popen' in e]"
    found, _ = report(script + TELL, BITBLAS_CACHE_DIR=warm, PYTHONDONTWRITEBYTECODE=1)
    assert found["events"] == []
    assert {path: path.stat().st_mtime_ns for path in warm.rglob("*")} == files


def test_a_cold_process_without_tvm_says_what_to_install(tmp_path):
    done = python("import sys\nsys.modules['tvm'] = None\n" + PROGRAM, BITBLAS_CACHE_DIR=tmp_path / "cold")
    assert done.returncode == 1
    assert "BuildError" in done.stderr
    assert "pip install 'apache-tvm>=0.27,<0.28'" in done.stderr


# -- no C compiler ---------------------------------------------------------------------------------------------------------


def test_without_a_compiler_it_works_in_memory_with_one_warning(tmp_path):
    other = "\nop = bitblas.Matmul(bitblas.MatmulConfig(M=1, N=32, K=32, W_dtype='int2'))\nreport['other'] = op.origin"
    found, warnings = report(PROGRAM + other + TELL, BITBLAS_CACHE_DIR=tmp_path / "cold", PATH="", BITBLAS_CC=None)
    assert found == {"origin": "in memory", "tvm": True, "other": "in memory"}
    assert len(warnings) == 1
    assert "C compiler" in warnings[0]
    assert "gcc" in warnings[0]
    assert "BITBLAS_CC" in warnings[0]
    assert libraries(tmp_path / "cold") == []


def test_attention_without_a_compiler(tmp_path):
    found, warnings = report(ATTENTION + TELL, BITBLAS_CACHE_DIR=tmp_path / "cold", PATH="", BITBLAS_CC=None)
    assert found == {"origin": "in memory", "tvm": True}
    assert len(warnings) == 1
    assert "C compiler" in warnings[0]


def test_a_compiler_that_is_named_and_missing_is_an_error(tmp_path):
    done = python(PROGRAM, BITBLAS_CACHE_DIR=tmp_path / "cold", BITBLAS_CC="/no/such/cc")
    assert done.returncode == 1
    assert "BuildError" in done.stderr
    assert "/no/such/cc" in done.stderr


# -- threads ---------------------------------------------------------------------------------------------------------------

# Operands are made of bytes, so that torch has run no parallel loop before: what starts threads is our kernel alone.
THREADS = """
import json, os, sys
import torch
torch.set_num_threads({threads})
import bitblas
floats = dict.fromkeys(("A_dtype", "out_dtype", "accum_dtype"), "float32")
config = bitblas.MatmulConfig(M=4, N=2048, K=512, W_dtype="uint4", **floats)
op = bitblas.Matmul(config)
weight = torch.frombuffer(bytearray(b"\\x12" * (2048 * 256)), dtype=torch.int8).view(2048, 256)
a = torch.frombuffer(bytearray(4 * 4 * 512), dtype=torch.float32).view(4, 512)
out = torch.frombuffer(bytearray(4 * 4 * 2048), dtype=torch.float32).view(4, 2048)
def count():
    return len(os.listdir("/proc/self/task"))
before = count()
op(a, weight, output=out)
ours = count() - before
torch.rand(4, 1 << 20).sum()  # torch's own parallel loop
report = {{"ours": ours, "both": count() - before, "origin": op.origin, "parallel": op.plan.kernels[0].tiling.parallel}}
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_torchs_number_of_threads_holds(tmp_path_factory, threads):
    store = tmp_path_factory.getbasetemp() / "threads"
    store.mkdir(mode=0o700, exist_ok=True)
    report(
        THREADS.format(threads=1) + TELL, BITBLAS_CACHE_DIR=store
    )  # so that the process that counts compiles nothing
    found, _ = report(THREADS.format(threads=threads) + TELL, BITBLAS_CACHE_DIR=store)
    assert found["origin"] == "loaded"
    assert found["parallel"]
    assert found["ours"] == threads - 1
    assert found["both"] == threads - 1, "torch and the kernels have two pools of threads"


# -- stores that are not as they should be ---------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone", "manifest"])
def test_a_damaged_entry_is_built_again(warm, tmp_path, damage):
    store = tmp_path / "store"
    shutil.copytree(warm, store)
    store.chmod(0o700)
    (library,) = libraries(store)
    content = library.read_bytes()
    if damage == "gone":
        library.unlink()
    elif damage == "manifest":
        (library.parent / "manifest.json").unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        library.chmod(0o644)
        library.write_bytes(flipped if damage == "flipped" else content[:middle])
    found, warnings = report(PROGRAM + TELL, BITBLAS_CACHE_DIR=store)
    assert found["origin"] == "compiled"
    assert len(warnings) == 1
    assert "damaged" in warnings[0]
    found, warnings = report(PROGRAM + TELL, BITBLAS_CACHE_DIR=store, PATH="")
    assert found["origin"] == "loaded"
    assert warnings == []


TWICE = PROGRAM + "\nagain = bitblas.Matmul(op.config)\nreport['again'] = again.origin" + TELL


def assert_falls_back(directory):
    found, warnings = report(TWICE, BITBLAS_CACHE_DIR=directory)
    assert found["origin"] == "compiled"
    assert found["again"] == "loaded"
    assert len(warnings) == 1, warnings
    assert "cannot be kept in" in warnings[0]
    assert "BITBLAS_CACHE_DIR" in warnings[0]


def test_a_store_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    assert_falls_back(tmp_path / "file" / "store")


@contextlib.contextmanager
def tmpfs(path, size):
    path.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", f"size={size},mode=0700,uid={os.geteuid()}", "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if mount else None
    if done is None or done.returncode:
        pytest.skip(f"cannot mount a tmpfs to test a real disk: {done.stderr.strip() if done else 'no mount'}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk(tmp_path):
    with tmpfs(tmp_path / "disk", "32k") as disk:
        (disk / "rest").write_bytes(bytes(24 << 10))
        assert_falls_back(disk / "store")


def test_a_read_only_disk(warm, tmp_path):
    with tmpfs(tmp_path / "disk", "16m") as disk:
        shutil.copytree(warm, disk / "warm", symlinks=True)
        (disk / "warm").chmod(0o700)
        (disk / "cold").mkdir(mode=0o700)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert_falls_back(disk / "cold")
        found, warnings = report(PROGRAM + TELL, BITBLAS_CACHE_DIR=disk / "warm", PATH="")
        assert found == {"origin": "loaded", "tvm": False}
        assert warnings == []


def test_attention_on_a_read_only_disk(warm_attention, tmp_path):
    with tmpfs(tmp_path / "disk", "16m") as disk:
        shutil.copytree(warm_attention, disk / "warm", symlinks=True)
        (disk / "warm").chmod(0o700)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        found, warnings = report(ATTENTION + TELL, BITBLAS_CACHE_DIR=disk / "warm", PATH="")
        assert found == {"origin": "loaded", "tvm": False}
        assert warnings == []


def test_a_store_that_others_may_write_is_refused(warm, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(warm, store)
    store.chmod(0o777)
    done = python(PROGRAM, BITBLAS_CACHE_DIR=store)
    assert done.returncode == 1
    assert "ArtifactError" in done.stderr
    assert "may be written by others" in done.stderr
    with env.scope(BITBLAS_CACHE_DIR=store), pytest.raises(bitblas.ArtifactError, match="may be written by others"):
        bitblas.Matmul(bitblas.MatmulConfig(M=1, N=16, K=16, W_dtype="int4"))
