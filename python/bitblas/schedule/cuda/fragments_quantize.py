"""How kernels for tensor cores round float activations to int8: a part of their program. Importing this imports TVM.

A block finds the largest magnitudes of its rows first, all of K, while its first weights are on their way. Then activations are
quantized step by step into shared memory, where they lie as int8 ones would.
"""

from __future__ import annotations

from struct import pack, unpack

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as B

from ...config import LEAST_EPS
from ...layout import WARP
from .emit import Registers, named, run, when
from .fragments_decode import call, u32
from .fragments_loads import FragmentLoads
from .tiles import FRAGMENT_M, source_bytes

#: Bytes of a load, and the four activations of a lane where a warp quantizes its own step.
_LOAD_BYTES, _QUAD = 16, 4
#: Loads of a lane that are on their way at once there.
_LOADS_AT_ONCE = 4
_KINDS = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}


class FragmentQuantization(FragmentLoads):
    """What `FragmentLoads` has, and activations that are quantized; see there for its parameters."""

    #: Shared memory as float32, from which scales of rows are read.
    row_facts: tirx.Buffer

    @property
    def quantizes(self) -> bool:
        """Whether activations are floats that are multiplied as int8."""
        return self.config.dynamic_quantization is not None

    def _allocate_quantization(self) -> None:
        if not self.quantizes:
            return
        self.kind, self.source_bytes = _KINDS[self.config.A_dtype], source_bytes(self.config)
        self.raw_words = Registers("raw", FRAGMENT_M * _LOAD_BYTES // 4, "uint32")
        self.largest = Registers("largest", FRAGMENT_M, "uint32")
        words = self.tiling.shared_bytes(self.config) // 4
        self.row_facts = named(
            "row_facts", B.decl_buffer((words,), "float32", data=self.shared.data, scope="shared.dyn")
        )

    def _row_scale(self, row: Expr) -> Expr:
        """The scale of a row of the tile."""
        return self.row_facts[self.tiling.operand_bytes(self.config) // 4 + row]

    def _facts(self, row: Expr, table: Expr | int = 0) -> Expr:
        """Where facts of a row lie in shared memory, 32 bits each: its scale, the inverse, what each warp has found."""
        return B.address_of(
            self.shared[self.tiling.operand_bytes(self.config) + 4 * (table * self.tiling.block_m + row)]
        )

    # -- scales of rows ----------------------------------------------------------------------------------------------------

    def _find_scales(self) -> None:
        """All threads together: the largest magnitudes of the tile's rows, eight rows at a time, and their scales."""
        if not self.quantizes:
            return
        with B.serial(0, self.tiling.m_tiles) as m_tile, when(self.first_m + m_tile * FRAGMENT_M < self.m):
            self._find_maxima(m_tile * FRAGMENT_M)
        B.evaluate(B.tvm_storage_sync("shared"))
        rows, threads = self.tiling.block_m, self.tiling.num_threads
        with B.serial(0, -(-rows // threads)) as round_:
            row = round_ * threads + self.thread
            with when(row < rows if rows % threads else True):
                self._scale_of(row)
        B.evaluate(B.tvm_storage_sync("shared"))

    def _find_maxima(self, first: Expr) -> None:
        """The largest magnitudes of eight rows, of what each warp sees of them; nothing for rows beyond m."""
        per_load = _LOAD_BYTES // self.source_bytes
        loads, threads = self.config.K // per_load, self.tiling.num_threads
        words = _LOAD_BYTES // 4
        self.largest.fill(u32(0))
        with B.serial(0, -(-loads // threads)) as round_:
            index = round_ * threads + self.thread
            with when(index < loads if loads % threads else True):
                for row in range(FRAGMENT_M):
                    m = self.first_m + first + row
                    with when(m < self.m):
                        source = B.address_of(self.A[m, index * per_load])
                        run(f"load_{_LOAD_BYTES}", self.raw_words.at(row * words), source)
                for row in range(FRAGMENT_M):
                    with when(self.first_m + first + row < self.m):
                        for word in range(words):
                            value = self.raw_words[row * words + word]
                            self.largest[row] = call(f"larger_{self.kind}", self.largest[row], value)
        for row in range(FRAGMENT_M):
            with when(self.first_m + first + row < self.m):
                self.largest[row] = B.call_extern("uint32", "bitblas_warp_max", self.largest[row])
                with when(self.lane == 0):
                    place = self._facts(first + row, 2 + self.thread // WARP)
                    run("store_shared_4", place, self.largest[row])

    def _scale_of(self, row: Expr) -> None:
        """The scale of a row, of what all warps have found; of one beyond m that of zeros."""
        eps = self.config.activation_eps
        least = u32(_bits(LEAST_EPS if eps is None else eps))
        rows, warps = self.tiling.block_m, self.tiling.num_threads // WARP
        found = tirx.Select(self.first_m + row < self.m, tirx.const(warps, "int32"), tirx.const(0, "int32"))
        run(f"scale_row_{self.kind}", self._facts(row), tirx.const(rows, "int32"), found, least)

    # -- activations -------------------------------------------------------------------------------------------------------

    def _quantized(self, row: Expr, first: int) -> Expr:
        """Four activations of a row, from a place in `raw_words`, as the bytes of a register."""
        rows = tirx.const(self.tiling.block_m, "int32")
        return B.call_extern(
            "uint32", f"bitblas_quantize_{self.kind}", self.raw_words.at(first), self._facts(row), rows
        )

    def _quantized_place(self, which: Expr, row: Expr, k: Expr | int) -> Expr:
        """Where the int8 of a row lie in shared memory, of one of two steps, or of a warp's."""
        tiling, cfg = self.tiling, self.config
        offset = tiling.stages * tiling.stage_bytes(cfg) + which * tiling.quantized_bytes(cfg)
        return offset + row * tiling.row_bytes(cfg) + k

    def _quantize_stage(self, stage: Expr, which: Expr | int) -> None:
        """Quantize what the thread has copied of a stage itself, to the first or the second of the tiles of int8."""
        tiling, chunk = self.tiling, _LOAD_BYTES // self.source_bytes
        per_row = tiling.block_k // chunk
        total = tiling.block_m * per_row
        for first in range(0, total, tiling.num_threads):
            index = first + self.thread
            with when(index < total if first + tiling.num_threads > total else True):
                source = self.shared[stage * tiling.stage_bytes(self.config) + index * _LOAD_BYTES]
                run(f"load_shared_{_LOAD_BYTES}", self.raw_words.at(0), B.address_of(source))
                row, k = index // per_row, index % per_row * chunk
                words = [self._quantized(row, 2 * part) for part in range(chunk // _QUAD)]
                place = self.shared[self._quantized_place(which, row, k)]
                run(f"store_shared_{chunk}", B.address_of(place), *words)

    def _quantize_step(self, step: Expr) -> None:
        """A warp alone: load a step's activations, rows up to m, quantize them, and take those that the thread multiplies."""
        tiling, words = self.tiling, _QUAD * self.source_bytes // 4
        per_row = tiling.block_k // _QUAD
        rounds = FRAGMENT_M * per_row // WARP
        run("sync_warp")  # all have taken what was there before
        for first in range(0, rounds, _LOADS_AT_ONCE):
            places = [(at, (first + at) * WARP + self.lane) for at in range(min(_LOADS_AT_ONCE, rounds - first))]
            with when(self.first_m + first * WARP // per_row < self.m if first else True):
                for at, index in places:
                    row, k = index // per_row, index % per_row * _QUAD
                    with when(self.first_m + row < self.m):
                        source = self.A[self.first_m + row, step * tiling.block_k + k]
                        run(f"load_{4 * words}", self.raw_words.at(at * words), B.address_of(source))
                for at, index in places:
                    row, k = index // per_row, index % per_row * _QUAD
                    with when(self.first_m + row < self.m):
                        place = self.shared[self._quantized_place(self.warp_k, row, k)]
                        run("store_shared_4", B.address_of(place), self._quantized(row, at * words))
        run("sync_warp")
        with when(self.first_m + self.row < self.m):
            for half_block in range(2 * self.blocks_per_step):
                place = self._quantized_place(self.warp_k, self.row, half_block * 32 + self.quarter * 8)
                at = self.activations.at(half_block * self.raw)
                run(f"load_shared_{4 * self.raw}", at, B.address_of(self.shared[place]))


def _bits(value: float) -> int:
    """The bits of a float32."""
    return int(unpack("<I", pack("<f", value))[0])
