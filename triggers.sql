-- Job State Listener: the functions and triggers, made for the tables of the pipeline.
--
-- Applied by `make trigger` after schema.sql, in the same transaction and search path. They are
-- generated here: which tables and states there are is filled in as text.

-- The options of `install` come as settings of this transaction. The triggers store them as their
-- arguments: --no-notify ('silent'), --notify-owed ('owed only'), --no-insert ('updates only'). An
-- option that is not given keeps its stored value. Where the table named jobs was replaced by
-- another one, that value is in the trigger of the former table.
DO $do$
DECLARE
    before constant text := coalesce(
        (SELECT encode(t.tgargs, 'escape') FROM pg_trigger AS t JOIN pg_proc AS p ON p.oid = t.tgfoid
         WHERE p.pronamespace = quote_ident(current_schema())::regnamespace
           AND p.proname = 'notify_job_state_change' AND t.tgname = 'job_state_change_trigger'
         ORDER BY t.tgrelid = 'jobs'::regclass DESC LIMIT 1), '');
    known constant jsonb := jsonb_build_object(
        'tables', coalesce(
            (SELECT jsonb_agg(to_jsonb(t) ORDER BY t.position) FROM pipeline_tables AS t),
            '[{"name": "jobs", "position": 1, "id_column": "job_id",
               "tenant_column": "tenant_id", "channel": "job_state_changed"}]'),
        'routes', coalesce((SELECT jsonb_agg(to_jsonb(r)) FROM pipeline_stages AS r), '[]'));
BEGIN
    IF coalesce(current_setting('job_state_listener.pipeline', true), '') = '' THEN
        PERFORM set_config('job_state_listener.pipeline', known::text, true);
    END IF;
    IF coalesce(current_setting('job_state_listener.announced', true), '') = '' THEN
        PERFORM set_config('job_state_listener.announced',
                           CASE WHEN before LIKE 'silent%' THEN 'nothing'
                                WHEN before LIKE 'owed only%' THEN 'owed' ELSE 'all' END, true);
    END IF;
    IF coalesce(current_setting('job_state_listener.updates_only', true), '') = '' THEN
        PERFORM set_config('job_state_listener.updates_only',
                           (before LIKE '%updates only%')::text, true);
    END IF;
END
$do$;

-- The types that columns of a table have now, as OIDs; NULL where one is missing. pg_typeof() takes
-- them from the parser, as a query of the catalog would read as of the caller's snapshot.
-- IMMUTABLE spares the cost for each row. PostgreSQL evaluates an IMMUTABLE call with constant
-- arguments when it plans the expression, and plans anew after an ALTER TABLE of a table that the
-- expression has as a regclass constant. So it runs once a session, and once after each change.
CREATE OR REPLACE FUNCTION stage_column_types(place regclass, columns text[]) RETURNS text
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    types text;
BEGIN
    EXECUTE format('SELECT concat_ws('' '', %s) FROM (SELECT NULL::%s AS r) AS x',
                   (SELECT string_agg(format('pg_typeof((r).%I)::oid', name), ', ' ORDER BY position)
                    FROM unnest(columns) WITH ORDINALITY AS c (name, position)), place)
    INTO types;
    RETURN types;
EXCEPTION WHEN OTHERS THEN
    RETURN NULL;
END
$body$;

