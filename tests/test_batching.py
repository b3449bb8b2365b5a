"""Sequences side by side: batches of like length, and the rectangles that they are padded to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from melinoe.data.batching import length_batches, pad


def test_batches_by_hand():
    lengths = [5, 100, 7, 90, 6, 1]
    assert length_batches(lengths, 200) == [[1, 3], [2, 4, 0, 5]]
    assert length_batches(lengths, 200, batch_size=4) == [[1, 3, 2, 4], [0, 5]]
    assert length_batches([500], 100) == [[0]]
    assert length_batches(lengths, 100, parts=2) == [[1, 3], [2, 4, 0, 5]]
    assert length_batches([3, 3, 2], 6, positions=[2, 1, 0, 1]) == [
        [1, 0],
        [1, 2],
    ]  # equal ones in this order


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200), st.integers(1, 3))
def test_every_sequence_comes_once_and_no_part_is_larger_than_allowed(lengths, tokens, parts):
    batches = length_batches(lengths, tokens, parts=parts)
    assert sorted(one for batch in batches for one in batch) == list(range(len(lengths)))
    in_order = [lengths[one] for batch in batches for one in batch]
    assert in_order == sorted(lengths, reverse=True)
    for batch in batches:
        for part in (batch[number::parts] for number in range(parts)):
            assert len(part) <= 1 or len(part) * max(lengths[one] for one in part) <= tokens


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_by_hand(side):
    ids, mask = pad([[5, 6, 7], [8], []], 9, side)
    shorter = [[8, 9, 9], [9, 9, 9]] if side == "right" else [[9, 9, 8], [9, 9, 9]]
    real = [[1, 0, 0], [0, 0, 0]] if side == "right" else [[0, 0, 1], [0, 0, 0]]
    assert ids.tolist() == [[5, 6, 7], *shorter]
    assert mask.tolist() == [[1, 1, 1], *real]
