"""README.md and docs/: every Python block runs, tables say what the code says, links lead somewhere."""

import re

import pytest

from bitblas import env
from bitblas.formats import FORMATS
from documents import CONSOLE, DOCUMENTS, PROGRAMS, PYTHON, ROOT, SIGNATURE, anchors, blocks, names, rows_between


def test_the_documents_are_found():
    assert {"README.md", "docs/QuickStart.md", "docs/PythonAPI.md"} <= {names(path) for path in PROGRAMS}


@pytest.mark.parametrize("path", PROGRAMS, ids=names)
def test_python_blocks_run(path):
    namespace = {"__name__": "__main__"}
    for line, language, text in blocks(path):
        if language == PYTHON:
            # blank lines in front, so that a failure names the document's own line
            exec(compile("\n" * line + text, str(path), "exec"), namespace)


@pytest.mark.parametrize("path", DOCUMENTS, ids=names)
def test_blocks_say_what_they_are(path):
    languages = {language for _, language, _ in blocks(path)}
    assert languages <= {PYTHON, CONSOLE, SIGNATURE}


def format_rows():
    for name, fmt in FORMATS.items():
        zeros = "–"
        if fmt.is_integer:
            low, high = fmt.value_range
            values = "-1 and 1" if name == "int1" else f"{low} to {high}"
            zeros = "original, rescale" + (", quantized" if fmt.kind == "uint" else "")
        elif fmt.codebook:
            values = f"{len(fmt.codebook)} of a codebook"
        else:
            values = f"as torch.{fmt.torch_name}"
        yield f"| `{name}` | {fmt.bits} | {values} | yes | {zeros} |"


def variable_rows():
    for variable in env.VARIABLES:
        default = f"`{variable.default}`" if variable.default else "–"
        yield f"| `{variable.name}` | {variable.kind.name} | {default} | {variable.doc} |"


@pytest.mark.parametrize(
    ("document", "name", "expected"),
    [("README.md", "formats", format_rows), ("docs/Installation.md", "variables", variable_rows)],
)
def test_tables(document, name, expected):
    wanted = list(expected())
    assert rows_between(ROOT / document, name) == wanted, "the table should be:\n" + "\n".join(wanted)


@pytest.mark.parametrize("path", DOCUMENTS, ids=names)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        document = path.parent / name if name else path
        assert document.exists(), f"{names(path)} links to {target}"
        if anchor:
            assert anchor in anchors(document), f"{names(path)} links to {target}"
