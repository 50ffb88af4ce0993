"""How many tokens are left: possible at every length, and as many as was asked for."""

from __future__ import annotations

import pytest

from graphwright.passes.tokens.counts import PARTS, Kept, can_go, constant_counts, least_for, ratio_counts, shares

SCHEDULES = ("constant", "decreasing", "increasing")


@pytest.mark.parametrize("protect", [0, 1, 5])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("asked", [1, 7, 16, 0.99, 0.7, 0.45, 0.2])
def test_every_length_can_be_merged(asked, schedule, protect) -> None:
    """With the `least` that is worked out no merge of any length takes away more than it can, and none adds tokens."""
    counts = (ratio_counts if isinstance(asked, float) else constant_counts)(asked, schedule, 6)
    wanted = [least_for(before, after, protect) for before, after in zip((Kept(), *counts), counts, strict=False)]
    if None in wanted:
        assert any(2 * b.parts <= a.parts for a, b in zip((Kept(), *counts), counts, strict=False))
        return
    least = max(wanted)
    for tokens in (*range(300), 1023, 1024, 5000):
        have = tokens
        for count in counts:
            left = Kept(count.parts, count.less, least).of(tokens)
            assert 0 <= have - left <= can_go(have, protect)
            have = left
        assert have == tokens or have >= least


def test_a_smaller_least_is_not_enough() -> None:
    """One less than is worked out for a number of tokens is too few for some length."""
    counts, protect = constant_counts(7, "constant", 3), 2
    least = least_for(Kept(), counts[0], protect)
    assert least == 9
    short = [Kept(c.parts, c.less, least - 1) for c in counts]
    gone = [(tokens, tokens - short[0].of(tokens)) for tokens in range(100)]
    assert any(went > can_go(tokens, protect) for tokens, went in gone)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_keep_the_average(schedule) -> None:
    """All schedules merge the same in all; one starts with twice the average and ends with none, one the other way round."""
    assert constant_counts(10, schedule, 5)[-1].less == 50
    assert ratio_counts(0.5, schedule, 5)[-1].parts == PARTS // 2
    steps = [b - a for a, b in zip((0.0, *shares(schedule, 5)), shares(schedule, 5), strict=False)]
    first, last = {"constant": (0.2, 0.2), "decreasing": (0.4, 0), "increasing": (0, 0.4)}[schedule]
    assert steps[0] == pytest.approx(first)
    assert steps[-1] == pytest.approx(last)
    assert shares(schedule, 1) == [1.0]


@pytest.mark.parametrize("kept", [Kept(less=6, least=9), Kept(parts=700, least=3), Kept(parts=512, less=2)])
def test_the_text_says_the_number(kept) -> None:
    """The formula that people read gives what is computed."""
    for tokens in (0, 1, 8, 9, 10, 100):
        assert eval(str(kept), {"max": max, "min": min, "tokens": tokens}) == kept.of(tokens)
