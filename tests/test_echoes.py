"""A stage whose error page shows our own headers: the secret in them is shown nowhere."""

import base64
import json

import pytest

TOKEN = 's3cr"et/to+ken%20&x'
PASSWORD, WRITTEN = 'p@ss"w+rd', "p%40ss%22w%2Brd"
BASIC = base64.b64encode(f"user:{PASSWORD}".encode()).decode().rstrip("=")
COMMANDS = ["job {job}", "job {job} --json", "status", "status --json", "jobs --given-up",
            "metrics", "report --out=-"]  # fmt: skip


def echo(connection) -> None:
    while request := connection.receive():
        said = request.headers["authorization"]
        page = f"{json.dumps({'headers': request.headers})} <p>{said}</p>".encode()
        head = f"HTTP/1.1 422 Bad\r\nContent-Length: {len(page)}\r\n\r\n"
        connection.send(head.encode() + page)


@pytest.mark.parametrize(
    ("user", "token", "secrets"),
    [("", TOKEN, [TOKEN, json.dumps(TOKEN)[1:-1]]),
     (f"user:{WRITTEN}@", None, [PASSWORD, WRITTEN, BASIC])],
    ids=["token", "password"],
)  # fmt: skip
def test_headers_that_a_stage_shows_are_shown_to_nobody(
    database, serve, caller, run_command, tmp_path, user, token, secrets
):
    url = serve(echo).url.replace("//", f"//{user}")
    given = {"STAGE_API_TOKEN": token} if token else {}
    told, job = tmp_path / "alerts", database.add_job()
    worker = caller(url, ALERT_COMMAND=f"tee {told}", **given)
    attempt = worker.call()
    assert attempt.outcome == "failed" and "***" in attempt.error
    worker.listener.alerts.close()
    seen = [attempt.error, database.owed(job).last_error, worker.output.getvalue()]
    seen.append(told.read_text())
    for command in COMMANDS:  # they run without the setting that has the secret
        done = run_command(database, *command.format(job=job).split())
        seen.append(done.out + done.err)
        assert done.code == 0, done.err
    assert [text for text in seen if any(secret in text for secret in secrets)] == []
    assert all("HTTP 422" in text for text in seen[:4])
