"""docs/PythonAPI.md says what the code does: names, signatures, tables, and an example that runs in another process."""

import builtins
import dataclasses
import importlib
import inspect
import itertools
import math
import platform
import re

import numpy as np
import pytest
import torch

import bitblas
import reference
from bitblas import ConfigError, FlashAtten, FlashAttenConfig, Matmul, MatmulConfig, UnsupportedError
from bitblas.config import A_DTYPES, ACCUM_DTYPES, LAYOUTS, OUT_DTYPES, ZEROS_MODES
from bitblas.formats import ALIASES, FORMATS
from bitblas.ops.operator import Operator
from bitblas.plan import plan_matmul
from bitblas.target import Target, host_target, resolve_target
from documents import PROGRAMS, PYTHON, ROOT, SIGNATURE, blocks, cells, rows_between
from scripts import report

DOCUMENT = ROOT / "docs" / "PythonAPI.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")

#: What other projects import, and the other modules in which they find it.
PUBLIC = {
    "bitblas.MatmulConfig": ["bitblas.ops", "bitblas.ops.general_matmul"],
    "bitblas.Matmul": ["bitblas.ops", "bitblas.ops.general_matmul"],
    "bitblas.FlashAttenConfig": ["bitblas.ops", "bitblas.config"],
    "bitblas.FlashAtten": ["bitblas.ops", "bitblas.ops.attention"],
    "bitblas.Linear": ["bitblas.module", "bitblas.nn"],
    "bitblas.quantize_": ["bitblas.nn"],
    "bitblas.BitLinear": ["bitblas.module", "bitblas.nn"],
    "bitblas.ternarize_": ["bitblas.nn"],
    "bitblas.deploy": ["bitblas.nn"],
    "bitblas.load_model": ["bitblas.checkpoints.load"],
    "bitblas.auto_detect_nvidia_target": ["bitblas.utils", "bitblas.utils.target_detector"],
    "bitblas.utils.get_all_nvidia_targets": ["bitblas.utils.target_detector"],
    "bitblas.cache.OperatorCache": [],
    "bitblas.cache.global_operator_cache": [],
    "bitblas.cache.load_global_ops_cache": [],
    "bitblas.cache.get_database_path": [],
    "bitblas.cache.set_database_path": [],
    "bitblas.cache.export_bundle": [],
    "bitblas.cache.import_bundle": [],
    "bitblas.quantization.general_compress": ["bitblas.quantization.utils"],
    "bitblas.quantization.interleave_weight": ["bitblas.quantization.utils"],
    "bitblas.quantization.gen_quant4": ["bitblas.quantization.utils"],
    "bitblas.codecs.QuantizedWeight": ["bitblas.codecs.weight"],
    "bitblas.codecs.from_gptq": ["bitblas.codecs.gptq"],
    "bitblas.codecs.from_gptq_module": ["bitblas.codecs.gptq"],
    "bitblas.codecs.from_awq": ["bitblas.codecs.awq"],
    "bitblas.codecs.from_compressed": ["bitblas.codecs.compressed_tensors"],
    "bitblas.codecs.from_bitnet": ["bitblas.codecs.bitnet"],
    "bitblas.codecs.quantize": ["bitblas.codecs.rounding"],
    "bitblas.codecs.bitnet.ternary": [],
    "bitblas.codecs.format_tensor": ["bitblas.codecs.weight"],
    "bitblas.codecs.parse_format_tensor": ["bitblas.codecs.weight"],
    "bitblas.ops.QuantCompress": ["bitblas.ops.quant_compress"],
    "bitblas.ops.QuantCompressConfig": ["bitblas.ops.quant_compress"],
    "bitblas.ops.LOP3Permutate": ["bitblas.ops.lop3_permutate"],
    "bitblas.ops.LOP3PermutateConfig": ["bitblas.ops.lop3_permutate"],
    "bitblas.ops.LadderPermutate": ["bitblas.ops.ladder_permutate"],
    "bitblas.ops.LadderPermutateConfig": ["bitblas.ops.ladder_permutate"],
    "bitblas.ops.MatmulWithSplitK": ["bitblas.ops.general_matmul_splitk"],
    "bitblas.ops.MatmulConfigWithSplitK": ["bitblas.ops.general_matmul_splitk"],
    "bitblas.checkpoints.repack": [],
    "bitblas.checkpoints.unpack": [],
    "bitblas.checkpoints.read_layers": [],
    "bitblas.checkpoints.read_weights": [],
    "bitblas.checkpoints.LayerSpec": [],
    "bitblas.checkpoints.Summary": [],
    "bitblas.set_log_level": [],
    "bitblas.logger": [],
    "bitblas.BitBLASError": ["bitblas.errors"],
    "bitblas.tvm": [],
    "bitblas.__version__": [],
}
#: Without a signature: an object, exceptions, a module, a text.
PLAIN = {
    *("bitblas.cache.global_operator_cache", "bitblas.logger"),
    *("bitblas.BitBLASError", "bitblas.tvm", "bitblas.__version__"),
}
#: Each class beside the attributes that its objects get when they are made.
DOORS = {
    "bitblas.Matmul": ("config", "name", "backend", "target", "plan"),
    "bitblas.FlashAtten": ("config", "name", "backend", "target", "plan"),
    "bitblas.Linear": (),
    "bitblas.BitLinear": (),
    "bitblas.ops.MatmulWithSplitK": (),
    "bitblas.cache.OperatorCache": (),
    "bitblas.codecs.QuantizedWeight": ("W_dtype", "packed", "in_features", "scales"),
    "bitblas.ops.QuantCompress": ("config", "name", "backend", "target"),
    "bitblas.ops.LOP3Permutate": ("config", "name", "backend", "target"),
    "bitblas.ops.LadderPermutate": ("config", "name", "backend", "target"),
}
FLOATS = ("float16", "bfloat16", "float32")