-- Fills in a template, in one pass: what was filled in is not read again, whatever it contains.
-- {name} becomes the text of this name as it is, '{name}' becomes it as a literal, "{name}" as an
-- identifier. {name?} may have no text (NULL): then its line is left out. This function is dropped
-- below.
CREATE OR REPLACE FUNCTION pg_temp.filled(template text, texts jsonb) RETURNS text
LANGUAGE plpgsql AS $body$
DECLARE
    placeholder constant text := $re$(['"]?)[{]([a-z_]+)([?]?)[}]\1$re$;
    line   text;
    piece  record;
    made   text;
    result text;
BEGIN
    FOREACH line IN ARRAY string_to_array(btrim(template, E'\n '), E'\n') LOOP
        made := '';
        FOR piece IN
            SELECT x.before, x.found[1] AS quote, x.found[2] AS name, x.found[3] AS mark,
                   texts ->> x.found[2] AS given
            FROM ROWS FROM (regexp_split_to_table(line, placeholder),
                            regexp_matches(line, placeholder, 'g')) AS x (before, found)
        LOOP
            IF piece.given IS NULL AND piece.mark = '' THEN
                RAISE EXCEPTION 'a template has {%}, for which there is no text', piece.name;
            END IF;
            made := made || piece.before || CASE piece.quote
                WHEN '''' THEN quote_literal(piece.given)
                WHEN '"' THEN quote_ident(piece.given)
                WHEN '' THEN piece.given
                ELSE '' END;  -- NULL: the end of the line
        END LOOP;
        result := coalesce(result || E'\n' || made, result, made);
    END LOOP;
    RETURN result;
END
$body$;

-- The trigger function of each table records what a row owes, in the transaction that moves it, and
-- then notifies. That of jobs is notify_job_state_change(), that of another table
-- job_state_listener_TABLE(). The block below has, in this order: the facts about each table; the
-- function, with parts in braces; these parts.
--
-- Rights. It runs with its owner's rights. So its search path has no schema in which a user could
-- create a function or an operator, and its tables are named with their schema.
--
-- Cost. PL/pgSQL prepares each expression anew in every transaction, and most transactions move one
-- row. So what a table does not need is left out of its function, and a variable has no DEFAULT.
-- The routes are one constant: a comparison for each cost a tenth of the whole, and looking into
-- pipeline_stages for every row a third. It returns NEW, though what an AFTER trigger returns is
-- ignored, as RETURN NULL would be another expression. SET enable_seqscan = off: with a plan made
-- while stage_calls was empty, the DELETE made an UPDATE of 20,000 jobs take 14 s.
--
-- The application's write never fails:
-- - A column that was dropped, renamed or given another type would make NEW.column an error, in the
--   sessions that have planned it or in all. So NEW.column is used only while the columns are as
--   they were at install. Where they have changed, or the table was restored from a dump, a dynamic
--   statement reads them, and if it fails, that is a warning.
-- - A table that the function writes to may be missing, or its owner may have no right to it: that
--   is a warning, too. Only INSERT is asked for. The table has to be looked up anyway, and to ask
--   for one right costs a hundredth of the whole, but for all four a tenth. Row-level security that
--   holds for the owner (FORCE ROW LEVEL SECURITY) would refuse the row, or hide the open call.
DO $do$
DECLARE
    asked     constant jsonb := current_setting('job_state_listener.pipeline')::jsonb;
    announced constant text := current_setting('job_state_listener.announced');
    schema    constant text := quote_ident(current_schema());
    id_type   constant text := (
        SELECT format('%I.%I', n.nspname, y.typname)
        FROM pg_attribute AS a JOIN pg_type AS y ON y.oid = a.atttypid
        JOIN pg_namespace AS n ON n.oid = y.typnamespace
        WHERE a.attrelid = 'stage_calls'::regclass AND a.attname = 'job_id');
    -- An id of any length fits into the index of its own table, but not into one of more columns.
    may_be_too_long constant boolean := (
        SELECT y.typlen < 0 FROM pg_attribute AS a JOIN pg_type AS y ON y.oid = a.atttypid
        WHERE a.attrelid = 'stage_calls'::regclass AND a.attname = 'job_id');
    t     record;
    body  text;
    texts jsonb;
BEGIN
    FOR t IN
        WITH RECURSIVE tables AS (
            SELECT x.*, c.oid AS place, c.relkind = 'p' AS is_partitioned
            FROM jsonb_to_recordset(asked -> 'tables') AS x (
                name text, id_column text, tenant_column text, parent_table text,
                parent_column text, channel text, priority_column text, run_after_column text)
            JOIN pg_class AS c ON c.oid = format('%s.%I', schema, x.name)::regclass
        ), states AS (
            SELECT * FROM jsonb_to_recordset(asked -> 'routes') AS x (
                table_name text, child_table text, join_of text, current_step text, status text,
                stage text, asynchronous boolean)
        ), above AS (  -- from the parent of a table without tenants up to the first that has them
            SELECT c.name AS child, p.* FROM tables AS c JOIN tables AS p ON p.name = c.parent_table
            WHERE c.tenant_column IS NULL
            UNION ALL
            SELECT a.child, p.* FROM above AS a JOIN tables AS p ON p.name = a.parent_table
            WHERE a.tenant_column IS NULL
        )
        SELECT mine.*, read.columns::text AS columns,
            coalesce(stage_column_types(mine.place, read.columns), '') AS types,
            coalesce(mine.priority_column, mine.run_after_column) IS NOT NULL AS is_ordered,
            mine.parent_column IS NOT NULL OR EXISTS (
                SELECT FROM states AS s WHERE s.table_name = mine.name AND s.asynchronous)
                AS reads_old,
            -- The states in which its rows owe a call: {step: {status: stage}}.
            (SELECT coalesce(jsonb_object_agg(x.current_step, x.stages), '{}')
             FROM (SELECT s.current_step, jsonb_object_agg(s.status, s.stage) AS stages
                   FROM states AS s WHERE s.table_name = mine.name AND s.join_of = ''
                   GROUP BY s.current_step) AS x) AS routes,
            -- The states in which parents wait for its rows; NULL: none.
            (SELECT jsonb_agg(s) FROM states AS s WHERE s.child_table = mine.name) AS joins,
            -- Its asynchronous stages, and whether a row owes, or owed, their calls; NULL: none.
            (SELECT jsonb_agg(x ORDER BY x.stage)
             FROM (SELECT s.stage,
                          coalesce(string_agg(format('step = %L AND state = %L',
                                                     s.current_step, s.status), ' OR ')
                                   FILTER (WHERE s.join_of = ''), 'false') AS owes,
                          coalesce(string_agg(format('old_step = %L AND old_state = %L',
                                                     s.current_step, s.status), ' OR ')
                                   FILTER (WHERE s.join_of = ''), 'false') AS owed
                   FROM states AS s WHERE s.table_name = mine.name AND s.asynchronous
                   GROUP BY s.stage) AS x) AS asynchronous,
            -- The stages whose tenants take turns; NULL: none.
            (SELECT array_agg(l.name)::text
             FROM jsonb_to_recordset(asked -> 'limits') AS l (name text, is_fair boolean)
             WHERE l.is_fair) AS fair_stages,
            -- The tables that are read for a tenant; NULL: none. Not where one is partitioned, as
            -- each row would lock and read all partitions.
            (SELECT string_agg(format('%s.%I', schema, a.name), ', ') FROM above AS a
             WHERE a.child = mine.name HAVING NOT bool_or(a.is_partitioned)) AS lenders
        FROM tables AS mine CROSS JOIN LATERAL (
            SELECT array_remove(ARRAY[mine.id_column, mine.tenant_column, 'current_step', 'status',
                                      mine.parent_column, mine.priority_column,
                                      mine.run_after_column], NULL) AS columns) AS read
    LOOP
        texts := to_jsonb(t) || jsonb_build_object(
            'table', t.name,
            'schema', schema,
            'calls', schema || '.stage_calls',
            'id_type', id_type,
            'root', CASE WHEN t.is_partitioned THEN t.place END,  -- its partitions have the trigger
            'old_id_column', CASE WHEN t.is_partitioned AND t.parent_column IS NOT NULL
                                  THEN t.id_column END,
            'if_joined', CASE WHEN t.joins IS NOT NULL THEN '' END,  -- NULL leaves out its lines
            'order_columns', CASE WHEN t.is_ordered
                THEN ', priority, run_after, due_at' ELSE '' END,
            'order_values', CASE WHEN t.is_ordered
                THEN ', urgency, start, greatest(clock_timestamp(), start)' ELSE '' END,
            'set_order', CASE WHEN t.is_ordered
                THEN 'priority = excluded.priority, run_after = excluded.run_after'
                ELSE 'priority = 0, run_after = NULL' END);

        body := $body$
DECLARE
    is_missing boolean;  -- a table that the function writes to, or its owner's right to do so
    id         {id_type};
    tenant     text;
    step       text;
    state      text;
    parent     {id_type};
    old_step   text;
    old_state  text;
    old_parent {id_type};
    old_id     {id_type};
    route      text;
    owed       boolean;
    looked     boolean;
    moved_row  text;
    moved_from text;
    moved      boolean;
    urgency    integer;
    start      timestamptz;
    payload    text;
    notified   text;
BEGIN
    <<reading>>
    BEGIN
        -- Without the right to use the schema, to_regclass() is an error, as all that follows.
        IF has_schema_privilege(to_regnamespace('{schema}'), 'USAGE') IS NOT TRUE
           {or_may_not_write} THEN
            is_missing := true;
            RAISE WARNING 'Job State Listener: its tables are missing, or not for role % to use, so no call is recorded',
                current_user USING HINT = 'Run: ./jsl verify, which says what to do';
        ELSIF (TG_RELID = {place}
               OR pg_partition_root(TG_RELID) = {root?}
              ) AND {schema}.stage_column_types('{place}'::regclass, '{columns}') = '{types}' THEN
            IF TG_OP <> 'DELETE' THEN{if_joined?}
            id := NEW."{id_column}";
            step := NEW.current_step::text;
            state := NEW.status::text;
            tenant := left(NEW."{tenant_column?}"::text, 500);
            parent := NEW."{parent_column?}";
            urgency := least(greatest(coalesce(NEW."{priority_column?}", 0), -2147483648), 2147483647);
            start := CASE WHEN NEW."{run_after_column?}" IS NOT NULL
                          THEN least(NEW."{run_after_column?}", '9999-12-31') END;
            END IF;{if_joined?}
            {read_old_row?}
            EXIT reading;
        END IF;
        BEGIN
            IF TG_OP <> 'DELETE' THEN
                EXECUTE '{select_new_row}'
                INTO id, step, state, tenant, parent, payload, urgency, start USING NEW;
            END IF;
            {read_old_row_as_found?}
        EXCEPTION WHEN OTHERS THEN
            RAISE WARNING 'Job State Listener: columns of % have changed, so no call is recorded: %',
                TG_RELID::regclass, SQLERRM USING HINT = 'Run: ./jsl install';
            RETURN NEW;
        END;
    END;

    IF is_missing IS NULL THEN
        {leave_if_only_repartitioned?}
        {look_at_parents?}
        {notify_of_looks?}
        {leave_in_same_state?}
        {record_moves?}
        route := '{routes}'::jsonb -> step ->> state;
        {borrow_tenant?}
        IF route IS NULL THEN
            DELETE FROM {calls} AS c
            WHERE c.job_id = id AND c.table_name = '{table}' AND c.join_of = ''
              AND (c.current_step IS DISTINCT FROM step OR c.status IS DISTINCT FROM state);
        {refuse_long_id?}
        ELSIF id IS NOT NULL THEN
            -- Nearly always there is no open call, and without the clauses for one the
            -- trigger costs a twentieth less.
            INSERT INTO {calls} (job_id, table_name, tenant_id, current_step, status,
                                 stage{order_columns})
            VALUES (id, '{table}', tenant, step, state, route{order_values})
            ON CONFLICT (job_id, table_name, join_of) DO NOTHING;
            IF NOT FOUND THEN
                -- An open call is replaced, but not one of the same state that is under
                -- way: a row that moves between partitions arrives again without having left.
                INSERT INTO {calls} AS c (job_id, table_name, tenant_id, current_step, status,
                                      stage{order_columns})
                VALUES (id, '{table}', tenant, step, state, route{order_values})
                ON CONFLICT (job_id, table_name, join_of) DO UPDATE
                SET call_id = DEFAULT, tenant_id = excluded.tenant_id,
                    current_step = excluded.current_step, status = excluded.status,
                    stage = excluded.stage, created_at = excluded.created_at,
                    due_at = excluded.due_at, attempts = 0, free_attempts = 0,
                    worker = NULL, started_at = NULL, last_error = NULL, {set_order}
                WHERE c.worker IS NULL
                   OR c.current_step <> excluded.current_step
                   OR c.status <> excluded.status;
            END IF;
            owed := FOUND;
        END IF;
    END IF;

    {leave_unannounced?}
    {notify?}
    {wake?}
    RETURN NEW;
END
$body$;

        -- The parts in braces, in the order in which they run.
        texts := texts || jsonb_build_object(
            -- Once for each of our tables that the function writes to.
            'or_may_not_write', (
                SELECT string_agg(pg_temp.filled($part$
           OR has_table_privilege(to_regclass('{place}'), 'INSERT') IS NOT TRUE
           OR row_security_active(to_regclass('{place}'))
$part$, jsonb_build_object('place', schema || '.' || name)), E'\n           ')
                FROM unnest(ARRAY['stage_calls',
                                  CASE WHEN t.joins IS NOT NULL THEN 'stage_looks' END,
                                  CASE WHEN t.asynchronous IS NOT NULL THEN 'stage_moves' END])
                    AS name
                WHERE name IS NOT NULL),

            -- Where the table has a parent, or asynchronous stages.
            'read_old_row', CASE WHEN t.reads_old THEN pg_temp.filled($part$
            IF TG_OP <> 'INSERT' THEN
                old_step := OLD.current_step::text;
                old_state := OLD.status::text;
                old_parent := OLD."{parent_column?}";
                old_id := OLD."{old_id_column?}";
            END IF;
$part$, texts) END,

            -- Always: the columns as they are now. Values are cast by way of text, as a cast between
            -- types of numbers would round.
            'select_new_row', pg_temp.filled($part$
SELECT ($1)."{id_column}"::text::{id_type}, ($1).current_step::text, ($1).status::text,
    {tenant}, {parent}, json_build_object(
        '{id_column}', ($1)."{id_column}"
        , '{parent_column?}', ($1)."{parent_column?}"
        , 'current_step', ($1).current_step, 'status', ($1).status
        , '{tenant_column?}', ($1)."{tenant_column?}"
    )::text, {urgency}, {start}
$part$, texts || jsonb_build_object(
                'tenant', coalesce(pg_temp.filled(
                    'left(($1)."{tenant_column?}"::text, 500)', texts), 'NULL'),
                'parent', coalesce(pg_temp.filled(
                    '($1)."{parent_column?}"::text::{id_type}', texts), 'NULL'),
                'urgency', coalesce(pg_temp.filled(
                    'least(greatest(coalesce(($1)."{priority_column?}", 0), -2147483648), 2147483647)',
                    texts), '0'),
                'start', coalesce(pg_temp.filled(
                    'CASE WHEN ($1)."{run_after_column?}" IS NOT NULL THEN'
                    ' least(($1)."{run_after_column?}", ''9999-12-31''::timestamptz) END',
                    texts), 'NULL'))),

            -- Where read_old_row is needed: the same of the old row.
            'read_old_row_as_found', CASE WHEN t.reads_old THEN pg_temp.filled($part$
            IF TG_OP <> 'INSERT' THEN
                EXECUTE '{select_old_row}' INTO old_step, old_state, old_parent, old_id USING OLD;
            END IF;
$part$, jsonb_build_object('select_old_row', pg_temp.filled($part$
SELECT ($1).current_step::text, ($1).status::text, {parent}, ($1)."{id_column}"::text::{id_type}
$part$, texts || jsonb_build_object('parent', coalesce(pg_temp.filled(
                '($1)."{parent_column?}"::text::{id_type}', texts), 'NULL'))))) END,

            -- Where there are joins, and the table has partitions. An UPDATE that moves a row to
            -- another partition deletes it there and inserts it here, in this order: such a row has
            -- not newly come to its state. One that the application deletes and inserts again has,
            -- and it is in the same partition as before.
            'leave_if_only_repartitioned', CASE WHEN t.joins IS NOT NULL AND t.is_partitioned
            THEN pg_temp.filled($part$
        IF TG_OP = 'DELETE' THEN
            moved_row := set_config('job_state_listener.moved_row', concat_ws(
                ' ', statement_timestamp(), old_id, old_parent, old_step, old_state), true);
            moved_from := set_config('job_state_listener.moved_from', TG_RELID::text, true);
        ELSIF TG_OP = 'INSERT'
              AND current_setting('job_state_listener.moved_row', true) = concat_ws(
                  ' ', statement_timestamp(), id, parent, step, state)
              AND current_setting('job_state_listener.moved_from', true) <> TG_RELID::text THEN
            RETURN NEW;
        END IF;
$part$, texts) END,

            -- Once for each join. A row that came to the state, to another parent, or both: look at
            -- its parent. One that was not in the state and went away may have been the last that
            -- its parent waited for.
            'look_at_parents', (
                SELECT string_agg(pg_temp.filled($part$
        IF (step = '{current_step}' AND state = '{status}') IS TRUE
           AND (TG_OP = 'INSERT' OR old_parent IS DISTINCT FROM parent
                OR (old_step = '{current_step}' AND old_state = '{status}') IS NOT TRUE)
           AND parent IS NOT NULL AND NOT {parent_is_too_long} THEN
            INSERT INTO {schema}.stage_looks (parent_id, join_of, arrived)
            VALUES (parent, '{join_of}', true);
            looked := true;
        END IF;
        IF TG_OP <> 'INSERT'
           AND (old_step = '{current_step}' AND old_state = '{status}') IS NOT TRUE
           AND (TG_OP = 'DELETE' OR old_parent IS DISTINCT FROM parent)
           AND old_parent IS NOT NULL AND NOT {old_parent_is_too_long} THEN
            INSERT INTO {schema}.stage_looks (parent_id, join_of, arrived)
            VALUES (old_parent, '{join_of}', false);
            looked := true;
        END IF;
$part$, texts || a_join || jsonb_build_object(
                    'parent_is_too_long', CASE WHEN may_be_too_long
                        THEN 'octet_length(parent::text) > 2600' ELSE 'false' END,
                    'old_parent_is_too_long', CASE WHEN may_be_too_long
                        THEN 'octet_length(old_parent::text) > 2600' ELSE 'false' END)),
                    E'\n        ')
                FROM jsonb_array_elements(t.joins) AS a_join),

            -- Where there are joins, unless nothing is announced.
            'notify_of_looks', CASE WHEN t.joins IS NOT NULL AND announced <> 'nothing'
            THEN pg_temp.filled($part$
        IF looked THEN
            notified := pg_notify('job_state_listener_join', '');
        END IF;
$part$, texts) END,

            -- Where there are joins: only then is there a trigger for DELETE, and for a new parent.
            'leave_in_same_state', CASE WHEN t.joins IS NOT NULL THEN pg_temp.filled($part$
        IF TG_OP = 'DELETE' OR TG_OP = 'UPDATE'
           AND old_step IS NOT DISTINCT FROM step AND old_state IS NOT DISTINCT FROM state THEN
            RETURN NEW;
        END IF;
$part$, texts) END,

            -- Once for each asynchronous stage. A row has left the stage if it comes to a state of
            -- the stage other than running, or if it goes elsewhere from running or from a state
            -- that owes the call. It has not if it goes back from running to a state that owes the
            -- call.
            'record_moves', (
                SELECT string_agg(pg_temp.filled($part$
        IF (step = '{stage}' AND state = 'running') IS NOT TRUE AND id IS NOT NULL
           AND (step = '{stage}' OR {owed}
                OR old_step = '{stage}' AND old_state = 'running' AND ({owes}) IS NOT TRUE) THEN
            INSERT INTO {schema}.stage_moves (job_id, table_name, stage, is_failed)
            VALUES (id, '{table}', '{stage}',
                    coalesce(step = '{stage}' AND state = 'failed', false));
            moved := true;
        END IF;
$part$, texts || a_stage), E'\n        ')
                FROM jsonb_array_elements(t.asynchronous) AS a_stage),

            -- Where tenants take turns, and a parent has the tenant, which is copied into the call.
            -- Nothing waits for a lock on the parent's table: a call without the parent's tenant
            -- has its turn with those that have none.
            'borrow_tenant', CASE WHEN t.lenders IS NOT NULL AND t.fair_stages IS NOT NULL
            THEN pg_temp.filled($part$
        IF route = ANY ('{fair_stages}'::text[]) AND parent IS NOT NULL THEN
            BEGIN
                LOCK TABLE {lenders} IN ACCESS SHARE MODE NOWAIT;
                tenant := left(({schema}.stage_call_row('{parent_table}', '', parent)).tenant_id
                               #>> '{}', 500);
            EXCEPTION WHEN OTHERS THEN
                tenant := NULL;
            END;
        END IF;
$part$, texts) END,

            -- Where ids have a type of any length.
            'refuse_long_id', CASE WHEN may_be_too_long THEN pg_temp.filled($part$
        ELSIF octet_length(id::text) > 2600 THEN
            RAISE WARNING 'Job State Listener: an id of more than 2,600 bytes, no call is recorded';
$part$, texts) END,

            -- Unless nothing is announced. A new row that owes nothing is not announced, unless it
            -- comes from another partition and has left an asynchronous stage.
            'leave_unannounced', CASE WHEN announced = 'all' AND t.channel IS NOT NULL
            THEN pg_temp.filled($part$
    IF TG_OP = 'DELETE'
       OR TG_OP = 'INSERT' AND owed IS NOT TRUE AND moved IS NOT TRUE THEN
        RETURN NEW;
    END IF;
$part$, texts) WHEN announced <> 'nothing' THEN pg_temp.filled($part$
    IF owed IS NOT TRUE AND moved IS NOT TRUE THEN
        RETURN NEW;
    END IF;
$part$, texts) END,

            -- Unless nothing is announced, where the table has a channel.
            'notify', CASE WHEN announced <> 'nothing' AND t.channel IS NOT NULL
            THEN pg_temp.filled($part$
    IF payload IS NULL THEN  -- else NEW is not as it was at install, and its types would be kept
        payload := json_build_object(
            '{id_column}', NEW."{id_column}"
            , '{parent_column?}', NEW."{parent_column?}"
            , 'current_step', NEW.current_step, 'status', NEW.status
            , '{tenant_column?}', NEW."{tenant_column?}"
        )::text;
    END IF;
    IF octet_length(payload) > 7999 THEN
        -- NOTIFY would abort the application's transaction: null for what is long. Four
        -- values of 1,900 bytes and their names make 7,999, five of 1,500 less.
        SELECT json_object_agg(field.key, CASE
                   WHEN octet_length(field.value::text) <= {longest} THEN field.value END)::text
        INTO payload
        FROM json_each(payload::json) AS field;
    END IF;
    -- An assignment needs no executor, which PERFORM would start for every row.
    notified := pg_notify('{channel}', payload);
$part$, texts || jsonb_build_object('longest', CASE t.name WHEN 'jobs' THEN 1900 ELSE 1500 END)) END,

            -- Unless nothing is announced, where the table has no channel.
            'wake', CASE WHEN announced <> 'nothing' AND t.channel IS NULL
            THEN pg_temp.filled($part$
    notified := pg_notify('job_state_listener_wake', '');
$part$, texts) END);

        EXECUTE pg_temp.filled($function$
CREATE OR REPLACE FUNCTION "{name}"() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
AS '{body}'
$function$, jsonb_build_object(
            'name', CASE t.name WHEN 'jobs' THEN 'notify_job_state_change'
                                ELSE 'job_state_listener_' || t.name END,
            'body', E'\n' || pg_temp.filled(body, texts) || E'\n'));
    END LOOP;
END
$do$;

-- stage_join_is_complete(): whether a parent has rows, and all of them are in the state. STABLE, so
-- that it sees what the statement that asks sees.
-- stage_call_row(): where the row that owes a call is now. Of a join: of the parent, and whether
-- the join is complete, and whether the parent has moved since the call was first claimed.
-- Both are generated, as they name the tables of the application.
DO $do$
DECLARE
    asked    constant jsonb := current_setting('job_state_listener.pipeline')::jsonb;
    schema   constant text := quote_ident(current_schema());
    id_type  constant text := (SELECT format_type(atttypid, -1) FROM pg_attribute
                               WHERE attrelid = 'stage_calls'::regclass AND attname = 'job_id');
    -- An id of a text type is compared by the collation of its column. The arguments have that of
    -- the call, which is "C" by the names of tables, and then no index on the column serves.
    collated constant jsonb := coalesce((
        SELECT jsonb_object_agg(concat_ws(' ', p.relname, a.attname),
                                format(' COLLATE %I.%I', n.nspname, c.collname))
        FROM pg_class AS p JOIN pg_attribute AS a ON a.attrelid = p.oid
        JOIN pg_collation AS c ON c.oid = a.attcollation
        JOIN pg_namespace AS n ON n.oid = c.collnamespace
        WHERE p.relnamespace = schema::regnamespace
          AND (p.relname = 'stage_joins' OR p.relname IN (
               SELECT name FROM jsonb_to_recordset(asked -> 'tables') AS x (name text)))), '{}');
    joins  text;  -- a branch for each join
    tables text;  -- a branch for each table
    -- For a row that is not there. A statement that waited while ALTER TABLE rewrote a table sees
    -- none of its rows, as its snapshot is older. Nobody may take that for a deletion: it is
    -- refused, and the listener asks again. What pg_class says is of the snapshot, what
    -- pg_relation_filenode() says is of now. Its IF is its own, as PL/pgSQL would run the query of
    -- a longer condition for rows that are there, too.
    refuse_if_rewritten constant text := $part$
            IF EXISTS (
                SELECT FROM pg_class AS c
                WHERE (c.oid = '{place}'::regclass
                       OR c.oid IN (SELECT relid FROM pg_partition_tree('{place}'::regclass)))
                  AND c.relfilenode <> pg_relation_filenode(c.oid)) THEN
                RAISE serialization_failure
                USING MESSAGE = 'a table was rewritten meanwhile: ' || '{place}';
            END IF;
$part$;
BEGIN
    SELECT string_agg(pg_temp.filled($part$
    IF a_join = '{join_of}' THEN
        SELECT bool_and((r.current_step::text = '{current_step}'
                         AND r.status::text = '{status}') IS TRUE)
        INTO is_complete FROM {place} AS r WHERE r."{parent_column}" = a_parent{collation};
        IF is_complete IS NULL THEN
            {refuse_if_rewritten}
        END IF;
        RETURN coalesce(is_complete, false);
    END IF;
$part$, to_jsonb(x) || jsonb_build_object(
        'refuse_if_rewritten', pg_temp.filled(refuse_if_rewritten, to_jsonb(x)))), E'\n    ')
    INTO joins
    FROM (SELECT r.*, t.parent_column, format('%s.%I', schema, t.name) AS place,
                 coalesce(collated ->> concat_ws(' ', t.name, t.parent_column), '') AS collation
          FROM jsonb_to_recordset(asked -> 'routes') AS r (
                   child_table text, join_of text, current_step text, status text)
          JOIN jsonb_to_recordset(asked -> 'tables') AS t (name text, parent_column text)
              ON t.name = r.child_table) AS x;

    EXECUTE pg_temp.filled($function$
CREATE OR REPLACE FUNCTION stage_join_is_complete(a_join text, a_parent {id_type}) RETURNS boolean
LANGUAGE plpgsql STABLE AS '{body}'
$function$, jsonb_build_object('id_type', id_type, 'body', E'\n' || pg_temp.filled($body$
DECLARE
    is_complete boolean;
BEGIN
    {joins?}
    RETURN false;
END
$body$, jsonb_build_object('joins', joins)) || E'\n'));

    SELECT string_agg(pg_temp.filled($part$
    IF a_table = '{name}' THEN
        SELECT true, to_jsonb({tenant}), r.current_step::text, r.status::text, {parent}
        INTO is_there, tenant_id, current_step, status, parent_id
        FROM {place} AS r WHERE r."{id_column}" = an_id{collation} LIMIT 1;
        IF is_there IS NULL THEN
            {refuse_if_rewritten}
        END IF;
        tenant_id := ({schema}.stage_call_row('{lender?}', '', parent_id)).tenant_id;
    END IF;
$part$, to_jsonb(x) || jsonb_build_object(
        'refuse_if_rewritten', pg_temp.filled(refuse_if_rewritten, to_jsonb(x)),
        'parent', coalesce(pg_temp.filled('r."{parent_column?}"', to_jsonb(x)), 'NULL'),
        -- Not a join: one that is planned while both tables have one row reads all of both later.
        'tenant', coalesce(
            pg_temp.filled('r."{tenant_column?}"', to_jsonb(x)),
            pg_temp.filled('(SELECT p."{lent_column?}" FROM {schema}."{parent_table?}" AS p'
                           ' WHERE p."{parent_id?}" = r."{parent_column?}"{parent_collation}'
                           ' LIMIT 1)', to_jsonb(x)),
            'NULL::text'))), E'\n    ')
    INTO tables
    FROM (SELECT t.*, schema, format('%s.%I', schema, t.name) AS place,
                 coalesce(collated ->> concat_ws(' ', t.name, t.id_column), '') AS collation,
                 p.id_column AS parent_id, p.tenant_column AS lent_column,
                 coalesce(collated ->> concat_ws(' ', p.name, p.id_column), '') AS parent_collation,
                 -- The parent has the tenant from its own parent.
                 CASE WHEN t.tenant_column IS NULL AND p.tenant_column IS NULL
                           AND p.parent_table IS NOT NULL THEN p.name END AS lender
          FROM jsonb_to_recordset(asked -> 'tables') AS t (
                   name text, id_column text, tenant_column text, parent_table text,
                   parent_column text)
          LEFT JOIN jsonb_to_recordset(asked -> 'tables') AS p (
                   name text, id_column text, tenant_column text, parent_table text)
              ON p.name = t.parent_table) AS x;

    EXECUTE pg_temp.filled($function$
CREATE OR REPLACE FUNCTION stage_call_row(
    a_table text, a_join text, an_id {id_type}, OUT is_there boolean, OUT tenant_id jsonb,
    OUT current_step text, OUT status text, OUT parent_id {id_type}, OUT is_complete boolean,
    OUT has_moved boolean) LANGUAGE plpgsql STABLE AS '{body}'
$function$, jsonb_build_object('id_type', id_type, 'body', E'\n' || pg_temp.filled($body$
BEGIN
    {tables}
    IF a_join <> '' THEN
        is_complete := {schema}.stage_join_is_complete(a_join, an_id);
        SELECT m.is_noted AND (m.parent_step, m.parent_status)
                              IS DISTINCT FROM (stage_call_row.current_step, stage_call_row.status)
        INTO has_moved
        FROM {schema}.stage_joins AS m WHERE m.parent_id = an_id{collation} AND m.join_of = a_join;
    END IF;
END
$body$, jsonb_build_object(
        'tables', tables, 'schema', schema,
        'collation', coalesce(collated ->> 'stage_joins parent_id', ''))) || E'\n'));
END
$do$;

DROP FUNCTION pg_temp.filled(text, jsonb);

-- A function that is replaced keeps its owner, and would run with the rights of whoever made the
-- first version. So each is given to the owner of the tables. Those that run with its rights are
-- revoked from PUBLIC: nobody else may make a trigger of them on a table of their own.
DO $do$
DECLARE
    owner regrole := (SELECT relowner FROM pg_class WHERE oid = 'stage_calls'::regclass);
    made  record;
BEGIN
    FOR made IN
        SELECT p.oid::regprocedure AS name, p.proowner <> owner AS foreign_owned,
               p.prorettype = 'trigger'::regtype AS is_trigger
        FROM pg_proc AS p
        WHERE p.pronamespace = quote_ident(current_schema())::regnamespace
          AND (p.proname IN ('notify_job_state_change', 'stage_call_row', 'stage_join_is_complete',
                             'stage_column_types', 'stage_due_calls')
               OR p.prorettype = 'trigger'::regtype AND p.proname ^@ 'job_state_listener_'
                  AND strpos(p.prosrc, 'stage_calls') > 0)
    LOOP
        IF made.foreign_owned THEN
            EXECUTE format('ALTER FUNCTION %s OWNER TO %s', made.name, owner);
        END IF;
        IF made.is_trigger THEN
            EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', made.name);
        END IF;
    END LOOP;
END
$do$;

-- Triggers are made only where they are missing or different, as each one locks its table. They are
-- removed, with their functions, from tables that are no longer in the pipeline. One of those may
-- be the former jobs: it was renamed, and is now a partition, or stands aside.
DO $do$
DECLARE
    asked  constant jsonb := current_setting('job_state_listener.pipeline')::jsonb;
    wanted record;
    found  pg_trigger;
    gone   record;
    updates_only constant boolean := current_setting('job_state_listener.updates_only');
    arguments constant text := concat_ws(', ',
        CASE current_setting('job_state_listener.announced')
            WHEN 'nothing' THEN quote_literal('silent')
            WHEN 'owed' THEN quote_literal('owed only') END,
        CASE WHEN updates_only THEN quote_literal('updates only') END);
BEGIN
    FOR gone IN
        SELECT t.tgname AS name, t.tgrelid::regclass AS place, p.oid::regprocedure AS function
        FROM pg_trigger AS t JOIN pg_proc AS p ON p.oid = t.tgfoid
        WHERE p.pronamespace = quote_ident(current_schema())::regnamespace
          AND (p.proname = 'notify_job_state_change'
               OR p.proname ^@ 'job_state_listener_' AND strpos(p.prosrc, 'stage_calls') > 0)
          AND p.prorettype = 'trigger'::regtype AND t.tgparentid = 0
          AND NOT EXISTS (SELECT FROM jsonb_to_recordset(asked -> 'tables') AS x (name text)
                          WHERE to_regclass(format('%I', x.name)) = t.tgrelid
                            AND (x.name = 'jobs') = (p.proname = 'notify_job_state_change')
                            AND (t.tgname <> 'job_state_listener_delete' OR EXISTS (
                                SELECT FROM jsonb_to_recordset(asked -> 'routes')
                                    AS r (child_table text) WHERE r.child_table = x.name)))
        UNION ALL
        SELECT t.tgname, t.tgrelid::regclass, t.tgfoid::regprocedure
        FROM pg_trigger AS t JOIN jsonb_to_recordset(asked -> 'tables') AS x (name text)
            ON t.tgrelid = to_regclass(format('%I', x.name))
        WHERE updates_only AND t.tgname = CASE x.name WHEN 'jobs' THEN 'job_state_insert_trigger'
                                               ELSE 'job_state_listener_insert' END
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', gone.name, gone.place);
    END LOOP;
    FOR gone IN
        SELECT p.oid::regprocedure AS function FROM pg_proc AS p
        WHERE p.pronamespace = quote_ident(current_schema())::regnamespace
          AND p.prorettype = 'trigger'::regtype AND p.proname ^@ 'job_state_listener_'
          AND strpos(p.prosrc, 'stage_calls') > 0
          AND p.proname NOT IN (SELECT 'job_state_listener_' || x.name
                                FROM jsonb_to_recordset(asked -> 'tables') AS x (name text))
          AND NOT EXISTS (SELECT FROM pg_trigger AS t WHERE t.tgfoid = p.oid)
    LOOP
        EXECUTE format('DROP FUNCTION %s', gone.function);
    END LOOP;

    FOR wanted IN
        SELECT to_regclass(format('%I', x.name)) AS place, made.*,
               CASE x.name WHEN 'jobs' THEN 'job_state_' || made.event || '_trigger'
                    ELSE 'job_state_listener_' || made.event END AS name,
               (CASE x.name WHEN 'jobs' THEN 'notify_job_state_change'
                     ELSE format('%I', 'job_state_listener_' || x.name) END || '()')::regprocedure
                   AS function,
               CASE made.event WHEN 'change' THEN
                   'WHEN (OLD.current_step IS DISTINCT FROM NEW.current_step'
                   ' OR OLD.status IS DISTINCT FROM NEW.status'
                   || CASE WHEN joins.are THEN format(' OR OLD.%1$I IS DISTINCT FROM NEW.%1$I',
                                                      x.parent_column) ELSE '' END
                   || ')' ELSE '' END AS condition
        FROM jsonb_to_recordset(asked -> 'tables') AS x (name text, parent_column text)
        CROSS JOIN LATERAL (
            SELECT count(*) > 0 AS are
            FROM jsonb_to_recordset(asked -> 'routes') AS r (child_table text)
            WHERE r.child_table = x.name) AS joins
        CROSS JOIN (VALUES
            ('change', 'UPDATE', 17),  -- bits of tgtype: 1 row, 4 insert, 8 delete, 16 update
            -- Rows that are born in a routed state, and rows moved between partitions.
            ('insert', 'INSERT', 5),
            ('delete', 'DELETE', 9)) AS made (event, statement, type)
        WHERE CASE made.event WHEN 'delete' THEN joins.are WHEN 'insert' THEN NOT updates_only
                              ELSE true END
    LOOP
        SELECT * INTO found FROM pg_trigger
        WHERE tgrelid = wanted.place AND tgname = wanted.name;
        IF found.oid IS NULL
           OR found.tgfoid <> wanted.function
           OR found.tgtype <> wanted.type
           OR found.tgattr::text <> ''
           OR rtrim(replace(encode(found.tgargs, 'escape'), chr(92) || '000', ', '), ', ')
              <> replace(arguments, '''', '')
           -- The condition follows a column that is renamed. PostgreSQL adds brackets and casts.
           OR regexp_replace(coalesce(substring(pg_get_triggerdef(found.oid)
                                                FROM ' WHEN (.*) EXECUTE FUNCTION '), ''),
                             '[()]|::[^ )]+', '', 'g')
              <> regexp_replace(replace(replace(substr(wanted.condition, 6), 'OLD.', 'old.'),
                                        'NEW.', 'new.'), '[()]', '', 'g') THEN
            EXECUTE format('DROP TRIGGER IF EXISTS %I ON %s', wanted.name, wanted.place);
            EXECUTE format('CREATE TRIGGER %I AFTER %s ON %s FOR EACH ROW %s'
                           ' EXECUTE FUNCTION %s(%s)',
                           wanted.name, wanted.statement, wanted.place, wanted.condition,
                           wanted.function::regproc,
                           arguments);
        ELSIF found.tgenabled NOT IN ('O', 'A')  -- disabled, or for replicas only
              OR EXISTS (  -- on a partition
                  WITH RECURSIVE copy AS (
                      SELECT oid, tgenabled FROM pg_trigger WHERE tgparentid = found.oid
                      UNION ALL
                      SELECT c.oid, c.tgenabled
                      FROM copy JOIN pg_trigger AS c ON c.tgparentid = copy.oid)
                  SELECT FROM copy WHERE tgenabled NOT IN ('O', 'A')) THEN
            EXECUTE format('ALTER TABLE %s ENABLE %s TRIGGER %I', wanted.place,
                           CASE found.tgenabled WHEN 'A' THEN 'ALWAYS' ELSE '' END, wanted.name);
        END IF;
    END LOOP;
END
$do$;
