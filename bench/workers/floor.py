"""The floor: a bare select() loop that POSTs what it hears of with `requests`, and keeps no books.

Of several processes each calls for the jobs that fall to it by their id. With BENCH_HTTP=bare the
POST is one of http.client instead.
"""

import http.client
import json
import os
import select
import zlib

import psycopg2
import requests

from bench.pipeline import ROUTES
from bench.workers import API, DSN, NUMBER, OF, TIMEOUT


def with_requests():
    session = requests.Session()

    def post(path: str, job: str, tenant: str) -> None:
        body = {"job_id": job, "tenant_id": tenant}
        session.post(API + path, json=body, timeout=TIMEOUT).raise_for_status()

    return post


def with_http_client():
    connection = http.client.HTTPConnection(API.removeprefix("http://"), timeout=TIMEOUT)

    def post(path: str, job: str, tenant: str) -> None:
        body = json.dumps({"job_id": job, "tenant_id": tenant})
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200, answer.status

    return post


def main() -> None:
    post = with_http_client() if os.environ.get("BENCH_HTTP") == "bare" else with_requests()
    conn = psycopg2.connect(DSN)
    conn.autocommit = True
    conn.cursor().execute("LISTEN job_state_changed")
    while True:
        select.select([conn], [], [])
        conn.poll()
        while conn.notifies:
            heard = json.loads(conn.notifies.pop(0).payload)
            path = ROUTES.get((heard["current_step"], heard["status"]))
            if path and zlib.crc32(heard["job_id"].encode()) % OF == NUMBER:
                post(path, heard["job_id"], heard["tenant_id"])


if __name__ == "__main__":
    main()
