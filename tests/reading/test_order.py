import itertools
import pickle
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from distillery.config.keys_train import TrainConfig
from distillery.reading import shard_draws
from distillery.reading.order import EpochOrder, Sampling, block_sizes, rank_slice
from distillery.reading.shard_draws import SUBSET_MODES, ShardDraws, epoch_shards, rows_of_draw
from distillery.system.errors import UserError
from distillery.training.build import steps_per_epoch

SHARD_ROWS = np.array([8, 8, 5, 0, 8, 8, 3])


def order_of(seed=0, epoch=0, shuffle="block", rows=SHARD_ROWS, **options):
    return EpochOrder(np.arange(len(rows)), rows, seed=seed, epoch=epoch, shuffle=shuffle, **options)


def pairs(rows: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, int]]:
    return list(zip(rows[0].tolist(), rows[1].tolist(), strict=True))


def every_row(order: EpochOrder) -> list[tuple[int, int]]:
    return pairs(order.rows(0, len(order)))


# ---- which shards ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_shards, per_epoch, seed", list(itertools.product([1, 2, 5, 7, 12], [1, 2, 3, 5, 7], [0, -9]))
)
def test_cycle_takes_every_shard_once_before_any_comes_again(num_shards, per_epoch, seed):
    taken = Counter()
    for epoch in range(40):
        shards = epoch_shards(num_shards, per_epoch, seed, epoch, "cycle").tolist()
        assert len(shards) == len(set(shards)) == min(per_epoch, num_shards)
        taken.update(shards)
        counts = [taken[shard] for shard in range(num_shards)]
        assert max(counts) - min(counts) <= 1
        if (epoch + 1) * per_epoch >= num_shards:
            assert min(counts) >= 1


@pytest.mark.parametrize("mode", SUBSET_MODES)
def test_draws_do_not_depend_on_the_order_they_are_asked_in(mode):
    draws = ShardDraws(11, 4, 3, mode)
    forwards = [draws(epoch).tolist() for epoch in range(12)]
    backwards = [draws(epoch).tolist() for epoch in reversed(range(12))]
    assert forwards == backwards[::-1] == [epoch_shards(11, 4, 3, epoch, mode).tolist() for epoch in range(12)]
    copy = pickle.loads(pickle.dumps(draws))
    assert copy(7).tolist() == forwards[7]


def test_cycle_draws_a_new_set_each_epoch_and_each_seed():
    sets = {tuple(sorted(epoch_shards(40, 10, seed, epoch))) for seed in range(3) for epoch in range(20)}
    assert len(sets) == 60


def test_independent_draws_are_uniform():
    counts = Counter(itertools.chain(*(epoch_shards(10, 3, 0, epoch, "independent").tolist() for epoch in range(2000))))
    assert all(abs(counts[shard] - 600) < 5 * np.sqrt(600) for shard in range(10))


def test_fixed_keeps_its_set_and_changes_its_order():
    draws = [epoch_shards(20, 6, 5, epoch, "fixed").tolist() for epoch in range(10)]
    assert len({tuple(sorted(draw)) for draw in draws}) == 1
    assert len({tuple(draw) for draw in draws}) > 5
    assert set(epoch_shards(20, 6, 6, 0, "fixed").tolist()) != set(draws[0])


@pytest.mark.parametrize("mode", SUBSET_MODES)
def test_every_shard_of_a_draw_is_equally_often_read_first(mode):
    # a cap reads the first ones only: sorted draws would never reach the last shards
    draws = ShardDraws(6, 6 if mode == "fixed" else 3, 0, mode)
    first = Counter(int(draws(epoch)[0]) for epoch in range(1800))
    assert all(abs(first[shard] - 300) < 6 * np.sqrt(300) for shard in range(6))


def test_null_shards_per_epoch_means_every_shard():
    assert sorted(epoch_shards(5, None, 0, 3)) == list(range(5)) == sorted(epoch_shards(5, 9, 0, 3))


def test_unknown_mode_and_empty_subset_are_errors():
    with pytest.raises(UserError, match="shard_subset_mode 'random': expected one of cycle, independent, fixed"):
        epoch_shards(5, 2, 0, 0, "random")
    with pytest.raises(UserError, match="shards_per_epoch is 0"):
        epoch_shards(5, 0, 0, 0)


