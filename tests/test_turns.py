"""Idle workers of one parent look one at a time, and none of them can stop the others."""

import os
from collections.abc import Callable, Iterator

import pytest

from process import LOOKING, WAITING, Turns


@pytest.fixture
def turns() -> Turns:
    return Turns()


@pytest.fixture
def sibling(turns) -> Iterator[Callable[[int], None]]:
    """sibling(byte): another process takes that lock, and keeps it until the test is over."""
    children = []

    def take(byte: int) -> None:
        told, tell = os.pipe()
        release, hold = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(hold)
            os.write(tell, b"1" if turns.lock(byte) else b"0")
            os.read(release, 1)  # until the test closes its end
            os._exit(0)
        os.close(release)
        assert os.read(told, 1) == b"1"
        children.append((pid, hold))

    yield take
    for _, hold in children:
        os.close(hold)
    for pid, _ in children:
        os.waitpid(pid, 0)


def test_first_to_hear_looks(turns):
    assert turns.begin()
    turns.done(wake=False)
    assert not turns.is_woken()


def test_who_hears_it_while_one_looks_and_one_waits_need_not_look(turns, sibling):
    sibling(LOOKING)
    sibling(WAITING)
    assert not turns.begin()


def test_worker_that_is_stopped_in_its_turn_does_not_stop_the_others(turns, sibling, monkeypatch):
    monkeypatch.setattr(Turns, "LONGEST_WAIT", 0.05)
    sibling(LOOKING)
    assert turns.begin()


def test_lock_of_a_worker_that_died_is_free(turns, sibling):
    pid = os.fork()
    if not pid:
        os._exit(0 if turns.lock(LOOKING) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert turns.lock(LOOKING)


def test_who_finds_a_call_wakes_one_other(turns):
    assert turns.begin()
    turns.done(wake=True)
    assert turns.is_woken()


def test_who_is_woken_looks_although_another_has_just_looked(turns, sibling):
    assert turns.begin()
    turns.done(wake=True)
    assert turns.is_woken()
    sibling(WAITING)  # a late hearer waits already
    assert turns.begin()
