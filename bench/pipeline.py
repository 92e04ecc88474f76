"""What all programs of the benchmark share: the table, the stages, and the trigger that only
notifies. Imports nothing, as the memory of the programs that import it is measured.
"""


def stage(name: str, path: str):
    """A stage function of this name that only POSTs."""

    def function(call):
        return call.post(path)

    function.__name__ = name
    return function


# state: the path of the stage that it owes
ROUTES = {
    ("img_gen", "done"): "/api/yh/llava/stage1/validate",
    ("vlm_analyze", "done"): "/api/yh/yolo/detect",
    ("yolo_detect", "done"): "/api/yh/planner",
    ("planner", "done"): "/api/yh/overlay",
    ("overlay", "done"): "/api/yh/llava/stage2/judge",
}
STEPS = [step for step, _ in ROUTES]  # each is done before its stage is called
STAGES = [*STEPS[1:], "vlm_judge"]

JOBS = """
CREATE TABLE jobs (
    job_id       uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id    text,
    current_step text,
    status       text,
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now()
)
"""

# Ten stages (bench/children.py): eight run for each child of a job, one for the job when all its
# children are done, and one after that. Or all ten run for jobs alone (bench/alone.py).
CHILD_STAGES = [f"child_{number}" for number in range(1, 9)]
JOB_STAGES = ["join", "finish"]
CHILDREN = """
CREATE TABLE jobs_variants (
    job_variants_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    job_id          uuid NOT NULL REFERENCES jobs ON DELETE CASCADE,
    current_step    text,
    status          text,
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX ON jobs_variants (job_id);
"""

# The trigger of the guide, which only notifies.
NOTIFY_ONLY = """
CREATE FUNCTION notify_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (OLD.current_step IS DISTINCT FROM NEW.current_step
       OR OLD.status IS DISTINCT FROM NEW.status) THEN
        PERFORM pg_notify('job_state_changed', json_build_object(
            'job_id', NEW.job_id, 'current_step', NEW.current_step,
            'status', NEW.status, 'tenant_id', NEW.tenant_id)::text);
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER notify_only AFTER UPDATE ON jobs FOR EACH ROW
    WHEN (OLD.current_step IS DISTINCT FROM NEW.current_step
       OR OLD.status IS DISTINCT FROM NEW.status)
    EXECUTE FUNCTION notify_only();
"""
