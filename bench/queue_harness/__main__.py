"""python -m bench.queue_harness CHECKOUT run …: runs the harness in CHECKOUT with our adapter.

The arguments after CHECKOUT are those of the harness. Instead of in containers, the server runs
embedded, with the settings of its postgres.conf, and these adapters run as processes:
procrastinate where CHECKOUT/procrastinate-bench/.venv exists, pgboss where
CHECKOUT/pgboss-bench/node_modules does.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

import psycopg2

from bench.queue_harness.adapter import MANIFEST
from demo.database import EmbeddedDatabase, available_majors

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
# The extension with which the harness measures bloat.
EXTENSION = "/usr/share/postgresql/{}/extension/pgstattuple.control"
SETTING = re.compile(r"^(\w+) *= *'?([^'\n#]+?)'? *(#.*)?$", re.MULTILINE)
PEERS = {
    "procrastinate": (".venv/bin/python", "main.py"),
    "pgboss": ("node", "main.js"),
}
NEEDED = {"procrastinate": ".venv/bin/python", "pgboss": "node_modules"}

# A job that is neither finished nor waiting is lost. Every call of a job after its first counts as
# repeated. A call that a kill interrupted must be repeated.
ACCOUNT = """
WITH calls AS (
    SELECT job_id, count(*) made, count(*) FILTER (WHERE outcome = 'succeeded') accepted
    FROM stage_attempts WHERE outcome IN ('succeeded', 'retry', 'unknown', 'failed', 'lost')
    GROUP BY job_id
)
SELECT count(*) jobs, count(*) FILTER (WHERE j.current_step = 'vlm_judge') finished,
       count(o.job_id) waiting,
       count(*) FILTER (WHERE j.current_step <> 'vlm_judge' AND o.job_id IS NULL) lost,
       count(*) FILTER (WHERE calls.accepted > 1) "accepted more than once",
       count(*) FILTER (WHERE calls.made > 1) "called more than once"
FROM jobs j LEFT JOIN stage_calls o USING (job_id) LEFT JOIN calls USING (job_id)
"""


def options(text: str) -> dict[str, Any]:
    """The settings in a postgresql.conf, but listen_addresses: only this machine may connect."""
    found = {name: value for name, value, _ in SETTING.findall(text)}
    found.pop("listen_addresses", None)
    return found


class Server:
    """Stands in for the harness's container."""

    def __init__(self, checkout: Path):
        majors = [m for m in available_majors() if os.path.exists(EXTENSION.format(m))]
        if not majors:
            raise SystemExit("error: no PostgreSQL with pgstattuple here: apt install postgresql")
        settings = options((checkout / "postgres.conf").read_text())
        self.database = EmbeddedDatabase(majors[0], settings)
        self.is_up = False

    def start(self, _image: str) -> None:
        if not self.is_up:
            self.database.start()
            self.is_up = True

    def stop(self, _image: str) -> None:
        """Stop the server and keep its data."""
        self.database.stop()
        self.is_up = False

    def remove(self, _image: str) -> None:
        if self.is_up:
            self.account()
            self.is_up = False
        self.database.close()

    def account(self) -> None:
        """Print what became of our jobs, if there are any."""
        try:
            conn = psycopg2.connect(self.database.dsn(MANIFEST["db_name"]))
        except psycopg2.OperationalError:
            return  # another system's turn
        with conn, conn.cursor() as cursor:
            cursor.execute(ACCOUNT)
            names = [column.name for column in cursor.description or ()]
            values = cursor.fetchone() or ()
        told = ", ".join(f"{value} {name}" for name, value in zip(names, values, strict=True))
        print("account:", told)
        conn.close()


def register(harness: Any, checkout: Path) -> None:
    """Add our adapter to the harness's list, and run those of PEERS without containers."""

    def native(directory: Path, command: tuple[str, ...]) -> Any:
        def launch(manifest: Any, overrides: dict[str, str]) -> Any:
            environ = harness._base_env(manifest, overrides)
            return harness.LaunchSpec(list(command), environ, str(directory))

        return launch

    def add(name: str, directory: Path, launch: Any) -> None:
        harness.ADAPTERS[name] = harness.AdapterEntry(directory, lambda _skip: None, launch)

    ours = (sys.executable, "-m", "bench.queue_harness.adapter")
    add(MANIFEST["system"], HERE, native(ROOT, ours))
    for name, command in PEERS.items():
        directory = checkout / f"{name}-bench"
        if (directory / NEEDED[name]).exists():
            found = directory / command[0]
            program = str(found) if found.exists() else command[0]
            add(name, directory, native(directory, (program, *command[1:])))


def main() -> int:
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / "bench_harness").is_dir():
        print("usage: python -m bench.queue_harness CHECKOUT run …", file=sys.stderr)
        return 2
    checkout = Path(sys.argv.pop(1)).resolve()
    sys.path.insert(0, str(checkout))
    from bench_harness import adapters, orchestrator

    server = Server(checkout)
    adapters.PG_PORT, adapters.PG_USER = server.database.port, "postgres"
    orchestrator.start_postgres, orchestrator.stop_postgres = server.start, server.remove
    orchestrator._compose_start_postgres = server.start
    orchestrator._compose_stop_postgres = server.stop
    register(adapters, checkout)
    return orchestrator.main()


if __name__ == "__main__":
    raise SystemExit(main())
