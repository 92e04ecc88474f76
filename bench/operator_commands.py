"""How long the operator's commands take on a big database: python -m bench.operator_commands

A million rows of history, 100,000 calls owed, 300,000 jobs; each command as a process of its own.
"""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import psycopg2

import config
import db
from demo.database import EmbeddedDatabase
from ops.install import apply
from ops.table import table

ROOT = Path(__file__).parent.parent

# A third of the jobs owe a call (3% of those are given up, 5% wait for a retry), a few are running
# in a stage, the others have passed all stages. The history goes back 30 days.
FILL = """
SET session_replication_role = replica;
INSERT INTO jobs (job_id, tenant_id, current_step, status, created_at, updated_at)
SELECT md5(n::text)::uuid, 'tenant-' || n %% 50,
       CASE WHEN n > %(jobs)s / 3 + 500 THEN 'vlm_judge'
            ELSE (ARRAY['img_gen', 'vlm_analyze', 'yolo_detect', 'planner', 'overlay'])[1 + n %% 5]
       END,
       CASE WHEN n BETWEEN %(jobs)s / 3 + 1 AND %(jobs)s / 3 + 500 THEN 'running' ELSE 'done' END,
       at, at
FROM generate_series(1, %(jobs)s) AS n, LATERAL (SELECT now() - n * interval '8 s' AS at) AS t;
INSERT INTO stage_calls (job_id, tenant_id, current_step, status, stage, created_at, due_at,
                         attempts, last_error)
SELECT j.job_id, j.tenant_id, j.current_step, j.status, p.stage, j.updated_at,
       CASE WHEN n < 3 THEN 'infinity'
            WHEN n < 8 THEN now() + n * interval '1 minute' ELSE j.updated_at END,
       CASE WHEN n < 8 THEN 5 ELSE 0 END,
       CASE WHEN n < 8 THEN repeat('HTTP 500: out of memory ', 20) END
FROM (SELECT *, abs(hashtext(job_id::text)) %% 100 AS n FROM jobs) AS j
JOIN pipeline_stages AS p USING (current_step, status);
INSERT INTO stage_attempts (job_id, call_id, attempt, stage, worker, started_at, finished_at,
                            http_status, outcome, error)
SELECT md5((%(jobs)s - n / 5)::text)::uuid, n, 1, stage.name, 'w' || n %% 8,
       at - (n %% 40) * interval '1 s', at,
       CASE WHEN n %% 37 = 0 THEN 500 ELSE 200 END,
       CASE WHEN n %% 37 = 0 THEN 'retry' ELSE 'succeeded' END,
       CASE WHEN n %% 37 = 0 THEN 'HTTP 500: out of memory' END
FROM generate_series(0, %(attempts)s - 1) AS n,
     LATERAL (SELECT now() - n * interval '30 days' / %(attempts)s AS at) AS t,
     LATERAL (SELECT (ARRAY['vlm_analyze', 'yolo_detect', 'planner', 'overlay', 'vlm_judge']
                     )[1 + n %% 5] AS name) AS stage;
RESET session_replication_role;
"""

A_JOB = "SELECT job_id FROM stage_attempts GROUP BY job_id HAVING count(*) = 5 LIMIT 1"

COMMANDS = ["--help", "status", "status --json", "job {}", "jobs", "jobs --stage planner",
            "jobs --given-up", "jobs --stalled", "jobs --tenant tenant-7", "jobs --since 2h",
            "metrics", "audit --since 30d", "report --since 30d --out -"]  # fmt: skip


def seconds(environ: dict[str, str], line: str, times: int) -> list[float]:
    """How long it took, each time."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        program = [sys.executable, str(ROOT / "listener.py"), *line.split()]
        check = not line.startswith("audit")  # which has findings here, and ends with 1
        subprocess.run(program, env=os.environ | environ, check=check, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - began)
    return taken


@click.command()
@click.option("--attempts", default=1_000_000, show_default=True, help="Rows of history.")
@click.option("--jobs", "count", default=300_000, show_default=True, help="A third of them owe.")
def main(attempts: int, count: int) -> None:
    rows = []
    with EmbeddedDatabase(options={"fsync": "off"}) as server, TemporaryDirectory() as directory:
        environ = server.settings() | {"HEARTBEAT_DIR": directory}
        with contextlib.closing(db.connect(config.read(environ))) as conn:
            apply(conn)
            fill(server, {"attempts": attempts, "jobs": count})
            job_id = str(db.execute(conn, A_JOB).fetchone()[0])
        for line in COMMANDS:
            taken = seconds(environ, line.format(job_id), 3)
            rows.append([line.format("JOB_ID"), f"{min(taken):.2f}"])
    click.echo(f"{count:,} jobs, {attempts:,} rows of history")
    click.echo(table(["listener.py", "best, s"], rows))


def fill(server: EmbeddedDatabase, sizes: dict[str, int]) -> None:
    """Fill the database, without the listener's deadline, and ANALYZE as autovacuum would."""
    psycopg2.extensions.set_wait_callback(None)
    with contextlib.closing(psycopg2.connect(server.dsn())) as conn:
        conn.autocommit = True
        conn.cursor().execute(FILL, sizes)
        conn.cursor().execute("VACUUM ANALYZE")
    psycopg2.extensions.set_wait_callback(db.wait_with_deadline)


if __name__ == "__main__":
    main()
