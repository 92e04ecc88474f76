-- A database as the guide's users have it before they come here: the tables of their application
-- with its foreign keys, and the triggers of the listener in the API process. The first is the
-- guide's, word for word.

CREATE TABLE tenants (
    tenant_id    text PRIMARY KEY,
    display_name text NOT NULL
);
CREATE TABLE jobs (
    job_id       uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id    text NOT NULL REFERENCES tenants,
    store_id     uuid,
    status       varchar(20) NOT NULL DEFAULT 'queued',
    current_step varchar(50),
    created_at   timestamptz NOT NULL DEFAULT CURRENT_TIMESTAMP,
    updated_at   timestamptz NOT NULL DEFAULT CURRENT_TIMESTAMP
);
CREATE TABLE job_inputs (
    job_id   uuid PRIMARY KEY REFERENCES jobs ON DELETE CASCADE,
    desc_kor text NOT NULL,
    text     text
);
CREATE TABLE jobs_variants (
    job_variants_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    job_id          uuid NOT NULL REFERENCES jobs ON DELETE CASCADE,
    creation_order  integer NOT NULL,
    status          varchar(20) NOT NULL DEFAULT 'queued',
    current_step    varchar(50) NOT NULL DEFAULT 'img_gen',
    updated_at      timestamptz NOT NULL DEFAULT CURRENT_TIMESTAMP,
    UNIQUE (job_id, creation_order)
);

CREATE OR REPLACE FUNCTION notify_job_state_change()
RETURNS TRIGGER AS $$
BEGIN
    -- current_step 또는 status가 변경된 경우에만 NOTIFY 발행
    IF (OLD.current_step IS DISTINCT FROM NEW.current_step 
       OR OLD.status IS DISTINCT FROM NEW.status) THEN
        PERFORM pg_notify('job_state_changed', 
            json_build_object(
                'job_id', NEW.job_id,
                'current_step', NEW.current_step,
                'status', NEW.status,
                'tenant_id', NEW.tenant_id
            )::text
        );
    END IF;
    RETURN NEW;
END;
$$ LANGUAGE plpgsql;

-- 트리거 생성
DROP TRIGGER IF EXISTS job_state_change_trigger ON jobs;
CREATE TRIGGER job_state_change_trigger
    AFTER UPDATE ON jobs
    FOR EACH ROW
    WHEN (OLD.current_step IS DISTINCT FROM NEW.current_step 
       OR OLD.status IS DISTINCT FROM NEW.status)
    EXECUTE FUNCTION notify_job_state_change();

CREATE OR REPLACE FUNCTION notify_job_variant_state_change()
RETURNS TRIGGER AS $$
DECLARE
    tenant text;
BEGIN
    SELECT tenant_id INTO tenant FROM jobs WHERE job_id = NEW.job_id;
    PERFORM pg_notify('job_variant_state_changed',
        json_build_object(
            'job_variants_id', NEW.job_variants_id,
            'job_id', NEW.job_id,
            'current_step', NEW.current_step,
            'status', NEW.status,
            'tenant_id', tenant
        )::text
    );
    RETURN NEW;
END;
$$ LANGUAGE plpgsql;

CREATE TRIGGER job_variant_state_change_trigger
    AFTER UPDATE ON jobs_variants
    FOR EACH ROW
    WHEN (OLD.current_step IS DISTINCT FROM NEW.current_step
       OR OLD.status IS DISTINCT FROM NEW.status)
    EXECUTE FUNCTION notify_job_variant_state_change();
