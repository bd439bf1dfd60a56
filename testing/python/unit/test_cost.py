"""The cost model of tilings: facts that any such model must respect, and that ranking keeps the default first."""

from dataclasses import replace

import pytest

from bitblas.config import MatmulConfig
from bitblas.plan import native_layout
from bitblas.schedule import RULES, LaneTiling, Problem, select_rule
from bitblas.schedule.cpu.cost import Caches, estimate, rank
from bitblas.target import resolve_target

ZEN4 = resolve_target("x86-64-v4")
HASWELL = resolve_target("x86-64-v3")
SMALL = LaneTiling(1, 64, 8, prefetch=1024)
PANEL = LaneTiling(8, 48, 4, chunk_k=128, panel=True, slab_m=512)


def problem(m, N=4096, K=4096, target=ZEN4, **fields):
    config = MatmulConfig(
        M=m, N=N, K=K, **{"W_dtype": "uint4", "group_size": 128, "with_scaling": True, **fields}
    ).kernel
    return Problem(config, native_layout(config, target), target, m)


def test_weights_that_are_decoded_for_each_tile_of_rows_cost_more():
    few, many = (estimate(problem(m), replace(SMALL, block_m=2)) for m in (2, 8))
    assert many.decode == 4 * few.decode
    assert many.weights > few.weights
    once = estimate(problem(8), replace(PANEL, block_m=2, block_n=64))
    assert once.decode == few.decode
    assert once.weights < many.weights


def test_narrow_weights_are_less_traffic():
    costs = [estimate(problem(1, W_dtype=name), SMALL).weights for name in ("uint1", "uint2", "uint4", "uint8")]
    assert costs == sorted(costs)
    assert costs[-1] == pytest.approx(8 * costs[0])


def test_wide_tiles_read_activations_less_often():
    narrow, wide = (estimate(problem(64), replace(PANEL, block_n=n)) for n in (16, 64))
    assert narrow.activations == 4 * wide.activations


def test_activations_that_leave_the_cache_cost_more_a_byte():
    costs = [estimate(problem(m), replace(PANEL, slab_m=0)).activations / m for m in (8, 64, 8192)]
    assert costs[0] < costs[1] < costs[2]
    in_slabs = estimate(problem(8192), replace(PANEL, slab_m=64)).activations / 8192
    assert in_slabs == costs[1]


def test_a_panel_that_leaves_the_l1_cache_costs_more():
    small, large = Caches(levels=((32 << 10, 1.0), (1 << 20, 2.0))), Caches(levels=((128 << 10, 1.0), (1 << 20, 2.0)))
    fits, spills = replace(PANEL, chunk_k=64, block_n=64), replace(PANEL, chunk_k=256, block_n=64)  # 16 KB, 64 KB
    one = problem(64, group_size=256)
    assert estimate(one, fits, small).panel == estimate(one, fits, large).panel
    assert estimate(one, spills, small).panel > estimate(one, spills, large).panel


def test_sums_beyond_the_registers_are_spilled():
    assert estimate(problem(64), replace(PANEL, block_m=8, block_n=48)).spill == 0  # 24 + 3 + 2 of 32
    spills = [estimate(problem(64), replace(PANEL, block_m=m, block_n=64)).spill for m in (8, 10, 12)]
    assert 0 < spills[0] < spills[1] < spills[2]
    halves = estimate(problem(64, target=HASWELL), replace(PANEL, block_m=8, block_n=48)).spill
    assert halves > 0  # 16 registers of half the width


def test_padding_is_work():
    exact, padded = (estimate(problem(m), PANEL).multiply / m for m in (16, 17))
    assert padded > 1.3 * exact
    whole, tail = (estimate(problem(8, N=N), PANEL).multiply / N for N in (4800, 4816))
    assert tail > whole


def test_few_sums_leave_the_multipliers_waiting():
    one, four, eight = (estimate(problem(1), replace(SMALL, block_n=16 * blocks)).multiply for blocks in (1, 4, 8))
    assert one > four > eight


def test_asking_ahead_helps_where_weights_are_used_once():
    assert estimate(problem(1), SMALL).weights < estimate(problem(1), replace(SMALL, prefetch=0)).weights


def test_threads_without_work_and_threads_with_more_than_others():
    three_tiles = problem(1, N=192)
    assert estimate(three_tiles, SMALL, Caches(threads=1)).imbalance == 1
    assert estimate(three_tiles, SMALL, Caches(threads=2)).imbalance == pytest.approx(4 / 3)
    assert estimate(three_tiles, replace(SMALL, parallel=False), Caches(threads=2)).imbalance == 2


def test_bytes_are_multiplied_four_at_a_time():
    floats = problem(64, A_dtype="int8", out_dtype="int32", accum_dtype="int32", with_scaling=False, group_size=-1)
    as_bytes = estimate(floats, replace(PANEL, chunk_k=512, dot="u8s8"))
    assert 4 * as_bytes.multiply == estimate(floats, replace(PANEL, chunk_k=512)).multiply


@pytest.mark.parametrize("m", [1, 2, 4, 16, 128, 1024])
@pytest.mark.parametrize("target", [ZEN4, HASWELL, resolve_target("neoverse-n1")], ids=str)
def test_ranking_keeps_the_default_first_and_loses_nothing(m, target):
    one = problem(m, target=target)
    tilings = select_rule(RULES, one).tilings(one)
    ranked = rank(one, tilings)
    assert ranked[0] == tilings[0]
    assert sorted(ranked, key=tilings.index) == tilings
    totals = [estimate(one, tiling).total for tiling in ranked[1:]]
    assert totals == sorted(totals)
    assert all(total > 0 for total in totals)
