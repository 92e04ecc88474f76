"""What the chaos and soak runs are made of: the plan, the bad network, the verdict on a trend."""

import itertools
import os
import random
import re
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from contextlib import closing, contextmanager
from types import SimpleNamespace
from xml.etree import ElementTree

import psycopg2
import pytest
from waiting import PATIENCE, until

import calls
from chaos import audit, deck, families, faults, nemesis, pipeline, plan, program
from chaos.application import ACTIONS, Application
from chaos.clock import STEP, Clock, library
from chaos.history import Exit, Fault, History
from chaos.listeners import Listener, Supervisor
from chaos.plot import svg
from chaos.proxy import Proxy
from chaos.report import faults_table
from chaos.run import told
from chaos.soak import Soak
from chaos.trend import Series
from demo.database import EmbeddedDatabase
from demo.terminal import CHILD, GUARDIAN
from ops.audit import RESTS

# --- the plan ------------------------------------------------------------------------------


def test_same_seed_gives_the_same_plan():
    assert deck.planned(7, 300) == deck.planned(7, 300)
    assert plan.steps(7, 60, 3) == plan.steps(7, 60, 3)
    decide = [plan.behaviour(7, "job", "planner", n, pipeline.WEIGHTS)[0] for n in range(200)]
    again = [plan.behaviour(7, "job", "planner", n, pipeline.WEIGHTS)[0] for n in range(200)]
    assert decide == again and len(set(decide)) > 5


def test_other_seed_gives_another_plan():
    assert deck.planned(7, 300) != deck.planned(8, 300)
    assert plan.steps(7, 60, 3) != plan.steps(8, 60, 3)


def test_longer_plan_begins_like_a_shorter_one():
    short, long = deck.planned(7, 60), deck.planned(7, 300)
    assert long[: len(short)] == short


def test_everything_planned_can_be_done():
    assert {step.what for step in plan.steps(7, 300, 3)} == set(ACTIONS)
    assert set(plan.MISCHIEF) == program.BEFORE.keys() | program.AFTER.keys()


@pytest.mark.parametrize("seed", range(20))
def test_every_kind_of_fault_is_dealt_early_in_a_run_of_five_minutes(seed):
    assert {fault.kind for fault in deck.planned(seed, 200)} == set(deck.KINDS)


def test_kinds_of_faults_come_evenly():
    counted = Counter(fault.kind for fault in deck.planned(7, 7200))
    decks = [counted[name] / kind.cards for name, kind in deck.KINDS.items() if name != deck.AWAY]
    assert max(decks) - min(decks) <= 1


def test_database_is_away_for_long_but_rarely():
    away = [fault for fault in deck.planned(7, 7200) if fault.kind == deck.AWAY]
    assert all(60 <= fault.seconds <= 90 for fault in away)
    assert all(b.at - a.at >= deck.AWAY_EVERY for a, b in itertools.pairwise(away))


def test_fault_that_is_not_possible_is_put_off(monkeypatch):
    happened = []

    @contextmanager
    def begin(_world, planned, _target):
        if planned.kind == "late" and len(happened) < 2:
            raise faults.NotNow
        happened.append(planned.kind)
        yield

    kinds = ["early", "late", "next", "last"]
    monkeypatch.setattr(nemesis, "KINDS", {kind: deck.Kind(begin, 1) for kind in kinds})
    nemesis.Nemesis(None, [faults.PlannedFault(0.0, kind, 0.0, 0) for kind in kinds]).run()
    assert happened == ["early", "next", "late", "last"]


def test_rows_that_a_transaction_without_a_trace_had_locked_are_noted(database, monkeypatch):
    def lose_connection(app, cursor, _step):
        app.stop.set()  # or it would be tried again
        cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    monkeypatch.setitem(ACTIONS, "touch", lose_connection)
    app = Application(database.dsn, [])
    kept, undone, lost = (plan.Step(0, database.add_job(), what, ("img_gen", "done"))
                          for what in ("move", "roll back", "touch"))  # fmt: skip
    for step in (kept, undone, lost):
        app.carry_out(step)
    assert app.rolled_back == {undone.job, lost.job, lost.variant}


