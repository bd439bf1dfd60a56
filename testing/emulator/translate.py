"""The passes that make a CUDA text compile as C++: inline assembly, and declarations of shared memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .instructions import PtxError
from .ptx import Operand, translate_template

_ASM = re.compile(r"\b(?:__asm__|__asm|asm)\b\s*(?:(?:__volatile__|volatile|__volatile)\b\s*)?(?=\()")
_STRING = re.compile(r'"((?:[^"\\\n]|\\.)*)"')
_OPERAND = re.compile(r'^\s*(?:\[\w+\]\s*)?"([=+&]*)([a-zA-Z])"\s*\(')
# before, type, name, dimensions
_SHARED = re.compile(
    r"(?P<extern>\bextern\s+)?(?P<align>(?:__align__|alignas)\s*\([^()]*\)\s*)?\b__shared__\s+"
    r"(?P<align2>(?:__align__|alignas)\s*\([^()]*\)\s*)?(?P<type>(?:[\w:\s*]|<[^;<>]*>)+?)\s*\b(?P<name>\w+)\s*(?P<dims>(?:\[[^\]]*\]\s*)*);"
)


UNKNOWN = "emulator_unknown_instruction_"
# Members of a launch configuration have the same names.
_INDEX = re.compile(r"(?<!\.)(?<!->)\b(threadIdx|blockIdx|blockDim|gridDim)\b")
_INDEX_FUNCTIONS = {
    "threadIdx": "::emulator::thread_index()",
    "blockIdx": "::emulator::block_index()",
    "blockDim": "::emulator::block_size()",
    "gridDim": "::emulator::grid_size()",
}


class TranslationError(Exception):
    """A text that the emulator does not know how to run."""


@dataclass(frozen=True)
class _Piece:
    """A token of a text as far as the passes need it: code, or a string, character or comment to leave alone."""

    begin: int
    end: int


def _skipped(text: str) -> list[_Piece]:
    """Comments and literals of a text, in order."""
    pattern = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:[^"\\\n]|\\.)*"|' + r"'(?:[^'\\\n]|\\.)+'", re.DOTALL)
    return [_Piece(match.start(), match.end()) for match in pattern.finditer(text)]


def _blank_comments(text: str) -> str:
    """The text with its comments replaced by as many blanks, newlines kept."""
    result = list(text)
    for piece in _skipped(text):
        if text.startswith(("//", "/*"), piece.begin):
            for i in range(piece.begin, piece.end):
                if text[i] != "\n":
                    result[i] = " "
    return "".join(result)


def _closing(text: str, opening: int) -> int:
    """The index of the parenthesis that closes the one at `opening`."""
    depth, i = 0, opening
    while i < len(text):
        literal = _STRING.match(text, i)
        if literal:
            i = literal.end()
            continue
        if text[i] in "([{":
            depth += 1
        elif text[i] in ")]}":
            depth -= 1
            if depth == 0:
                return i
        i += 1
    raise TranslationError(f"no closing parenthesis: {text[opening : opening + 200]}")


def _split(text: str, separator: str) -> list[str]:
    """The parts of a text at its top-level separators, those in strings and brackets left alone."""
    parts, depth, begin, i = [], 0, 0, 0
    while i < len(text):
        literal = _STRING.match(text, i)
        if literal:
            i = literal.end()
            continue
        if text[i] in "([{":
            depth += 1
        elif text[i] in ")]}":
            depth -= 1
        elif depth == 0 and text[i] == separator:
            parts.append(text[begin:i])
            begin = i + 1
        i += 1
    parts.append(text[begin:])
    return parts


def _unescaped(template: str) -> str:
    return template.replace("\\n", "\n").replace("\\t", "\t").replace('\\"', '"').replace("\\\\", "\\")


def _operands(section: str) -> list[Operand]:
    operands = []
    for part in _split(section, ","):
        if not part.strip():
            continue
        match = _OPERAND.match(part)
        if match is None:
            raise TranslationError(f"an operand of inline assembly that is not understood: {part.strip()}")
        expression = part[match.end() : _closing(part, match.end() - 1)]
        operands.append(Operand(modifier=match[1].replace("&", ""), constraint=match[2], expression=expression.strip()))
    return operands


def _translate_asm(text: str, unknown: list[str] | None) -> str:
    result, position = [], 0
    literals = [piece for piece in _skipped(text) if text[piece.begin] == '"']
    for match in _ASM.finditer(text):
        if match.start() < position or any(piece.begin <= match.start() < piece.end for piece in literals):
            continue
        end = _closing(text, match.end())
        statement = text[match.end() + 1 : end].replace("\\\n", " \n")
        sections = _split(statement, ":")
        template = _unescaped("".join(_STRING.findall(sections[0])))
        operands = [operand for section in sections[1:3] for operand in _operands(section)]
        try:
            code = translate_template(template, operands, is_plain=len(sections) == 1)
        except PtxError as error:
            message = f"inline assembly that the emulator does not know: {error}\nin: asm({statement})"
            if unknown is None:
                raise TranslationError(message) from None
            code = f"{UNKNOWN}{len(unknown)}()"
            unknown.append(message)
        result.append(text[position : match.start()])
        result.append(
            code + "".join(re.findall(r"\\?\n", text[match.start() : end]))
        )  # in a macro, lines end in backslashes
        position = end + 1
    result.append(text[position:])
    return "".join(result)


def _translate_shared(text: str) -> str:
    count = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal count
        count += 1
        kind, name, dims = match["type"], match["name"], re.sub(r"\s", "", match["dims"])
        newlines = "\n" * match[0].count("\n")
        if match["extern"]:
            if dims != "[]":
                raise TranslationError(f"an extern __shared__ array needs empty brackets: {match[0]}")
            return f"{kind}* const {name} = ({kind}*)::emulator::dynamic_shared();{newlines}"
        if text.count("{", 0, match.start()) == text.count("}", 0, match.start()):
            raise TranslationError(f"declare shared memory in a function: {match[0]}")
        align = match["align"] or match["align2"]
        alignment = f"{align[align.index('(') + 1 : align.rindex(')')]}" if align else f"alignof({kind})"
        alias, site = f"emulator_type_{count}", f"emulator_site_{count}"
        return (
            f"typedef {kind} {alias}{dims}; static char {site}; "
            f"{alias}& {name} = *({alias}*)::emulator::static_shared(&{site}, sizeof({alias}), {alignment});{newlines}"
        )

    result = _SHARED.sub(replace, text)
    left = re.search(r"\b__shared__\b[^\n]*", result)
    if left is not None:
        raise TranslationError(f"a declaration of shared memory that the emulator does not know: {left[0]}")
    return result


def translate(text: str, unknown: list[str] | None = None) -> str:
    """
    The C++ text that runs a CUDA text on the emulator; lines keep their numbers.

    Parameters
    ----------
    text : str
        Device and host code of one translation unit.
    unknown : list of str, optional
        Takes the messages for instructions that are not known, which then become calls of functions that do not exist: the
        preprocessor may yet drop them. Their names are `UNKNOWN` and the index of the message.

    Returns
    -------
    str
        The text with inline assembly replaced by calls, and `__shared__` declarations by references into the emulator's arena.

    Raises
    ------
    TranslationError
        An instruction, an operand or a declaration that is not known; the message shows its text.
    """
    text = _translate_shared(_translate_asm(_blank_comments(text), unknown))
    return _INDEX.sub(lambda match: _INDEX_FUNCTIONS[match[0]], text)
