-- The application's tables, as they are before `make trigger`.

CREATE TABLE jobs (
    job_id       uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id    text NOT NULL,
    current_step text,
    status       text,
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now()
);

-- What overlay writes onto the image.
CREATE TABLE job_inputs (
    job_id uuid PRIMARY KEY REFERENCES jobs ON DELETE CASCADE,
    text   text NOT NULL
);
