"""The minimizer: 1-minimal results, every set asked once, few questions."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cp_debug.minimize import Minimizer, find_integer

SMALL = st.sets(st.integers(0, 11), max_size=12)


def counted(predicate):
    """The predicate, and the list of sets that it was asked for."""
    asked: list[frozenset[int]] = []

    def ask(items: frozenset[int]) -> bool:
        asked.append(items)
        return predicate(items)

    return ask, asked


def assert_one_minimal(predicate, items: list[int]) -> list[int]:
    ask, asked = counted(predicate)
    minimizer = Minimizer(ask)
    found = minimizer.minimize(items)
    assert predicate(frozenset(found))
    assert not any(predicate(frozenset(found) - {item}) for item in found)
    assert len(asked) == len(set(asked)) == minimizer.asked
    assert found == [item for item in dict.fromkeys(items) if item in found]
    return found


@given(items=st.lists(st.integers(0, 40), max_size=40), needed=st.sets(st.integers(0, 40), max_size=5))
def test_finds_exactly_what_is_needed(items, needed):
    needed &= set(items)
    assert set(assert_one_minimal(needed.issubset, items)) == needed


@settings(max_examples=100)
@given(true_sets=st.sets(st.frozensets(st.integers(0, 5)), max_size=20), seed=st.integers(0, 5))
def test_is_one_minimal_under_any_predicate(true_sets, seed):
    """Also under predicates that are not monotone: exactly these sets hold, and the whole one."""
    everything = frozenset(range(6))
    order = [(i + seed) % 6 for i in range(6)]
    assert_one_minimal(lambda s: s == everything or s in true_sets, order)


@given(groups=st.lists(st.sets(st.integers(0, 11), min_size=1), min_size=1, max_size=4))
def test_is_one_minimal_where_one_of_several_groups_suffices(groups):
    assert_one_minimal(lambda s: any(group <= s for group in groups), list(range(12)))


@pytest.mark.parametrize("culprits", [set(), {0}, {999}, {3, 500, 998}])
def test_few_questions_for_few_of_many(culprits):
    ask, asked = counted(culprits.issubset)
    assert set(Minimizer(ask).minimize(range(1000))) == culprits
    assert len(asked) <= 25 * (len(culprits) + 1)


def test_what_was_answered_is_never_asked_again_by_later_minimizations():
    ask, asked = counted({3}.issubset)
    minimizer = Minimizer(ask)
    minimizer.minimize(range(8))
    before = len(asked)
    assert minimizer.minimize(range(8)) == [3]
    assert len(asked) == before


def test_refuses_a_set_that_does_not_hold():
    with pytest.raises(ValueError, match="whole set"):
        Minimizer(lambda s: False).minimize([1])


@given(st.integers(0, 5000))
def test_find_integer(n):
    asked = []
    assert find_integer(lambda k: asked.append(k) or k <= n) == n
    assert len(asked) <= 4 + 2 * (n + 1).bit_length()
