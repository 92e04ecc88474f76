"""The adapter for the public benchmark of queues: what it reads and writes, and how it ends.

It runs with what `make bench` installs, and is not tested where that was never run.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from urllib.parse import quote

import pytest
from conftest import ROOT
from waiting import PATIENCE, until

BENCH = ROOT / "bench" / ".venv" / "bin" / "python"
PYTHON = str(BENCH) if BENCH.exists() else sys.executable
LISTENERS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND application_name LIKE 'job-state-listener%%'
"""
FINISHED = "SELECT count(*) FROM jobs WHERE (current_step, status) = ('vlm_judge', 'done')"
METRICS = {f"{name}_p{p}_ms" for name in ("claim", "end_to_end") for p in (50, 95, 99)}
METRICS |= {"enqueue_rate", "completion_rate", "queue_depth", "producer_target_rate"}

pytestmark = pytest.mark.skipif(
    not BENCH.exists() and not (find_spec("asyncpg") and find_spec("uvloop")),
    reason="bench/.venv is not there: `make bench` makes it",
)


@contextmanager
def adapter(database):
    told = {name: quote(value, safe="") for name, value in database.environ.items()}
    url = "postgresql://{DB_USER}:{DB_PASSWORD}@{DB_HOST}:{DB_PORT}/{DB_NAME}".format_map(told)
    given = {"DATABASE_URL": url, "WORKER_COUNT": "2", "SAMPLE_EVERY_S": "0.2"}
    process = subprocess.Popen(
        [PYTHON, "-m", "bench.queue_harness.adapter"], cwd=ROOT, text=True,
        env=os.environ | given | {"PRODUCER_PACING": "harness"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_adapter_inserts_what_it_is_told_and_reports_what_was_called(database):
    with adapter(database) as process:
        described = json.loads(process.stdout.readline())
        assert described["kind"] == "descriptor"
        assert "public.stage_calls" in described["event_tables"]
        process.stdin.write("ENQUEUE 2\nENQUEUE 3\n")
        process.stdin.flush()
        until(lambda: database.value(FINISHED) == 5, "five jobs that are finished")
        seen = {}
        while not seen.get("claim_p50_ms") or not seen.keys() >= METRICS:
            sample = json.loads(process.stdout.readline())
            seen[sample["metric"]] = sample["value"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    assert database.value(LISTENERS) == 0


def test_listener_ends_with_an_adapter_that_is_killed(database):
    with adapter(database) as process:
        process.stdout.readline()
        until(lambda: database.value(LISTENERS), "the listener's session")
        process.kill()
        until(lambda: not database.value(LISTENERS), "no session of the listener")
