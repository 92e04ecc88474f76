"""The order of a stage's due calls: tenants that take turns, priorities, and run_after."""

import itertools
import json
import re
import threading
from collections import Counter

import pytest
from claims import LEASE_OVER, claim_many, connected, wanted
from conftest import ROOT
from pages import Page
from subscription import Subscription
from test_plans import read_by
from variants import TABLE, VARIANTS, install, stage
from waiting import PATIENCE, wait_until_idle

import calls
import db
import joins
import one_by_one
import troubles
from demo.stage_server import Answer
from ops.check import LAG
from ops.install import apply
from ops.place import changes
from ops.report.data import WAITING
from pipeline import Table, limits

ORDERED = Table("jobs", id="job_id", priority="priority", run_after="run_after")
PIPELINE = {
    ("img_gen", "done"): limits(fair=True)(stage("vlm_analyze")),
    ("planner", "done"): limits(per_tenant=2)(stage("overlay")),
    ORDERED("overlay", "done"): stage("vlm_judge"),
    ("yolo_detect", "done"): limits(per_minute=7, fair=True)(stage("planner")),
    VARIANTS("iou_eval", "done"): limits(per_tenant=1)(stage("yolo_detect")),
}
MODULE = {"PYTHONPATH": str(ROOT / "tests"), "PIPELINE_MODULE": "test_fairness"}
COLUMNS = "ALTER TABLE jobs ADD priority integer, ADD run_after timestamptz;"


@pytest.fixture
def run_command(run_here):
    return run_here


@pytest.fixture
def site(database, use_pipeline, api, listener):
    use_pipeline(PIPELINE)
    install(database, COLUMNS, TABLE)
    for name in ("vlm_analyze", "overlay", "vlm_judge"):
        api.on(f"/{name}", lambda request: Answer(200))

    def start(*args, **settings):
        given = MODULE | {"SWEEP_INTERVAL": 3600} | settings
        return listener(database, *args, api=api, **given)

    database.start = start
    return database


def add(database, step: str, tenant: str | None, count: int = 1, **columns) -> None:
    names = "".join(f", {name}" for name in columns)
    values = ", %s" * len(columns)
    database.rows(
        f"INSERT INTO jobs (job_id, tenant_id, current_step, status{names})"
        f" SELECT gen_random_uuid(), %s, %s, 'done'{values} FROM generate_series(1, {count})",
        tenant, step, *columns.values())  # fmt: skip


def tenants(api) -> list:
    return [request.tenant_id for request in api.calls()]


def claimed(database) -> list:
    """The tenants in the order of their claims: requests may overtake each other."""
    order = "SELECT tenant_id FROM stage_attempts JOIN jobs USING (job_id) ORDER BY started_at"
    return [row.tenant_id for row in database.rows(order)]


ADD_VARIANTS = """
WITH added AS (
    INSERT INTO jobs (job_id, tenant_id, current_step, status)
    VALUES (gen_random_uuid(), %s, 'family', 'queued') RETURNING job_id)
INSERT INTO jobs_variants (job_id, current_step, status)
SELECT job_id, 'iou_eval', 'queued' FROM added, generate_series(1, 2)
"""


def test_rows_without_a_tenant_of_their_own_take_the_turns_of_their_parents(site):
    for tenant in ("acme", "zoo"):
        site.rows(ADD_VARIANTS, tenant)
    site.rows("UPDATE jobs_variants SET status = 'done'")
    with connected(site) as conn:
        given = {"stages": ["yolo_detect"], "ordered": True}
        rows = claim_many(conn, 4, **given).claimed
    assert sorted(row.tenant_id for row in rows) == ["acme", "zoo"]


