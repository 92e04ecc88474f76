"""The versions of the database's part: how `install` gets from a released one to this one."""

import db
from ops.problem import Problem

# What each version changed, to be applied once. Tables, indexes and functions that are new are
# made by schema.sql, which follows.
STEPS = {
    # 1.0.0 had fewer columns, no 'cancelled', and a due_at that began with now().
    1: """
        ALTER TABLE pipeline_stages
            ADD COLUMN IF NOT EXISTS position integer,
            ADD COLUMN IF NOT EXISTS timeout double precision,
            ADD COLUMN IF NOT EXISTS stalled_since timestamptz,
            ADD COLUMN IF NOT EXISTS held_by text;
        ALTER TABLE stage_calls ALTER COLUMN due_at SET DEFAULT clock_timestamp();
        ALTER TABLE stage_attempts DROP CONSTRAINT stage_attempts_outcome_check;
        ALTER TABLE stage_attempts ADD CONSTRAINT stage_attempts_outcome_check CHECK (
            outcome IN ('succeeded', 'held', 'retry', 'unknown', 'failed', 'skipped',
                        'cancelled', 'lost')) NOT VALID;
    """,
    # One listener a host. Places under max_running are counted from stage_leases. A listener of
    # version 1 that still runs may settle its calls, but finds no slot for another one.
    2: """
        ALTER TABLE IF EXISTS stage_leases
            ADD COLUMN IF NOT EXISTS unanswered boolean NOT NULL DEFAULT false;
        IF to_regclass('stage_slots') IS NOT NULL THEN
            DELETE FROM stage_slots;
            INSERT INTO stage_slots (stage, slot, leased_until)
            SELECT DISTINCT stage, 1, 'infinity'::timestamptz FROM pipeline_stages;
        END IF;
    """,
}
LATEST = max(STEPS)

# Everything goes beside jobs, wherever the search path finds it. A second install waits here.
BEGIN = """
SET LOCAL lock_timeout = '7s';
SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtext('job_state_listener.install'));
SELECT pg_catalog.set_config('search_path', pg_catalog.format('%I, pg_temp', coalesce(
    (SELECT n.nspname FROM pg_catalog.pg_class AS c
     JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
     WHERE c.oid = pg_catalog.to_regclass('jobs')),
    pg_catalog.current_schema())), true);
"""

MARK = f"""
CREATE TABLE IF NOT EXISTS job_state_listener_schema (
    one     boolean PRIMARY KEY DEFAULT true CHECK (one),
    version integer NOT NULL
);
INSERT INTO job_state_listener_schema (version)
SELECT CASE
    WHEN to_regclass('stage_calls') IS NULL THEN {LATEST}
    WHEN EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('pipeline_stages')
                 AND attname = 'held_by') THEN 1
    ELSE 0 END
WHERE NOT EXISTS (SELECT FROM job_state_listener_schema);
"""

STEP = """
DO $step$
BEGIN
    IF (SELECT version FROM job_state_listener_schema) < {version} THEN
        {statements}
        UPDATE job_state_listener_schema SET version = {version};
    END IF;
END
$step$;
"""


def script() -> str:
    """What brings an installation of any released version to this one, in one transaction."""
    steps = (STEP.format(version=number, statements=text) for number, text in STEPS.items())
    return BEGIN + MARK + "".join(steps)


FOUND = "SELECT to_regclass('job_state_listener_schema') IS NOT NULL AS marked"
VERSION = "SELECT version FROM job_state_listener_schema"


def version(conn) -> int:
    """The version of what is installed; 1 for everything before versions were marked."""
    if not db.execute(conn, FOUND).fetchone().marked:
        return 1
    return db.execute(conn, VERSION).fetchone()[0]


def refusal(conn) -> str | None:
    """Why this program cannot work with what is installed; None where it can."""
    found = version(conn)
    if found < LATEST:
        return (
            f"the database's part is of version {found}, this program needs {LATEST}: "
            "run `make trigger` (python listener.py install)"
        )
    if found > LATEST:
        return (
            f"the database's part is of version {found}, newer than this program, which knows "
            f"{LATEST}: deploy the newer program"
        )
    return None


def require_not_newer(conn) -> None:
    """Raises Problem where a newer program has installed; an older one would undo its work."""
    if version(conn) > LATEST:
        raise Problem(f"nothing was changed: {refusal(conn)}")
