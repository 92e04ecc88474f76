"""docs/MONITORING.md, and demo/monitoring: alert rules on metrics that exist, a chat's webhook."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scraping import EVERYTHING, Scraped
from test_readme import Readme
from waiting import until

from demo.stage_server import Answer
from logs import EVENTS
from ops.metrics import FAMILIES

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "demo" / "monitoring"
RULES, RULES_TEST = FOLDER / "alerts.yml", FOLDER / "alerts_test.yml"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)"
)

# --- alert rules ---------------------------------------------------------------------------


@needs_promtool
@pytest.mark.parametrize("what", [["check", RULES], ["test", RULES_TEST]], ids=["rules", "tests"])
def test_rules_are_valid_and_fire_when_they_should(what):
    command, file = what
    done = subprocess.run([PROMTOOL, command, "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", [RULES, RULES_TEST])
def test_rules_name_only_metrics_that_are_written(file):
    text = re.sub(r'="[^"]*"', "", file.read_text())  # a label may be the name of a trigger
    named = set(re.findall(r"\bjob_state_listener_\w+", text))
    assert named and named <= set(FAMILIES)


def test_every_rule_has_a_test_in_which_it_fires():
    rules = re.findall(r"- alert: (\w+)", RULES.read_text())
    fires = re.findall(
        r"alertname: (\w+)\n +eval_time: \w+\n +exp_alerts:\n", RULES_TEST.read_text()
    )
    assert len(rules) == len(set(rules)) == len(fires)
    assert set(fires) == set(rules)


# --- the pages -----------------------------------------------------------------------------

PAGES = ["docs/MONITORING.md", "docs/MONITORING.ko.md"]


@pytest.fixture(params=PAGES)
def page(request) -> Readme:
    return Readme(request.param)


def test_both_languages_have_the_same_structure():
    english, korean = map(Readme, PAGES)
    assert [len(marks) for marks, _ in korean.headings] == [len(m) for m, _ in english.headings]
    assert korean.blocks == english.blocks
    for theirs, ours in zip(korean.tables, english.tables, strict=True):
        assert [row[0] for row in theirs if "`" in row[0]] == [r[0] for r in ours if "`" in r[0]]
        assert list(map(len, theirs)) == list(map(len, ours))


def test_every_metric_is_documented_as_it_is_written(page, database, run_command):
    database.rows(EVERYTHING)
    written = {}
    for family in Scraped(run_command(database, "metrics").out).families:
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = dict.fromkeys(key for sample in family.samples for key in sample.labels)
        written[name] = (family.type, list(labels))
    documented = {
        name.strip("`"): (kind, re.findall(r"`(\w+)`", labels))
        for name, kind, labels, _ in page.table("`job_state_listener_up`")
    }
    assert documented == written
    assert list(documented) == list(FAMILIES)


def test_every_alert_is_documented_with_its_severity(page):
    rules = re.findall(r"- alert: (\w+)\n(?:.+\n)+? +labels: {severity: (\w+)}", RULES.read_text())
    documented = [
        (name.strip("`"), severity) for name, _, severity in page.table(f"`{rules[0][0]}`")
    ]
    assert documented == rules


def test_every_event_of_the_log_is_documented_with_its_line(page):
    documented = [(name, line) for name, line, _ in page.table("`call_succeeded`")]
    lines = {line.replace("%d", "…").replace("%s", "…"): name for line, name in EVENTS.items()}
    assert documented == [(f"`{name}`", f"`{line}`") for line, name in lines.items()]


def test_queries_run_as_the_role_that_may_only_read(page, database, make_role, run_command):
    role = make_role(database)
    run_command(database, "install", "--reader", role)
    database.add_job()
    queries = [body for language, body in page.blocks if language == "sql"]
    assert len(queries) == 5
    database.rows(f"SET ROLE {role}")
    assert [len(database.rows(query.replace("%", "%%"))) for query in queries] == [5, 0, 0, 0, 0]


# --- the chat ------------------------------------------------------------------------------

WEBHOOK = [sys.executable, str(FOLDER / "chat_webhook.py")]
ALERT = {"event": "given_up", "text": "job 7: planner was given up: HTTP 500"}


def run(url: str, alert: dict = ALERT) -> subprocess.CompletedProcess:
    return subprocess.run(
        WEBHOOK, input=json.dumps(alert), capture_output=True, encoding="utf-8",
        env=os.environ | {"CHAT_WEBHOOK_URL": url},
    )  # fmt: skip


def test_chat_hears_of_a_given_up_call(database, api, listener, accepting):
    api.on("planner", lambda _: Answer(422, b"<!channel> @all & no text"))
    listener(database, api=api, ALERT_COMMAND=shlex.join(WEBHOOK),
             CHAT_WEBHOOK_URL=f"{accepting.url}/hooks/1")  # fmt: skip
    job = database.add_job("yolo_detect")
    [posted] = until(lambda: list(accepting.requests), "a message")
    assert posted.head.startswith("POST /hooks/1 ")
    assert posted.headers["content-type"] == "application/json"
    assert json.loads(posted.body) == {
        "text": f"given_up: job {job}: planner was given up:"
        f" HTTP 422: &lt;!channel&gt; @\u200ball &amp; no text; to call it again: ./jsl retry {job}"
    }


def test_chat_hears_of_a_job_that_its_stage_set_failed(database, listener, accepting, serve):
    def fails(connection) -> None:
        connection.receive()
        database.rows("UPDATE jobs SET current_step = 'planner', status = 'failed'")
        connection.send(b"HTTP/1.1 500 No\r\nContent-Length: 9\r\n\r\nno memory")

    server = serve(fails)
    listener(database, STAGE_API_URL=server.url, ALERT_COMMAND=shlex.join(WEBHOOK),
             CHAT_WEBHOOK_URL=f"{accepting.url}/hooks/1")  # fmt: skip
    job = database.add_job("yolo_detect")
    [posted] = until(lambda: list(accepting.requests), "a message")
    assert json.loads(posted.body) == {
        "text": f"failed_by_stage: job={job}: planner set it to failed: HTTP 500: no memory"
        " (set failed by its stage); to send it back: UPDATE jobs SET current_step ="
        f" 'yolo_detect', status = 'done' WHERE job_id = '{job}'"
        " AND (current_step, status) = ('planner', 'failed')"
    }


@pytest.mark.parametrize(
    ("answer", "said"),
    [(b"403 No", "HTTP 403"), (b"302 Found\r\nLocation: /", "HTTP 302"), (b"500 No", "HTTP 500")],
)
def test_chat_that_refuses_is_one_line_and_exit_1(serve, answer, said):
    server = serve(lambda c: c.answer(b"HTTP/1.1 " + answer + b"\r\nContent-Length: 0\r\n\r\n"))
    done = run(f"{server.url}/hooks/s3cr3t")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"the chat did not take the alert: {said}\n"
    assert server.connections == 1


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:1/s3cr3t", "the chat did not take the alert: ConnectionRefusedError"),
        ("http://127.0.0.1:s3cr3t/", "the chat did not take the alert: InvalidURL"),
        ("", "CHAT_WEBHOOK_URL is not set to a URL such as https://chat.example.com/hooks/…"),
        ("file:///etc/s3cr3t", "CHAT_WEBHOOK_URL is not set to a URL such as"),
    ],
)
def test_chat_that_is_not_there_is_one_line_without_its_address(url, said):
    done = run(url)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(said) and "s3cr3t" not in done.stderr
