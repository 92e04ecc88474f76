"""Limits that several stages share, and stages that are called at a pace."""

import select
import threading

import pytest
from asynchronous import asynchronous
from caller import Caller
from claims import connected
from conftest import ROOT
from faults.test_claims import with_idle_worker, with_idle_workers
from variants import install, stage
from waiting import PATIENCE, until

import calls
import clock
import db
import pipeline
import trigger
from demo.stage_server import Answer
from listener import Listener
from ops.install import apply
from pipeline import Call, Pool, limits

GPU = Pool("gpu1", 1)
LINGERING = Pool("gpu2", 1, linger=3600)
WIDE, WIDE_LINGERING = Pool("gpu4", 2), Pool("gpu5", 2, linger=3600)

POOLED = {
    ("img_gen", "done"): limits(pool=GPU)(stage("vlm_analyze")),
    ("overlay", "done"): limits(pool=GPU)(stage("vlm_judge")),
    ("planner", "done"): stage("overlay"),
    ("a", "done"): limits(pool=LINGERING)(stage("load_a")),
    ("b", "done"): limits(pool=LINGERING)(stage("load_b")),
    ("c", "done"): limits(pool=WIDE, max_running=2)(stage("crop")),
    ("d", "done"): limits(pool=WIDE)(stage("draw")),
    ("e", "done"): limits(pool=WIDE)(stage("erase")),
    ("f", "done"): limits(pool=WIDE_LINGERING)(stage("resize")),
    ("g", "done"): limits(pool=WIDE_LINGERING)(stage("sort")),
    ("slow", "done"): limits(per_minute=600)(stage("paid")),
    ("x", "done"): asynchronous("taken", pool=Pool("gpu3", 2)),
}
PIPELINE = POOLED


@pytest.fixture
def run_command(run_here):
    return run_here


def claim(claiming: Caller) -> list[Call]:
    """The calls of one turn, each of which a worker is busy with from now on."""
    listener = claiming.listener
    found = listener.settle_and_claim(claiming.conn)
    for call in found:
        listener.workers.idle[0].call = call
    return found


def end(listener: Listener, call: Call) -> None:
    [worker] = [worker for worker in listener.workers.all if worker.call == call]
    worker.call = None
    listener.keep(call, trigger.result(call, "skipped"))


