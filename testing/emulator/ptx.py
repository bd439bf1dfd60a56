"""From PTX instructions to calls of the emulator: a small translator, and the table of what it knows."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field


class PtxError(Exception):
    """PTX that the emulator does not know."""


@dataclass(frozen=True)
class Operand:
    """An operand of inline assembly: '' / '=' / '+', the letter of its constraint, the C++ expression."""

    modifier: str
    constraint: str
    expression: str


_REGISTER = {
    "r": "uint32_t",
    "l": "uint64_t",
    "h": "uint16_t",
    "f": "float",
    "d": "double",
    "n": "int64_t",
    "q": "__int128",
}
_TYPES = {
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
_SPECIAL = {
    "laneid": "::emulator::lane_index()",
    **{f"tid.{axis}": f"::emulator::thread_index().{axis}" for axis in "xyz"},
    **{f"ctaid.{axis}": f"::emulator::block_index().{axis}" for axis in "xyz"},
    **{f"ntid.{axis}": f"::emulator::block_size().{axis}" for axis in "xyz"},
    **{f"nctaid.{axis}": f"::emulator::grid_size().{axis}" for axis in "xyz"},
}
_TYPE = "|".join(sorted(_TYPES, key=len, reverse=True))


# ---- the table -----------------------------------------------------------------------------------------------------------


@dataclass
class _Instruction:
    """One instruction with operands as C++: a register, an immediate, a tuple of registers, or an address."""

    name: str
    operands: list
    match: re.Match[str]

    def value(self, index: int, dtype: str) -> str:
        """Operand `index` as a value of a PTX type."""
        return _value(self.operands[index], dtype)

    def set(self, index: int, expression: str) -> str:
        target = self.operands[index]
        return "" if target == "_" else f"::emulator::ptx::set({target}, {expression});"


@dataclass(frozen=True)
class _Address:
    base: str
    offset: str


@dataclass(frozen=True)
class _Immediate:
    text: str


def _value(operand, dtype: str) -> str:
    kind = _TYPES[dtype]
    if isinstance(operand, _Immediate):
        text = operand.text
        if text.lower().startswith("0f"):
            return f"::emulator::bit_cast<float>(0x{text[2:]}u)"
        if text.lower().startswith("0d"):
            return f"::emulator::bit_cast<double>(0x{text[2:]}ull)"
        return f"({kind})({text})"
    if not isinstance(operand, str):
        raise PtxError(f"a register was expected in place of {operand}")
    return operand if dtype == "pred" else f"::emulator::ptx::as<{kind}>({operand})"


_RULES: list[tuple[re.Pattern[str], Callable[[_Instruction], str]]] = []


def _rule(pattern: str):
    def register(function: Callable[[_Instruction], str]) -> Callable[[_Instruction], str]:
        _RULES.append((re.compile(pattern), function))
        return function

    return register


@_rule(rf"mov\.(?:(?P<t>{_TYPE}))")
def _mov(i: _Instruction) -> str:
    dtype = i.match["t"]
    target, source = i.operands
    if isinstance(target, tuple):  # unpacks
        bits = {"b32": 32, "b64": 64, "u64": 64, "u32": 32}[dtype] // len(target)
        whole = i.value(1, dtype)
        parts = [f"(uint{bits}_t)(({_TYPES[dtype]}){whole} >> {bits * k})" for k in range(len(target))]
        return "".join(f"::emulator::ptx::set({t}, {part});" for t, part in zip(target, parts, strict=True) if t != "_")
    if isinstance(source, tuple):  # packs
        whole = {"b32": 32, "b64": 64, "u64": 64, "u32": 32}[dtype]
        bits = whole // len(source)
        parts = [f"((uint{whole}_t){_value(s, f'b{bits}')} << {bits * k})" for k, s in enumerate(source)]
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


@_rule(r"(?P<op>add|sub|mul\.lo)\.(?P<t>[us](?:16|32|64))")
def _ring(i: _Instruction) -> str:
    dtype = _unsigned_ring(i.match["t"])
    return i.set(0, f"({_TYPES[dtype]})" + _BINARY[i.match["op"]].format(a=i.value(1, dtype), b=i.value(2, dtype)))


@_rule(r"(?P<op>min|max|div|rem)\.(?P<t>[us](?:32|64))|(?P<op2>and|or|xor)\.(?P<t2>b16|b32|b64|pred)")
def _integer(i: _Instruction) -> str:
    op, dtype = i.match["op"] or i.match["op2"], i.match["t"] or i.match["t2"]
    return i.set(0, f"({_TYPES[dtype]})" + _BINARY[op].format(a=i.value(1, dtype), b=i.value(2, dtype)))


@_rule(r"mad\.lo\.(?P<t>[us](?:16|32|64))")
def _mad(i: _Instruction) -> str:
    dtype = _unsigned_ring(i.match["t"])
    return i.set(0, f"({_TYPES[dtype]})({i.value(1, dtype)} * {i.value(2, dtype)} + {i.value(3, dtype)})")


@_rule(r"(?P<op>mul|mad)\.wide\.(?P<t>[us](?:16|32))")
def _wide(i: _Instruction) -> str:
    dtype = i.match["t"]
    product = f"::emulator::ptx::mul_wide<{_WIDER[dtype]}>({i.value(1, dtype)}, {i.value(2, dtype)})"
    if i.match["op"] == "mad":
        wide = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}[dtype]
        product = f"{product} + {i.value(3, wide)}"
    return i.set(0, product)


@_rule(r"mul\.hi\.(?P<t>[us])32")
def _mul_hi(i: _Instruction) -> str:
    function, dtype = ("__mulhi", "s32") if i.match["t"] == "s" else ("__umulhi", "u32")
    return i.set(0, f"{function}({i.value(1, dtype)}, {i.value(2, dtype)})")


@_rule(r"not\.(?P<t>b16|b32|b64|pred)")
def _not(i: _Instruction) -> str:
    dtype = i.match["t"]
    return i.set(0, f"{'!' if dtype == 'pred' else f'({_TYPES[dtype]})~'}{i.value(1, dtype)}")


@_rule(r"neg\.s32")
def _neg(i: _Instruction) -> str:
    return i.set(0, f"0u - {i.value(1, 'u32')}")


@_rule(r"(?P<op>shl|shr)\.(?P<t>[bus](?:16|32|64))")
def _shift(i: _Instruction) -> str:
    return i.set(0, f"::emulator::ptx::{i.match['op']}({i.value(1, i.match['t'])}, {i.value(2, 'u32')})")


@_rule(r"shf\.(?P<d>[lr])\.(?P<m>wrap|clamp)\.b32")
def _funnel(i: _Instruction) -> str:
    function = f"__funnelshift_{i.match['d']}{'c' if i.match['m'] == 'clamp' else ''}"
    return i.set(0, f"{function}({i.value(1, 'u32')}, {i.value(2, 'u32')}, {i.value(3, 'u32')})")


@_rule(r"bfe\.(?P<t>[us](?:32|64))")
def _bfe(i: _Instruction) -> str:
    return i.set(0, f"::emulator::ptx::bfe({i.value(1, i.match['t'])}, {i.value(2, 'u32')}, {i.value(3, 'u32')})")


@_rule(r"bfi\.(?P<t>b(?:32|64))")
def _bfi(i: _Instruction) -> str:
    dtype = i.match["t"]
    arguments = f"{i.value(1, dtype)}, {i.value(2, dtype)}, {i.value(3, 'u32')}, {i.value(4, 'u32')}"
    return i.set(0, f"::emulator::ptx::bfi({arguments})")


@_rule(r"(?P<op>popc|clz|brev)\.b32")
def _count(i: _Instruction) -> str:
    return i.set(0, f"(uint32_t)__{i.match['op']}({i.value(1, 'b32')})")


@_rule(r"lop3\.b32")
def _lop3(i: _Instruction) -> str:
    return i.set(0, f"::emulator::ptx::lop3({', '.join(i.value(k, 'b32') for k in (1, 2, 3, 4))})")


@_rule(r"prmt\.b32")
def _prmt(i: _Instruction) -> str:
    return i.set(0, f"__byte_perm({', '.join(i.value(k, 'b32') for k in (1, 2, 3))})")


@_rule(r"dp4a\.(?P<a>[us])32\.(?P<b>[us])32")
def _dp4a(i: _Instruction) -> str:
    kinds = ", ".join("int8_t" if i.match[k] == "s" else "uint8_t" for k in "ab")
    return i.set(0, f"::emulator::ptx::dp4a<{kinds}>({', '.join(i.value(k, 'b32') for k in (1, 2, 3))})")


@_rule(rf"selp\.(?P<t>{_TYPE})")
def _selp(i: _Instruction) -> str:
    dtype = i.match["t"]
    return i.set(0, f"({i.value(3, 'pred')} ? {i.value(1, dtype)} : {i.value(2, dtype)})")


@_rule(rf"setp\.(?P<c>eq|ne|lt|le|gt|ge|lo|ls|hi|hs)\.(?P<t>{_TYPE})")
def _setp(i: _Instruction) -> str:
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


# ---- floats --------------------------------------------------------------------------------------------------------------


@_rule(r"(?P<op>add|sub|mul)(?:\.rn)?(?:\.ftz)?\.(?P<t>f32|f64)")
def _float_binary(i: _Instruction) -> str:
    sign = {"add": "+", "sub": "-", "mul": "*"}[i.match["op"]]
    return i.set(0, f"({i.value(1, i.match['t'])} {sign} {i.value(2, i.match['t'])})")


@_rule(r"fma\.rn(?:\.ftz)?\.(?P<t>f32|f64)")
def _float_fma(i: _Instruction) -> str:
    dtype = i.match["t"]
    function = "fmaf" if dtype == "f32" else "fma"
    return i.set(0, f"{function}({', '.join(i.value(k, dtype) for k in (1, 2, 3))})")


@_rule(r"(?P<op>min|max)(?:\.ftz)?\.f32")
def _float_min_max(i: _Instruction) -> str:
    return i.set(0, f"{i.match['op']}({i.value(1, 'f32')}, {i.value(2, 'f32')})")


@_rule(r"(?P<op>rcp|rsqrt|sqrt|ex2|lg2|tanh|abs|neg)(?:\.approx|\.rn)?(?:\.ftz)?\.f32")
def _float_unary(i: _Instruction) -> str:
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


@_rule(r"(?P<op>add|sub|mul|fma|min|max)(?:\.rn)?(?:\.ftz)?\.(?P<t>b?f16)(?P<two>x2)?")
def _half(i: _Instruction) -> str:
    dtype = i.match["t"] + (i.match["two"] or "")
    operands = ", ".join(i.value(k, dtype) for k in range(1, len(i.operands)))
    return i.set(0, f"::emulator::ptx::half_{i.match['op']}<::emulator::{i.match['t'].upper()}>({operands})")


@_rule(r"(?P<op>neg|abs)(?:\.ftz)?\.(?P<t>b?f16)(?P<two>x2)?")
def _half_sign(i: _Instruction) -> str:
    dtype = i.match["t"] + (i.match["two"] or "")
    sign, kind = ("0x80008000u" if i.match["two"] else "0x8000u"), _TYPES[dtype]
    value = i.value(1, dtype)
    return i.set(0, f"({kind})({value} ^ {sign})" if i.match["op"] == "neg" else f"({kind})({value} & ~{sign})")


# ---- conversions ---------------------------------------------------------------------------------------------------------


@_rule(r"cvt\.(?P<to>[usb](?:8|16|32|64))\.(?P<from>[usb](?:8|16|32|64))")
def _cvt_integer(i: _Instruction) -> str:
    to, source = i.match["to"], i.value(1, i.match["from"])
    extended = f"(int64_t)({_TYPES[to]}){source}" if to[0] == "s" else f"({_TYPES[to]}){source}"
    return i.set(0, extended)


@_rule(r"cvt\.rn(?:\.relu)?\.(?P<t>b?f16)x2\.f32")
def _cvt_pair(i: _Instruction) -> str:
    if "relu" in i.name:
        raise PtxError(i.name)
    encode = f"::emulator::{i.match['t'].upper()}::encode"
    return i.set(0, f"::emulator::ptx::pair({encode}({i.value(2, 'f32')}), {encode}({i.value(1, 'f32')}))")


@_rule(r"cvt\.rn\.(?P<t>b?f16)\.(?P<from>f32|f64|[us](?:8|16|32))")
def _cvt_to_half(i: _Instruction) -> str:
    return i.set(0, f"::emulator::{i.match['t'].upper()}::encode({i.value(1, i.match['from'])})")


@_rule(r"cvt(?:\.ftz)?\.f32\.(?P<t>b?f16)")
def _cvt_from_half(i: _Instruction) -> str:
    return i.set(0, f"::emulator::{i.match['t'].upper()}::decode({i.value(1, 'b16')})")


@_rule(r"cvt\.rn\.f16x2\.(?P<t>e4m3|e5m2)x2")
def _cvt_from_float8(i: _Instruction) -> str:
    source = i.value(1, "b16")
    low, high = (
        f"::emulator::float_to_half(::emulator::{i.match['t']}_to_float((uint8_t)({source} >> {shift})))"
        for shift in (0, 8)
    )
    return i.set(0, f"::emulator::ptx::pair({low}, {high})")


@_rule(r"cvt\.rn\.satfinite\.(?P<t>e4m3|e5m2)x2\.f32")
def _cvt_to_float8(i: _Instruction) -> str:
    high, low = (f"::emulator::to_{i.match['t']}({i.value(k, 'f32')})" for k in (1, 2))
    return i.set(0, f"(uint16_t)({high} << 8 | {low})")


@_rule(r"cvt\.rn\.satfinite\.(?P<t>e4m3|e5m2)x2\.f16x2")
def _cvt_half_to_float8(i: _Instruction) -> str:
    source = i.value(1, "b32")
    high, low = (
        f"::emulator::to_{i.match['t']}(::emulator::half_to_float((uint16_t)({source} >> {shift})))"
        for shift in (16, 0)
    )
    return i.set(0, f"(uint16_t)({high} << 8 | {low})")


@_rule(r"cvt\.rn\.f(?P<w>32|64)\.(?P<from>[us](?:8|16|32|64)|f64)")
def _cvt_to_float(i: _Instruction) -> str:
    return i.set(0, f"({'float' if i.match['w'] == '32' else 'double'}){i.value(1, i.match['from'])}")


@_rule(r"cvt\.(?P<r>rni|rzi|rmi|rpi)(?:\.ftz)?(?:\.sat)?\.(?P<to>[us](?:8|16|32|64))\.f32")
def _cvt_from_float(i: _Instruction) -> str:
    rounding = {"rni": "rintf", "rzi": "truncf", "rmi": "floorf", "rpi": "ceilf"}[i.match["r"]]
    return i.set(0, f"::emulator::saturate<{_TYPES[i.match['to']]}>({rounding}({i.value(1, 'f32')}))")


# ---- addresses and memory --------------------------------------------------------------------------------------------------


@_rule(r"cvta\.to\.shared\.u(?:32|64)")
def _cvta_to_shared(i: _Instruction) -> str:
    return i.set(0, f"::emulator::shared_address((const void*){i.value(1, 'u64')})")


@_rule(r"cvta\.to\.global\.u64|cvta\.global\.u64")
def _cvta_to_global(i: _Instruction) -> str:
    return i.set(0, i.value(1, "u64"))


@_rule(r"cvta\.shared\.u(?:32|64)")
def _cvta_from_shared(i: _Instruction) -> str:
    return i.set(0, f"(uint64_t)::emulator::ptx::shared({i.value(1, 'u32')})")


def _pointer(operand, space: str) -> str:
    if not isinstance(operand, _Address):
        raise PtxError(f"an address was expected in place of {operand}")
    base = f"::emulator::ptx::as<uint64_t>({operand.base})"
    return f"::emulator::ptx::{'shared' if space == 'shared' else 'global'}({base} + ({operand.offset}))"


_CACHE = r"(?:\.(?:L1|L2)::\w+|\.ca|\.cg|\.cs|\.lu|\.cv|\.wb|\.wt|\.nc|\.weak|\.volatile|\.relaxed|\.acquire|\.release|\.cta|\.gpu|\.sys)*"


@_rule(rf"ld{_CACHE}(?:\.(?P<space>global|shared|const))?(?:::cta)?{_CACHE}(?:\.v(?P<n>[248]))?\.(?P<t>{_TYPE})")
def _ld(i: _Instruction) -> str:
    dtype, count = i.match["t"], int(i.match["n"] or 1)
    targets = i.operands[0] if isinstance(i.operands[0], tuple) else (i.operands[0],)
    if len(targets) != count:
        raise PtxError(f"{i.name} into {len(targets)} registers")
    load = f"::emulator::ptx::load<{_TYPES[dtype]}, {count}>({_pointer(i.operands[1], i.match['space'])}, __LINE__)"
    sets = "".join(
        f"::emulator::ptx::set({target}, ::emulator::ptx::widened(ptx_loaded.item[{k}]));"
        for k, target in enumerate(targets)
        if target != "_"
    )
    return f"{{ const auto ptx_loaded = {load}; {sets} }}"


@_rule(rf"st{_CACHE}(?:\.(?P<space>global|shared))?(?:::cta)?{_CACHE}(?:\.v(?P<n>[248]))?\.(?P<t>{_TYPE})")
def _st(i: _Instruction) -> str:
    dtype, count = i.match["t"], int(i.match["n"] or 1)
    sources = i.operands[1] if isinstance(i.operands[1], tuple) else (i.operands[1],)
    if len(sources) != count:
        raise PtxError(f"{i.name} from {len(sources)} registers")
    values = ", ".join(_value(source, dtype) for source in sources)
    vector = f"::emulator::ptx::Vector<{_TYPES[dtype]}, {count}>{{{{{values}}}}}"
    return f"::emulator::ptx::store({_pointer(i.operands[0], i.match['space'])}, {vector}, __LINE__);"


@_rule(r"prefetch(?:u)?\..*|discard\..*|applypriority\..*")
def _prefetch(i: _Instruction) -> str:
    return ""


_ATOMIC = {
    "add": "Add",
    "min": "Min",
    "max": "Max",
    "and": "And",
    "or": "Or",
    "xor": "Xor",
    "exch": "Exch",
    "inc": "Inc",
    "dec": "Dec",
}
_ATOMIC_TYPES = {
    "u32": "unsigned",
    "b32": "unsigned",
    "s32": "int",
    "u64": "unsigned long long",
    "b64": "unsigned long long",
}
_ATOMIC_TYPES |= {"f32": "float", "f64": "double", "f16x2": "__half2", "bf16x2": "__nv_bfloat162", "f16": "__half"}
_SCOPE = r"(?:\.(?:relaxed|acquire|release|acq_rel|cta|gpu|sys|noftz))*"


@_rule(
    rf"(?P<kind>red|atom){_SCOPE}(?:\.(?P<space>global|shared))?{_SCOPE}\.(?P<op>{'|'.join(_ATOMIC)}|cas)"
    rf"(?:\.noftz)?\.(?P<t>{'|'.join(sorted(_ATOMIC_TYPES, key=len, reverse=True))})"
)
def _atomic(i: _Instruction) -> str:
    first = 1 if i.match["kind"] == "atom" else 0
    dtype = i.match["t"]
    kind = _ATOMIC_TYPES[dtype]
    pointer = f"({kind}*){_pointer(i.operands[first], i.match['space'])}"
    values = [f"::emulator::bit_cast<{kind}>({_value(operand, dtype)})" for operand in i.operands[first + 1 :]]
    call = f"atomic{'CAS' if i.match['op'] == 'cas' else _ATOMIC[i.match['op']]}({', '.join([pointer, *values])})"
    return i.set(0, call) if first else f"{call};"


@_rule(r"createpolicy\..*")
def _policy(i: _Instruction) -> str:
    return i.set(0, "uint64_t(0)")


@_rule(r"fence\..*|membar\..*|griddepcontrol\..*")
def _no_operation(i: _Instruction) -> str:
    return ""


@_rule(r"nanosleep\.u32")
def _sleep(i: _Instruction) -> str:
    return "::emulator::let_others_run();"


@_rule(r"trap")
def _trap(i: _Instruction) -> str:
    return "__trap();"


# ---- asynchronous copies -----------------------------------------------------------------------------------------------------


@_rule(r"cp\.async\.commit_group")
def _commit(i: _Instruction) -> str:
    return "::emulator::cp_async_commit();"


@_rule(r"cp\.async\.wait_all")
def _wait_all(i: _Instruction) -> str:
    return "::emulator::cp_async_wait(-1);"


@_rule(r"cp\.async\.wait_group")
def _wait_group(i: _Instruction) -> str:
    return f"::emulator::cp_async_wait({i.value(0, 's32')});"


@_rule(r"cp\.async\.(?P<c>ca|cg)\.shared(?:::cta)?\.global(?:\.L2::\w+)*")
def _cp_async(i: _Instruction) -> str:
    shared, source = i.operands[0], i.operands[1]
    if not isinstance(shared, _Address):
        raise PtxError(i.name)
    target = f"::emulator::ptx::as<uint32_t>({shared.base}) + ({shared.offset})"
    bytes_ = i.value(2, "s32")
    if i.match["c"] == "cg" and isinstance(i.operands[2], _Immediate) and i.operands[2].text != "16":
        raise PtxError(f"{i.name} copies 16 bytes, not {i.operands[2].text}")
    if "cache_hint" in i.name:
        i.operands.pop()
    present = f"::emulator::ptx::source_bytes({i.operands[3]}, {bytes_})" if len(i.operands) > 3 else bytes_
    return f"::emulator::cp_async({target}, {_pointer(source, 'global')}, {bytes_}, {present}, __LINE__);"


# ---- warps -------------------------------------------------------------------------------------------------------------------


@_rule(r"(?:bar|barrier)(?:\.cta)?\.sync(?:\.aligned)?")
def _bar_sync(i: _Instruction) -> str:
    threads = i.value(1, "s32") if len(i.operands) > 1 else "0"
    return f"::emulator::barrier({i.value(0, 's32')}, {threads}, true, ::emulator::Reduce::none, 0, __LINE__);"


@_rule(r"(?:bar|barrier)(?:\.cta)?\.arrive(?:\.aligned)?")
def _bar_arrive(i: _Instruction) -> str:
    return f"::emulator::bar_arrive({i.value(0, 's32')}, {i.value(1, 's32')}, __LINE__);"


@_rule(r"bar\.warp\.sync")
def _bar_warp(i: _Instruction) -> str:
    return f"::emulator::warp_barrier({i.value(0, 'u32')}, __LINE__);"


@_rule(r"activemask\.b32")
def _activemask(i: _Instruction) -> str:
    return i.set(0, "::emulator::active_mask()")


@_rule(r"vote\.sync\.(?P<m>ballot\.b32|any\.pred|all\.pred)")
def _vote(i: _Instruction) -> str:
    mode, predicate, mask = i.match["m"], i.value(1, "pred"), i.value(2, "u32")
    if mode == "ballot.b32":
        return i.set(0, f"::emulator::ballot({mask}, {predicate}, __LINE__)")
    if mode == "any.pred":
        return i.set(0, f"::emulator::ballot({mask}, {predicate}, __LINE__) != 0")
    return i.set(0, f"::emulator::ballot({mask}, !{predicate}, __LINE__) == 0")


@_rule(r"shfl\.sync\.(?P<m>idx|up|down|bfly)\.b32")
def _shfl(i: _Instruction) -> str:
    mode = {"idx": "index", "up": "up", "down": "down", "bfly": "butterfly"}[i.match["m"]]
    target, predicate = i.operands[0], None
    if isinstance(target, str) and "|" in target:
        target, predicate = target.split("|")
    call = (
        f"::emulator::shuffle(::emulator::Shuffle::{mode}, {i.value(4, 'u32')}, &ptx_word, 1, "
        f"{i.value(2, 's32')}, {i.value(3, 's32')}, __LINE__)"
    )
    tail = f"{predicate} = ptx_inside;" if predicate and predicate != "_" else "(void)ptx_inside;"
    word = f"uint32_t ptx_word = {i.value(1, 'b32')};"
    return f"{{ {word} const bool ptx_inside = {call}; ::emulator::ptx::set({target}, ptx_word); {tail} }}"


@_rule(r"redux\.sync\.(?P<o>add|min|max|and|or|xor)\.(?P<t>[usb]32)")
def _redux(i: _Instruction) -> str:
    fold = {"and": "bit_and", "or": "bit_or", "xor": "bit_xor"}.get(i.match["o"], i.match["o"])
    value = f"(int64_t){i.value(1, i.match['t'])}"
    return i.set(
        0, f"(uint32_t)::emulator::warp_fold(::emulator::Fold::{fold}, {i.value(2, 'u32')}, {value}, __LINE__)"
    )


# ---- matrices ------------------------------------------------------------------------------------------------------------------


def _array(name: str, operand, count: int, is_output: bool = False) -> str:
    items = operand if isinstance(operand, tuple) else (operand,)
    if len(items) != count:
        raise PtxError(f"{len(items)} registers where {count} are needed")
    if is_output:
        return f"uint32_t {name}[{count}];"
    return f"const uint32_t {name}[{count}] = {{{', '.join(_value(item, 'b32') for item in items)}}};"


def _sets(name: str, operand) -> str:
    items = operand if isinstance(operand, tuple) else (operand,)
    return "".join(f"::emulator::ptx::set({item}, {name}[{k}]);" for k, item in enumerate(items) if item != "_")


_WIDTHS = {"f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "s8": 8, "u8": 8, "s4": 4, "u4": 4}
_MMA_SHAPES = {
    ("m16n8k16", 16),
    ("m16n8k8", 16),
    ("m16n8k4", 32),
    ("m16n8k8", 32),
    ("m16n8k32", 8),
    ("m16n8k16", 8),
    ("m8n8k16", 8),
    ("m16n8k64", 4),
    ("m16n8k32", 4),
    ("m8n8k32", 4),
}


@_rule(
    r"mma\.sync\.aligned\.(?P<shape>m(?P<m>\d+)n(?P<n>\d+)k(?P<k>\d+))\.row\.col(?P<sat>\.satfinite)?"
    r"\.(?P<d>f16|f32|s32)\.(?P<a>\w+)\.(?P<b>\w+)\.(?P<c>f16|f32|s32)"
)
def _mma(i: _Instruction) -> str:
    g = i.match
    a, b, d = g["a"], g["b"], g["d"]
    is_integer = a in ("s8", "u8", "s4", "u4")
    fits = (g["shape"], _WIDTHS.get(a)) in _MMA_SHAPES and _WIDTHS.get(a) == _WIDTHS.get(b) and d == g["c"]
    known = d == "s32" if is_integer else d == "f32" or (d == "f16" and a == "f16")
    same = is_integer or a == b or {a, b} <= {"e4m3", "e5m2"}
    if not (fits and known and same):
        raise PtxError(f"{i.name}: no such shape and types")
    m, n, k, bits = int(g["m"]), int(g["n"]), int(g["k"]), _WIDTHS[a]
    count = m * n // 32 // (2 if d == "f16" else 1)
    saturate = "true" if g["sat"] else "false"
    shape = f"{{{m}, {n}, {k}, {', '.join(f'::emulator::Number::{t}' for t in (a, b, d))}, {saturate}}}"
    return (
        f"{{ static constexpr ::emulator::MmaShape ptx_shape = {shape};"
        f"{_array('ptx_d', i.operands[0], count, is_output=True)}{_array('ptx_a', i.operands[1], m * k * bits // 1024)}"
        f"{_array('ptx_b', i.operands[2], n * k * bits // 1024)}{_array('ptx_c', i.operands[3], count)}"
        f"::emulator::mma(ptx_shape, ptx_d, ptx_a, ptx_b, ptx_c, __LINE__);{_sets('ptx_d', i.operands[0])} }}"
    )


@_rule(r"ldmatrix\.sync\.aligned\.(?:m8n8\.)?x(?P<n>[124])(?:\.m8n8)?(?P<t>\.trans)?\.shared(?:::cta)?\.b16")
def _ldmatrix(i: _Instruction) -> str:
    return _ldmatrix_of(i, int(i.match["n"]), bool(i.match["t"]))


def _ldmatrix_of(i: _Instruction, count: int, transposed: bool) -> str:
    address = i.operands[1]
    pointer = f"::emulator::ptx::as<uint32_t>({address.base}) + ({address.offset})"
    call = f"::emulator::ldmatrix({pointer}, {count}, {'true' if transposed else 'false'}, ptx_d, __LINE__);"
    return f"{{ {_array('ptx_d', i.operands[0], count, is_output=True)} {call} {_sets('ptx_d', i.operands[0])} }}"


@_rule(r"stmatrix\.sync\.aligned\.(?:m8n8\.)?x(?P<n>[124])(?:\.m8n8)?(?P<t>\.trans)?\.shared(?:::cta)?\.b16")
def _stmatrix(i: _Instruction) -> str:
    count, address = int(i.match["n"]), i.operands[0]
    pointer = f"::emulator::ptx::as<uint32_t>({address.base}) + ({address.offset})"
    transposed = "true" if i.match["t"] else "false"
    return f"{{ {_array('ptx_s', i.operands[1], count)} ::emulator::stmatrix({pointer}, {count}, {transposed}, ptx_s, __LINE__); }}"


@_rule(r"movmatrix\.sync\.aligned\.m8n8\.trans\.b16")
def _movmatrix(i: _Instruction) -> str:
    return i.set(0, f"::emulator::movmatrix({i.value(1, 'b32')}, __LINE__)")


# ---- templates -------------------------------------------------------------------------------------------------------------------


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
            return _Address(self.name(base), _number(offset or "0") if _is_number(offset or "0") else self.name(offset))
        if "|" in text:
            return "|".join(self.name(part.strip()) for part in text.split("|"))
        if _is_number(text):
            return _Immediate(_number(text))
        if text.startswith("!"):
            return f"(!{self.name(text[1:])})"
        return self.name(text)


_NUMBER = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F]+|\d+)[uU]?|0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}")


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
    for pattern, function in _RULES:
        match = pattern.fullmatch(name)
        if match:
            operands = [scope.operand(part) for part in _split_operands(rest)]
            try:
                return f"{guard}{{ {function(_Instruction(name, operands, match))} }}"
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
            declared.append(f"{_TYPES[match[1]]} {scope.registers[one]}{{}};")
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
