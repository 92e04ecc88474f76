"""What turns of tenants cost: claims a second of one stage with 1,000 tenants and 100,000 calls
owed, in the order of tenants and in that of time: python -m bench.fair_rate
"""

import contextlib
import time

import click

import calls
import config
import db
from bench.claim_rate import accepted
from calls import Wanted
from demo.database import EmbeddedDatabase
from ops.install import apply

ADD_JOBS = """
INSERT INTO jobs (tenant_id, current_step, status)
SELECT 'tenant ' || n %% 1000, 'img_gen', 'done' FROM generate_series(1, %s) AS n
"""
# As `install` leaves them where the stage is declared fair.
FAIR = """
INSERT INTO stage_limits (name, stages, is_fair) VALUES ('vlm_analyze', '{vlm_analyze}', true);
CREATE INDEX stage_calls_tenant_idx
    ON stage_calls (stage, priority, (coalesce(tenant_id, '')), due_at)
"""


def rate(conn, workers: int, is_fair: bool, seconds: float) -> float:
    """Calls a second that are claimed and settled, as many a turn as there are workers."""
    stage = Wanted("vlm_analyze", 630, workers, workers, limited=is_fair, ordered=is_fair)
    results, done, began = [], 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        claimed = calls.settle_and_claim(conn, results, [stage], workers, "bench").claimed
        results = [accepted(row) for row in claimed]
        done += len(claimed)
    calls.settle_and_claim(conn, results, [], 0, "bench")
    return done / spent


@click.command()
@click.option("--calls", "owed", default=100_000, show_default=True)
@click.option("--seconds", default=5.0, show_default=True, help="Of each figure.")
def main(owed: int, seconds: float) -> None:
    """Claims a second without and with turns of tenants, by the number of workers."""
    with EmbeddedDatabase() as server:
        settings = config.read(server.settings())
        with contextlib.closing(db.connect(settings)) as conn:
            apply(conn)
            for _ in range(0, owed, 5000):
                db.execute(conn, ADD_JOBS, [5000])
            db.execute(conn, "ANALYZE")
        with contextlib.closing(db.connect(settings, pinned=True)) as conn:
            plain = {workers: rate(conn, workers, False, seconds) for workers in (1, 4, 16)}
            db.execute(conn, FAIR)
            for workers, without in plain.items():
                fair = rate(conn, workers, True, seconds)
                click.echo(f"{workers:3} workers: {without:6.0f} a second in order of time, "
                           f"{fair:6.0f} in turns of tenants ({fair / without:.2f})")  # fmt: skip


if __name__ == "__main__":
    main()
