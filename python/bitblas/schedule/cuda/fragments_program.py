"""The program of a kernel for tensor cores, written thread by thread. Importing this imports TVM.

Weights are the left operand, 16 rows of them, and activations the right one, 8 rows: out^T = W · A^T. So a few rows of A waste
little, and a weight is decoded once for all rows of a tile. A code is multiplied as the number that it is, exactly, and what
scales it meets the sums, in float32.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B

from ...expr.storage import finish, widen
from ...expr.streams import join_bytes
from ...layout import FRAGMENT_K, FRAGMENT_N, WARP
from .emit import Registers, let, named, run, when
from .fragments_decode import Zero, table_words, u32
from .fragments_loads import Loaded
from .fragments_quantize import FragmentQuantization
from .tiles import FRAGMENT_M, SUM_PADDING

#: Columns that a thread takes at once where sums pass through memory, and how many of these it has on their way.
_QUAD, _QUADS_AT_ONCE = 4, 16
#: Bits of 1 in each half or byte.
_ONES = {"f16": 0x3C003C00, "bf16": 0x3F803F80, "s8": 0x01010101, "u8": 0x01010101}


class FragmentProgram(FragmentQuantization):
    """The whole of a kernel: see `FragmentLoads` for its parameters."""

    def func(self, name: str) -> tirx.PrimFunc:
        """The function; its arguments are those of `bitblas.expr.matmul_func`, and a workspace where K is split."""
        with IRBuilder() as builder, B.prim_func(s_tir=True):
            B.func_name(name)
            self.name = name  # kernels of one text may not declare different memory under one name
            B.func_attr({"tirx.noalias": True, "global_symbol": name})
            self._arguments()
            tiles_along_n = -(-self.config.N // self.tiling.block_n)
            self.tiles_along_m = (self.m + self.tiling.block_m - 1) // self.tiling.block_m
            with (
                B.thread_binding(0, self.tiles_along_m * tiles_along_n, "blockIdx.x") as tile,
                B.thread_binding(0, self.tiling.split_k, "blockIdx.y") as part,
                B.thread_binding(0, self.tiling.num_threads, "threadIdx.x") as thread,
                B.sblock("kernel"),
            ):
                B.reads()
                B.writes()
                self.tile, self.part, self.thread = tile, part, thread
                with B.attr(thread, "tirx.launch_bounds_min_blocks_per_sm", self.tiling.blocks_at_once):
                    self._body()
        return builder.get()

    # -- the body ----------------------------------------------------------------------------------------------------------

    def _body(self) -> None:
        tiling = self.tiling
        self.lane, warp = let("lane", self.thread % WARP), let("warp", self.thread // WARP)
        self.warp_n, self.warp_k = let("warp_n", warp % tiling.warps_n), let("warp_k", warp // tiling.warps_n)
        self.row, self.quarter = let("row", self.lane // 4), let("quarter", self.lane % 4)
        self.first_m = let("first_m", tirx.truncmod(self.tile, self.tiles_along_m) * tiling.block_m)
        self.first_n = let("first_n", tirx.truncdiv(self.tile, self.tiles_along_m) * tiling.block_n)
        self._allocate()
        self.sums.fill(tirx.const(0, self.sum_dtype))
        if self.row_sums is not None:
            self.row_sums.fill(tirx.const(0, self.sum_dtype))
        if self.totals is not self.sums:
            self.totals.fill(tirx.const(0, self.total_dtype))
        worker = self.part * tiling.warps_k + self.warp_k if tiling.warps_k > 1 else self.part
        worker = let("worker", worker)
        count = let("count", (self.num_steps - worker + (self.workers - 1)) // self.workers)
        if not self.per_group:
            self._load_groups(worker)
            self._split_zeros()
        if tiling.stages:
            self._staged_turns(worker, count)
        else:
            self._turns(worker, count)
        if not self.per_group and (self.scales_groups or self.float_zeros):
            self._fold(0)
        self._finish()

    def _allocate(self) -> None:
        tiling = self.tiling
        tiles = tiling.n_tiles * tiling.m_tiles
        step_words = tiling.n_tiles * self.blocks_per_step * self.layout.bits
        per_row = 2 * self.num_folds * tiling.n_tiles
        first = Loaded(Registers("words", step_words, "uint32"), *self._of_groups("", per_row))
        words = first.words if tiling.stages else Registers("other_words", step_words, "uint32")
        groups = self._of_groups("other_", per_row) if self.per_group else (first.scales, first.zeros)
        self.loaded = first, Loaded(words, *groups)
        self.now = self.ahead = first
        self.weights = Registers("weights", 4, "uint32")
        held = tiling.m_tiles * (2 * self.blocks_per_step if not tiling.stages else 1)
        self.activations = Registers("activations", held * self.raw, "uint32")
        if not tiling.stages:
            self.activations.fill(u32(0))  # of rows beyond m
        self.right = Registers("right", tiling.m_tiles * 4, "uint32") if self.widen else self.activations
        self.sums = Registers("sums", tiles * 4, self.sum_dtype)
        self.totals = Registers("totals", tiles * 4, self.total_dtype) if self._has_totals else self.sums
        self.row_sums = Registers("row_sums", tiling.m_tiles * 4, self.sum_dtype) if self.float_zeros else None
        if self.float_zeros:
            self.ones = Registers("ones", 4, "uint32")
            self.ones.fill(u32(_ONES[self.products]))
        if self.splits_zeros:
            self.offsets, self.rests = Registers("offsets", per_row, "uint32"), Registers("rests", per_row, "float32")
            self.any_rest = Registers("any_rest", 1, "int32")
        if self.decoder.looks_up:
            self.table = Registers("table", 8, "uint32")
            for index, word in enumerate(table_words(self.config.format, self.products)):
                self.table[index] = u32(word)
        shared = tiling.shared_bytes(self.config)
        self.shared = named(f"shared_{self.name}", B.sblock_alloc_buffer((shared,), "int8", scope="shared.dyn"))
        self._allocate_quantization()

    def _of_groups(self, prefix: str, per_row: int) -> tuple[Registers | None, Registers | None]:
        """Registers of scales and of zero points, where there are such."""
        scales = Registers(f"{prefix}scales", per_row, self.S.dtype) if self.scales_groups else None
        if not self.config.with_zeros:
            return scales, None
        size = per_row * self.zero_bytes if self.config.zeros_packed else per_row
        return scales, Registers(f"{prefix}zeros", size, self.Z.dtype)

    @property
    def _has_totals(self) -> bool:
        """Whether sums are added up elsewhere, because they are scaled on the way or of another dtype."""
        return self.folds or self.sum_dtype != self.total_dtype

    def _turns(self, worker: Expr, count: Expr) -> None:
        """All steps, where each warp loads for itself: of two in turn one is multiplied while the other is on its way."""
        for half in range(2):
            self.ahead = self.loaded[half]
            with when(count > half):
                self._load(worker + half * self.workers)
        self._find_scales()
        with B.serial(0, (count + 1) // 2) as pair:
            named("pair", pair)
            for half in range(2):
                self.now = self.ahead = self.loaded[half]
                turn = pair * 2 + half
                step = worker + turn * self.workers
                with when(turn < count if half else True):
                    # from a cache, while the weights are still on their way
                    (self._quantize_step if self.quantizes else self._load_activations)(step)
                    if self.per_group:
                        self._split_zeros()
                    for block in range(self.blocks_per_step):
                        self._multiply(block, turn)
                    with when(turn + 2 < count):
                        self._load(step + 2 * self.workers)

    def _staged_turns(self, worker: Expr, count: Expr) -> None:
        """All steps, where weights and activations come through the ring of stages."""
        tiling = self.tiling
        self.now, self.ahead = self.loaded
        with when(worker < self.num_steps if self.workers > 1 else True):
            self._load(worker)
        for ahead in range(tiling.stages - 1):
            with when(count > ahead):
                self._copy(worker + ahead * self.workers, ahead)
            run("commit_copies")
        ready = tiling.stages - 2 - int(self.quantizes)  # copies that may be under way while a step is multiplied
        if self.quantizes:
            self._find_scales()
            run(f"wait_copies<{tiling.stages - 2}>")
            self._quantize_stage(0, 0)
        with B.serial(0, count) as turn:
            named("turn", turn)
            step = worker + turn * self.workers
            self.now.take_groups(self.ahead)
            with when(turn + 1 < count):
                self._load(step + self.workers)
            if self.per_group:
                self._split_zeros()
            run(f"wait_copies<{ready}>")
            B.evaluate(B.tvm_storage_sync("shared"))
            later = turn + (tiling.stages - 1)
            with when(later < count):
                self._copy(step + (tiling.stages - 1) * self.workers, later % tiling.stages)
            run("commit_copies")
            if self.quantizes:
                with when(turn + 1 < count):
                    self._quantize_stage((turn + 1) % tiling.stages, (turn + 1) % 2)
            for place, words, _ in self._vectors(step):
                source = self._staged_words(place, words, turn % tiling.stages)
                run(f"load_shared_{4 * words}", self.now.words.at(place), source)
            for block in range(self.blocks_per_step):
                self._multiply(block, turn)

    # -- multiplying -------------------------------------------------------------------------------------------------------

    def _multiply(self, block: int, turn: Expr) -> None:
        """Multiply one block of 64 k, all tiles, and fold what is complete."""
        steps_per_half = self.decoder.num_steps // 2
        for half_block in range(2):
            self._right(block, half_block, turn)
            for step in range(steps_per_half):
                for n_tile in range(self.tiling.n_tiles):
                    self._decode(block, half_block * steps_per_half + step, n_tile)
                    for m_tile in range(self.tiling.m_tiles):
                        self._mma(
                            self.sums,
                            n_tile * self.tiling.m_tiles + m_tile,
                            self.weights,
                            m_tile,
                            step,
                            block,
                            half_block,
                        )
            self._sum_rows(block, half_block)
            done = block * FRAGMENT_K + (half_block + 1) * 32
            if self.folds and done % self.fold == 0:
                self._fold(done // self.fold - 1)

    def _sum_rows(self, block: int, half_block: int) -> None:
        """Sum the activations of 32 k of each row, where a zero point asks for it: products with ones."""
        if self.row_sums is None:
            return
        with when(self.any_rest[0] != 0 if self.splits_zeros else True):
            for step in range(self.decoder.num_steps // 2):
                for m_tile in range(self.tiling.m_tiles):
                    self._mma(self.row_sums, m_tile, self.ones, m_tile, step, block, half_block)

    def _split_zeros(self) -> None:
        """Float zero points into what codes hold, and a rest, which is 0 for whole ones."""
        if not self.splits_zeros:
            return
        fmt, largest = self.config.format, float((1 << self.config.format.bits) - 1)
        offset = tirx.const(float(fmt.code_offset), "float32")
        found: Expr = tirx.const(False, "bool")
        zeros = self.now.zeros
        assert zeros is not None
        for index in range(zeros.size):
            zero = widen(zeros[index]) + offset
            whole = tirx.max(tirx.min(tirx.nearbyint(zero), tirx.const(largest, "float32")), tirx.const(0.0, "float32"))
            self.offsets[index] = whole.astype("uint32")
            self.rests[index] = zero - self.offsets[index].astype("float32")
            found = tirx.any(found, self.rests[index] != tirx.const(0.0, "float32"))
        self.any_rest[0] = B.call_extern("int32", "bitblas_any", found.astype("int32"))

    def _right(self, block: int, half_block: int, turn: Expr) -> None:
        """The activations of 32 k into registers, as they are multiplied."""
        tiling = self.tiling
        if tiling.stages:
            for m_tile in range(tiling.m_tiles):
                row, k = m_tile * FRAGMENT_M + self.row, block * FRAGMENT_K + half_block * 32 + self.quarter * 8
                offset = turn % tiling.stages * tiling.stage_bytes(self.config)
                offset += row * tiling.row_bytes(self.config) + k * self.element_bytes
                if self.quantizes:
                    offset = self._quantized_place(turn % 2, row, k)
                run(
                    f"load_shared_{4 * self.raw}",
                    self.activations.at(m_tile * self.raw),
                    B.address_of(self.shared[offset]),
                )
        if self.widen:
            for m_tile in range(tiling.m_tiles):
                at = self._held(m_tile, block, half_block) * self.raw
                for index in range(2):
                    run(self.widen, self.right.at(m_tile * 4 + 2 * index), self.activations[at + index])

    def _held(self, m_tile: int, block: int, half_block: int) -> int:
        """Which of the held pieces of activations are those of 32 k."""
        if self.tiling.stages:
            return m_tile
        return m_tile * 2 * self.blocks_per_step + 2 * block + half_block

    def _mma(
        self, sums: Registers, tile: int, weights: Registers, m_tile: int, step: int, block: int, half_block: int
    ) -> None:
        registers = 2 if self.decoder.is_bytes else 4  # of 32 k, as they are multiplied
        piece = m_tile if self.widen else self._held(m_tile, block, half_block)
        first = piece * registers + 2 * step
        run(f"mma_{self.products}", sums.at(4 * tile), weights.at(0), self.right[first], self.right[first + 1])

    def _decode(self, block: int, step: int, n_tile: int) -> None:
        words = [self._word(plane, n_tile, block) for plane in self.layout.planes]
        if self.decoder.looks_up:
            run("look_up", self.weights.at(0), words[0](step), self.table.at(0))
            return
        k = block * FRAGMENT_K + step * (FRAGMENT_K // self.decoder.num_steps)
        fold = k // self.fold if self.num_folds > 1 else 0
        for register in range(4):
            zero = self._zero(n_tile, fold, register % 2)
            self.weights[register] = self.decoder.register(words, 4 * step + register, zero)

    def _zero(self, n_tile: int, fold: int, half: int) -> Zero | None:
        """What is subtracted from a code, beyond what its format says."""
        if self.splits_zeros:
            return Zero(self.offsets[self._per_row(n_tile, fold, half)])
        if not self.config.zeros_packed:
            return None
        bits, index = self.config.format.bits, self._per_row(n_tile, fold, half) * self.zero_bytes
        zeros = self.now.zeros
        assert zeros is not None
        code = join_bytes([zeros[index + part] for part in range(self.zero_bytes)])
        code = tirx.shift_right(code, self._column(n_tile, half) * bits % 8)
        return Zero(tirx.bitwise_and(code, tirx.const((1 << bits) - 1, "int32")).astype("uint32"))

    def _fold(self, fold: int) -> None:
        """Let the sums of a group meet its scale and zero point, and begin anew."""
        cfg, tiling = self.config, self.tiling
        for n_tile in range(tiling.n_tiles):
            for m_tile in range(tiling.m_tiles):
                tile = n_tile * tiling.m_tiles + m_tile
                for element in range(4):
                    index, at = tile * 4 + element, self._per_row(n_tile, fold, element // 2)
                    value = self.sums[index].astype("float32")
                    scale = None if self.now.scales is None else widen(self.now.scales[at])
                    shift = None
                    if self.row_sums is not None:
                        row_sum = self.row_sums[m_tile * 4 + element].astype("float32")
                        zeros = self.rests if self.splits_zeros else self.now.zeros
                        assert zeros is not None
                        shift = row_sum * widen(zeros[at])
                    if shift is not None and cfg.zeros_mode != "rescale":
                        value = value - shift
                    value = value if scale is None else value * scale
                    if shift is not None and cfg.zeros_mode == "rescale":
                        value = value - shift
                    self.totals[index] = self.totals[index] + value if self._has_totals else value
        if self.folds:
            self.sums.fill(tirx.const(0, self.sum_dtype))
            if self.row_sums is not None:
                self.row_sums.fill(tirx.const(0, self.sum_dtype))

    # -- the end -----------------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Add up the sums of warps, and of blocks, in shared memory, and store the result row by row."""
        tiling, pitch = self.tiling, self.tiling.block_n + SUM_PADDING
        sums = B.decl_buffer(
            (tiling.warps_k * tiling.block_m * pitch,), self.total_dtype, data=self.shared.data, scope="shared.dyn"
        )
        if tiling.stages:
            run("wait_copies<0>")
        if tiling.stages or self.quantizes:
            B.evaluate(B.tvm_storage_sync("shared"))
        for n_tile in range(tiling.n_tiles):
            for m_tile in range(tiling.m_tiles):
                for element in range(4):
                    row = m_tile * FRAGMENT_M + 2 * self.quarter + element % 2
                    column = (self.warp_n * tiling.n_tiles + n_tile) * FRAGMENT_N + self.row + 8 * (element // 2)
                    place = (self.warp_k * tiling.block_m + row) * pitch + column
                    value = self.totals[(n_tile * tiling.m_tiles + m_tile) * 4 + element]
                    B.buffer_store(sums, value, [place])
        B.evaluate(B.tvm_storage_sync("shared"))

        def of_block(row: Expr, column: Expr) -> Expr:
            value = sums[row * pitch + column]
            for warp in range(1, tiling.warps_k):
                value = value + sums[(warp * tiling.block_m + row) * pitch + column]
            return value

        if tiling.split_k == 1:
            self._each(lambda row, column, _index: self._store(row, column, of_block(row, column)))
            return
        elements = tiling.block_m * tiling.block_n
        base = self.tile * (tiling.split_k * elements)
        quad = Registers("quad", _QUAD, self.total_dtype)
        with B.serial(0, self._quad_rounds) as round_:
            index = (round_ * tiling.num_threads + self.thread) * _QUAD
            with when(index < elements if elements % (_QUAD * tiling.num_threads) else True):
                for at in range(_QUAD):
                    quad[at] = of_block(index // tiling.block_n, index % tiling.block_n + at)
                run("store_quad", B.address_of(self.partial[base + self.part * elements + index]), quad.at(0))
        self._last_block(base, elements)

    @property
    def _quad_rounds(self) -> int:
        """How often all threads take four columns of a row until the tile is done."""
        return -(-self.tiling.block_m * self.tiling.block_n // (_QUAD * self.tiling.num_threads))

    def _last_block(self, base: Expr, elements: int) -> None:
        """The block that comes last adds up what all have left, in their order."""
        tiling = self.tiling
        arrived = B.decl_buffer((1,), "int32", data=self.shared.data, scope="shared.dyn")
        B.evaluate(B.tvm_storage_sync("shared"))
        with when(self.thread == 0):
            before = B.call_extern("int32", "bitblas_arrive", B.address_of(self.counters[self.tile]))
            B.buffer_store(arrived, before, [0])
        B.evaluate(B.tvm_storage_sync("shared"))
        before_all = Registers("before", 1, "int32")
        before_all[0] = arrived[0]
        with when(before_all[0] == tiling.split_k - 1):
            run("see_arrived")
            self._add_parts(base, elements)
            with when(self.thread == 0):
                B.buffer_store(self.counters, tirx.const(0, "int32"), [self.tile])

    def _add_parts(self, base: Expr, elements: int) -> None:
        """Load several rounds of all parts at once, so that their latencies overlap; add, and store."""
        tiling = self.tiling
        at_once = max(1, min(self._quad_rounds, _QUADS_AT_ONCE // tiling.split_k))
        quads = Registers("quads", at_once * tiling.split_k * _QUAD, self.total_dtype)
        with B.serial(0, -(-self._quad_rounds // at_once)) as round_:
            places = [((round_ * at_once + turn) * tiling.num_threads + self.thread) * _QUAD for turn in range(at_once)]
            for turn, place in enumerate(places):
                for part in range(tiling.split_k):
                    source = self.partial[base + part * elements + tirx.min(place, elements - _QUAD)]
                    run("load_quad", quads.at((turn * tiling.split_k + part) * _QUAD), B.address_of(source))
            for turn, place in enumerate(places):
                with when(place < elements):
                    for at in range(_QUAD):
                        value = quads[turn * tiling.split_k * _QUAD + at]
                        for part in range(1, tiling.split_k):
                            value = value + quads[(turn * tiling.split_k + part) * _QUAD + at]
                        self._store(place // tiling.block_n, place % tiling.block_n + at, value)

    def _each(self, visit: Callable[[Expr, Expr, Expr], None]) -> None:
        """Share the elements of the tile out among threads, side by side along n."""
        total = self.tiling.block_m * self.tiling.block_n
        with B.serial(0, -(-total // self.tiling.num_threads)) as round_:
            index = round_ * self.tiling.num_threads + self.thread
            with when(index < total if total % self.tiling.num_threads else True):
                visit(index // self.tiling.block_n, index % self.tiling.block_n, index)

    def _store(self, row: Expr, column: Expr, value: Expr) -> None:
        cfg, m, n = self.config, self.first_m + row, self.first_n + column
        inside = m < self.m
        if cfg.N % self.tiling.block_n:
            inside = tirx.all(inside, n < cfg.N)
        with when(inside):
            place = [0] if cfg.scale_per_tensor else [n, 0]
            scale = widen(self.S[place]) if cfg.with_scaling and cfg.integer_accumulation else None
            bias = self.bias[n] if self.bias is not None else None
            row_scale = self._row_scale(row) if self.quantizes else None
            B.buffer_store(self.out, finish(cfg, value, scale, row_scale, bias, threads=True, as_bits=True), [m, n])
