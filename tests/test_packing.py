"""Batches and packs: every row once, within the budget, and what rows begin with in common run once."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mech.batching import plan_batches
from mech.packed_attention import _folded_attention, _masked_attention
from mech.packing import Pack, plan_packs


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(1, 200))
def test_every_row_is_in_one_batch_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = plan_batches(lengths, token_budget=budget)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= budget for b in batches)


ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=25), min_size=1, max_size=9)


@given(ROWS, st.integers(0, 12), st.data())
@settings(max_examples=150)
def test_a_pack_holds_every_row_and_shares_within_limits(
    rows: list[list[int]], start: int, data: Any
) -> None:
    rows = [[9] * start + row for row in rows]
    limits = [data.draw(st.integers(0, len(r))) for r in rows]
    packs = plan_packs(rows, limits, token_budget=40, max_rows=3)
    assert sorted(i for members in packs for i in members) == list(range(len(rows)))
    for members in packs:
        pack = Pack(tuple(tuple(rows[i]) for i in members), tuple(limits[i] for i in members))
        assert len(members) == 1 or len(pack) <= 40
        assert len(members) <= 3
        ids, positions = (t[0].tolist() for t in pack.tensors(torch.device("cpu")))
        owners: dict[int, list[tuple[int, int]]] = {}
        for row, (i, places) in enumerate(zip(members, pack.places, strict=True)):
            assert [ids[p] for p in places] == rows[i]
            assert [positions[p] for p in places] == list(range(len(rows[i])))
            for t, place in enumerate(places):
                owners.setdefault(place, []).append((row, t))
        assert sorted(owners) == list(range(len(pack)))
        assert all(t < limits[members[row]] for of in owners.values() if len(of) > 1 for row, t in of)
        # Each token lies in one segment, and what the segment has before it is what its rows have before it.
        seen: list[int] = []
        for s in pack.segments:
            seen += range(s.start, s.start + s.length)
            row, t = owners[s.start][0]
            assert pack.places[row][: t + s.length] == (*s.before, *range(s.start, s.start + s.length))
        assert sorted(seen) == list(range(len(pack)))


def test_a_system_turn_and_a_question_are_run_once() -> None:
    system, questions = list(range(100, 120)), [list(range(200, 210)), list(range(300, 308))]
    rows = [[*system, *q, *answer] for q in questions for answer in ([1, 2, 3], [4, 5])]
    assert plan_packs(rows, [len(r) for r in rows], token_budget=100) == [[0, 1, 2, 3]]
    assert len(Pack(tuple(map(tuple, rows)), tuple(map(len, rows)))) == 20 + 10 + 8 + 2 * 5
    assert len(Pack(tuple(map(tuple, [*rows, rows[0]])), (99,) * 5)) == 48  # a row twice costs nothing


@pytest.mark.parametrize("attend", [_masked_attention, _folded_attention])
def test_heads_that_share_keys_attend_as_by_the_formula(attend: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 5, 8, generator=draw)
    k, v = (torch.randn(2, 2, 9, 8, generator=draw) for _ in range(2))
    mask = torch.zeros(2, 1, 5, 9).masked_fill(
        torch.rand(2, 1, 5, 9, generator=draw) < 0.3, torch.finfo(torch.float32).min
    )
    each = k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1)
    expected = (q @ each[0].mT * 0.25 + mask).softmax(-1) @ each[1]
    found = attend(q, k, v, mask, {"scale": 0.25})
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)
