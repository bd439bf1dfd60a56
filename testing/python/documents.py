"""The documents of the project, their fenced blocks and their tables."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmark" / "README.md"]
#: What a fence may say that it holds. Signatures are shown, and not run: `test_python_api` compares them with the code.
PYTHON, CONSOLE, SIGNATURE = "python", "console", "python signature"

_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def names(path):
    """A document's path, as a test's id."""
    return path.relative_to(ROOT).as_posix()


def blocks(path):
    """(line, language, text) of each fenced block."""
    text = path.read_text(encoding="utf-8")
    return [(text[: match.start(2)].count("\n"), match[1], match[2]) for match in _FENCE.finditer(text)]


#: Documents with Python to run.
PROGRAMS = [path for path in DOCUMENTS if any(language == PYTHON for _, language, _ in blocks(path))]


def rows_between(path, name):
    """The table's lines below its two heading lines, between `<!-- name: … -->` and `<!-- end of name -->`."""
    text = path.read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name}: .*?-->\n(.*?)\n<!-- end of {name} -->", text, re.DOTALL)
    assert found, f"{names(path)} has no table {name!r}"
    return found[1].splitlines()[2:]


def cells(row):
    """The cells of a table's line."""
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def anchors(path):
    """What a link to a heading of a document ends in, after `#`."""
    prose = _FENCE.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ +(.*?) *$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