def test_row_whose_parents_table_is_locked_is_written_at_once(site):
    site.rows(ADD_VARIANTS, "acme")
    with site.connect() as change:
        change.autocommit = False
        change.cursor().execute("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
        site.rows("SET statement_timeout = '5s'; UPDATE jobs_variants SET status = 'done'")
        change.rollback()
    assert site.value("SELECT count(*) FROM stage_calls WHERE tenant_id IS NULL") == 2


def test_sweep_does_not_ask_for_each_tenant_whose_calls_wait(site):
    site.rows("INSERT INTO jobs (tenant_id, current_step, status, run_after)"
              " SELECT 'tenant ' || n, 'img_gen', 'done', now() + interval '1 day'"
              " FROM generate_series(1, 200) AS n")  # fmt: skip
    with connected(site) as conn:
        sweep = "SELECT FROM stage_due_calls('vlm_analyze', 0, 1, true)"
        _, index_scans, _ = read_by(conn, lambda: db.execute(conn, sweep))["stage_calls"]
    assert index_scans <= 5


@pytest.mark.parametrize("workers", [1, 3])
def test_tenants_take_turns(site, api, workers):
    add(site, "img_gen", "acme", 50)
    add(site, "img_gen", None, 2)
    add(site, "img_gen", "zoo", 2)
    site.start("run", "--once", LISTENER_WORKERS=workers).wait()
    assert len(tenants(api)) == 54
    # The third round may begin in the claim that ends the second.
    assert Counter(claimed(site)[:8]) == {None: 2, "acme": 4, "zoo": 2}


def test_tenant_who_comes_late_waits_for_no_more_than_the_calls_in_flight(site, api):
    add(site, "img_gen", "acme", 200)
    number, added = itertools.count(1), threading.Event()

    def behave(request):
        arrived = next(number)
        if arrived == 20:
            add(site, "img_gen", "zoo")
            added.set()
        elif arrived > 20:
            added.wait(PATIENCE)
        return Answer(200)

    api.on("/vlm_analyze", behave)
    site.start("run", "--once", LISTENER_WORKERS=2).wait()
    # Two in flight, and two that were claimed while the job was added.
    assert tenants(api).index("zoo") <= 24


def test_turns_go_on_over_all_listeners(site, api):
    for tenant in "abc":
        add(site, "img_gen", tenant, 10)
    for _ in range(2):
        site.start("run", "--once", LISTENER_WORKERS=1)
    site.wait_for("SELECT count(*) = 30 FROM stage_attempts")
    # Two listeners may begin a claim in one order, and get the lock in the other.
    assert all({*claimed(site)[at : at + 5]} == {*"abc"} for at in range(20))


def test_limit_of_a_tenant_holds_over_all_listeners(site, api):
    now, most = Counter(), Counter()
    lock, together = threading.Lock(), threading.Event()

    def behave(request):
        with lock:
            now[request.tenant_id] += 1
            most[request.tenant_id] = max(most[request.tenant_id], now[request.tenant_id])
            if now.total() == 4:
                together.set()
        together.wait(PATIENCE)
        with lock:
            now[request.tenant_id] -= 1
        return Answer(200)

    api.on("/overlay", behave)
    add(site, "planner", "acme", 12)
    add(site, "planner", "zoo", 4)
    for _ in range(2):
        site.start(LISTENER_WORKERS=4)
    api.wait_for(lambda _: len(api.calls()) >= 16, PATIENCE)
    assert most == {"acme": 2, "zoo": 2}


def test_highest_priority_is_called_first(site, api):
    for priority in (0, 5, None, -1, 5):
        add(site, "overlay", str(priority), priority=priority)
    site.start("run", "--once", LISTENER_WORKERS=1).wait()
    assert tenants(api) == ["5", "5", "0", "None", "-1"]


def test_verify_says_when_a_column_of_the_order_has_changed(site):
    with connected(site) as conn:
        assert list(changes(conn)) == []
        site.rows("ALTER TABLE jobs ALTER priority TYPE bigint")
        assert len(list(changes(conn))) == 1


def test_call_is_not_made_before_its_time(site, api):
    [[soon]] = site.rows("SELECT now() + interval '1 second'")
    add(site, "overlay", "later", run_after=soon)
    add(site, "overlay", "never", run_after="infinity")
    add(site, "overlay", "now", run_after="-infinity")
    site.start(LISTENER_WORKERS=1, SWEEP_INTERVAL=0.1)
    site.wait_for("SELECT count(*) = 2 FROM stage_attempts")
    assert tenants(api) == ["now", "later"]
    assert site.value("SELECT min(started_at) >= %s FROM stage_attempts WHERE job_id ="
                      " (SELECT job_id FROM jobs WHERE tenant_id = 'later')", soon)  # fmt: skip
    assert not site.value("SELECT due_at = 'infinity' FROM stage_calls")


def test_call_that_comes_while_nothing_is_due_is_made_at_its_time(site, api, tmp_path):
    add(site, "overlay", "next week", run_after="9999-01-01")
    site.start(LISTENER_WORKERS=2)
    wait_until_idle(tmp_path)
    [[soon]] = site.rows("SELECT now() + interval '1 second'")
    add(site, "overlay", "soon", run_after=soon)
    site.wait_for("SELECT count(*) = 1 FROM stage_attempts")
    assert tenants(api) == ["soon"]


def test_call_by_hand_that_fails_waits_for_its_time_again(site, api, run_command):
    api.on("/vlm_judge", lambda request: Answer(500))
    add(site, "overlay", "acme", run_after="9999-01-01")
    [[job]] = site.rows("SELECT job_id::text FROM jobs")
    assert run_command(site, "call", job, api=api, **MODULE).code == 1
    assert site.value("SELECT due_at = run_after FROM stage_calls")


def test_call_by_hand_that_is_lost_waits_for_its_time_again(site, run_command):
    add(site, "overlay", "acme", run_after="9999-01-01")
    [[job, call]] = site.rows("SELECT job_id::text, call_id FROM stage_calls")
    with connected(site) as conn:
        [row] = calls.run_turn(
            conn, [], wanted(["vlm_judge"]), 1, "by hand", only=(job, call, 0)
        ).claimed
        site.rows(LEASE_OVER)
        calls.reap(conn)
    assert [each.outcome for each in site.attempts(job)] == ["lost"] and row
    assert run_command(site, "job", job, **MODULE).lines[1].split("), ")[1].startswith("due in ")
    found = json.loads(run_command(site, "status", "--json", **MODULE).out)
    [judge] = [each for each in found["stages"] if each["stage"] == "vlm_judge"]
    assert (judge["due"], judge["planned"]) == (0, 1)


def test_claim_in_order_asks_of_leases_what_any_claim_asks():
    """The function has this in two queries. A function of its own would be run for each row."""
    written = " ".join((ROOT / "schema.sql").read_text(encoding="utf-8").split())
    for condition in (calls.UNDER_WAY, calls.IS_OVER):
        assert written.count(" ".join(condition.split())) == 2


@pytest.mark.parametrize(("step", "stage"), [("img_gen", "vlm_analyze"), ("overlay", "vlm_judge")])
def test_call_whose_lease_is_being_extended_keeps_no_other_waiting(site, step, stage):
    add(site, step, "acme")
    given = {"stages": [stage], "ordered": True}
    with connected(site) as conn:
        [lost] = claim_many(conn, 1, **given).claimed
        site.rows(LEASE_OVER)
        add(site, step, "acme")
        with site.connect() as extending:
            extending.autocommit = False
            extending.cursor().execute("UPDATE stage_leases SET leased_until = now() + '1 minute'")
            [other] = claim_many(conn, 1, **given).claimed
            extending.rollback()
        assert other.key != lost.key
        [again] = claim_many(conn, 1, **given).claimed
    assert (again.key, again.taken_over) == (lost.key, True)


def test_call_that_cannot_be_claimed_is_given_up_and_none_of_lower_priority(site):
    add(site, "overlay", "healthy")
    add(site, "overlay", "poisoned", priority=10)
    site.rows("UPDATE stage_calls SET attempts = 2147483647 WHERE priority = 10")
    given = wanted(["vlm_judge"], ordered=True)
    with connected(site) as conn:
        assert one_by_one.run_turn_in_parts(conn, [], given, 1, "w").claimed == []
        [row] = one_by_one.run_turn_in_parts(conn, [], given, 1, "w").claimed
    assert row.tenant_id == "healthy"


def test_row_of_a_table_that_declares_no_time_any_more_is_called_when_it_moves(site, use_pipeline):
    add(site, "overlay", "acme", run_after="9999-01-01", priority=-1)
    use_pipeline({("overlay", "done"): stage("vlm_judge"), ("vlm_judge", "done"): stage("planner")})
    with connected(site) as conn:
        apply(conn)
        site.rows("UPDATE jobs SET current_step = 'vlm_judge'")
        [row] = claim_many(conn, 1, stages=["planner"]).claimed
    assert site.rows("SELECT priority, run_after FROM stage_calls") == [(0, None)] and row


def test_listener_that_does_not_know_of_run_after_leaves_such_a_call(site):
    """During a deploy, one with the PIPELINE of before."""
    add(site, "overlay", "later", run_after="9999-01-01")
    with connected(site) as conn:
        turn = claim_many(conn, 1, stages=["vlm_judge"], sweep=True)
    assert turn.claimed == []


@pytest.mark.parametrize("seen", ["as installed", "as found"])
def test_priority_beyond_an_integer_does_not_hurt_the_application(database, use_pipeline, seen):
    use_pipeline(PIPELINE)
    install(database, COLUMNS.replace("priority integer", "priority bigint"), TABLE)
    if seen == "as found":  # a dynamic statement reads the row
        database.rows("ALTER TABLE jobs ALTER run_after TYPE timestamptz(3)")
        database.rows("ALTER TABLE jobs ALTER priority TYPE numeric")
    for priority in (2**40, -(2**40), 7):
        add(database, "overlay", "acme", priority=priority)
    found = database.rows("SELECT priority FROM stage_calls ORDER BY priority")
    assert [row.priority for row in found] == [-(2**31), 7, 2**31 - 1]


LONG = "SELECT string_agg(md5(n::text), '') FROM generate_series(1, 300) AS n"


def test_long_tenant_does_not_hurt_the_application_nor_a_join(site, use_pipeline):
    use_pipeline(PIPELINE | {VARIANTS.every("iou_eval", "done"): stage("ad_copy")})
    tenant = site.value(LONG)  # 9,600 letters that cannot be compressed
    with connected(site) as conn:
        apply(conn)
        add(site, "img_gen", tenant)
        site.rows(ADD_VARIANTS, tenant)
        site.rows("UPDATE jobs_variants SET status = 'done'")
        joins.look(conn)
        found = site.rows("SELECT tenant_id FROM stage_calls")
        assert {row.tenant_id for row in found} == {tenant[:500]} and len(found) == 4
        site.rows("DELETE FROM stage_calls")
        parent = site.value("SELECT DISTINCT job_id::text FROM jobs_variants")
        assert joins.record_again(conn, parent, "jobs_variants (iou_eval, done)", "ad_copy")
    assert site.value("SELECT tenant_id FROM stage_calls") == tenant[:500]


PARTITIONED = """
ALTER TABLE jobs_variants DROP CONSTRAINT jobs_variants_job_id_fkey;
ALTER TABLE jobs RENAME TO before;
CREATE TABLE jobs (LIKE before INCLUDING DEFAULTS) PARTITION BY LIST (tenant_id);
CREATE INDEX ON jobs (job_id);
CREATE TABLE jobs_acme PARTITION OF jobs FOR VALUES IN ('acme')
"""
LOCKED = "SELECT count(*) FROM pg_locks WHERE relation IN ('jobs'::regclass, 'jobs_acme'::regclass)"


def test_no_partition_of_the_parent_is_locked_for_its_tenant(site):
    site.rows(PARTITIONED)
    with connected(site) as conn:
        apply(conn)
    site.rows(ADD_VARIANTS, "acme")
    with connected(site) as writing:
        db.execute(writing, "BEGIN; UPDATE jobs_variants SET status = 'done'")
        assert db.execute(writing, LOCKED).fetchone()[0] == 0
        db.execute(writing, "COMMIT")
    assert [row.tenant_id for row in site.rows(ORDER)] == [None, None]


UNSHARED = "UPDATE jobs_variants SET status = 'done'; UPDATE stage_calls SET tenant_id = NULL"


def test_calls_that_waited_have_no_tenant_of_a_partitioned_parent_either(site):
    site.rows(PARTITIONED)
    site.rows(ADD_VARIANTS, "acme")
    site.rows(UNSHARED)
    with connected(site) as conn:
        apply(conn)
    assert [row.tenant_id for row in site.rows(ORDER)] == [None, None]


def test_install_whose_waiting_calls_stay_as_they_were_says_what_to_do(site, run_command):
    site.rows(ADD_VARIANTS, "acme")
    site.rows(UNSHARED + "; ALTER TABLE stage_calls ADD CONSTRAINT odd CHECK (tenant_id IS NULL)")
    with Subscription(site, db.WAKE_CHANNEL) as subscription:
        done = run_command(site, "install", **MODULE)
        assert subscription.payloads() == [""]
    note, end = done.lines[-2:]
    assert (done.code, end) == (0, "Next: ./jsl verify, then ./jsl")
    assert 'violates check constraint "odd"' in note and note.endswith("./jsl install, once more")


def test_calls_of_a_long_tenant_are_chosen_by_it(site, run_command):
    tenant = site.value(LONG)
    add(site, "img_gen", tenant)
    site.rows("UPDATE stage_calls SET due_at = 'infinity'")
    listed = run_command(site, "jobs", "--given-up", "--tenant", tenant, "--json", **MODULE)
    assert len(json.loads(listed.out)["jobs"]) == 1
    retried = run_command(site, "retry", "--tenant", tenant, "--yes", **MODULE)
    assert "due again" in retried.out


def test_call_that_waits_for_its_time_says_so_and_can_be_hurried(site, run_command, api):
    add(site, "overlay", "later", run_after="9999-01-01")
    job = str(site.value("SELECT job_id FROM jobs"))
    module = {"PYTHONPATH": str(ROOT / "tests"), "PIPELINE_MODULE": "test_fairness"}
    assert "its row has run_after 9999-01-01" in run_command(site, "job", job, **module).out
    assert "no such call" in run_command(site, "retry", "--now", "--all", "--yes", **module).out
    assert run_command(site, "retry", "--now", job, **module).code == 0
    site.start("run", "--once").wait()
    assert tenants(api) == ["later"]


ORDER = "SELECT priority, run_after, due_at > now() AS is_later, tenant_id FROM stage_calls"


@pytest.mark.parametrize("priority", [7, None])
@pytest.mark.parametrize("command", ["again", "backfill"])
def test_call_that_a_command_records_has_the_order_of_the_trigger(
    site, run_command, command, priority
):
    add(site, "overlay", "acme", priority=priority, run_after="9999-01-01")
    before = site.rows(ORDER)
    job = str(site.value("SELECT job_id FROM jobs"))
    site.rows("DELETE FROM stage_calls")
    module = {"PYTHONPATH": str(ROOT / "tests"), "PIPELINE_MODULE": "test_fairness"}
    typed = ["again", job] if command == "again" else ["backfill", "--apply"]
    assert run_command(site, *typed, **module).code == 0
    assert site.rows(ORDER) == before
    assert before[0].priority == (priority or 0) and before[0].is_later


def test_backfill_records_the_tenant_of_the_parent(site, run_command):
    site.rows(ADD_VARIANTS, "acme")
    site.rows("UPDATE jobs_variants SET status = 'done'")
    site.rows("DELETE FROM stage_calls")
    module = {"PYTHONPATH": str(ROOT / "tests"), "PIPELINE_MODULE": "test_fairness"}
    run_command(site, "backfill", "--apply", **module)
    assert [row.tenant_id for row in site.rows(ORDER)] == ["acme", "acme"]


def test_columns_of_another_type_are_refused(database, use_pipeline, run_command):
    use_pipeline(PIPELINE)
    database.rows("ALTER TABLE jobs ADD priority text, ADD run_after timestamptz")
    done = run_command(database, "install", **MODULE)
    assert "jobs.priority is of type text, not integer" in done.refused(1)


@pytest.mark.parametrize("bad", [{"priority": True}, {"run_after": ""}, {"trace": 5}])
def test_what_is_no_name_of_a_column_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad)) + ".*: allowed is a name"):
        Table("jobs", id="job_id", **bad)


