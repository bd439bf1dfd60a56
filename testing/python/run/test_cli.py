"""The `bitblas` command: what it prints, what it refuses, and that `info` fails on no installation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitblas import __version__, cli, env

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments, **environment):
    """The command in a fresh process, with variables set, or removed where None."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "python"), **environment}
    variables = {name: str(value) for name, value in variables.items() if value is not None}
    command = [sys.executable, "-m", "bitblas", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables, timeout=300)


def info(**environment):
    """The facts of `bitblas info --json` by name: (value, hint)."""
    done = run("info", "--json", **environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return {fact["name"]: (fact["value"], fact["hint"]) for fact in json.loads(done.stdout)}


# -- the command -----------------------------------------------------------------------------------------------------------


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"bitblas {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["bench", "--N", "0"], "argument --N: 0 is not allowed: it must be a whole number of at least 1"),
        (["bench", "--M", "1", "x"], "argument --M: x is not allowed: it must be a whole number"),
        (["bench", "--seconds", "-1"], "must be between 0 and 3600"),
        (["bench", "--zeros", "some"], "invalid choice: 'some'"),
        (
            ["tune", "--softmax-scale", "inf"],
            "argument --softmax-scale: inf is not allowed: it must be a finite number",
        ),
        (["tune", "--softmax-scale", "x"], "argument --softmax-scale: x is not allowed"),
        (["bench", "--threads", "0"], "argument --threads: 0 is not allowed"),
    ],
)
def test_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--W-dtype", "uint9"], "W_dtype is 'uint9', which is no format; allowed: uint1"),
        (["--A-dtype", "float64"], "A_dtype is 'float64'"),
        (["--group-size", "3"], "group_size is 3"),
        (["--W-dtype", "nf4", "--zeros", "original"], "nf4 has no zero points"),
        (["--target", "potato"], "target is 'potato'"),
    ],
)
def test_impossible_requests_are_one_line_and_exit_2(arguments, message, capsys):
    assert cli.main(["bench", "--N", "64", "--K", "64", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
    assert output.err.startswith("bitblas: error: ")
    assert output.err.count("\n") == 1


def test_an_interrupt_is_no_traceback(monkeypatch):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.info, "run", interrupt)
    assert cli.main(["info"]) == 130


def test_a_reader_that_leaves(tmp_path):
    command = f"{sys.executable} -m bitblas info | head -1"
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, env=variables)
    assert done.stdout == "versions\n"
    assert done.stderr == ""


# -- info ------------------------------------------------------------------------------------------------------------------


def test_info_tells_all_and_loads_no_tvm():
    script = "import sys; from bitblas import cli; code = cli.main(['info']); sys.exit('tvm' in sys.modules or code)"
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for word in (__version__, "torch", "apache-tvm-ffi", "instruction sets", "threads", "C compiler", "directory"):
        assert word in done.stdout
    for variable in env.VARIABLES:
        assert variable.name in done.stdout
        assert variable.doc in done.stdout


def test_info_without_a_compiler():
    facts = info(PATH="", BITBLAS_CC=None)
    value, hint = facts["C compiler"]
    assert value == "none"
    assert "apt install gcc" in hint
    assert "BITBLAS_CC" in hint


def test_info_with_a_compiler_that_is_not_there():
    value, hint = info(BITBLAS_CC="/no/such/cc")["C compiler"]
    assert "/no/such/cc" in value
    assert "BITBLAS_CC" in hint


