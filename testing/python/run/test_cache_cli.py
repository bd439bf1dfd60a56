"""`bitblas cache`: what it prints, what it refuses, and a bundle that serves a machine without TVM and without a compiler."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fake_store
from bitblas import Linear, Matmul, MatmulConfig, cli, env, load_model, tuner
from bitblas.artifacts import ArtifactStore
from bitblas.artifacts import process as process_module
from bitblas.build import LIBRARY, find_compiler
from bitblas.cache.models import configs_of_model
from bitblas.checkpoints import LayerSpec, make_config
from bitblas.codecs import QuantizedWeight, format_tensor
from bitblas.errors import CheckpointError
from bitblas.target import host_target
from fake_store import OTHER_TARGET, TARGET, attention, config, put, tune

ROOT = Path(__file__).resolve().parents[3]
KEY = r"[0-9a-f]{64}"


@pytest.fixture(autouse=True)
def clean():
    """Nothing is in memory."""
    process_module.this_process.reset()


@pytest.fixture
def cache(capsys):
    """The command: its exit status, and what it printed; JSON is parsed."""

    def run(*arguments):
        capsys.readouterr()
        status = cli.main(["cache", *map(str, arguments)])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return status, json.loads(printed.out) if "--json" in arguments and not status else printed.out or printed.err

    return run


@pytest.fixture
def filled(store):
    """A store of a tuned and a default operator, one of another version and one for another target; the first is whole."""
    put(store, config(64))
    put(store, config(128), tuned=tune(config(128)))
    put(store, config(64), bitblas="0.0.1")
    put(store, config(64), OTHER_TARGET)
    return store


def damage(path, how):
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[:-5] if how == "cut" else content)


def libraries(root):
    return sorted((root / "artifacts").glob(f"*/{LIBRARY}"))


# -- path, list ------------------------------------------------------------------------------------------------------------


def test_path(store, cache):
    assert cache("path") == (0, f"{store}\n")


def test_a_list_in_words(filled, cache):
    status, text = cache("list")
    assert status == 0
    assert len(re.findall(r"^  [0-9a-f]{12} ", text, re.MULTILINE)) == 4
    assert re.search(r"default +float16 x uint4 -> float16, N=64 K=64, M=1 16$", text, re.MULTILINE)
    assert re.search(r"tuned +float16 x uint4 -> float16, N=128 K=64, M=1 16$", text, re.MULTILINE)
    assert re.search(r"by other versions: float16 x uint4", text)
    assert f"{TARGET} (" in text
    assert f"{filled}: 4 operators" in text
    assert "0 saved operators in the index, 1 tuning record\n" in text
    assert "1 operator by other versions" in text
    assert "bitblas cache prune --stale" in text


def test_a_list_in_json(filled, cache):
    _, found = cache("list", "--json")
    assert found["root"] == str(filled)
    assert (found["tuning"], found["saved"], found["damaged"], found["leftovers"]) == (1, 0, [], [])
    rows = {(row["config"]["N"], row["target"], row["usable"]): row for row in found["operators"]}
    tuned, default = rows[128, str(TARGET), True], rows[64, str(TARGET), True]
    assert (tuned["tilings"], default["tilings"]) == ("tuned", "default")
    assert rows[64, str(TARGET), False]["tilings"] == ""
    assert default["runs"] is (TARGET.features <= host_target().features)
    files = [path for path in Path(default["path"]).iterdir() if path.is_file()]
    assert default["size"] == sum(path.stat().st_size for path in files)
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", default["built"])
    order = [(row["target"], row["operator"]) for row in found["operators"]]
    assert order == sorted(order)


def test_a_list_with_attentions(store, cache):
    put(store, config(64))
    put(store, attention())
    wide = attention(seq_len=32, seq_len_kv=None, dim=128, dim_v=96, is_causal=True, layout="ntn", K_dtype="bfloat16")
    put(store, wide, tuned=tune(wide))
    put(store, attention(), bitblas="0.0.1")
    _, text = cache("list")
    dims = "attention float16 -> float16, dim=64, rows=1 16 64 256 1024$"
    assert re.search(f"default +{dims}", text, re.MULTILINE)
    assert re.search(f"by other versions: {dims}", text, re.MULTILINE)
    wide_words = "attention float16/bfloat16 -> float16, dim=128 dim_v=96, causal, K transposed, rows=64"
    assert re.search(f"tuned +{wide_words}$", text, re.MULTILINE)
    _, found = cache("list", "--json")
    assert sorted((row["operator"].split()[0], row["tilings"], row["usable"]) for row in found["operators"]) == [
        ("attention", "", False),
        ("attention", "default", True),
        ("attention", "tuned", True),
        ("float16", "default", True),
    ]
    assert cache("verify")[1].endswith("5 entries verified, 0 damaged\n")
    _, pruned = cache("prune", "--stale", "--json")
    assert [row["kind"] for row in pruned["removed"]] == ["operator"]


def test_a_kind_of_operator_that_this_version_does_not_know(store, cache):
    from bitblas.build import toolchain

    plan = {"operator": "convolution", "config": {"channels": 3}, "target": TARGET.fields(), "kernels": []}
    made = {"plan": plan, "toolchain": {**toolchain(), "bitblas": "99"}, "library": LIBRARY, "linker": "none"}

    def fill(staging):
        (staging / LIBRARY).write_bytes(b"library")
        return made

    ArtifactStore(store).get_or_build("ab" * 32, fill)
    status, text = cache("list")
    assert status == 0
    assert "by other versions: channels=3" in text
    assert cache("verify")[0] == 0


@pytest.mark.parametrize("verb", ["list", "verify"])
def test_a_store_that_is_not_there(tmp_path, cache, verb):
    with env.scope(BITBLAS_CACHE_DIR=tmp_path / "none"):
        status, text = cache(verb)
        assert status == 0
        assert f"{tmp_path / 'none'}: 0 " in text
        assert cache(verb, "--json")[0] == 0
        assert cache("prune", "--all")[0] == 0
    assert not (tmp_path / "none").exists()


def test_a_list_beside_processes_that_remove_and_build(filled, cache, monkeypatch):
    """Entries that are listed, and have gone when they are looked at; one that is half there."""
    store, real = ArtifactStore(filled), ArtifactStore.keys
    keys = store.keys()

    def vanishing(self):
        found = real(self)
        shutil.rmtree(filled / "artifacts" / keys[0])
        return [*found, "0" * 64]

    monkeypatch.setattr(ArtifactStore, "keys", vanishing)
    _, found = cache("list", "--json")
    assert [row["key"] for row in found["operators"]].count(keys[0]) == 0
    assert len(found["operators"]) == 3


def test_a_list_shows_what_is_damaged(filled, cache):
    first, second, *_ = sorted((filled / "artifacts").iterdir())
    (first / "manifest.json").unlink()
    damage(second / LIBRARY, "cut")
    (record,) = filled.glob("tuning/*.json")
    record.write_text("{}")
    status, text = cache("list")
    assert status == 0
    for path in (first, second, record):
        assert re.search(rf"^damaged .* {path}: ", text, re.MULTILINE)
    _, found = cache("list", "--json")
    assert len(found["operators"]) == 4
    assert {row["kind"] for row in found["damaged"]} == {"operator", "tuning record"}


def test_what_others_may_write_is_refused(filled, cache):
    filled.chmod(0o777)
    for arguments in (["list"], ["verify"], ["prune", "--all"], ["export", filled.parent / "a.tar", "--all"]):
        status, text = cache(*arguments)
        assert (status, text.count("\n")) == (2, 1)
        assert "may be written by others" in text


# -- verify ----------------------------------------------------------------------------------------------------------------


def test_verify_of_what_is_whole(filled, cache):
    assert cache("verify") == (0, f"{filled}: 5 entries verified, 0 damaged\n")


def test_verify_leaves_no_trace_of_use(filled, cache):
    (library, *_) = libraries(filled)
    os.utime(library, (1e9, 2e9))
    assert cache("verify")[0] == 0
    assert (library.stat().st_atime, library.stat().st_mtime) == (1e9, 2e9)


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_verify_names_what_is_damaged_and_sets_it_aside(filled, cache, capsys, how):
    (library, *_) = libraries(filled)
    (record,) = filled.glob("tuning/*.json")
    damage(library, how)
    damage(record, how)
    status, text = cache("verify")
    assert status == 1
    assert f"damaged operator {library.parent}: {LIBRARY}" in text
    assert f"damaged tuning record {record}: " in text
    assert library.exists()
    assert cli.main(["cache", "verify", "--json", "--repair"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {row["path"] for row in found["set_aside"]} == {str(library.parent), str(record)}
    assert not library.exists()
    assert not record.exists()
    assert len(list((filled / "quarantine").iterdir())) == 2
    assert cache("verify") == (0, f"{filled}: 3 entries verified, 0 damaged\n")
    assert "2 in quarantine" in cache("list")[1]


# -- prune -----------------------------------------------------------------------------------------------------------------


def test_prune_asks_for_criteria(filled, cache):
    status, text = cache("prune")
    assert status == 2
    for option in (
        "--older-than",
        "--max-size",
        "--stale",
        "--quarantine",
        "--staging",
        "--failed",
        "--all",
        "--dry-run",
    ):
        assert option in text
    assert len(libraries(filled)) == 4


@pytest.mark.parametrize("arguments", [["--older-than", "x"], ["--older-than", "-1"], ["--max-size", "5 apples"]])
def test_criteria_that_mean_nothing(cache, arguments, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["cache", "prune", *arguments])
    assert left.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


def test_prune_by_version(filled, cache):
    _, before = cache("list", "--json")
    (stale,) = [row for row in before["operators"] if not row["usable"]]
    _, tried = cache("prune", "--stale", "--dry-run", "--json")
    assert [row["path"] for row in tried["removed"]] == [stale["path"]]
    assert len(libraries(filled)) == 4
    _, found = cache("prune", "--stale", "--json")
    assert found["removed"] == tried["removed"]
    assert found["freed"] == stale["size"]
    _, after = cache("list", "--json")
    assert after["operators"] == [row for row in before["operators"] if row["usable"]]
    assert after["tuning"] == 1
    (record,) = filled.glob("tuning/*.json")
    values = json.loads(record.read_text())
    del values["checksum"]
    values["versions"]["bitblas"] = "0.0.1"
    record.write_text(json.dumps(values))
    assert len(cache("prune", "--stale", "--json")[1]["removed"]) == 1
    assert not record.exists()


def test_prune_by_age_counts_from_the_last_use(filled, cache):
    old, used, *_ = libraries(filled)
    for library in (old, used):
        for path in library.parent.iterdir():
            os.utime(path, (1.2e9, 1.2e9))
    os.utime(used, None)
    _, found = cache("prune", "--older-than", "30", "--json")
    assert [row["path"] for row in found["removed"]] == [str(old.parent)]
    assert len(libraries(filled)) == 3


def test_prune_by_size_takes_the_longest_unused(filled, cache):
    everything = libraries(filled)
    for number, library in enumerate(reversed(everything)):
        for path in library.parent.iterdir():
            os.utime(path, (1e9 + number, 1e9 + number))
    sizes = {library: sum(path.stat().st_size for path in library.parent.iterdir()) for library in everything}
    most = sum(sizes.values()) - 1
    _, found = cache("prune", "--max-size", most, "--json")
    assert [row["path"] for row in found["removed"]] == [str(everything[-1].parent)]
    assert cache("prune", "--max-size", "1G", "--json")[1]["removed"] == []
    cache("prune", "--max-size", "0.02K")
    assert libraries(filled) == []


def test_prune_of_leftovers(filled, cache):
    key = ArtifactStore(filled).keys()[0]
    for folder in ("staging", "quarantine", "failed"):
        (filled / folder / f"{key}.1").mkdir(parents=True)
        (filled / folder / f"{key}.1" / "x").write_bytes(bytes(1000))
    for folder in ("staging", "quarantine", "failed"):
        _, found = cache("prune", f"--{folder}", "--json")
        assert [(row["kind"], row["size"]) for row in found["removed"]] == [(folder, 1000)]
    assert len(libraries(filled)) == 4


HOLD = """
import sys, time
from pathlib import Path
from bitblas.artifacts import ArtifactStore
def build(directory):
    (directory / "x").write_text("half")
    print("building", flush=True)
    sys.stdin.read()
    return {}
