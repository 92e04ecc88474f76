"""How fast the stage API is for a client that does nothing but send: the upper bound of all peers.

Each connection takes its jobs through all five stages by itself, and no trigger is on `jobs`.
"""

import json
import socket
import statistics
import threading
import time

from bench.database import Database
from bench.harness import MOVE_ALL, Bench
from bench.pipeline import ROUTES

COMMITS = 200
CONNECTIONS = (1, 4, 16)


def ceiling(bench: Bench) -> dict[str, str]:
    """What to print: calls a second of the stage API, and what a commit costs here."""
    jobs = 200
    found = {}
    with Database(bench.server) as database:
        found["a commit"] = f"{commit(database) * 1000:.2f} ms (median of {COMMITS})"
        bench.stages.connect(database.dsn)
        for mode in ("answer", "work"):
            rates = [f"{rate(bench, database, mode, n, jobs):,.0f}" for n in CONNECTIONS]
            found[f"stage API, {mode}"] = f"{' / '.join(rates)} calls/s"
        bench.stages.disconnect()
    found["connections"] = " / ".join(map(str, CONNECTIONS))
    return found


def commit(database: Database) -> float:
    """Seconds for one INSERT and its commit."""
    times = []
    for _ in range(COMMITS):
        began = time.perf_counter()
        database.execute("INSERT INTO jobs (tenant_id) VALUES ('bench')")
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def rate(bench: Bench, database: Database, mode: str, connections: int, jobs: int) -> float:
    database.execute("DELETE FROM jobs")
    ids = database.add_jobs(jobs)
    database.execute(MOVE_ALL)
    bench.stages.reset(mode)
    shares = [ids[number::connections] for number in range(connections)]
    threads = [threading.Thread(target=send, args=(bench.stages.port, ids)) for ids in shares]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return jobs * len(ROUTES) / (time.monotonic() - began)


def send(port: int, jobs: list[str]) -> None:
    """Every stage of every job, one request at a time on one kept-alive connection."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for job in jobs:
            body = json.dumps({"job_id": job, "tenant_id": "bench"}).encode()
            for path in ROUTES.values():
                head = f"POST {path} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall(head.encode() + body)
                connection.recv(65536)
