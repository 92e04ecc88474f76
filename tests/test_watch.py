"""One idle worker of a parent is on watch and wakes another; none of them can stop the others."""

import os
from collections.abc import Callable, Iterator

import pytest
from process import LOOKED_AT, Watch


@pytest.fixture
def watch() -> Watch:
    """That of the first of three workers."""
    return Watch(3)


@pytest.fixture
def sibling(watch) -> Iterator[Callable[[int], bool]]:
    """sibling(number): another worker rests, until the test is over; whether it is on watch."""
    children = []

    def start(number: int) -> bool:
        told, tell = os.pipe()
        release, hold = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(hold)
            watch.number = number
            os.write(tell, b"1" if watch.rest() else b"0")
            os.read(release, 1)  # until the test closes its end
            os._exit(0)
        os.close(release)
        children.append((pid, hold))
        return os.read(told, 1) == b"1"

    yield start
    for _, hold in children:
        os.close(hold)
    for pid, _ in children:
        os.waitpid(pid, 0)


def woken(watch: Watch) -> list[int]:
    """The workers that were woken, each once."""
    found = []
    for watch.number in range(3):
        found += [watch.number] * watch.is_woken()
    watch.number = 0
    return found


def test_first_to_rest_is_on_watch_and_no_other(watch, sibling):
    assert watch.rest()
    assert not sibling(1)
    assert watch.rest()


def test_one_on_watch_wakes_an_idle_one(watch, sibling):
    watch.rest()
    sibling(2)
    assert watch.wake_another()
    assert woken(watch) == [2]


def test_who_was_woken_is_not_woken_again_before_it_rests(watch, sibling):
    watch.rest()
    sibling(1)
    sibling(2)
    assert watch.wake_another() and watch.wake_another()
    assert not watch.wake_another()
    assert woken(watch) == [1, 2]


def test_one_on_watch_looks_itself_where_all_others_are_busy(watch):
    watch.rest()
    assert not watch.wake_another()


def test_one_on_watch_is_woken_last(watch, sibling):
    assert sibling(1)
    sibling(2)
    watch.begin_look()
    watch.leave()
    assert woken(watch) == [2]
    watch.leave()
    assert woken(watch) == [1]


def test_who_is_busy_gives_the_watch_up_and_wakes_another(watch, sibling):
    sibling(2)  # on watch
    assert not watch.rest()
    watch.number = 1
    watch.leave()
    assert woken(watch) == [0]


def test_watch_that_is_given_up_is_free(watch, sibling):
    assert watch.rest()
    watch.leave()
    assert sibling(1)


def test_watch_of_a_worker_that_died_is_free(watch):
    pid = os.fork()
    if not pid:
        os._exit(0 if watch.rest() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert watch.rest()


def test_look_answers_what_woke_it(watch, sibling):
    watch.rest()
    sibling(1)
    watch.wake_another()
    watch.number = 1
    watch.begin_look()
    assert woken(watch) == []
    assert watch.times[LOOKED_AT] > 0
