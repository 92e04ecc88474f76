"""Stage APIs that answer oddly, and ids that want to be paths."""

import json
import time
from collections import Counter
from urllib.parse import unquote

import pytest
from raw_server import OK, answering, in_turn
from waiting import RECONNECTING

import config
from pipeline import quoted
from stage_http import Answer, StageApi

HEAD = b"HTTP/1.1 200 OK\r\n"
ODD = [
    b"",
    b"<html>502 Bad Gateway</html>",
    HEAD + b"\r\n<html>no length</html>",
    HEAD + b"Content-Length: -1\r\n\r\n",
    HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    HEAD + b"Content-Length: 9\r\nContent-Type: application/json\r\n\r\n\xff\xfe{NaN,\x00\x1b",
    HEAD + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    HEAD + b"X: " + b"x" * 70_000 + b"\r\n\r\n",
    HEAD + b"X: 1\r\n" * 200 + b"\r\n",
    b"HTTP/9.9 999999 \xed\x95\x9c\r\n\r\n",
    b"HTTP/1.1 200\r\n: \r\n\r\n",
    b"HTTP/1.1 503 Busy\r\nRetry-After: \xff\r\nContent-Length: 0\r\n\r\n",
]
SETTLED = "SELECT count(*) = %s FROM stage_attempts"
FREE = "UPDATE pipeline_stages SET held_until = now()"


def test_h13_no_answer_however_odd_stops_the_loop(database, serve, listener):
    server = serve(*map(answering, ODD), in_turn(OK))
    process = listener(database, STAGE_API_URL=server.url, MAX_ATTEMPTS=1, SWEEP_INTERVAL=0.1)
    jobs = []
    for number in range(len(ODD)):
        jobs.append(database.add_job("overlay", "done"))
        database.wait_for(SETTLED, number + 1)
    database.rows("DELETE FROM stage_calls; " + FREE)
    last = database.add_job("overlay", "done")
    database.wait_for("SELECT outcome = 'succeeded' FROM stage_attempts WHERE job_id = %s", last)
    assert RECONNECTING not in process.output and "Traceback" not in process.output
    called = Counter(json.loads(request.body)["job_id"] for request in server.requests)
    called.pop(jobs.pop())  # its stage was held for a second: it may be called again
    assert called == dict.fromkeys([*jobs, last], 1)


IDS = [
    "../../admin",
    "..%2f..%2fadmin",
    "a/b",
    "x?y#z",
    "a;b",
    "\r\nX: y",
    "\0",
    "한글 😀",
    "...",
    7,
]


@pytest.mark.parametrize("job_id", IDS)
def test_h11_quoted_id_stays_one_segment_of_its_path(accepting, job_id):
    api = StageApi(config.read({"STAGE_API_URL": accepting.url}))
    answer = api.post(f"/api/jobs/{quoted(job_id)}/run", {}, {}, time.monotonic() + 30)
    assert answer == Answer(200, "ok")
    _, path, _ = accepting.requests[0].head.split("\r\n")[0].split(" ")
    before, segment, after = path.removeprefix("/api/").split("/")
    assert (before, unquote(segment), after) == ("jobs", str(job_id), "run")


@pytest.mark.parametrize("job_id", ["", ".", "..", "\ud800"])
def test_h11_id_that_no_quoting_makes_safe_is_refused(job_id):
    with pytest.raises(ValueError):
        quoted(job_id)
