-- The receiver's table, in the schema of jobs. Applying this again changes nothing.
--
--   psql "$DATABASE_URL" -f receiver/schema.sql
--   PGOPTIONS='-c search_path=app' psql "$DATABASE_URL" -f receiver/schema.sql
--
-- The stage's role needs SELECT, INSERT, UPDATE and DELETE on it.

-- One row for each request that took a row of jobs, under its Idempotency-Key.
CREATE TABLE IF NOT EXISTS stage_requests (
    key         text COLLATE "C" PRIMARY KEY,
    stage       text NOT NULL,
    table_name  text NOT NULL,
    row_id      text NOT NULL,
    -- running; done or failed: it has its answer; abandoned: it has none and never will.
    state       text NOT NULL DEFAULT 'running'
                CHECK (state IN ('running', 'done', 'failed', 'abandoned')),
    -- Who works on it. Nobody else can finish it, however late they come back.
    owner       text NOT NULL,
    -- The state in which the row was taken.
    from_step   text NOT NULL,
    from_status text NOT NULL,
    -- How often the row was sent back there, as its process had died.
    sent_back   integer NOT NULL DEFAULT 0,
    http_status integer,
    answer      text,
    started_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at timestamptz
);

-- Of one row: what a later request takes over, and how often it was sent back.
CREATE INDEX IF NOT EXISTS stage_requests_of_row ON stage_requests (row_id, stage);
-- What recover() looks through.
CREATE INDEX IF NOT EXISTS stage_requests_running ON stage_requests (stage)
    WHERE state = 'running';
-- What is old enough to be forgotten.
CREATE INDEX IF NOT EXISTS stage_requests_finished ON stage_requests (finished_at)
    WHERE state <> 'running';
