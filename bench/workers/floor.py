"""The floor: a bare select() loop that POSTs for each notification and records nothing.

With several processes, each calls for the jobs whose ids fall to it.
"""

import json
import select
import zlib

import psycopg2
import requests

from bench.pipeline import ROUTES
from bench.workers import API, DSN, NUMBER, OF, TIMEOUT


def main() -> None:
    session = requests.Session()
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
                body = {"job_id": heard["job_id"], "tenant_id": heard["tenant_id"]}
                session.post(API + path, json=body, timeout=TIMEOUT).raise_for_status()


if __name__ == "__main__":
    main()