# An error that is not that of a row.
REFUSING = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE EXCEPTION 'no!'; END$$;
CREATE TRIGGER refuse BEFORE UPDATE ON stage_calls
FOR EACH ROW WHEN (NEW.stage = 'draw') EXECUTE FUNCTION refuse();
"""


class Gate:
    """A stage API whose answers wait, and which knows how many calls it had at once."""

    def __init__(self, api, stages):
        self.api, self.lock, self.open = api, threading.Lock(), threading.Event()
        self.now = self.most = 0
        for name in stages:
            api.on(f"/{name}", self.behave)

    def behave(self, request):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        self.open.wait(PATIENCE)
        with self.lock:
            self.now -= 1
        return Answer(200)

    def order(self) -> list[str]:
        return [request.path.strip("/") for request in self.api.calls()]


@pytest.fixture
def site(database, use_pipeline, api, listener):
    use_pipeline(PIPELINE)
    install(database, "SELECT 1;")

    def start(*args, **settings):
        given = {"PYTHONPATH": str(ROOT / "tests"), "PIPELINE_MODULE": "test_pools",
                 "SWEEP_INTERVAL": 3600} | settings  # fmt: skip
        return listener(database, *args, api=api, **given)

    database.start = start
    return database


def test_stages_of_a_pool_share_its_places_over_all_listeners(site, api):
    gate = Gate(api, ["vlm_analyze", "vlm_judge"])
    for _ in range(6):
        site.add_job("img_gen", "done")
        site.add_job("overlay", "done")
    running = [site.start(LISTENER_WORKERS=4) for _ in range(2)]
    api.wait_for(lambda api: len(api.calls()) >= 1, PATIENCE)
    gate.open.set()
    api.wait_for(lambda api: len(api.calls()) >= 12, PATIENCE)
    assert gate.most == 1
    # They take turns; each listener begins with the first.
    assert {*gate.order()[:3]} == {"vlm_analyze", "vlm_judge"}
    assert all(listener.stop() == 0 for listener in running)


def test_full_pool_keeps_no_other_stage_waiting(site, api):
    gate = Gate(api, ["vlm_analyze", "vlm_judge"])
    for step in ("img_gen", "overlay", "planner"):
        site.add_job(step, "done")
    site.start(LISTENER_WORKERS=4)
    api.wait_for(lambda api: len(api.calls()) >= 2, PATIENCE)
    assert "overlay" in gate.order()
    gate.open.set()
    api.wait_for(lambda api: len(api.calls()) >= 3, PATIENCE)


def test_pool_stays_with_the_stage_that_has_calls(site, api):
    gate = Gate(api, ["load_a", "load_b"])
    gate.open.set()
    for _ in range(3):
        site.add_job("a", "done")
        site.add_job("b", "done")
    site.start("run", "--once", LISTENER_WORKERS=4).wait()
    first = gate.order()[0]
    assert gate.order() == [first] * 3 + ["load_b" if first == "load_a" else "load_a"] * 3


def test_result_has_all_stages_of_a_pool_looked_at_again(site, caller):
    claiming = caller("http://127.0.0.1:1")
    listener = with_idle_worker(claiming.listener)
    site.add_job("img_gen", "done"), site.add_job("overlay", "done")
    [first] = listener.settle_and_claim(claiming.conn)
    assert listener.settle_and_claim(claiming.conn) == []
    listener.once = True
    listener.keep(first, trigger.result(first, "skipped"))

    def claimed():
        assert not listener.finished()
        return listener.settle_and_claim(claiming.conn)

    [second] = until(claimed, "a call of the other stage")
    assert {first.stage, second.stage} == {"vlm_analyze", "vlm_judge"}


def test_stage_whose_pool_has_an_idle_one_is_called_beside_a_busy_stage(site, caller):
    """Each claim settles a result, as the busy stage keeps the only worker at work."""
    claiming = caller("http://127.0.0.1:1")
    listener = with_idle_worker(claiming.listener)
    for _ in range(8):
        site.add_job("planner", "done"), site.add_job("overlay", "done")
    called = []
    for _ in range(6):
        [call] = listener.settle_and_claim(claiming.conn)
        called.append(call.stage)
        listener.keep(call, trigger.result(call, "skipped"))
    assert called.count("vlm_judge") >= 2 and called.count("overlay") >= 2


def test_stage_that_had_nothing_is_asked_again_beside_two_busy_ones_of_its_pool(site, caller):
    claiming = caller("http://127.0.0.1:1")
    listener = with_idle_worker(claiming.listener)
    for _ in range(12):
        site.add_job("c", "done"), site.add_job("d", "done")
    called = []
    for turn in range(16):
        if turn == 4:
            site.add_job("e", "done")
        for call in listener.settle_and_claim(claiming.conn):
            called.append(call.stage)
            listener.keep(call, trigger.result(call, "skipped"))
    assert "erase" in called and called.count("crop") >= 4 and called.count("draw") >= 4


def test_stages_of_a_pool_take_turns_while_all_workers_are_busy(site, caller):
    """All calls take equally long, so that results of the pool and of others alternate."""
    claiming = caller("http://127.0.0.1:1")
    listener = with_idle_workers(claiming.listener, 2)
    for _ in range(12):
        site.add_job("overlay", "done"), site.add_job("planner", "done")
    busy = {call.stage: call for call in claim(claiming)}
    assert sorted(busy) == ["overlay", "vlm_judge"]
    site.add_job("img_gen", "done")
    called = []
    for _ in range(4):
        for stage_called in list(busy):
            end(listener, busy.pop(stage_called))
            busy |= {call.stage: call for call in claim(claiming)}
            called += busy
    assert "vlm_analyze" in called


def test_place_that_a_lingering_pool_kept_is_offered_at_once(site, caller):
    claiming = caller("http://127.0.0.1:1")
    with_idle_workers(claiming.listener, 4)
    claiming.listener.claiming.order.sort(reverse=True)  # sort is asked before resize
    site.rows("UPDATE stage_limits SET stays_with = 'resize', stays_since = now()"
              " WHERE name = 'gpu5'")  # fmt: skip
    site.add_job("f", "done"), site.add_job("g", "done")
    assert [call.stage for call in claim(claiming)] == ["resize"]
    assert [call.stage for call in claim(claiming)] == ["sort"]


def test_place_that_a_lingering_pool_kept_is_offered_to_other_listeners(site, caller):
    claiming = caller("http://127.0.0.1:1")
    with_idle_workers(claiming.listener, 1).claiming.order = ["resize"]
    site.rows("UPDATE stage_limits SET stays_with = 'resize', stays_since = now()"
              " WHERE name = 'gpu5'")  # fmt: skip
    site.add_job("f", "done"), site.add_job("g", "done")
    with connected(site) as other:
        other.cursor().execute(f"LISTEN {db.WAKE_CHANNEL}")
        assert [call.stage for call in claim(claiming)] == ["resize"]
        assert select.select([other], [], [], PATIENCE)[0]


def test_pool_is_looked_at_when_it_stays_no_longer(site, caller):
    conn = caller("http://127.0.0.1:1").conn
    site.rows("UPDATE stage_limits SET stays_with = 'resize', stays_since = now()"
              " WHERE name = 'gpu5'")  # fmt: skip
    assert 0 < calls.next_due(conn, ["sort"]) <= 3600
    site.rows("UPDATE stage_limits SET stays_since = now() - interval '1 h' WHERE name = 'gpu5'")
    assert calls.next_due(conn, ["sort"]) is None
    asked_at = site.value("SELECT now() - interval '1 s'")
    assert calls.next_due(conn, ["sort"], asked_at) <= 0


def test_limit_that_somebody_holds_keeps_no_other_stage_of_its_pool_waiting(site, caller):
    claiming = caller("http://127.0.0.1:1")
    with_idle_workers(claiming.listener, 4)
    site.add_job("c", "done"), site.add_job("d", "done")
    with connected(site) as other:
        other.autocommit = False
        other.cursor().execute("SELECT FROM stage_limits WHERE name = 'crop' FOR UPDATE")
        first, second = claim(claiming), claim(claiming)
    assert [call.stage for call in (*first, *second)] == ["draw"]


def test_claim_that_is_refused_takes_no_other_call_with_it(site, caller):
    """Neither what the turn has claimed before, nor what it would have claimed afterwards."""
    claiming = caller("http://127.0.0.1:1")
    listener = with_idle_workers(claiming.listener, 4)
    listener.claiming.order = ["overlay", "crop", "draw", "erase"]
    site.rows(REFUSING)
    for step in ("planner", "d", "e"):
        site.add_job(step, "done")
    assert [call.stage for call in claim(claiming)] == ["overlay"]
    listener.claiming.claim_at = 0.0
    assert [call.stage for call in claim(claiming)] == ["erase"]


def test_hold_that_ended_since_the_last_turn_has_ended(site, caller):
    conn = caller("http://127.0.0.1:1").conn
    site.add_job("c", "done")
    site.rows("UPDATE pipeline_stages SET held_until = now()")
    asked_at = site.value("SELECT now() - interval '1 s'")
    site.rows("UPDATE stage_calls SET due_at = now() - interval '1 h'")
    assert calls.next_due(conn, ["crop"], asked_at) <= 0


def test_pool_leaves_a_stage_that_is_paused(site, api, run_command):
    gate = Gate(api, ["load_a", "load_b"])
    gate.open.set()
    site.rows("UPDATE stage_limits SET stays_with = 'load_a', stays_since = now()")
    site.rows("UPDATE pipeline_stages SET held_until = 'infinity' WHERE stage = 'load_a'")
    site.add_job("a", "done")
    site.add_job("b", "done")
    site.start()
    api.wait_for(lambda api: gate.order() == ["load_b"], PATIENCE)


@pytest.mark.slow
def test_stage_is_called_at_its_pace_over_all_listeners(site, api):
    began = site.value("SELECT clock_timestamp()")
    for _ in range(6):
        site.add_job("slow", "done")
    for _ in range(2):
        site.start(LISTENER_WORKERS=4)
    site.wait_for("SELECT count(*) >= 6 FROM stage_attempts")
    gaps = site.rows("SELECT started_at - lag(started_at) OVER (ORDER BY started_at) AS gap"
                     " FROM stage_attempts ORDER BY started_at OFFSET 1")  # fmt: skip
    assert min(row.gap.total_seconds() for row in gaps) >= 0.1
    assert site.value("SELECT clock_timestamp() - %s", began).total_seconds() > 0.5


def test_place_in_a_pool_is_kept_by_what_is_worked_on(site, api):
    api.on("/taken", lambda request: Answer(202))
    jobs = [site.add_job("x", "done") for _ in range(3)]
    site.start(LISTENER_WORKERS=1)
    site.wait_for("SELECT count(*) = 2 FROM stage_leases WHERE working")
    assert len(api.calls()) == 2
    site.move(api.calls()[0].job_id, "taken", "done")
    api.wait_for(lambda api: len(api.calls()) >= 3, PATIENCE)
    assert {request.job_id for request in api.calls()} == set(jobs)


@pytest.mark.parametrize("bad, said", [
    ({"pool": [GPU, LINGERING]}, "a stage has one Pool"),
    ({"pool": "gpu1"}, "a stage has one Pool"),
    ({"per_minute": 0}, "per_minute=0 of a stage: allowed is a number above 0"),
    ({"per_minute": float("inf")}, "per_minute=inf of a stage: allowed is a number above 0"),
    ({"per_minute": 1e-9}, "per_minute=1e-09 of a stage: allowed is a number above 0.000001, or"),
    ({"timeout": 86_401}, "timeout=86401 of a stage: allowed is a number from 0.1 to 86400"),
    ({"max_running": 2**31}, "max_running=2147483648 of a stage: .* up to 2147483647"),
    ({"max_attempts": 1_000_001}, "max_attempts=1000001 of a stage: .* from 1 to 1000000, or"),
    ({"timeout": "60"}, "timeout='60' of a stage: allowed is a number from 0.1"),
    ({"max_running": 1.5}, "max_running=1.5 of a stage: allowed is a whole number above 0"),
    ({"max_running": 0}, "max_running=0 of a stage: allowed is a whole number above 0"),
    ({"timeout": 0.01}, "timeout=0.01 of a stage: allowed is a number from 0.1"),
    ({"max_attempts": 0}, "max_attempts=0 of a stage: allowed is a whole number from 1"),
    ({"fair": 1}, "fair=1 of a stage: allowed is True or False"),
    ({"per_tenant": 0}, "per_tenant=0 of a stage: allowed is a whole number above 0"),
    ({"per_tenant": 0.5}, "per_tenant=0.5 of a stage: allowed is a whole number above 0"),
    ({"max_attempts": True}, "max_attempts=True of a stage: allowed is a whole number from 1"),
])  # fmt: skip
def test_bad_limits_are_refused(bad, said):
    with pytest.raises(ValueError, match=said):
        limits(**bad)


@pytest.mark.parametrize("pools, said", [
    ((Pool("g", 1), Pool("g", 2)), "declared in two ways"),
    ((Pool("one"), None), "has the name of a stage"),
])  # fmt: skip
def test_pools_of_one_name_are_refused(pools, said):
    functions = [
        limits(pool=pool)(stage(name)) for pool, name in zip(pools, ("one", "two"), strict=True)
    ]
    with pytest.raises(ValueError, match=said):
        pipeline.check({("a", "b"): functions[0], ("c", "d"): functions[1]})


@pytest.mark.parametrize(
    "bad",
    [
        {"name": ""},
        {"size": 0},
        {"size": True},
        {"size": 2**31},
        {"linger": 0},
        {"linger": 86_401},
        {"linger": "60"},
    ],
)
def test_bad_pool_is_refused(bad):
    with pytest.raises(ValueError, match="Pool"):
        Pool(**({"name": "gpu"} | bad))


def test_pool_is_paused_and_shown(site, run_command):
    module = {"PYTHONPATH": str(ROOT / "tests"), "PIPELINE_MODULE": "test_pools"}

    def said(*args: str) -> str:
        done = run_command(site, *args, **module)
        return done.out + done.err

    paused = said("pause", "--pool", "gpu1")
    assert "paused: vlm_analyze" in paused
    assert "paused: vlm_judge" in paused
    assert "resumed: vlm_judge" in said("resume", "--pool", "gpu1", "overlay")
    assert "is no pool: did you mean" in said(
        "pause", "--pool", "gpu")  # fmt: skip
    assert "name a STAGE, or a --pool" in said("pause")
    site.rows("UPDATE stage_limits SET stays_with = 'load_a', stays_since = now() WHERE linger > 0")
    assert "pool gpu2: 0/1; stays with load_a until" in said("status")
    assert 'pool_size{pool="gpu3"} 2' in said("metrics")


def test_call_says_that_its_pool_is_full(site, api, run_command):
    module = {"PYTHONPATH": str(ROOT / "tests"), "PIPELINE_MODULE": "test_pools"}
    api.on("/taken", lambda request: Answer(202))
    jobs = [site.add_job("x", "done") for _ in range(3)]
    site.start()
    site.wait_for("SELECT count(*) = 2 FROM stage_leases WHERE working")
    waiting = next(job for job in jobs if job not in {r.job_id for r in api.calls()})
    assert "pool gpu3 is at its limit of 2 calls at once" in run_command(
        site, "job", waiting, **module).out  # fmt: skip
    assert "pool gpu3 is at its limit" in run_command(
        site, "call", waiting, api=api, **module).refused(1)  # fmt: skip


def test_install_with_a_higher_rate_ends_a_wait_of_the_lower_one(site):
    site.rows("UPDATE stage_limits SET next_at = now() + interval '1 h' WHERE name = 'paid'")
    soon = "SELECT next_at <= now() + interval '0.1 s' FROM stage_limits WHERE name = 'paid'"
    with connected(site) as conn:
        apply(conn)
        assert site.value(soon)
        assert clock.shorten_waits(conn) == 0  # it is no sign of a clock that was set back


def test_install_writes_only_the_limits_that_have_changed(site, use_pipeline):
    written = "SELECT name, xmin::text FROM stage_limits"
    before = set(site.rows(written))
    with connected(site) as conn:
        apply(conn)
        assert set(site.rows(written)) == before
        use_pipeline(PIPELINE | {("slow", "done"): limits(max_running=3)(stage("paid"))})
        apply(conn)
    assert {name for name, _ in before - set(site.rows(written))} == {"paid"}


def test_install_does_not_shorten_the_wait_of_a_call_that_was_claimed_meanwhile(site):
    claimed = "UPDATE stage_limits SET next_at = now() + make_interval(secs => seconds)"
    with connected(site) as conn:
        db.execute(conn, "BEGIN")
        site.rows(f"{claimed} WHERE name = 'paid'")
        [next_at] = site.rows("SELECT next_at FROM stage_limits WHERE name = 'paid'")
        apply(conn)
        db.execute(conn, "COMMIT")
    assert site.rows("SELECT next_at FROM stage_limits WHERE name = 'paid'") == [next_at]


def test_install_without_a_rate_ends_its_wait(site, use_pipeline):
    site.rows("UPDATE stage_limits SET next_at = now() + interval '1 h' WHERE name = 'paid'")
    use_pipeline(PIPELINE | {("slow", "done"): limits(max_running=3)(stage("paid"))})
    with connected(site) as conn:
        apply(conn)
    assert site.value("SELECT next_at IS NULL FROM stage_limits WHERE name = 'paid'")


def test_job_and_report_say_what_a_limit_keeps_waiting(site, run_command):
    module = {"PYTHONPATH": str(ROOT / "tests"), "PIPELINE_MODULE": "test_pools"}
    site.rows("UPDATE stage_limits SET next_at = now() + interval '1 h' WHERE seconds > 0")
    site.rows("UPDATE stage_limits SET stays_with = 'load_a', stays_since = now() WHERE linger > 0")
    jobs = [site.add_job("slow", "done"), site.add_job("b", "done")]
    slow, pooled = (run_command(site, "job", job, **module).out for job in jobs)
    assert "paid has a rate; its next call is due" in slow
    assert "pool gpu2 stays with load_a until" in pooled
    page = run_command(site, "report", "--out", "-", **module).out
    assert "Pools" in page and "gpu2" in page and "0 of 1" in page