def test_info_with_a_compiler_that_cannot_link(tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'ld: error: cannot find -lgomp' >&2\nexit 1\n")
    broken.chmod(0o755)
    value, hint = info(BITBLAS_CC=broken)["links OpenMP"]
    assert value == "no: ld: error: cannot find -lgomp"
    assert hint


def test_info_with_an_unusable_cache(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    value, hint = info(BITBLAS_CACHE_DIR=shared)["usable"]
    assert "may be written by others" in value
    assert "BITBLAS_CACHE_DIR" in hint
    (tmp_path / "file").write_text("")
    value, hint = info(BITBLAS_CACHE_DIR=tmp_path / "file" / "cache")["usable"]
    assert f"{tmp_path / 'file'} is no directory" in value
    assert hint


def test_info_with_a_cache_that_is_not_there_yet_makes_none(tmp_path):
    facts = info(BITBLAS_CACHE_DIR=tmp_path / "new")
    assert facts["usable"] == ("yes", "")
    assert facts["operators"] == ("0, 0.0 MB", "")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("target", "value"),
    [("potato", "none: target is 'potato'"), ("llvm -mcpu=penryn", "only LLVM knows"), ("haswell", "-mcpu=haswell")],
)
def test_info_with_any_target(target, value):
    assert value in info(BITBLAS_TARGET=target)["target"][0]


def test_info_with_malformed_variables():
    facts = info(BITBLAS_LOG_LEVEL="loud", BITBLAS_KEEP_BUILD="perhaps")
    assert "expected" in facts["BITBLAS_LOG_LEVEL"][1]
    assert "expected" in facts["BITBLAS_KEEP_BUILD"][1]


def test_info_without_packages(monkeypatch, capsys):
    def version(name):
        if name == "apache-tvm":
            raise cli.info.metadata.PackageNotFoundError(name)
        return {"apache-tvm-ffi": "0.1.15.post2"}.get(name, "1.0")

    monkeypatch.setattr(cli.info.metadata, "version", version)
    assert cli.main(["info", "--json"]) == 0
    facts = {fact["name"]: fact for fact in json.loads(capsys.readouterr().out)}
    assert facts["apache-tvm"]["value"] == "missing"
    assert "pip install 'apache-tvm>=0.27,<0.28'" in facts["apache-tvm"]["hint"]
    assert "0.1.14" in facts["apache-tvm-ffi"]["hint"]


def test_info_survives_a_part_that_breaks(monkeypatch, capsys):
    def version(name):
        raise RuntimeError("broken metadata")

    monkeypatch.setattr(cli.info.metadata, "version", version)
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "RuntimeError: broken metadata" in out
    assert "BITBLAS_CACHE_DIR" in out


# -- bench -----------------------------------------------------------------------------------------------------------------

SMALL = ["bench", "--N", "64", "--K", "128", "--seconds", "0.01", "--threads", "1"]


def test_bench_prints_a_table(capsys):
    assert cli.main([*SMALL, "--M", "1", "5", "--zeros", "quantized"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "float16 x uint4 -> float16, N=64, K=128, groups of 128, quantized zeros" in lines[0]
    assert "1 threads" in lines[1]
    header = next(place for place, line in enumerate(lines) if "times ours" in line)
    assert [line.split()[0] for line in lines[header + 1 : header + 3]] == ["1", "5"]
    assert "wrong" not in "".join(lines)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--A-dtype", "float32", "--W-dtype", "nf4"], ["bitblas", "torch float32"]),
        (["--A-dtype", "bfloat16", "--W-dtype", "int3"], ["bitblas", "torch float32", "torch bfloat16"]),
        (["--A-dtype", "int8", "--W-dtype", "int2", "--no-scale"], ["bitblas", "torch float32", "torch _int_mm"]),
        (["--A-dtype", "int8", "--W-dtype", "int4"], ["bitblas", "torch float32"]),
    ],
)
def test_bench_json(arguments, names, capsys):
    assert cli.main([*SMALL, "--M", "2", "--json", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["threads"] == 1
    (row,) = found["results"]
    assert row["workload"]["m"] == 2
    assert [timing["name"] for timing in row["timings"]] == names
    assert all(timing["seconds"] > 0 for timing in row["timings"])


def test_bench_fails_on_wrong_results(monkeypatch, capsys):
    from bitblas import Matmul

    right = Matmul.transform_weight
    monkeypatch.setattr(Matmul, "transform_weight", lambda self, weight: right(self, weight.flip(0)))
    assert cli.main([*SMALL, "--M", "1"]) == 1
    output = capsys.readouterr()
    assert "wrong" in output.out
    assert "wrong results" in output.err