def test_job_says_that_its_tenant_is_at_its_limit(site, run_command):
    add(site, "planner", "acme")
    site.rows("INSERT INTO stage_leases (job_id, call_id, attempt, stage, worker, started_at,"
              " leased_until, tenant_id) SELECT gen_random_uuid(), -n, 1, 'overlay', 'w', now(),"
              " now() + interval '1 h', 'acme' FROM generate_series(1, 2) AS n")  # fmt: skip
    job = str(site.value("SELECT job_id FROM jobs"))
    said = run_command(site, "job", job, **MODULE).out
    assert "overlay is at its limit of 2 calls of this tenant" in said


# --- what is shown -------------------------------------------------------------------------

LATER = "2100-01-01 12:00+00"


@pytest.fixture
def planned(site):
    """Two calls of vlm_judge wait for their run_after, one of planner for its rate, and a tenant
    was served.
    """
    add(site, "overlay", "acme", run_after=LATER)
    add(site, "overlay", "zoo", run_after="infinity")
    site.rows("UPDATE stage_limits SET next_at = %s WHERE name = 'planner'", LATER)
    site.rows("UPDATE stage_limits SET last_tenant = 'acme' WHERE name = 'overlay'")
    return site


def test_status_shows_all_that_stages_declare_and_what_is_planned(planned, run_command):
    lines = run_command(planned, "status", TZ="UTC", **MODULE).lines
    most = "tenants take turns, at most 2 at once of each; the last was acme"
    assert lines[-8:-1] == [
        "vlm_analyze  highest priority first, tenants take turns",
        f"overlay      highest priority first, {most}",
        "vlm_judge    highest priority first",
        "vlm_judge    2 planned by run_after, the first for 2100-01-01 12:00:00",
        "planner      7 calls a minute, the next may begin at 2100-01-01 12:00:00",
        "planner      highest priority first, tenants take turns",
        "yolo_detect  tenants take turns, at most 1 at once of each",
    ]


