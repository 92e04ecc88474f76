"""Pools: limits that several stages share, and the calls that are under way in each."""

import click

import db
import pipeline
from ops.stage import StageName

POOLS = """
SELECT s.name, s.max_running AS size, count(l.stage) AS calling,
       coalesce(array_agg(l.stage ORDER BY l.started_at) FILTER (WHERE l.stage IS NOT NULL), '{}')
           AS stages,
       CASE WHEN s.stays_since > now() - make_interval(secs => s.linger)
            THEN s.stays_with END AS stays_with,
       s.stays_since + make_interval(secs => s.linger) AS stays_until
FROM stage_limits AS s
LEFT JOIN stage_leases AS l ON l.stage = ANY (s.stages) AND l.leased_until > now()
WHERE s.name NOT IN (SELECT stage FROM pipeline_stages)
GROUP BY s.name
ORDER BY s.name
"""


def pools(conn) -> list:
    """A row for each pool: name, size, calling, stages, stays_with, stays_until."""
    return db.execute(conn, POOLS).fetchall()


class PoolName(StageName):
    """A pool of PIPELINE."""

    name = "pool"

    def names(self) -> list[str]:
        return list(pipeline.pools())


def members(names: tuple[str, ...]) -> tuple[str, ...]:
    """The stages of these pools, in the order of PIPELINE."""
    functions = {function.__name__: function for function in pipeline.pipeline().values()}
    return tuple(name for name, of in functions.items() if pipeline.pool_name(of) in names)


POOL = click.option("--pool", "of_pools", type=PoolName(), multiple=True, metavar="POOL",
                    help="All stages of this pool; may be repeated.")  # fmt: skip
