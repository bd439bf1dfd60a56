"""The PTX instructions that reach memory or other threads, each with the C++ that does what it does."""

from __future__ import annotations

from .instructions import TYPES, Address, Immediate, Instruction, PtxError, rule, value

_TYPE = "|".join(sorted(TYPES, key=len, reverse=True))


# ---- addresses and memory --------------------------------------------------------------------------------------------


@rule(r"cvta\.to\.shared\.u(?:32|64)")
def _cvta_to_shared(i: Instruction) -> str:
    return i.set(0, f"::emulator::shared_address((const void*){i.value(1, 'u64')})")


@rule(r"cvta\.to\.global\.u64|cvta\.global\.u64")
def _cvta_to_global(i: Instruction) -> str:
    return i.set(0, i.value(1, "u64"))


@rule(r"cvta\.shared\.u(?:32|64)")
def _cvta_from_shared(i: Instruction) -> str:
    return i.set(0, f"(uint64_t)::emulator::ptx::shared({i.value(1, 'u32')})")


def _pointer(operand, space: str) -> str:
    if not isinstance(operand, Address):
        raise PtxError(f"an address was expected in place of {operand}")
    base = f"::emulator::ptx::as<uint64_t>({operand.base})"
    return f"::emulator::ptx::{'shared' if space == 'shared' else 'global'}({base} + ({operand.offset}))"


_CACHE = r"(?:\.(?:L[12]::\w+|c[agsv]|lu|w[bt]|nc|weak|volatile|relaxed|acquire|release|cta|gpu|sys))*"


@rule(rf"ld{_CACHE}(?:\.(?P<space>global|shared|const))?(?:::cta)?{_CACHE}(?:\.v(?P<n>[248]))?\.(?P<t>{_TYPE})")
def _ld(i: Instruction) -> str:
    dtype, count = i.match["t"], int(i.match["n"] or 1)
    targets = i.operands[0] if isinstance(i.operands[0], tuple) else (i.operands[0],)
    if len(targets) != count:
        raise PtxError(f"{i.name} into {len(targets)} registers")
    load = f"::emulator::ptx::load<{TYPES[dtype]}, {count}>({_pointer(i.operands[1], i.match['space'])}, __LINE__)"
    sets = "".join(
        f"::emulator::ptx::set({target}, ::emulator::ptx::widened(ptx_loaded.item[{k}]));"
        for k, target in enumerate(targets)
        if target != "_"
    )
    return f"{{ const auto ptx_loaded = {load}; {sets} }}"


@rule(rf"st{_CACHE}(?:\.(?P<space>global|shared))?(?:::cta)?{_CACHE}(?:\.v(?P<n>[248]))?\.(?P<t>{_TYPE})")
def _st(i: Instruction) -> str:
    dtype, count = i.match["t"], int(i.match["n"] or 1)
    sources = i.operands[1] if isinstance(i.operands[1], tuple) else (i.operands[1],)
    if len(sources) != count:
        raise PtxError(f"{i.name} from {len(sources)} registers")
    values = ", ".join(value(source, dtype) for source in sources)
    vector = f"::emulator::ptx::Vector<{TYPES[dtype]}, {count}>{{{{{values}}}}}"
    return f"::emulator::ptx::store({_pointer(i.operands[0], i.match['space'])}, {vector}, __LINE__);"


@rule(r"prefetch(?:u)?\..*|discard\..*|applypriority\..*")
def _prefetch(i: Instruction) -> str:
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


@rule(
    rf"(?P<kind>red|atom){_SCOPE}(?:\.(?P<space>global|shared))?{_SCOPE}\.(?P<op>{'|'.join(_ATOMIC)}|cas)"
    rf"(?:\.noftz)?\.(?P<t>{'|'.join(sorted(_ATOMIC_TYPES, key=len, reverse=True))})"
)
def _atomic(i: Instruction) -> str:
    first = 1 if i.match["kind"] == "atom" else 0
    dtype = i.match["t"]
    kind = _ATOMIC_TYPES[dtype]
    pointer = f"({kind}*){_pointer(i.operands[first], i.match['space'])}"
    values = [f"::emulator::bit_cast<{kind}>({value(operand, dtype)})" for operand in i.operands[first + 1 :]]
    call = f"atomic{'CAS' if i.match['op'] == 'cas' else _ATOMIC[i.match['op']]}({', '.join([pointer, *values])})"
    return i.set(0, call) if first else f"{call};"


@rule(r"createpolicy\..*")
def _policy(i: Instruction) -> str:
    return i.set(0, "uint64_t(0)")


@rule(r"fence\..*|membar\..*|griddepcontrol\..*")
def _no_operation(i: Instruction) -> str:
    return ""


@rule(r"nanosleep\.u32")
def _sleep(i: Instruction) -> str:
    return "::emulator::let_others_run();"


@rule(r"trap")
def _trap(i: Instruction) -> str:
    return "__trap();"


# ---- asynchronous copies ---------------------------------------------------------------------------------------------


@rule(r"cp\.async\.commit_group")
def _commit(i: Instruction) -> str:
    return "::emulator::cp_async_commit();"


@rule(r"cp\.async\.wait_all")
def _wait_all(i: Instruction) -> str:
    return "::emulator::cp_async_wait(-1);"


@rule(r"cp\.async\.wait_group")
def _wait_group(i: Instruction) -> str:
    return f"::emulator::cp_async_wait({i.value(0, 's32')});"