_SIGNATURE = re.compile(r"^(bitblas[\w.]*)\((.*?)\)(?: -> ([^\n]+))?$", re.MULTILINE | re.DOTALL)


def resolve(path):
    """The object of a dotted path, whose modules are imported on the way."""
    found, names = bitblas, path.split(".")[1:]
    for depth, name in enumerate(names):
        if inspect.ismodule(found) and not hasattr(found, name):
            importlib.import_module(".".join(["bitblas", *names[: depth + 1]]))
        found = getattr(found, name)
    return found


def documented_signatures():
    """(path, parameters, what is returned) of each signature in the document."""
    for _, language, text in blocks(DOCUMENT):
        if language == SIGNATURE:
            rest = _SIGNATURE.sub("", text).strip()
            assert not rest, f"this is not of the form bitblas.NAME(PARAMETERS) -> TYPE: {rest}"
            yield from _SIGNATURE.findall(text)


def table_below(heading):
    """The cells of each line of the first table below a heading."""
    table = re.search(rf"^#+ {heading}\n.*?((?:^\|[^\n]*\n)+)", TEXT, re.MULTILINE | re.DOTALL)[1]
    return [cells(line) for line in table.splitlines()[2:]]


SIGNATURES = list(documented_signatures())


# -- names and signatures --------------------------------------------------------------------------------------------------


def test_the_table_of_names():
    found = {}
    for name, also in table_below("Names"):
        path = re.search(r"`(bitblas\.[\w.]+)`", name)[1]
        found[path] = re.findall(r"`(bitblas\.[\w.]+)`", also)
    assert found == PUBLIC


@pytest.mark.parametrize("path", PUBLIC)
def test_names_are_importable(path):
    home, _, name = path.rpartition(".")
    wanted = getattr(importlib.import_module(home), name)
    for module in PUBLIC[path]:
        assert getattr(importlib.import_module(module), name) is wanted


@pytest.mark.parametrize("path", PUBLIC)
def test_names_are_documented(path):
    signatures = [name for name, _, _ in SIGNATURES]
    assert signatures.count(path) == (path not in PLAIN)


@pytest.mark.parametrize(("path", "parameters", "returns"), SIGNATURES, ids=[path for path, _, _ in SIGNATURES])
def test_signatures(path, parameters, returns):
    namespace = {"np": np, "torch": torch}
    exec(f"def documented({parameters}): ...", namespace)
    documented = list(inspect.signature(namespace["documented"]).parameters.values())
    signature = inspect.signature(resolve(path))
    actual = [parameter for parameter in signature.parameters.values() if parameter.name != "self"]
    assert [(p.name, p.kind) for p in documented] == [(p.name, p.kind) for p in actual]
    for ours, theirs in zip(documented, actual, strict=True):
        assert ours.default == theirs.default, ours.name
        assert isinstance(theirs.default, type(ours.default)), f"{ours.name}: {theirs.default!r}"
    annotation = signature.return_annotation
    assert returns == ("" if annotation in (None, "None", inspect.Signature.empty) else annotation)


def section(path):
    """The part of the document about a class: from the first signature of its own to the next heading of the first rank."""
    begin = TEXT.index(f"\n{path}(")
    return TEXT[begin : TEXT.index("\n## ", begin)]


