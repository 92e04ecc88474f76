-- The application's tables, as they are before `make trigger`.

CREATE TABLE tenants (
    tenant_id text PRIMARY KEY,
    name      text NOT NULL
);

CREATE TABLE jobs (
    job_id       uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id    text NOT NULL REFERENCES tenants,
    current_step text,
    status       text,
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now()
);

-- What overlay writes onto the images of a job.
CREATE TABLE job_inputs (
    job_id uuid PRIMARY KEY REFERENCES jobs ON DELETE CASCADE,
    text   text NOT NULL
);

-- The images of a job: each goes through eight stages.
CREATE TABLE jobs_variants (
    job_variants_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    job_id          uuid NOT NULL REFERENCES jobs ON DELETE CASCADE,
    image_url       text NOT NULL,
    current_step    text,
    status          text,
    updated_at      timestamptz NOT NULL DEFAULT now()
);

-- Serves `every`: are all variants of this job there?
CREATE INDEX jobs_variants_job_idx ON jobs_variants (job_id);

-- Made by planner, needed by overlay.
CREATE TABLE planner_proposals (
    proposal_id     uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    job_variants_id uuid NOT NULL REFERENCES jobs_variants ON DELETE CASCADE,
    layout          jsonb NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX planner_proposals_variant_idx ON planner_proposals (job_variants_id, created_at);

-- Made by overlay. The stages after it do without where there is no row, or NULL in it.
CREATE TABLE overlays (
    job_variants_id uuid PRIMARY KEY REFERENCES jobs_variants ON DELETE CASCADE,
    overlay_id      uuid
);
