"""One run: everything is started, broken for a while, healed, and read out into a History."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2.extensions import make_dsn

from chaos import audit, deck, families, plan
from chaos.application import Application
from chaos.clock import Clock, library
from chaos.faults import World
from chaos.history import History
from chaos.listeners import Listener, Supervisor
from chaos.nemesis import Nemesis
from chaos.pipeline import Pipeline, url_of
from chaos.proxy import Proxy
from demo import five_stages
from demo.database import EmbeddedDatabase
from demo.standby import Standby
from demo.start import environment
from demo.terminal import CHILD
from ops.audit import RESTS

PROGRAM = ("-m", "chaos.program")
# Short times, so that thousands of calls fit into minutes.
SETTINGS = {
    "PIPELINE_MODULE": "demo.five_stages",
    "STAGE_TIMEOUT": plan.STAGE_TIMEOUT,
    "LEASE_MARGIN": plan.LEASE_MARGIN,
    "MAX_ATTEMPTS": 3,
    "RETRY_DELAY": 0.2,
    "SWEEP_INTERVAL": plan.SWEEP_INTERVAL,
    "JOB_STATE_LISTENER_RECONNECT_DELAY": 0.3,
    "LOG_LEVEL": "INFO",
}
# The table that `install` would make, with an order; families refer to it.
JOBS = """
CREATE TABLE jobs (
    job_id       uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id    text,
    current_step text,
    status       text,
    priority     integer,
    run_after    timestamptz,
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now()
);
"""
WORKERS = {1: 16, 2: 4, 3: 1, 4: 16}  # of the listeners, by slot
BEHIND = [3, 4]  # the slots of those behind the proxies
RATE = 2.5  # jobs that arrive in a second
RETRY_EVERY = 1.5  # seconds between two `retry --all --yes` of the operator
# Calls whose run_after the clock, as it was set back, has made far away.
PUT_OFF = "SELECT job_id::text FROM stage_calls WHERE run_after > now() + interval '1 hour'"
# Seconds to wait for calls that are still owed. A hold lasts a minute at most, a lease less. A
# clock that was set back is noticed within a minute, or two where a row was locked.
SETTLE_LIMIT = 270.0


class Run:
    """A context manager; `happen` is the run itself."""

    def __init__(self, seed: int, seconds: float, directory: Path):
        self.seed, self.seconds, self.directory = seed, seconds, directory
        self.planned = deck.planned(seed, seconds)
        self.steps = plan.steps(seed, seconds, RATE)
        self.stack = ExitStack()
        self.over = threading.Event()

    def __enter__(self) -> "Run":
        with ExitStack() as stack:
            for name in [name for name in os.environ if name.startswith("PG")]:
                del os.environ[name]  # PGHOSTADDR and others would connect us to another server
            preloaded = library()
            self.clock = stack.enter_context(Clock(preloaded)) if preloaded else None
            environ = self.clock.environ if self.clock else None
            database = EmbeddedDatabase(options=audit.OPTIONS, environ=environ)
            self.database = stack.enter_context(database)
            standby = stack.enter_context(Standby(self.database, audit.OPTIONS))
            self.hosts = f"{self.database.host},{standby.host}"
            self.api = stack.enter_context(Pipeline(self.dsn, self.seed))
            self.database_proxy = stack.enter_context(Proxy(self.database.port))
            self.stage_proxy = stack.enter_context(Proxy(self.api.port))
            with closing(self.connect()) as conn:
                conn.cursor().execute(JOBS + families.TABLE)
            self.command("install")
            with closing(self.connect()) as conn:
                audit.install(conn)
            self.supervisor = Supervisor([self.listener(slot) for slot in WORKERS])
            stack.callback(self.supervisor.close)
            self.application = Application(self.dsn, self.steps)
            stack.callback(self.application.stop.set)
            world = World(self.database, standby, self.api, self.supervisor.listeners,
                          self.database_proxy, self.stage_proxy, BEHIND, self.command,
                          self.clock)  # fmt: skip
            self.nemesis = Nemesis(world, self.planned)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.stack.close()

    def environ(self, slot: int) -> dict[str, str]:
        behind = slot in BEHIND
        given = SETTINGS | self.database.settings() | {"DB_HOST": self.hosts}
        given["STAGE_API_URL"] = url_of(slot, self.stage_proxy.port if behind else self.api.port)
        given["HEARTBEAT_DIR"] = self.directory / f"heartbeats-{slot}"
        given["CHAOS_SEED"] = self.seed
        given["CHAOS_CLOCK"] = clock = self.directory / f"clock-{slot}"
        if not clock.exists():  # a listener has it mapped
            clock.write_bytes(plan.CLOCK.pack(0.0))
        if behind:
            given["DB_HOST"], given["DB_PORT"] = "127.0.0.1", self.database_proxy.port
        return environment(**given)

    def listener(self, slot: int) -> Listener:
        return Listener(slot, WORKERS[slot], self.environ(slot), self.directory, PROGRAM)

    def command(self, *words: str) -> int:
        """The exit code of one of the product's commands."""
        command = [sys.executable, *PROGRAM, *words]
        return subprocess.run(command, env=self.environ(1), timeout=60, **CHILD).returncode

    def audited(self) -> list[str]:
        """What `audit` says, which sees only the tables."""
        command = [sys.executable, *PROGRAM, "audit", "--json", "--since", "2000-01-01"]
        given = CHILD | {"env": self.environ(1), "stderr": None}
        said = json.loads(subprocess.run(command, timeout=60, **given).stdout)
        return told(said)

    @property
    def dsn(self) -> str:
        """The connection string of the proxy, which leads to the present primary."""
        return make_dsn(self.database.dsn(), host=self.hosts, target_session_attrs="read-write")

    def connect(self) -> psycopg2.extensions.connection:
        conn = psycopg2.connect(self.dsn)
        conn.autocommit = True
        return conn

    def happen(self, tell: Callable[[str], None]) -> History:
        """Run it and return its record. `tell` gets a line of progress now and then."""
        if self.clock is None:
            tell("libfaketime is not installed: the clock of the database is not set back")
        began = time.time()
        self.supervisor.start()
        with ThreadPoolExecutor(4) as pool:
            try:
                nemesis = pool.submit(self.nemesis.run)
                application = pool.submit(self.application.run)
                helpers = [pool.submit(self.application.look_after), pool.submit(self.operate)]
                while not self.over.wait(1.0) and time.time() < began + self.seconds:
                    self.report(tell, time.time() - began)
                self.nemesis.stop.set()
                nemesis.result()
                self.api.calm.set()
                calm = time.time()
                application.result()
                self.application.stop.set()
                owed = self.settle(tell)
            finally:
                for event in (self.nemesis.stop, self.application.stop, self.over):
                    event.set()
            for helper in helpers:
                helper.result()
        self.supervisor.stop()
        if self.clock:  # nobody is left whose lease could end by this
            self.clock.set_right()
            with closing(self.connect()) as conn:
                audit.set_right(conn)
        return self.history(began, calm, owed)

    def report(self, tell: Callable[[str], None], seconds: float) -> None:
        if int(seconds) % 10 == 0:
            calls, faults = len(self.api.posts), len(self.nemesis.faults)
            tell(f"{seconds:4.0f} s: {calls} requests, {faults} faults")

    def operate(self) -> None:
        """The operator, who retries what was given up, or was put off."""
        while not self.over.wait(1.0 if self.api.calm.is_set() else RETRY_EVERY):
            self.command("retry", "--all", "--yes")
            with suppress(psycopg2.Error), closing(self.connect()) as conn, conn.cursor() as cursor:
                cursor.execute(PUT_OFF)
                if late := [job for (job,) in cursor.fetchall()]:
                    self.command("retry", "--now", *late)

    def settle(self, tell: Callable[[str], None]) -> int:
        """Wait until nothing is owed; how many calls still are when the time limit is over."""
        end = time.monotonic() + SETTLE_LIMIT
        with closing(self.connect()) as conn:
            while (owed := self.unsettled(conn)) and time.monotonic() < end:
                if not int(end - time.monotonic()) % 10:
                    tell(f"healed; {owed} calls are still owed")
                time.sleep(1.0)
        return owed

    def unsettled(self, conn: psycopg2.extensions.connection) -> int:
        """How many requests are under way, which may still move their jobs; else, calls owed."""
        under_way = sum(not r.finished for r in self.api.requests) + self.api.working
        return under_way or audit.owed(conn)

    def history(self, began: float, calm: float, owed: int) -> History:
        self.api.wait_for(lambda api: all(r.finished for r in api.requests), 60)
        listeners = self.supervisor.listeners
        with closing(self.connect()) as conn:
            known = audit.records(conn)
        stage_of = {debt.call: debt.stage for debt in [*known["debts"], *known["joins"]]}
        attempts = {(claim.job, stage_of[claim.call], claim.attempt) for claim in known["claims"]}
        return History(
            seed=self.seed,
            began=began,
            calm=calm,
            ended=time.time(),
            timeout=plan.STAGE_TIMEOUT,
            lease=plan.LEASE,
            routes={
                "/".join(state): stage.__name__ for state, stage in five_stages.PIPELINE.items()
            }
            | families.ROUTES,
            joined=families.JOINS,
            rolled_back=sorted(self.application.rolled_back),
            owed=owed,
            orphans=sum(each.orphans for each in listeners),
            posts=sorted(self.api.posts, key=lambda post: post.arrived),
            faults=self.nemesis.faults,
            exits=self.supervisor.exits,
            listening=[heard for each in listeners for heard in each.listening],
            listeners={name: each.slot for each in listeners for name in each.names},
            mischief={
                "/".join(map(str, of)): what
                for of in attempts
                if (what := plan.mischief(self.seed, *of))
            },
            bugs=[
                *self.application.errors,
                *(bug for each in listeners for bug in each.bugs),
                *self.audited(),
            ],
            **known,
        )


def told(said: dict[str, Any]) -> list[str]:
    """The findings of `audit`, but rows that rest as planned; and what it could not look at."""
    found = [f"{one['kind']}: {one['stage']} {one['id']}: {one['text']}"
             for one in said["findings"] if one["kind"] != RESTS]  # fmt: skip
    return [f"audit: {text}" for text in (*found, said["problem"]) if text]