@pytest.mark.parametrize("path", DOORS)
def test_every_member_is_mentioned(path):
    kind = resolve(path)
    own = [name for name in dir(kind) if not name.startswith("_") and name not in ("config_class", "default_name")]
    inherited = dir(Matmul) if kind is not Matmul and issubclass(kind, Matmul) else ()
    if kind is FlashAtten:  # a sentence names what all operators have, and Matmul's section describes that
        inherited = [name for name in dir(Operator) if inspect.isfunction(getattr(Operator, name))]
    if issubclass(kind, torch.nn.Module):
        inherited = dir(torch.nn.Module)
    if hasattr(kind, "config_class"):  # a sentence says that the fields of its config are attributes
        inherited = [field.name for field in dataclasses.fields(kind.config_class)]
    text = section(path)
    for name in {*own, *DOORS[path]} - set(inherited):
        if inspect.isfunction(getattr(kind, name, None)) and name != "torch_func":  # which is forward
            assert f"\n{path}.{name}(" in TEXT, f"{name} has no signature"
        else:
            assert re.search(rf"`(op\.)?{name}(\([^`]*\))?`", text), f"{name} is not mentioned"


def test_an_operator_has_no_other_attributes():
    for path, op in {
        "bitblas.Matmul": Matmul(MatmulConfig(1, 16, 16), from_database=True),
        "bitblas.FlashAtten": FlashAtten(FlashAttenConfig(dim=16), from_database=True),
        "bitblas.ops.QuantCompress": bitblas.ops.QuantCompress(bitblas.ops.QuantCompressConfig(1, 16)),
    }.items():
        assert {name for name in vars(op) if not name.startswith("_")} == set(DOORS[path])


@pytest.mark.parametrize(
    ("kind", "required", "right"),
    [(MatmulConfig, ("N", "K"), {"N": 8, "K": 8}), (FlashAttenConfig, ("dim",), {"dim": 8})],
)
def test_the_fields_of_a_config(kind, required, right):
    defaults = {}
    for names, default, _ in table_below(kind.__name__):
        defaults |= dict.fromkeys(re.findall(r"`(\w+)`", names), default.strip("`"))
    actual = inspect.signature(kind).parameters.values()
    assert list(defaults) == [parameter.name for parameter in actual]
    for parameter in actual:
        if parameter.name not in required:
            assert eval(defaults[parameter.name]) == parameter.default, parameter.name
    kind(**right)
    for missing in required:
        with pytest.raises(ConfigError):
            kind(**{name: value for name, value in right.items() if name != missing})


def test_hints_are_the_fields_that_are_not_compared():
    hints = {field.name for field in dataclasses.fields(MatmulConfig) if not field.compare}
    assert hints == set(re.findall(r"^\| `(\w+)` \| .* \| a hint, without effect", TEXT, re.MULTILINE))


def test_every_error_that_is_mentioned_exists():
    mentioned = set(re.findall(r"\b[A-Z]\w*Error\b", TEXT))
    assert mentioned
    assert all(hasattr(bitblas, name) or hasattr(builtins, name) for name in mentioned)


# -- tables ----------------------------------------------------------------------------------------------------------------


def spread(cell):
    """The dtypes that a cell of the table of combinations means."""
    integers = [name for name, fmt in FORMATS.items() if fmt.is_integer]
    groups = {
        "floats": FLOATS,
        "every format": FORMATS,
        "uint1 to uint8": [name for name in integers if name.startswith("u")],
        "int1 to int8": [name for name in integers if not name.startswith("u")],
        "every other format": [name for name in FORMATS if name not in integers],
    }
    return [name for word in cell.split(", ") for name in groups.get(word, [word])]


def test_the_table_of_combinations():
    documented = set()
    for row in rows_between(DOCUMENT, "combinations"):
        documented |= set(itertools.product(*map(spread, cells(row))))
    accepted, here = set(), host_target()
    for names in itertools.product(A_DTYPES, FORMATS, OUT_DTYPES, ACCUM_DTYPES):
        try:
            config = MatmulConfig(1, 16, 32, *names)
        except ConfigError:
            continue
        assert plan_matmul(config, here).kernels
        accepted.add(names)
    assert documented == accepted


def test_the_table_of_aliases():
    documented = {}
    for name, others in map(cells, rows_between(DOCUMENT, "aliases")):
        documented |= dict.fromkeys(re.findall(r"`(\w+)`", others), name.strip("`"))
    assert documented == ALIASES


def shape(text, sizes):
    """A shape of the document without its leading dimensions, as numbers."""
    inside = text.strip()[1:-1].replace("..., ", "").replace("·", "*").replace(" / ", "//")
    return tuple(int(eval(part, {**sizes, "ceil": math.ceil})) for part in re.split(r", (?![^(]*\))", inside))


