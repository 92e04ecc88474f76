"""How many rows of each stage rest, as no call and no stage moves them on."""

from typing import Any, NamedTuple

import db

# A query apart from pipeline_overview, which answers within milliseconds: this one reads the
# application's tables.
RESTING = """
SELECT stage, kind, count(*) AS jobs,
       (array_agg(left(reason, 2000) ORDER BY since DESC NULLS LAST))[1] AS reason
FROM resting_rows()
GROUP BY stage, kind
"""


class Resting(NamedTuple):
    """How many rows rest, and the reason of the last one."""

    jobs: int | None  # None: not known
    reason: str | None


NONE = Resting(0, None)


def resting(conn) -> dict[tuple[str, str], Any]:
    """The rows that rest, by stage and kind ("failed": set so by their stage; "stalled").

    Raises:
        psycopg2.errors.QueryCanceled: the tables are too large to be read in time.
    """
    rows = db.execute(conn, RESTING).fetchall()
    return {(row.stage, row.kind): Resting(row.jobs, row.reason) for row in rows}