def test_status_as_json_shows_the_same(planned, run_command):
    found = json.loads(run_command(planned, "status", "--json", **MODULE).out)
    by_name = {row["stage"]: row for row in found["stages"]}
    assert (by_name["planner"]["per_minute"], by_name["planner"]["next_at"][:4]) == (7, "2100")
    names = ("fair", "per_tenant", "last_tenant", "planned")
    assert [by_name["overlay"][name] for name in names] == [True, 2, "acme", 0]
    assert (by_name["vlm_judge"]["planned"], by_name["vlm_judge"]["by_priority"]) == (2, True)
    assert by_name["yolo_detect"]["planned"] is None


def test_metrics_have_only_what_stages_declare(planned, run_command):
    shown = run_command(planned, "metrics", **MODULE).out
    names = "max_tenant_calls|max_calls_per_minute|planned_calls"
    found = re.findall(
        rf'^job_state_listener_({names}){{stage="(\w+)"}} (.+)$', shown, re.MULTILINE
    )
    assert found == [
        ("max_tenant_calls", "overlay", "2"),
        ("max_tenant_calls", "yolo_detect", "1"),
        ("max_calls_per_minute", "planner", "7.0"),
        ("planned_calls", "vlm_analyze", "0"),
        ("planned_calls", "overlay", "0"),
        ("planned_calls", "vlm_judge", "2"),
        ("planned_calls", "planner", "0"),
    ]