def test_variant_waits_for_its_job(database, monkeypatch):
    tried, add = [], ACTIONS["add variant"]

    def add_once_more(app, cursor, step):
        if tried:
            database.rows("INSERT INTO jobs (job_id) VALUES (%s)", step.job)
        tried.append(step)
        add(app, cursor, step)

    monkeypatch.setitem(ACTIONS, "add variant", add_once_more)
    database.rows(families.TABLE)
    step = plan.Step(0, str(uuid.uuid4()), "add variant", families.CUT)
    Application(database.dsn, []).carry_out(step)
    assert database.value("SELECT job_variants_id::text FROM jobs_variants") == step.variant


def test_change_that_gives_up_is_recorded_with_the_time_it_kept_others_waiting(
    database, monkeypatch
):
    monkeypatch.setattr(faults, "WAIT_FOR_LOCK", "-c lock_timeout=1")
    server = SimpleNamespace(dsn=lambda: database.dsn)
    world = faults.World(server, None, None, [], None, None, [], None)
    done = nemesis.Nemesis(world, [])
    with database.conn.cursor() as cursor:
        cursor.execute("BEGIN; LOCK TABLE jobs IN ROW SHARE MODE")
        done.begin(faults.PlannedFault(0.0, "rewrite tables", 0.0, 0))
        done.begin(faults.PlannedFault(0.0, "terminate backend", 0.0, 0))  # there is none
    assert [fault.kind for fault in done.faults] == ["rewrite tables, given up"]
    [(began, ended)] = done.faults[0].locked
    assert done.faults[0].began <= began < ended <= done.faults[0].ended


@pytest.mark.parametrize(("ago", "is_silent"), [(2.0, True), (0.0, False)])
def test_frozen_backend_that_silences_everybody_is_told_by_the_last_request(ago, is_silent):
    api = SimpleNamespace(requests=[SimpleNamespace(time=time.monotonic() - ago)])
    assert faults.World(None, None, api, [], None, None, [], None).is_silent == is_silent


def test_clock_of_the_database_stays_as_it_is_without_libfaketime():
    world = faults.World(None, None, None, [], None, None, [], None)
    with pytest.raises(faults.NotNow):
        faults.set_back(world, None, faults.Target("", [])).__enter__()


def test_mischief_is_planned_for_the_first_attempts_alone():
    planned = [[plan.mischief(7, f"job {n}", "planner", attempt) for n in range(2000)]
               for attempt in (1, plan.TRIED + 1)]  # fmt: skip
    assert set(planned[0]) == {None, *plan.MISCHIEF}
    assert planned[0].count(None) > 1800
    assert set(planned[1]) == {None}


# --- the clock of the database -------------------------------------------------------------

BEGAN = 1_800_000_000.0


@pytest.mark.parametrize("seconds", [0, 0.25, 3600, STEP - 1])
def test_time_is_read_without_the_steps_of_the_clock(database, seconds):
    with database.conn.cursor() as cursor:
        cursor.execute(audit.TIME, {"step": STEP, "began": BEGAN})
    for steps in (0, 1, 700):
        read = "SELECT chaos.seconds(to_timestamp(%s))"
        assert database.value(read, BEGAN + seconds - steps * STEP) == BEGAN + seconds


# What audit.py records of, and upkeep's new start of a lease.
TABLES = """
CREATE TABLE jobs (current_step text, status text);
CREATE TABLE jobs_variants (current_step text, status text);
CREATE TABLE stage_calls ();
CREATE TABLE pipeline_stages (held_until timestamptz);
CREATE TABLE stage_leases (job_id text, call_id bigint, attempt integer, stage text,
                           tenant_id text, started_at timestamptz, leased_until timestamptz);
"""
LEASE = "INSERT INTO stage_leases VALUES ('j', 1, 1, 's', 't', now(), now() + interval '5 s')"
AGAIN = "UPDATE stage_leases SET started_at = now(), leased_until = now() + interval '5 s'"


