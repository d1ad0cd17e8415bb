"""Cycles are collected at the steps that are asked for, and Python's collector is as it was afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from vlm_dist.engine import GarbageCollection


class Node:
    """Something that only a collection frees."""

    def __init__(self) -> None:
        self.itself = self


def cycle() -> weakref.ref[Node]:
    return weakref.ref(Node())


@pytest.fixture(autouse=True)
def python_collects() -> Iterator[None]:
    """As a new process does, whatever the tests before have left."""
    gc.unfreeze()
    gc.enable()
    yield
    gc.unfreeze()
    gc.enable()


def test_cycles_are_freed_at_the_steps_that_are_due_and_no_other() -> None:
    with GarbageCollection(4) as garbage:
        freed = []
        made = cycle()
        for position in range(5, 13):
            [[] for _ in range(20_000)]  # Python's own collector would have run many times
            garbage.step_done(position)
            freed.append(made() is None)
            if freed[-1]:
                made = cycle()
    assert freed == [False, False, False, True, False, False, False, True]


def test_a_cycle_that_outlived_a_collection_is_freed_by_the_next() -> None:
    with GarbageCollection(1) as garbage:
        node: Node | None = Node()
        gone = weakref.ref(node)
        for position in range(1, 4):
            garbage.step_done(position)
        assert gone() is not None
        node = None
        garbage.step_done(4)
        assert gone() is None


def test_what_was_there_at_the_start_is_gone_through_no_more() -> None:
    before = [Node() for _ in range(1000)]
    with GarbageCollection(1):
        assert gc.get_freeze_count() >= len(before)
        assert not gc.isenabled()
    assert gc.get_freeze_count() == 0
    gone = weakref.ref(before[0])
    before.clear()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("was_enabled", [True, False])
def test_everything_is_as_before_after_an_exception_too(was_enabled: bool) -> None:
    if not was_enabled:
        gc.disable()
    with pytest.raises(ZeroDivisionError), GarbageCollection(3):
        raise ZeroDivisionError
    assert gc.isenabled() == was_enabled
    assert gc.get_freeze_count() == 0


def test_what_somebody_else_has_frozen_stays_so() -> None:
    gc.freeze()
    count = gc.get_freeze_count()
    with GarbageCollection(3):
        pass
    assert gc.get_freeze_count() == count


def test_python_collects_within_an_evaluation_and_no_longer_after_it() -> None:
    with GarbageCollection(3) as garbage:
        with garbage.left_to_python():
            assert gc.isenabled()
        assert not gc.isenabled()
        with pytest.raises(ZeroDivisionError), garbage.left_to_python():
            raise ZeroDivisionError
        assert not gc.isenabled()


def test_zero_leaves_everything_to_python() -> None:
    collections: list[int] = []
    with GarbageCollection(0) as garbage:
        gc.callbacks.append(lambda phase, about: collections.append(about["generation"]))
        try:
            garbage.step_done(1)
            with garbage.left_to_python():
                assert gc.isenabled()
        finally:
            gc.callbacks.pop()
        assert gc.isenabled()
        assert gc.get_freeze_count() == 0
    assert 2 not in collections