def test_report_lists_what_stages_declare(planned, run_command):
    add(planned, "yolo_detect", "acme")
    planned.rows("UPDATE stage_calls SET due_at = now() - interval '1 h' WHERE stage = 'planner'")
    page = Page(run_command(planned, "report", "--out", "-", **MODULE).out)
    assert page.table("limits") == [
        ["vlm_analyze", "–", "–", "–", "–", "tenants take turns, highest priority first"],
        ["overlay", "–", "–", "–", "2", "tenants take turns, highest priority first"],
        ["vlm_judge", "–", "–", "–", "–", "highest priority first, 2 planned by run_after"],
        ["planner", "–", "–", "7", "–", "tenants take turns, highest priority first"],
        ["yolo_detect", "–", "–", "–", "1", "tenants take turns"],
    ]
    assert "the stage is at its rate of 7 calls a minute" in page.root.text


def test_bars_of_the_report_show_planned_calls_apart(planned, run_command):
    add(planned, "overlay", "acme")
    page = Page(run_command(planned, "report", "--out", "-", **MODULE).out)
    [row] = page.table("waits")
    assert row[1:4] == ["vlm_judge", "3", "1 waiting, 2 planned for later"]
    cards = page.section("pipeline").one("ol").all("li")
    [card] = [one for one in cards if "vlm_judge" in one.text]
    names, counts = ([part.text for part in card.all(tag)] for tag in ("dt", "dd"))
    shown = dict(zip(names, counts, strict=True))
    assert [shown[name] for name in ("owed", "waiting", "planned")] == ["3", "1", "2"]


def test_planned_call_is_not_late(planned, run_command):
    planned.rows("UPDATE stage_calls SET created_at = now() - interval '3 h'")
    assert "nothing is due" in run_command(planned, "status", **MODULE).out
    with connected(planned) as conn:
        assert db.execute(conn, LAG).fetchone()[0] == 0
        assert troubles.episodes(conn, 60) == []
        assert {row.longest_seconds for row in db.execute(conn, WAITING, {"until": "now"})} == {0}