# ---- in which order ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seed, epoch, shuffle, run_rows, window_runs",
    list(itertools.product(range(2), range(2), ["block", "none"], [1, 3, 7, 100], [1, 2, 50])),
)
def test_an_epoch_holds_every_row_once(seed, epoch, shuffle, run_rows, window_runs):
    order = order_of(seed, epoch, shuffle, run_rows=run_rows, window_runs=window_runs)
    expected = [(shard, nth) for shard, rows in enumerate(SHARD_ROWS) for nth in range(rows)]
    assert sorted(every_row(order)) == expected


@pytest.mark.parametrize("start", range(0, 40, 3))
def test_any_part_of_the_order_equals_that_part_of_the_whole(start):
    whole = every_row(order_of(run_rows=3, window_runs=4))
    fresh = order_of(run_rows=3, window_runs=4)
    assert pairs(fresh.rows(start, 40)) == whole[start:]
    assert pairs(fresh.rows(start, start)) == []


@pytest.mark.parametrize("shuffle", ["block", "none"])
@pytest.mark.parametrize("seed", range(60))
def test_spans_say_between_which_windows_the_rows_of_each_shard_come(seed, shuffle):
    rng = np.random.default_rng(seed)
    rows, (run_rows, window_runs) = rng.integers(0, 12, 7) + (np.arange(7) == 3), rng.integers(1, 20, 2).tolist()
    part = [{}, {"first": 3}, {"num_rows": 5}, {"first": 4, "num_rows": int(rows.sum()) // 2}][seed % 4]
    if part.get("first", 0) >= rows.sum():
        part = {}
    order = order_of(seed, seed, shuffle, rows, run_rows=run_rows, window_runs=window_runs, **part)
    listed = order.rows(0, len(order))[0]
    expected = {}
    for shard in np.unique(listed).tolist():
        first, last = np.flatnonzero(listed == shard)[[0, -1]].tolist()
        is_exact = shuffle == "none"
        expected[shard] = (
            first if is_exact else order.window_bounds(first)[0],
            last + 1 if is_exact else order.window_bounds(last)[1],
        )
    shards, first, stop = order.spans()
    found = {shard: span for shard, *span in zip(shards.tolist(), first.tolist(), stop.tolist(), strict=True)}
    assert (np.diff(first) >= 0).all()
    if shuffle == "none" or not part:
        assert {shard: tuple(span) for shard, span in found.items()} == expected
    for shard, (low, high) in expected.items():  # a window that is cut counts as a whole
        assert found[shard][0] <= low and high <= found[shard][1]


def test_positions_outside_the_order_are_errors():
    with pytest.raises(IndexError, match=r"positions 30\.\.41 of an order of 40 rows"):
        order_of().rows(30, 41)


def test_block_differs_from_epoch_to_epoch_and_from_seed_to_seed():
    orders = {tuple(every_row(order_of(seed, epoch, run_rows=3))) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_none_reads_each_shard_from_its_first_row_to_its_last():
    shards = epoch_shards(7, None, 0, 0)
    order = EpochOrder(shards, SHARD_ROWS[shards], seed=0, epoch=0, shuffle="none", run_rows=2, window_runs=2)
    assert every_row(order) == [(shard, nth) for shard in shards.tolist() for nth in range(SHARD_ROWS[shard])]


def test_a_window_is_made_of_runs_of_neighbours():
    rows = np.array([1000, 1000])
    order = order_of(rows=rows, run_rows=10, window_runs=8)
    start, stop = order.window_bounds(500)
    line = np.sort(order.rows(start, stop)[0] * 1000 + order.rows(start, stop)[1])
    runs = np.split(line, np.flatnonzero(np.diff(line) != 1) + 1)
    assert stop - start == 80
    assert all(len(run) % 10 == 0 for run in runs if 0 not in run and 1999 not in run)
    assert len(runs) > 4


def test_windows_cover_the_order_without_gaps_and_none_is_short():
    order = order_of(rows=np.array([997]), run_rows=10, window_runs=8)
    edges, position = [], 0
    while position < len(order):
        low, high = order.window_bounds(position)
        assert low == position
        edges.append(high - low)
        position = high
    assert sum(edges) == 997
    assert min(edges) >= 40


def test_run_borders_move_between_epochs():
    rows = np.array([64])
    together = []
    for epoch in range(60):
        order = order_of(epoch=epoch, rows=rows, run_rows=8, window_runs=1)
        window = {nth: k // 8 for k, nth in enumerate(order.rows(0, 64)[1].tolist())}
        together.append([window[nth] == window[nth + 1] for nth in range(63)])
    share = np.mean(together, axis=0)
    assert share.min() > 0.5
    assert share.max() < 1


def test_batch_mates_change_between_epochs():
    rows = np.full(20, 100)

    def mates(epoch):
        order = order_of(epoch=epoch, rows=rows, run_rows=10, window_runs=20)
        line = order.rows(0, 2000)[0] * 100 + order.rows(0, 2000)[1]
        return {frozenset(pair) for batch in line.reshape(-1, 50).tolist() for pair in itertools.combinations(batch, 2)}

    first, second = mates(0), mates(1)
    by_chance = len(first) * 49 / 1999
    assert len(first & second) < 6 * by_chance


@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 1000, 5000])
def test_computed_permutation_is_one(n, monkeypatch):
    monkeypatch.setattr(shard_draws, "_LARGEST_HELD_ORDER", 0)
    values = shard_draws.RandomOrder(n, 3, 4)(np.arange(n))
    assert sorted(values.tolist()) == list(range(n))
    assert n < 64 or (values != np.arange(n)).mean() > 0.9
    assert n < 64 or values.tolist() != shard_draws.RandomOrder(n, 3, 5)(np.arange(n)).tolist()


def test_memory_does_not_grow_with_the_rows():
    rows = np.full(244_000, 2048)  # 500 M rows
    order = EpochOrder(np.arange(len(rows)), rows, seed=0, epoch=0, run_rows=27, window_runs=128)
    tracemalloc.start()
    shards, nth = order.rows(400_000_000, 400_000_256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(zip(shards.tolist(), nth.tolist(), strict=True))) == 256
    assert peak < 4 << 20


def test_the_order_is_frozen():
    # a change of these numbers changes what every run in progress would read after a resume
    assert epoch_shards(9, 4, 42, 5).tolist() == [8, 5, 2, 0]
    assert every_row(order_of(42, 1, run_rows=3, window_runs=4))[:6] == [(6, 2), (4, 7), (2, 4), (4, 0), (4, 6), (5, 6)]


# ---- ranks and caps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed, epoch, world", list(itertools.product(range(3), range(3), [1, 2, 3, 4, 8])))
def test_rank_slices_are_disjoint_and_cover_the_epoch_order(seed, epoch, world):
    global_batch = 24
    plan = Sampling(np.full(9, 40), global_batch, shards_per_epoch=4, seed=seed, run_rows=6, window_runs=5)
    order = plan.order(epoch)
    batch_size = global_batch // world
    together = [
        row
        for batch in range(plan.num_batches(epoch))
        for rank in range(world)
        for row in pairs(order.rows(*rank_slice(batch, batch_size, rank, world)))
    ]
    assert together == every_row(order)
    assert len(together) == len(set(together)) == 4 * 40 // 24 * 24


def test_an_epoch_holds_whole_steps_only():
    assert Sampling(np.array([50]), 8).num_batches(0) == 6
    assert Sampling(np.array([50]), 8, batches_per_step=4).num_batches(0) == 4
    assert Sampling(np.array([50]), 8, batches_per_step=2, max_steps=2).num_batches(0) == 4
    assert Sampling(np.array([50]), 8, max_steps=100).num_batches(0) == 6


def test_a_batch_larger_than_an_epoch_is_an_error_with_the_figures():
    with pytest.raises(UserError, match=r"a step takes 64 images .* an epoch holds at most 16 \(2 of 5 shards\)"):
        Sampling(np.full(5, 8), 64, shards_per_epoch=2)


def test_a_draw_of_small_shards_is_made_long_enough_for_a_step():
    rows = np.array([64, 64, 64, 5])
    plan = Sampling(rows, 64, shards_per_epoch=1)
    assert all(plan.num_batches(epoch) >= 1 for epoch in range(40))
    assert any(len(plan.shards(epoch)) == 2 for epoch in range(8))


@pytest.mark.parametrize("mode", SUBSET_MODES)
@pytest.mark.parametrize("per_epoch, images", [(1, 192), (2, 384), (3, 576), (None, 608)])
def test_a_short_last_shard_makes_no_epoch_shorter(mode, per_epoch, images):
    plan = Sampling(np.array([200, 200, 200, 10]), 32, shards_per_epoch=per_epoch, mode=mode, run_rows=4)
    config = TrainConfig(checkpoint_dir="x", batch_size=32, max_steps_per_epoch=None)
    assert steps_per_epoch(config, [200, 200, 200, 10], per_epoch) == images // 32
    lengths, seen = set(), Counter()
    for epoch in range(24):
        rows = every_row(plan.order(epoch))
        lengths.add(len(rows))
        seen.update({shard for shard, _ in rows})
        assert len(plan.shards(epoch)) in (per_epoch or 4, (per_epoch or 3) + 1)
    assert lengths == {images}
    assert mode == "fixed" and per_epoch or set(seen) == {0, 1, 2, 3}


@pytest.mark.parametrize("shuffle", ["block", "none"])
def test_a_capped_cycle_reads_every_shard_it_draws_before_any_comes_again(shuffle):
    plan = Sampling(np.full(12, 32), 16, shards_per_epoch=6, max_steps=4, shuffle=shuffle, run_rows=4, window_runs=4)
    seen = Counter()
    for epoch in range(6):
        order = plan.order(epoch)
        assert len(order) == 64
        seen.update({shard for shard, _ in every_row(order)})
    assert seen == dict.fromkeys(range(12), 1)


@pytest.mark.parametrize("mode", ["fixed", "cycle"])
@pytest.mark.parametrize("shuffle", ["block", "none"])
def test_a_capped_epoch_of_the_same_shards_goes_on_where_the_last_one_stopped(shuffle, mode):
    per_epoch = 5 if mode == "fixed" else None
    plan = Sampling(
        np.full(10, 32), 16, shards_per_epoch=per_epoch, mode=mode, max_steps=2, shuffle=shuffle, run_rows=4
    )
    parts = len(plan.shards(0)) * 32 // 32
    rows = list(itertools.chain(*(every_row(plan.order(epoch)) for epoch in range(parts))))
    assert len(rows) == len(set(rows)) == parts * 32
    again = list(itertools.chain(*(every_row(plan.order(parts + epoch)) for epoch in range(parts))))
    assert set(again) == set(rows)
    assert again != rows


@pytest.mark.parametrize("mode", SUBSET_MODES)
@pytest.mark.parametrize("shuffle", ["block", "none"])
def test_a_cap_favours_no_shard(mode, shuffle):
    plan = Sampling(
        np.full(8, 16), 8, shards_per_epoch=8 if mode == "fixed" else 4, mode=mode, max_steps=3, shuffle=shuffle
    )
    seen = Counter()
    for epoch in range(600):
        seen.update(shard for shard, _ in every_row(plan.order(epoch)))
    expected = 600 * 24 / 8
    assert all(abs(seen[shard] - expected) < 0.35 * expected for shard in range(8))


def test_run_and_window_sizes_follow_the_bytes():
    assert block_sizes(602_112) == (6, 148)
    assert block_sizes(150_528) == (27, 132)
    assert block_sizes(1 << 30) == (1, 1)
    assert block_sizes(1000, run_bytes=5000, window_bytes=20_000) == (5, 4)


def test_a_draw_has_as_many_rows_whichever_shards_it_takes():
    assert rows_of_draw([300, 300, 300, 100], 2) == 600  # a draw with the short shard takes a part of another
    assert rows_of_draw([300, 300, 300, 100], None) == 1000


def test_an_epoch_without_an_image_says_why():
    with pytest.raises(UserError, match=r"No image could be decoded: failures\.jsonl"):
        Sampling(np.zeros(2, int), 8)
    with pytest.raises(UserError, match=r"\(2 of 2 shards\)\. Lower batch_size, or let more images be used"):
        Sampling(np.ones(2, int), 8)