@rule(r"cp\.async\.(?P<c>ca|cg)\.shared(?:::cta)?\.global(?:\.L2::\w+)*")
def _cp_async(i: Instruction) -> str:
    shared, source = i.operands[0], i.operands[1]
    if not isinstance(shared, Address):
        raise PtxError(i.name)
    target = f"::emulator::ptx::as<uint32_t>({shared.base}) + ({shared.offset})"
    bytes_ = i.value(2, "s32")
    if i.match["c"] == "cg" and isinstance(i.operands[2], Immediate) and i.operands[2].text != "16":
        raise PtxError(f"{i.name} copies 16 bytes, not {i.operands[2].text}")
    if "cache_hint" in i.name:
        i.operands.pop()
    present = f"::emulator::ptx::source_bytes({i.operands[3]}, {bytes_})" if len(i.operands) > 3 else bytes_
    return f"::emulator::cp_async({target}, {_pointer(source, 'global')}, {bytes_}, {present}, __LINE__);"


# ---- warps -----------------------------------------------------------------------------------------------------------


@rule(r"(?:bar|barrier)(?:\.cta)?\.sync(?:\.aligned)?")
def _bar_sync(i: Instruction) -> str:
    threads = i.value(1, "s32") if len(i.operands) > 1 else "0"
    return f"::emulator::barrier({i.value(0, 's32')}, {threads}, true, ::emulator::Reduce::none, 0, __LINE__);"


@rule(r"(?:bar|barrier)(?:\.cta)?\.arrive(?:\.aligned)?")
def _bar_arrive(i: Instruction) -> str:
    return f"::emulator::bar_arrive({i.value(0, 's32')}, {i.value(1, 's32')}, __LINE__);"


@rule(r"bar\.warp\.sync")
def _bar_warp(i: Instruction) -> str:
    return f"::emulator::warp_barrier({i.value(0, 'u32')}, __LINE__);"


@rule(r"activemask\.b32")
def _activemask(i: Instruction) -> str:
    return i.set(0, "::emulator::active_mask()")


@rule(r"vote\.sync\.(?P<m>ballot\.b32|any\.pred|all\.pred)")
def _vote(i: Instruction) -> str:
    mode, predicate, mask = i.match["m"], i.value(1, "pred"), i.value(2, "u32")
    if mode == "ballot.b32":
        return i.set(0, f"::emulator::ballot({mask}, {predicate}, __LINE__)")
    if mode == "any.pred":
        return i.set(0, f"::emulator::ballot({mask}, {predicate}, __LINE__) != 0")
    return i.set(0, f"::emulator::ballot({mask}, !{predicate}, __LINE__) == 0")


@rule(r"shfl\.sync\.(?P<m>idx|up|down|bfly)\.b32")
def _shfl(i: Instruction) -> str:
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


@rule(r"redux\.sync\.(?P<o>add|min|max|and|or|xor)\.(?P<t>[usb]32)")
def _redux(i: Instruction) -> str:
    fold = {"and": "bit_and", "or": "bit_or", "xor": "bit_xor"}.get(i.match["o"], i.match["o"])
    value = f"(int64_t){i.value(1, i.match['t'])}"
    return i.set(
        0, f"(uint32_t)::emulator::warp_fold(::emulator::Fold::{fold}, {i.value(2, 'u32')}, {value}, __LINE__)"
    )


# ---- matrices --------------------------------------------------------------------------------------------------------


def _array(name: str, operand, count: int, is_output: bool = False) -> str:
    items = operand if isinstance(operand, tuple) else (operand,)
    if len(items) != count:
        raise PtxError(f"{len(items)} registers where {count} are needed")
    if is_output:
        return f"uint32_t {name}[{count}];"
    return f"const uint32_t {name}[{count}] = {{{', '.join(value(item, 'b32') for item in items)}}};"


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


@rule(
    r"mma\.sync\.aligned\.(?P<shape>m(?P<m>\d+)n(?P<n>\d+)k(?P<k>\d+))\.row\.col(?P<sat>\.satfinite)?"
    r"\.(?P<d>f16|f32|s32)\.(?P<a>\w+)\.(?P<b>\w+)\.(?P<c>f16|f32|s32)"
)
def _mma(i: Instruction) -> str:
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


@rule(r"ldmatrix\.sync\.aligned\.(?:m8n8\.)?x(?P<n>[124])(?:\.m8n8)?(?P<t>\.trans)?\.shared(?:::cta)?\.b16")
def _ldmatrix(i: Instruction) -> str:
    return _ldmatrix_of(i, int(i.match["n"]), bool(i.match["t"]))


def _ldmatrix_of(i: Instruction, count: int, transposed: bool) -> str:
    address = i.operands[1]
    pointer = f"::emulator::ptx::as<uint32_t>({address.base}) + ({address.offset})"
    call = f"::emulator::ldmatrix({pointer}, {count}, {'true' if transposed else 'false'}, ptx_d, __LINE__);"
    return f"{{ {_array('ptx_d', i.operands[0], count, is_output=True)} {call} {_sets('ptx_d', i.operands[0])} }}"


@rule(r"stmatrix\.sync\.aligned\.(?:m8n8\.)?x(?P<n>[124])(?:\.m8n8)?(?P<t>\.trans)?\.shared(?:::cta)?\.b16")
def _stmatrix(i: Instruction) -> str:
    count, address = int(i.match["n"]), i.operands[0]
    pointer = f"::emulator::ptx::as<uint32_t>({address.base}) + ({address.offset})"
    transposed = "true" if i.match["t"] else "false"
    call = f"::emulator::stmatrix({pointer}, {count}, {transposed}, ptx_s, __LINE__);"
    return f"{{ {_array('ptx_s', i.operands[1], count)} {call} }}"


@rule(r"movmatrix\.sync\.aligned\.m8n8\.trans\.b16")
def _movmatrix(i: Instruction) -> str:
    return i.set(0, f"::emulator::movmatrix({i.value(1, 'b32')}, __LINE__)")