@pytest.mark.skipif(not library(), reason="libfaketime is not installed")
def test_lease_that_starts_again_on_a_clock_set_back_is_one_lease():
    with (
        Clock(library()) as clock,
        EmbeddedDatabase(options=audit.OPTIONS, environ=clock.environ) as server,
        closing(psycopg2.connect(server.dsn())) as conn,
        conn.cursor() as cursor,
    ):
        conn.autocommit = True
        cursor.execute(TABLES)
        audit.install(conn)
        began = time.time()
        cursor.execute(LEASE)
        clock.set_back(STEP)
        cursor.execute("SELECT extract(epoch FROM now())::float8")
        assert began - STEP <= cursor.fetchone()[0] <= time.time() - STEP
        again = time.time()
        cursor.execute(AGAIN)
        cursor.execute("DELETE FROM stage_leases")
        cursor.execute(audit.LEASES)
        [(*_, claimed, committed, until, ended)] = cursor.fetchall()
    assert began <= claimed <= committed <= again <= ended <= time.time()
    assert until == pytest.approx(claimed + 5)


# --- the processes -------------------------------------------------------------------------

# A listener's shape: a process whose child leads a process group of its own.
PROCESSES = """
import os, subprocess, time
child = subprocess.Popen(["sleep", "1000"], preexec_fn=os.setpgrp)
print(child.pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("killed_before", [False, True])
def test_guardian_ends_a_listener_and_workers_that_have_outlived_it(killed_before):
    command = [sys.executable, "-c", PROCESSES]
    with subprocess.Popen(command, **CHILD) as process:
        worker = os.pidfd_open(int(process.stdout.readline()))
        guardian = subprocess.Popen(
            ["sh", "-c", GUARDIAN, str(process.pid)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if killed_before:
            process.kill()
            process.wait()
        guardian.communicate()
        assert process.wait(PATIENCE) == -signal.SIGKILL
    try:
        assert select.select([worker], [], [], PATIENCE)[0], "the worker lives"
    finally:
        os.close(worker)


# --- the bad network -----------------------------------------------------------------------


class Echo:
    """A connection through a proxy, both ends in hand."""

    def __init__(self):
        self.server = socket.create_server(("127.0.0.1", 0))
        self.proxy = Proxy(self.server.getsockname()[1])
        self.near, self.far = self.connect()

    def connect(self):
        near = socket.create_connection(("127.0.0.1", self.proxy.port), PATIENCE)
        far, _ = self.server.accept()
        far.settimeout(PATIENCE)
        return near, far

    def close(self):
        for each in (self.proxy.listening, self.near, self.far, self.server):
            each.close()


@pytest.fixture
def echo():
    with closing(Echo()) as made, made.proxy:
        yield made


def test_network_passes_what_is_sent(echo):
    echo.near.sendall(b"there")
    assert echo.far.recv(10) == b"there"
    echo.far.sendall(b"and back")
    assert echo.near.recv(10) == b"and back"


def test_stalled_network_passes_late_what_was_sent(echo):
    echo.proxy.stall()
    echo.near.sendall(b"late")
    echo.far.settimeout(0.1)
    with pytest.raises(TimeoutError):
        echo.far.recv(10)
    echo.proxy.heal()
    echo.far.settimeout(PATIENCE)
    assert echo.far.recv(10) == b"late"


def test_connection_that_is_held_passes_late_what_was_sent_and_a_new_one_works(echo):
    echo.proxy.hold()
    echo.near.sendall(b"late")
    near, far = echo.connect()
    with near, far:
        near.sendall(b"new")
        assert far.recv(10) == b"new"
    assert not echo.proxy.is_whole
    echo.far.settimeout(0.1)
    with pytest.raises(TimeoutError):
        echo.far.recv(10)
    echo.proxy.heal()
    echo.far.settimeout(PATIENCE)
    assert echo.far.recv(10) == b"late" and echo.proxy.is_whole


def test_trap_knows_the_answer_to_a_claim_and_what_gives_it_back():
    answer = " ".join([*calls.Claimed._fields, "img_gen", "done"]).encode()
    assert faults.CLAIMED.search(answer)
    assert faults.GIVING_BACK.search(calls.GIVE_BACK.encode())


def test_trap_cuts_connections_until_it_holds_one(echo):
    echo.proxy.set_trap(re.compile(b"answer"), re.compile(b"question"))
    echo.far.sendall(b"the answer")
    assert echo.near.recv(10) == echo.far.recv(10) == b""
    (near, far), (other_near, other_far) = echo.connect(), echo.connect()
    with near, far, other_near, other_far:
        near.sendall(b"question")
        until(lambda: echo.proxy.caught, "the question")
        other_far.sendall(b"the answer")
        assert other_near.recv(10) == b"the answer"
        far.settimeout(0.1)
        with pytest.raises(TimeoutError):
            far.recv(10)
        echo.proxy.heal()
        far.settimeout(PATIENCE)
        assert far.recv(10) == b"question" and echo.proxy.is_whole


def test_dropped_connection_is_silent_for_good_and_a_new_one_works(echo):
    echo.proxy.drop()
    echo.near.sendall(b"lost")
    echo.proxy.heal()
    echo.near.sendall(b"lost as well")
    near, far = echo.connect()
    with near, far:
        near.sendall(b"new")
        assert far.recv(10) == b"new"
    echo.far.settimeout(0.1)
    with pytest.raises(TimeoutError):
        echo.far.recv(10)
    echo.near.close()
    until(lambda: not echo.proxy.links, "the end of the dropped connection")


def test_cut_network_closes_both_ends(echo):
    echo.proxy.cut()
    assert echo.near.recv(10) == echo.far.recv(10) == b""


# --- the verdict on a trend ----------------------------------------------------------------


def scattered(steepness: float, scatter: float = 1.0, count: int = 180) -> list[float]:
    chance = random.Random(1)
    return [100 + steepness * n + chance.uniform(-scatter, scatter) for n in range(count)]


def series(values: list[float], allowed: float | None = 1.0) -> Series:
    return Series("memory", "MiB", allowed, values)


def test_leak_grows():
    assert series(scattered(0.1)).grows
    assert series(scattered(0.05, scatter=0)).growth == pytest.approx(0.05 * 89)


@pytest.mark.parametrize("steepness", [0.0, -0.1, 0.005])
def test_scatter_and_shrinking_do_not_grow(steepness):
    assert not series(scattered(steepness)).grows


def test_warming_up_is_no_growth():
    assert not series([*range(90), *[90.0] * 90]).grows


def test_outliers_are_no_growth():
    values = scattered(0.0)
    values[-3:] = [5000.0] * 3
    assert not series(values).grows


def test_saw_teeth_are_no_growth():
    assert not series([n % 12 for n in range(180)]).grows


def test_unjudged_series_does_not_grow():
    assert not series(scattered(1.0), allowed=None).grows


def test_plot_shows_every_series():
    shown = [series(scattered(0.0)), series(scattered(0.5)), series([0.0] * 180, None)]
    picture = ElementTree.fromstring(svg("A < B", list(range(180)), shown))
    lines = picture.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.get("points").split()) for line in lines] == [180] * 3
    assert len({line.get("stroke") for line in lines}) == 3


# --- what is told at the end ---------------------------------------------------------------


def test_run_tells_how_often_each_kind_of_fault_came():
    came = [Fault("SIGTERM", "listener", 1, 1, [1]), Fault("old kind", "listener", 2, 2, [1])]
    _, *lines = faults_table(History(1, 0, 9, 9, 2, 3, {}, faults=came)).splitlines()
    numbers = dict(re.match(r"(.+?) {2,}(\d+) ", line).groups() for line in lines)
    assert numbers == dict.fromkeys(deck.KINDS, "0") | {"SIGTERM": "1", "old kind": "1", "all": "2"}


def test_run_tells_what_audit_found_and_could_not_read():
    rests, lost = ({"kind": kind, "stage": "planner", "id": 7, "text": "x"}
                   for kind in (RESTS, "lost arrival"))  # fmt: skip
    assert told({"findings": [rests, lost], "problem": "jobs_variants cannot be read"}) == [
        "audit: lost arrival: planner 7: x", "audit: jobs_variants cannot be read"
    ]  # fmt: skip
    assert told({"findings": [rests], "problem": None}) == []


def test_soak_tells_of_tracebacks_and_bad_exits(tmp_path):
    soak = Soak(1.0, tmp_path)
    soak.listener = Listener(1, 1, {}, tmp_path)
    soak.supervisor = Supervisor([soak.listener])
    soak.supervisor.exits.append(Exit(1, 101, 0, 50, 0, True, True))
    assert soak.problems() == []
    soak.supervisor.exits.append(Exit(1, 102, 50, 90, 1, False, True))
    soak.listener.bugs.append("listener 1: KeyError: 'x'")
    assert soak.problems() == [
        "listener 1 ended with exit code 1", "listener 1: KeyError: 'x'"
    ]  # fmt: skip
