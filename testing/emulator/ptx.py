"""From the template of an inline assembly statement to C++: registers, predicates, operands. The table has the instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from . import movements  # noqa: F401  its instructions join the table
from .instructions import RULES, TYPES, Address, Immediate, Instruction, PtxError

_REGISTER = {
    "r": "uint32_t",
    "l": "uint64_t",
    "h": "uint16_t",
    "f": "float",
    "d": "double",
    "n": "int64_t",
    "q": "__int128",
}
_SPECIAL = {
    "laneid": "::emulator::lane_index()",
    **{f"tid.{axis}": f"::emulator::thread_index().{axis}" for axis in "xyz"},
    **{f"ctaid.{axis}": f"::emulator::block_index().{axis}" for axis in "xyz"},
    **{f"ntid.{axis}": f"::emulator::block_size().{axis}" for axis in "xyz"},
    **{f"nctaid.{axis}": f"::emulator::grid_size().{axis}" for axis in "xyz"},
}
_TYPE = "|".join(sorted(TYPES, key=len, reverse=True))


@dataclass(frozen=True)
class Operand:
    """An operand of inline assembly: '' / '=' / '+', the letter of its constraint, the C++ expression."""

    modifier: str
    constraint: str
    expression: str


@dataclass
class _Scope:
    operands: list[Operand]
    is_plain: bool
    registers: dict[str, str] = field(default_factory=dict)

    def name(self, token: str) -> str:
        """A register of the template as C++."""
        if token == "_":
            return token
        number = re.fullmatch(r"%(\d+)", token)
        if number and not self.is_plain:
            if int(number[1]) >= len(self.operands):
                raise PtxError(f"there is no operand {token}")
            return f"ptx_r{number[1]}"
        bare = token.replace("%%", "%") if not self.is_plain else token
        if bare in self.registers:
            return self.registers[bare]
        if bare.startswith("%") and bare[1:] in _SPECIAL:
            return f"(uint32_t)({_SPECIAL[bare[1:]]})"
        raise PtxError(f"an operand that is not known: {token}")

    def operand(self, text: str):
        text = text.strip()
        if text.startswith("{"):
            return tuple(self.operand(part) for part in text[1:-1].split(","))
        if text.startswith("["):
            base, _, offset = re.sub(r"\s", "", text[1:-1]).partition("+")
            return Address(self.name(base), _number(offset or "0") if _is_number(offset or "0") else self.name(offset))
        if _is_number(text):
            return Immediate(_number(text))
        if _CONSTANT.fullmatch(text):
            return Immediate(f"({text})")
        if "|" in text:
            return "|".join(self.name(part.strip()) for part in text.split("|"))
        if text.startswith("!"):
            return f"(!{self.name(text[1:])})"
        return self.name(text)


_NUMBER = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F]+|\d+)[uU]?|0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}")

_CONSTANT = re.compile(
    r"(?=.*\d)[\s()&|^~+*<>-]*(?:0[xX][0-9a-fA-F]+|\d+)(?:[\s()&|^~+*<>-]+(?:0[xX][0-9a-fA-F]+|\d+))*[\s()]*"
)


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None


def _number(text: str) -> str:
    return text.rstrip("uU") if not text.lower().startswith(("0f", "0d")) else text


def _split_operands(text: str) -> list[str]:
    parts, depth, begin = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "[{(") - (c in "]})")
        if c == "," and depth == 0:
            parts.append(text[begin:i])
            begin = i + 1
    parts.append(text[begin:])
    return [part.strip() for part in parts if part.strip()]


def _statement(text: str, scope: _Scope) -> str:
    guard = ""
    guarded = re.match(r"@(!?)\s*(%{0,2}\w+)\s+", text)
    if guarded:
        guard = f"if ({guarded[1]}{scope.name(guarded[2])}) "
        text = text[guarded.end() :]
    name = re.match(r"[\w.:]*", text)[0]
    rest = text[len(name) :]
    for pattern, function in RULES:
        match = pattern.fullmatch(name)
        if match:
            operands = [scope.operand(part) for part in _split_operands(rest)]
            try:
                return f"{guard}{{ {function(Instruction(name, operands, match))} }}"
            except (IndexError, ValueError, AttributeError, KeyError) as error:
                raise PtxError(f"operands of `{text}`: {error}") from error
    raise PtxError(text)


def _declare(text: str, scope: _Scope) -> str:
    match = re.fullmatch(rf"\.reg\s+\.({_TYPE})\s+(.+)", text, re.DOTALL)
    if match is None:
        raise PtxError(text)
    declared = []
    for name in match[2].split(","):
        bare = name.strip().replace("%%", "%")
        many = re.fullmatch(r"(%?\w+)<(\d+)>", bare)
        names = [f"{many[1]}{k}" for k in range(int(many[2]))] if many else [bare]
        for one in names:
            scope.registers[one] = f"ptx_v_{one.lstrip('%')}"
            declared.append(f"{TYPES[match[1]]} {scope.registers[one]}{{}};")
    return "".join(declared)


def translate_template(template: str, operands: list[Operand], is_plain: bool = False) -> str:
    """
    The C++ statement, without a last semicolon, for the template of an asm statement and its operands.

    Parameters
    ----------
    template : str
        PTX with %0, %1 ... for operands; braces, `.reg` declarations and predicates are known, labels and branches are not.
    operands : list of Operand
        Outputs, then inputs.
    is_plain : bool
        An asm statement without colons, in which `%` is not written twice.

    Raises
    ------
    PtxError
        With the instruction that is not known.
    """
    scope = _Scope(operands, is_plain)
    before, after = [], []
    for number, operand in enumerate(operands):
        kind = _REGISTER.get(operand.constraint)
        if kind is None:
            raise PtxError(f'the constraint "{operand.constraint}"')
        register = f"ptx_r{number}"
        if operand.modifier:
            before.append(f"auto& ptx_o{number} = {operand.expression};")
            initial = (
                f"::emulator::ptx::as<{kind}>(ptx_o{number})" if operand.modifier == "+" else f"({kind})0x7fc5a5a5"
            )
            before.append(f"{kind} {register} = {initial};")
            after.append(f"::emulator::ptx::out(ptx_o{number}, {register});")
        else:
            before.append(f"const {kind} {register} = ::emulator::ptx::in<{kind}>({operand.expression});")
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", template, flags=re.DOTALL)
    body = []
    # Braces of a scope stand where a statement begins; those of a vector within one.
    for statement in (" ".join(part.split()) for part in text.split(";")):
        while statement.startswith(("{", "}")):
            statement = statement[1:].strip()
        if not statement:
            continue
        body.append(_declare(statement, scope) if statement.startswith(".reg") else _statement(statement, scope))
    return "do { " + " ".join([*before, *body, *after]) + " } while (0)"