def test_the_table_of_layouts(build):
    rows = {row[0].strip("`"): row[1:] for row in map(cells, rows_between(DOCUMENT, "layouts"))}
    assert tuple(rows) == LAYOUTS
    sizes = {"M": 3, "N": 16, "K": 24}
    for layout, texts in rows.items():
        a, weight, output = (shape(text, sizes) for text in texts)
        op = build(MatmulConfig([4], sizes["N"], sizes["K"], layout=layout, W_dtype="uint4"))
        packed = op.transform_weight(torch.zeros(weight))
        for leading in ((), (2, 5)):
            assert op(torch.zeros(*leading, *a, dtype=torch.float16), packed).shape == (*leading, *output)
        with pytest.raises(bitblas.ArgumentError):
            op.transform_weight(torch.zeros(weight[::-1]))
        with pytest.raises(bitblas.ArgumentError):
            op(torch.zeros(a[::-1], dtype=torch.float16), packed)


def zero_rows():
    for scaling, zeros, modes, formula, held in table_below("Scales and zero points"):
        for mode in re.findall(r"`\"(\w+)\"`", modes) or [None]:
            yield scaling == "yes", zeros == "yes", mode, formula, held


def test_the_table_of_zeros_is_whole():
    found = [row[:3] for row in zero_rows()]
    wanted = [(s, True, mode) for s in (False, True) for mode in ZEROS_MODES]
    assert sorted(found, key=str) == sorted([(False, False, None), (True, False, None), *wanted], key=str)


@pytest.mark.parametrize(("scaling", "zeros", "mode", "formula", "held"), list(zero_rows()))
def test_the_table_of_zeros(build, scaling, zeros, mode, formula, held):
    options = {"with_scaling": scaling, "with_zeros": zeros, "zeros_mode": mode, "group_size": 16}
    config = MatmulConfig(3, 16, 32, "float32", "uint4", "float32", "float32", **options)
    op, problem = build(config), reference.draw(config, 3, exact=True)
    q, s, z = problem.parts()
    weight = eval(formula.replace("·", "*"), {"w": q, "s": s, "z": z})
    out = op(problem.A, op.transform_weight(problem.weights), **problem.extras)
    assert torch.equal(out.double(), problem.A.double() @ weight.T)
    if zeros:
        text = held[: held.rindex(") ") + 1]
        assert problem.zeros.shape == shape(text, {"N": 16, "K": 32, "g": 16, "b": 4})


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the table names CPUs of x86-64")
def test_the_table_of_targets():
    op = Matmul(MatmulConfig(1, 16, 16), from_database=True)
    for form, example in map(cells, rows_between(DOCUMENT, "targets")):
        target = eval(example.strip("`"), {"bitblas": bitblas, "op": op})
        assert isinstance(resolve_target(target), Target), form


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device():
    assert Matmul(MatmulConfig(1, 16, 16), target="nvidia/nvidia-a100", from_database=True).target.arch == "sm_80"
    with pytest.raises(UnsupportedError, match="there is no CUDA device"):
        Matmul(MatmulConfig(1, 16, 16), target="cuda", from_database=True)


def test_the_table_of_errors():
    rows = {row[0].strip("`"): row[1].strip("`") for row in map(cells, rows_between(DOCUMENT, "errors"))}
    assert set(rows) == {name for name in bitblas.__all__ if name.endswith("Error")}
    for name, base in rows.items():
        assert getattr(builtins, base) in getattr(bitblas, name).__mro__
        assert issubclass(getattr(bitblas, name), bitblas.BitBLASError)


# -- programs --------------------------------------------------------------------------------------------------------------


def test_the_blocks_are_run():
    assert DOCUMENT in PROGRAMS  # by test_docs


def test_another_process_loads_what_one_has_saved(store):
    programs = [text for _, language, text in blocks(DOCUMENT) if language == PYTHON]
    (load,) = [text for text in programs if "load_global_ops_cache()" in text]
    (save,) = [text for text in programs if "save_into_database" in text]
    (config,) = [line for line in load.splitlines() if line.startswith("config = ")]
    head = f"import json, bitblas\nfrom bitblas import Matmul, MatmulConfig\n{config}\nop = Matmul(config)"
    where = {"BITBLAS_CACHE_DIR": store}
    assert report(f"{head}\n{save}\nprint(json.dumps(op.origin))", **where) == ("compiled", [])
    ending = "import json, sys\nprint(json.dumps([cache.size(), 'tvm' in sys.modules]))"
    assert report(f"{load}\n{ending}", **where) == ([1, False], [])
