"""The PTX instructions that compute in one thread, each with the C++ that does what it does, and what a table of them is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


class PtxError(Exception):
    """PTX that the emulator does not know."""


TYPES = {
    "b8": "uint8_t",
    "u8": "uint8_t",
    "s8": "int8_t",
    "b16": "uint16_t",
    "u16": "uint16_t",
    "s16": "int16_t",
    "f16": "uint16_t",
    "bf16": "uint16_t",
    "b32": "uint32_t",
    "u32": "uint32_t",
    "s32": "int32_t",
    "f32": "float",
    "f16x2": "uint32_t",
    "bf16x2": "uint32_t",
    "b64": "uint64_t",
    "u64": "uint64_t",
    "s64": "int64_t",
    "f64": "double",
    "pred": "bool",
}
_WIDER = {"u16": "uint32_t", "s16": "int32_t", "u32": "uint64_t", "s32": "int64_t"}
_TYPE = "|".join(sorted(TYPES, key=len, reverse=True))


# ---- the table -------------------------------------------------------------------------------------------------------


@dataclass
class Instruction:
    """One instruction with operands as C++: a register, an immediate, a tuple of registers, or an address."""

    name: str
    operands: list
    match: re.Match[str]

    def value(self, index: int, dtype: str) -> str:
        """Operand `index` as a value of a PTX type."""
        return value(self.operands[index], dtype)

    def set(self, index: int, expression: str) -> str:
        """Operand `index` set to a C++ expression; `_` drops it."""
        target = self.operands[index]
        return "" if target == "_" else f"::emulator::ptx::set({target}, {expression});"


@dataclass(frozen=True)
class Address:
    """A register and what is added to it, as C++."""

    base: str
    offset: str


@dataclass(frozen=True)
class Immediate:
    """A number as PTX writes it."""

    text: str


def value(operand, dtype: str) -> str:
    """An operand as a C++ value of a PTX type."""
    kind = TYPES[dtype]
    if isinstance(operand, Immediate):
        text = operand.text
        if text.lower().startswith("0f"):
            return f"::emulator::bit_cast<float>(0x{text[2:]}u)"
        if text.lower().startswith("0d"):
            return f"::emulator::bit_cast<double>(0x{text[2:]}ull)"
        return f"({kind})({text})"
    if not isinstance(operand, str):
        raise PtxError(f"a register was expected in place of {operand}")
    return operand if dtype == "pred" else f"::emulator::ptx::as<{kind}>({operand})"


RULES: list[tuple[re.Pattern[str], Callable[[Instruction], str]]] = []


def rule(pattern: str):
    """Register a function that writes the C++ of the instructions whose names match."""

    def register(function: Callable[[Instruction], str]) -> Callable[[Instruction], str]:
        RULES.append((re.compile(pattern), function))
        return function

    return register


@rule(rf"mov\.(?:(?P<t>{_TYPE}))")
def _mov(i: Instruction) -> str:
    dtype = i.match["t"]
    target, source = i.operands
    if isinstance(target, tuple):  # unpacks
        bits = {"b32": 32, "b64": 64, "u64": 64, "u32": 32}[dtype] // len(target)
        whole = i.value(1, dtype)
        parts = [f"(uint{bits}_t)(({TYPES[dtype]}){whole} >> {bits * k})" for k in range(len(target))]
        return "".join(f"::emulator::ptx::set({t}, {part});" for t, part in zip(target, parts, strict=True) if t != "_")
    if isinstance(source, tuple):  # packs
        whole = {"b32": 32, "b64": 64, "u64": 64, "u32": 32}[dtype]
        bits = whole // len(source)
        parts = [f"((uint{whole}_t){value(s, f'b{bits}')} << {bits * k})" for k, s in enumerate(source)]
        return i.set(0, " | ".join(parts))
    return i.set(0, i.value(1, dtype))


_BINARY = {
    "add": "({a} + {b})",
    "sub": "({a} - {b})",
    "and": "({a} & {b})",
    "or": "({a} | {b})",
    "xor": "({a} ^ {b})",
    "min": "min({a}, {b})",
    "max": "max({a}, {b})",
    "mul.lo": "({a} * {b})",
    "div": "({a} / {b})",
    "rem": "({a} % {b})",
}


def _unsigned_ring(dtype: str) -> str:
    """Sums and products of signed types wrap: computed unsigned."""
    return dtype.replace("s", "u") if dtype in ("s16", "s32", "s64") else dtype


@rule(r"(?P<op>add|sub|mul\.lo)\.(?P<t>[us](?:16|32|64))")
def _ring(i: Instruction) -> str:
    dtype = _unsigned_ring(i.match["t"])
    return i.set(0, f"({TYPES[dtype]})" + _BINARY[i.match["op"]].format(a=i.value(1, dtype), b=i.value(2, dtype)))


@rule(r"(?P<op>min|max|div|rem)\.(?P<t>[us](?:32|64))|(?P<op2>and|or|xor)\.(?P<t2>b16|b32|b64|pred)")
def _integer(i: Instruction) -> str:
    op, dtype = i.match["op"] or i.match["op2"], i.match["t"] or i.match["t2"]
    return i.set(0, f"({TYPES[dtype]})" + _BINARY[op].format(a=i.value(1, dtype), b=i.value(2, dtype)))


@rule(r"mad\.lo\.(?P<t>[us](?:16|32|64))")
def _mad(i: Instruction) -> str:
    dtype = _unsigned_ring(i.match["t"])
    return i.set(0, f"({TYPES[dtype]})({i.value(1, dtype)} * {i.value(2, dtype)} + {i.value(3, dtype)})")


@rule(r"(?P<op>mul|mad)\.wide\.(?P<t>[us](?:16|32))")
def _wide(i: Instruction) -> str:
    dtype = i.match["t"]
    product = f"::emulator::ptx::mul_wide<{_WIDER[dtype]}>({i.value(1, dtype)}, {i.value(2, dtype)})"
    if i.match["op"] == "mad":
        wide = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}[dtype]
        product = f"{product} + {i.value(3, wide)}"
    return i.set(0, product)


@rule(r"mul\.hi\.(?P<t>[us])32")
def _mul_hi(i: Instruction) -> str:
    function, dtype = ("__mulhi", "s32") if i.match["t"] == "s" else ("__umulhi", "u32")
    return i.set(0, f"{function}({i.value(1, dtype)}, {i.value(2, dtype)})")


@rule(r"not\.(?P<t>b16|b32|b64|pred)")
def _not(i: Instruction) -> str:
    dtype = i.match["t"]
    return i.set(0, f"{'!' if dtype == 'pred' else f'({TYPES[dtype]})~'}{i.value(1, dtype)}")


@rule(r"neg\.s32")
def _neg(i: Instruction) -> str:
    return i.set(0, f"0u - {i.value(1, 'u32')}")


@rule(r"(?P<op>shl|shr)\.(?P<t>[bus](?:16|32|64))")
def _shift(i: Instruction) -> str:
    return i.set(0, f"::emulator::ptx::{i.match['op']}({i.value(1, i.match['t'])}, {i.value(2, 'u32')})")


@rule(r"shf\.(?P<d>[lr])\.(?P<m>wrap|clamp)\.b32")
def _funnel(i: Instruction) -> str:
    function = f"__funnelshift_{i.match['d']}{'c' if i.match['m'] == 'clamp' else ''}"
    return i.set(0, f"{function}({i.value(1, 'u32')}, {i.value(2, 'u32')}, {i.value(3, 'u32')})")


@rule(r"bfe\.(?P<t>[us](?:32|64))")
def _bfe(i: Instruction) -> str:
    return i.set(0, f"::emulator::ptx::bfe({i.value(1, i.match['t'])}, {i.value(2, 'u32')}, {i.value(3, 'u32')})")


@rule(r"bfi\.(?P<t>b(?:32|64))")
def _bfi(i: Instruction) -> str:
    dtype = i.match["t"]
    arguments = f"{i.value(1, dtype)}, {i.value(2, dtype)}, {i.value(3, 'u32')}, {i.value(4, 'u32')}"
    return i.set(0, f"::emulator::ptx::bfi({arguments})")


@rule(r"(?P<op>popc|clz|brev)\.b32")
def _count(i: Instruction) -> str:
    return i.set(0, f"(uint32_t)__{i.match['op']}({i.value(1, 'b32')})")


@rule(r"lop3\.b32")
def _lop3(i: Instruction) -> str:
    return i.set(0, f"::emulator::ptx::lop3({', '.join(i.value(k, 'b32') for k in (1, 2, 3, 4))})")


@rule(r"prmt\.b32")
def _prmt(i: Instruction) -> str:
    return i.set(0, f"__byte_perm({', '.join(i.value(k, 'b32') for k in (1, 2, 3))})")


@rule(r"dp4a\.(?P<a>[us])32\.(?P<b>[us])32")
def _dp4a(i: Instruction) -> str:
    kinds = ", ".join("int8_t" if i.match[k] == "s" else "uint8_t" for k in "ab")
    return i.set(0, f"::emulator::ptx::dp4a<{kinds}>({', '.join(i.value(k, 'b32') for k in (1, 2, 3))})")


@rule(rf"selp\.(?P<t>{_TYPE})")
def _selp(i: Instruction) -> str:
    dtype = i.match["t"]
    return i.set(0, f"({i.value(3, 'pred')} ? {i.value(1, dtype)} : {i.value(2, dtype)})")


@rule(rf"setp\.(?P<c>eq|ne|lt|le|gt|ge|lo|ls|hi|hs)\.(?P<t>{_TYPE})")
def _setp(i: Instruction) -> str:
    signs = {
        "eq": "==",
        "ne": "!=",
        "lt": "<",
        "le": "<=",
        "gt": ">",
        "ge": ">=",
        "lo": "<",
        "ls": "<=",
        "hi": ">",
        "hs": ">=",
    }
    dtype = i.match["t"]
    return f"{i.operands[0]} = {i.value(1, dtype)} {signs[i.match['c']]} {i.value(2, dtype)};"


# ---- floats ----------------------------------------------------------------------------------------------------------


@rule(r"(?P<op>add|sub|mul)(?:\.rn)?(?:\.ftz)?\.(?P<t>f32|f64)")
def _float_binary(i: Instruction) -> str:
    sign = {"add": "+", "sub": "-", "mul": "*"}[i.match["op"]]
    return i.set(0, f"({i.value(1, i.match['t'])} {sign} {i.value(2, i.match['t'])})")


@rule(r"fma\.rn(?:\.ftz)?\.(?P<t>f32|f64)")
def _float_fma(i: Instruction) -> str:
    dtype = i.match["t"]
    function = "fmaf" if dtype == "f32" else "fma"
    return i.set(0, f"{function}({', '.join(i.value(k, dtype) for k in (1, 2, 3))})")


@rule(r"(?P<op>min|max)(?:\.ftz)?\.f32")
def _float_min_max(i: Instruction) -> str:
    return i.set(0, f"{i.match['op']}({i.value(1, 'f32')}, {i.value(2, 'f32')})")


@rule(r"(?P<op>rcp|rsqrt|sqrt|ex2|lg2|tanh|abs|neg)(?:\.approx|\.rn)?(?:\.ftz)?\.f32")
def _float_unary(i: Instruction) -> str:
    form = {
        "rcp": "1.0f / {}",
        "rsqrt": "rsqrtf({})",
        "sqrt": "sqrtf({})",
        "ex2": "exp2f({})",
        "lg2": "log2f({})",
        "tanh": "tanhf({})",
        "abs": "fabsf({})",
        "neg": "-{}",
    }[i.match["op"]]
    return i.set(0, form.format(i.value(1, "f32")))


@rule(r"(?P<op>add|sub|mul|fma|min|max)(?:\.rn)?(?:\.ftz)?\.(?P<t>b?f16)(?P<two>x2)?")
def _half(i: Instruction) -> str:
    dtype = i.match["t"] + (i.match["two"] or "")
    operands = ", ".join(i.value(k, dtype) for k in range(1, len(i.operands)))
    return i.set(0, f"::emulator::ptx::half_{i.match['op']}<::emulator::{i.match['t'].upper()}>({operands})")


@rule(r"(?P<op>neg|abs)(?:\.ftz)?\.(?P<t>b?f16)(?P<two>x2)?")
def _half_sign(i: Instruction) -> str:
    dtype = i.match["t"] + (i.match["two"] or "")
    sign, kind = ("0x80008000u" if i.match["two"] else "0x8000u"), TYPES[dtype]
    value = i.value(1, dtype)
    return i.set(0, f"({kind})({value} ^ {sign})" if i.match["op"] == "neg" else f"({kind})({value} & ~{sign})")


# ---- conversions -----------------------------------------------------------------------------------------------------


@rule(r"cvt\.(?P<to>[usb](?:8|16|32|64))\.(?P<from>[usb](?:8|16|32|64))")
def _cvt_integer(i: Instruction) -> str:
    to, source = i.match["to"], i.value(1, i.match["from"])
    extended = f"(int64_t)({TYPES[to]}){source}" if to[0] == "s" else f"({TYPES[to]}){source}"
    return i.set(0, extended)


@rule(r"cvt\.rn(?:\.relu)?\.(?P<t>b?f16)x2\.f32")
def _cvt_pair(i: Instruction) -> str:
    if "relu" in i.name:
        raise PtxError(i.name)
    encode = f"::emulator::{i.match['t'].upper()}::encode"
    return i.set(0, f"::emulator::ptx::pair({encode}({i.value(2, 'f32')}), {encode}({i.value(1, 'f32')}))")


@rule(r"cvt\.rn\.(?P<t>b?f16)\.(?P<from>f32|f64|[us](?:8|16|32))")
def _cvt_to_half(i: Instruction) -> str:
    return i.set(0, f"::emulator::{i.match['t'].upper()}::encode({i.value(1, i.match['from'])})")


@rule(r"cvt(?:\.ftz)?\.f32\.(?P<t>b?f16)")
def _cvt_from_half(i: Instruction) -> str:
    return i.set(0, f"::emulator::{i.match['t'].upper()}::decode({i.value(1, 'b16')})")


@rule(r"cvt\.rn\.f16x2\.(?P<t>e4m3|e5m2)x2")
def _cvt_from_float8(i: Instruction) -> str:
    source = i.value(1, "b16")
    low, high = (
        f"::emulator::float_to_half(::emulator::{i.match['t']}_to_float((uint8_t)({source} >> {shift})))"
        for shift in (0, 8)
    )
    return i.set(0, f"::emulator::ptx::pair({low}, {high})")


@rule(r"cvt\.rn\.satfinite\.(?P<t>e4m3|e5m2)x2\.f32")
def _cvt_to_float8(i: Instruction) -> str:
    high, low = (f"::emulator::to_{i.match['t']}({i.value(k, 'f32')})" for k in (1, 2))
    return i.set(0, f"(uint16_t)({high} << 8 | {low})")


@rule(r"cvt\.rn\.satfinite\.(?P<t>e4m3|e5m2)x2\.f16x2")
def _cvt_half_to_float8(i: Instruction) -> str:
    source = i.value(1, "b32")
    high, low = (
        f"::emulator::to_{i.match['t']}(::emulator::half_to_float((uint16_t)({source} >> {shift})))"
        for shift in (16, 0)
    )
    return i.set(0, f"(uint16_t)({high} << 8 | {low})")


@rule(r"cvt\.rn\.f(?P<w>32|64)\.(?P<from>[us](?:8|16|32|64)|f64)")
def _cvt_to_float(i: Instruction) -> str:
    return i.set(0, f"({'float' if i.match['w'] == '32' else 'double'}){i.value(1, i.match['from'])}")


@rule(r"cvt\.(?P<r>rni|rzi|rmi|rpi)(?:\.ftz)?(?:\.sat)?\.(?P<to>[us](?:8|16|32|64))\.f32")
def _cvt_from_float(i: Instruction) -> str:
    rounding = {"rni": "rintf", "rzi": "truncf", "rmi": "floorf", "rpi": "ceilf"}[i.match["r"]]
    return i.set(0, f"::emulator::saturate<{TYPES[i.match['to']]}>({rounding}({i.value(1, 'f32')}))")