ArtifactStore(sys.argv[1]).get_or_build("a" * 64, build)
"""


def test_prune_leaves_a_build_at_work_alone(filled, cache):
    command = [sys.executable, "-c", HOLD, str(filled)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables) as builder:
        assert builder.stdout.readline() == "building\n"
        _, found = cache("prune", "--staging", "--json")
        assert found["removed"] == []
        _, found = cache("prune", "--all", "--json")
        assert {row["kind"] for row in found["removed"]} == {"operator", "tuning record"}
        builder.stdin.close()
        assert builder.wait() == 0
    assert ArtifactStore(filled).keys() == ["a" * 64]


def test_what_is_pruned_while_it_is_loaded_stays_loaded(store, cache, build):
    op = Matmul(MatmulConfig(M=1, N=32, K=32, W_dtype="int4", A_dtype="float32", out_dtype="float32"))
    weight = op.transform_weight(torch.randint(-8, 8, (32, 32)))
    a = torch.randn(1, 32)
    before = op(a, weight)
    assert len(cache("prune", "--all", "--json")[1]["removed"]) == 1
    assert torch.equal(op(a, weight), before)
    assert Matmul(op.config).origin == "compiled"


def test_what_is_pruned_before_it_is_loaded_is_built_again(store, monkeypatch):
    """Another process prunes between the look and the load."""
    from bitblas.ops import provider

    cfg, real = MatmulConfig(M=1, N=32, K=48, W_dtype="int4"), provider.load_kernels
    provider.build(Matmul(cfg, from_database=True).plan)  # not loaded: a library that is, stays

    def late(library, plan):
        if not calls:
            calls.append(library)
            ArtifactStore(store).clear()
        return real(library, plan)

    calls = []
    monkeypatch.setattr(provider, "load_kernels", late)
    assert Matmul(cfg).origin == "compiled"
    assert calls


# -- export and import -----------------------------------------------------------------------------------------------------


def test_export_and_import(filled, cache, tmp_path):
    status, text = cache("export", tmp_path / "a.tar", "--all")
    assert status == 0
    assert "3 operators, 1 tuning record" in text
    assert "1 operator left out" in text
    with env.scope(BITBLAS_CACHE_DIR=tmp_path / "elsewhere"):
        status, text = cache("import", tmp_path / "a.tar")
        assert status == 0
        assert "3 operators added, 0 there already; 1 tuning record, 0 saved operators" in text
        assert f"for {TARGET}; " in text
        _, found = cache("import", tmp_path / "a.tar", "--json")
        assert (found["added"], len(found["kept"])) == ([], 3)
        assert {row["target"]: row["operators"] for row in found["targets"]} == {str(TARGET): 2, str(OTHER_TARGET): 1}
        assert cache("verify")[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--all", "--N", "64", "--K", "64"],
        ["--N", "64"],
        ["--all", "--model", "x"],
        ["--model", "x", "--N", "1", "--K", "1"],
        ["--attention", "64", "--all"],
        ["--attention", "64", "--model", "x"],
    ],
)
def test_export_asks_what(store, cache, tmp_path, arguments):
    status, text = cache("export", tmp_path / "a.tar", *arguments)
    assert status == 2
    assert "one of: --model FOLDER, --all, --N and --K of an operator, or --attention DIM" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--all", "--W-dtype", "nf4"], "--W-dtype is of one operator, which --all does not take"),
        (["--all", "--out-dtype", "float32"], "--out-dtype is of one operator"),
        (["--model", "x", "--group-size", "32"], "--group-size is of one operator, which --model does not take"),
    ],
)
def test_export_takes_no_option_in_vain(store, cache, tmp_path, arguments, message):
    status, text = cache("export", tmp_path / "a.tar", *arguments)
    assert status == 2
    assert message in text


def test_mistakes_are_one_line_and_exit_2(filled, cache, tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no bundle")
    (tmp_path / "file").write_text("")
    for arguments, message in [
        (["import", tmp_path / "none.tar"], "none.tar: No such file or directory"),
        (["import", tmp_path], "Is a directory"),
        (["import", tmp_path / "a.tar"], "it is no bundle of operators"),
        (["export", tmp_path / "a.zip", "--all"], "it must end in .tar"),
        (["export", tmp_path / "no" / "a.tar", "--all"], "is no directory"),
        (["export", tmp_path / "b.tar", "--all", "--target", "haswell"], "no operator of the installed versions"),
        (["export", tmp_path / "b.tar", "--all", "--target", "potato"], "target is 'potato'"),
        (["export", tmp_path / "b.tar", "--N", "64", "--K", "64", "--W-dtype", "uint9"], "uint9"),
        (["export", tmp_path / "b.tar", "--model", tmp_path / "none"], "config.json"),
    ]:
        status, text = cache(*arguments)
        assert (status, text.count("\n")) == (2, 1), text
        assert text.startswith("bitblas: error: ")
        assert message in text
    with env.scope(BITBLAS_CACHE_DIR=tmp_path / "file" / "store"):
        cache("export", tmp_path / "b.tar", "--all")
        status, text = cache("import", tmp_path / "b.tar")
        assert (status, text.count("\n")) == (2, 1)


def test_help_tells_the_exit_status(capsys):
    with pytest.raises(SystemExit):
        cli.main(["cache", "--help"])
    assert "1 where verify has found damage" in " ".join(capsys.readouterr().out.split())


# -- models ----------------------------------------------------------------------------------------------------------------

SHAPES = {"mlp.up": (96, 64), "mlp.gate": (96, 64), "mlp.down": (64, 96)}


def write_model(folder, dtype="float32"):
    """A folder of ours of three layers, two of which share an operator."""
    torch.manual_seed(0)
    tensors, specs = {}, {}
    for name, (n, k) in SHAPES.items():
        packed = torch.randint(-128, 128, (n, k // 2), dtype=torch.int8)
        weight = QuantizedWeight("uint4", packed, k, torch.rand(n, k // 32).half())
        specs[name] = LayerSpec.of(weight)
        parts = {"qweight": packed, "scales": weight.scales, "format": format_tensor("uint4", 32, None)}
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"dtype": dtype, "quantization_config": make_config(specs)}))
    return folder


def test_the_operators_of_a_model_are_those_of_its_layers(tmp_path):
    folder = write_model(tmp_path / "model")
    found = configs_of_model(folder)
    assert sorted(map(sorted, found.values())) == [["mlp.down"], ["mlp.gate", "mlp.up"]]
    from bitblas.checkpoints import read_weights

    for name, weight in read_weights(folder):
        layer = Linear.from_quantized(weight, A_dtype="float32", out_dtype="float32")
        assert name in found[layer.config]
    assert {c.A_dtype for c in configs_of_model(folder, "bfloat16")} == {"bfloat16"}
    assert {c.M for c in configs_of_model(folder, M=(1, 4))} == {(1, 4)}
    with pytest.raises(CheckpointError, match=r"layer mlp\.up has no operator: A_dtype is 'float64'"):
        configs_of_model(folder, "float64")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_the_operators_of_a_model_are_those_that_transformers_makes(tmp_path, dtype):
    pytest.importorskip("transformers", minversion="5", reason="pip install 'bitblas[transformers]'")
    import tiny_models

    folder = tiny_models.make(tmp_path / "model", "llama", tiny_models.MIXED).folder
    model = load_model(folder, dtype=dtype, device="cpu")
    layers = {name: layer.config for name, layer in model.named_modules() if isinstance(layer, Linear)}
    found = configs_of_model(folder, None if dtype is None else "float32")
    assert {name: cfg for cfg, names in found.items() for name in names} == layers


#: Runs a layer of the model, and answers with how it came by its kernels, and how far it is from float64.
SERVE = """
import importlib.metadata, json, shutil, sys
try:
    importlib.metadata.version("apache-tvm")
except importlib.metadata.PackageNotFoundError:
    pass
else:
    sys.exit("apache-tvm is installed")
assert not any(map(shutil.which, ("cc", "gcc", "clang", "g++", "nvcc"))), "there is a compiler"
import torch, bitblas
from bitblas.checkpoints import read_weights
torch.manual_seed(0)
found = {}
for name, weight in read_weights(sys.argv[1]):
    layer = bitblas.Linear.from_quantized(weight, A_dtype="float32", out_dtype="float32")
    rows = weight.packed.view(torch.uint8)
    codes = torch.stack((rows & 15, rows >> 4), -1).flatten(1).double()
    dense = (codes.unflatten(1, (-1, 32)) * weight.scales.double()[..., None]).flatten(1)
    error = 0.0
    for m in (1, 3, 20):
        a = torch.randn(m, weight.in_features)
        wanted = a.double() @ dense.T
        error = max(error, float((layer(a).double() - wanted).abs().max() / wanted.abs().max()))
    op = layer.bitblas_matmul
    found[name] = dict(origin=op.origin, error=error, tilings={m: t.fields() for m, t in op.plan.tilings.items()})
assert "tvm" not in sys.modules
print(json.dumps(found))
"""


#: What bitblas needs to load operators.
NEEDED = ("torch", "apache-tvm-ffi", "numpy", "filelock", "psutil", "safetensors", "thefuzz", "tqdm")
#: What a wheel is built from.
BUILT_FROM = ("python", "src", "integration", "pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in")


@pytest.fixture(scope="module", params=["linked", pytest.param("installed", marks=pytest.mark.slow)])
def bare(request, tmp_path_factory):
    """An environment of Python that has bitblas and what it needs to load operators, and neither TVM nor a compiler.

    "linked" has the packages that are installed here; in "installed" pip has put them and a wheel of bitblas, for two minutes.
    """
    folder = tmp_path_factory.mktemp("bare")
    return (link if request.param == "linked" else install)(folder)


def install(folder):
    def pip(python, *arguments):
        command = [str(python), "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=570)

    checkout = folder / "checkout"
    checkout.mkdir()
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():  # without what other tests may be writing
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, checkout / name)
    wheel = pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, checkout)
    assert wheel.returncode == 0, wheel.stderr
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    got = pip(python, "install", *(f"{name}=={metadata.version(name)}" for name in NEEDED))
    if got.returncode:
        pytest.skip(f"pip cannot install what bitblas needs: {got.stderr.strip().splitlines()[-1]}")
    done = pip(python, "install", "--no-deps", *folder.glob("bitblas-*.whl"))
    assert done.returncode == 0, done.stderr
    return python


def link(folder):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    for name in requirements(*NEEDED):
        for file in metadata.files(name) or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(metadata.distribution(name).locate_file(top))
    (site / "bitblas.pth").write_text(f"{ROOT / 'python'}\n")
    return folder / "venv" / "bin" / "python"


def requirements(*names):
    """Distributions that are installed here and that these need, without TVM."""
    found, left = set(), list(names)
    while left:
        name = left.pop()
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # one for another system
            continue
        if name not in found:
            found.add(name)
            left += [re.match(r"[\w.-]+", need)[0] for need in needs if "extra ==" not in need]
    assert "apache-tvm" not in found
    return sorted(found)


def there(python, home, *arguments):
    """Run in the bare environment, with another home and nothing on the PATH."""
    variables = {"HOME": str(home), "PATH": str(home / "bin"), "LANG": "C.UTF-8"}
    command = [str(python), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, cwd=home, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.skipif(find_compiler() is None, reason="there is no C compiler to build operators with")
def test_a_model_is_served_without_tvm_and_without_a_compiler(store, cache, tmp_path, bare):
    folder = write_model(tmp_path / "model")
    (tuned,) = [c for c, names in configs_of_model(folder).items() if names == ["mlp.down"]]
    tilings = fake_store.other_tilings(tuned, host_target())
    rows = {m: tuner.TunedBucket(tiling, ((tiling, 1e-6),), tiling) for m, tiling in tilings.items()}
    tuner.save_record(tuned, host_target(), rows)
    status, found = cache("export", tmp_path / "model.tar", "--model", folder, "--target", "llvm", "--json")
    assert (status, len(found["operators"]), found["tuning"]) == (0, 2, 1)

    home = tmp_path / "home"
    home.mkdir()
    out, err = there(bare, home, "-m", "bitblas", "cache", "import", tmp_path / "model.tar", "--json")
    assert (len(json.loads(out)["added"]), json.loads(out)["targets"][0]["runs"]) == (2, True)
    assert err == ""
    out, err = there(bare, home, "-c", SERVE, folder)
    assert err == ""
    served = json.loads(out)
    assert set(served) == set(SHAPES)
    for row in served.values():
        assert row["origin"] == "loaded"
        assert row["error"] < 1e-5
    assert served["mlp.down"]["tilings"] == {str(m): tiling.fields() for m, tiling in tilings.items()}
    out, _ = there(bare, home, "-m", "bitblas", "cache", "list")
    assert "tuned" in out
    assert "2 operators" in out


@pytest.mark.skipif(find_compiler() is None, reason="there is no C compiler to build operators with")
def test_one_operator_is_exported_and_built_once(store, cache, tmp_path):
    arguments = ["--N", "48", "--K", "64", "--M", "1", "--target", "llvm", "--json"]
    _, first = cache("export", tmp_path / "a.tar", *arguments)
    times = {path: path.stat().st_mtime_ns for path in libraries(store)}
    _, second = cache("export", tmp_path / "b.tar", *arguments)
    assert first["operators"] == second["operators"]
    assert {path: path.stat().st_mtime_ns for path in libraries(store)} == times
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


@pytest.mark.skipif(find_compiler() is None, reason="there is no C compiler to build operators with")
def test_an_operator_for_a_machine_that_this_is_not(store, cache, tmp_path, monkeypatch):
    """Nothing is loaded for an export, so that this machine need not be able to run what it builds."""
    monkeypatch.setattr("bitblas.target.host_features", lambda: frozenset({"sse4_2"}))
    _, found = cache(
        "export", tmp_path / "a.tar", "--N", "48", "--K", "64", "--M", "1", "--target", "haswell", "--json"
    )
    assert len(found["operators"]) == 1
