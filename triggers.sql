-- Job State Listener: the functions and triggers, made for the tables of the pipeline.
--
-- Applied by `make trigger` after schema.sql, in the same transaction and search path. They are
-- generated here: which tables and states there are is filled in as text.

-- The options of `install` come as settings of this transaction. The triggers store them as their
-- arguments: --no-notify ('silent'), --notify-owed ('owed only'), --no-insert ('updates only'). An
-- option that is not given keeps the value that is stored there; where the table named jobs was
-- replaced by another one, in the trigger of the former table.
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

-- The types that columns of a table have now, as OIDs; NULL where one is missing. The parser is
-- asked, as a catalog read by a query would be as old as the caller's snapshot.
-- IMMUTABLE is what makes it free. PostgreSQL evaluates an IMMUTABLE call with constant arguments
-- when it plans the expression, and plans anew after an ALTER TABLE of a table that the expression
-- has as a regclass constant. So it runs once a session, and once after each change of the table.
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

-- The trigger function of each table keeps the debt in step with the row, in the transaction that
-- moves it, and then notifies. That of jobs is notify_job_state_change(), that of another table
-- job_state_listener_TABLE().
-- It runs with its owner's rights: the search path holds nothing that a user could put a
-- function or an operator in, and its tables are named with their schema, filled in here. So are
-- the routes: looking into pipeline_stages for every row was a third of what the trigger cost.
-- PL/pgSQL prepares each expression anew in every transaction, and most transactions move one
-- row: what a table does not need is left out of its function, a variable has no DEFAULT, and the
-- routes are one constant, as a comparison for each cost a tenth of the whole. RETURN NULL would be
-- another expression; what an AFTER trigger returns is ignored.
-- Each function has SET enable_seqscan = off: with a plan made while stage_calls was empty, the
-- DELETE made an UPDATE of 20,000 jobs take 14 s.
-- A column that was dropped, renamed or given another type would make NEW.column an error, in a
-- session that has planned it or in every one. So the columns are read once, as they were at
-- install; where the table has changed since, or was restored from a dump, by a dynamic statement,
-- whose failure is a warning: the application's write goes through.
-- So it does where a table that the function writes to is missing, or not for its owner to use. The
-- right to INSERT stands for all: the name of the table has to be looked up anyway, and to ask for
-- one right costs a hundredth of the whole, but for all four a tenth. Row-level security that holds
-- for its owner would refuse the row, or hide the open call: see FORCE ROW LEVEL SECURITY.
DO $do$
DECLARE
    asked   constant jsonb := current_setting('job_state_listener.pipeline')::jsonb;
    announced constant text := current_setting('job_state_listener.announced');
    schema  constant text := current_schema();
    t       record;
    place   regclass;
    columns text[];
    routes  jsonb;  -- the rows' own: {step: {status: stage}}
    looks   text;  -- statements that record looks at parents; NULL: no joins
    moving  text;  -- statements before them, where the table has partitions
    is_ordered boolean;  -- the table has a column for the priority of its rows, or their time
    moves   text;  -- statements that record moves; NULL: no asynchronous stage
    fields  text;  -- of the notification
    tells   text;  -- statements that notify; NULL: nothing is announced
    id_type constant text := (
        SELECT format('%I.%I', n.nspname, y.typname)
        FROM pg_attribute AS a JOIN pg_type AS y ON y.oid = a.atttypid
        JOIN pg_namespace AS n ON n.oid = y.typnamespace
        WHERE a.attrelid = 'stage_calls'::regclass AND a.attname = 'job_id');
    -- An id of any length fits into the index of its own table, but not into one of more columns.
    too_long constant text := (
        SELECT CASE WHEN typlen < 0 THEN 'octet_length(%s::text) > 2600' ELSE 'false' END
        FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid
        WHERE attrelid = 'stage_calls'::regclass AND attname = 'job_id');
    fields_read text;  -- the same, of the dynamic statement
    as_installed text;  -- how the columns are read where the table is as it was
    as_found     text;  -- and where it is not
    borrowed     text;  -- how the parent's tenant is read
BEGIN
    FOR t IN SELECT * FROM jsonb_to_recordset(asked -> 'tables') AS x (
        name text, id_column text, tenant_column text, parent_table text, parent_column text,
        channel text, priority_column text, run_after_column text)
    LOOP
        place := format('%I.%I', schema, t.name)::regclass;
        columns := array_remove(ARRAY[t.id_column, t.tenant_column, 'current_step', 'status',
                                      t.parent_column, t.priority_column, t.run_after_column],
                                NULL);

        is_ordered := coalesce(t.priority_column, t.run_after_column) IS NOT NULL;

        SELECT coalesce(jsonb_object_agg(r.current_step, r.stages), '{}')
        INTO routes
        FROM (SELECT x.current_step, jsonb_object_agg(x.status, x.stage) AS stages
              FROM jsonb_to_recordset(asked -> 'routes') AS x (
                  table_name text, join_of text, current_step text, status text, stage text)
              WHERE x.table_name = t.name AND x.join_of = ''
              GROUP BY x.current_step) AS r;

        -- One UPDATE that moves a row to another partition deletes it there and inserts it here, in
        -- this order. Such a row has not come to its state. A row that is deleted and inserted anew
        -- has: it is in the same partition as before.
        moving := CASE WHEN (SELECT relkind FROM pg_class WHERE oid = place) = 'p' THEN $move$
        IF TG_OP = 'DELETE' THEN
            moved_row := set_config('job_state_listener.moved_row', concat_ws(
                ' ', statement_timestamp(), old_id, old_parent, old_step, old_state), true);
            moved_from := set_config('job_state_listener.moved_from', TG_RELID::text, true);
        ELSIF TG_OP = 'INSERT'
              AND current_setting('job_state_listener.moved_row', true) = concat_ws(
                  ' ', statement_timestamp(), id, parent, step, state)
              AND current_setting('job_state_listener.moved_from', true) <> TG_RELID::text THEN
            RETURN NEW;
        END IF;$move$ ELSE '' END;

        -- A row that came to the state, to another parent, or both: look at its parent. One that
        -- was not in the state and went away may have been the last that its parent waited for.
        SELECT moving || string_agg(format($look$
        IF (step = %1$L AND state = %2$L) IS TRUE
           AND (TG_OP = 'INSERT' OR old_parent IS DISTINCT FROM parent
                OR (old_step = %1$L AND old_state = %2$L) IS NOT TRUE)
           AND parent IS NOT NULL AND NOT %5$s THEN
            INSERT INTO %4$I.stage_looks (parent_id, join_of, arrived) VALUES (parent, %3$L, true);
            looked := true;
        END IF;
        IF TG_OP <> 'INSERT'
           AND (old_step = %1$L AND old_state = %2$L) IS NOT TRUE
           AND (TG_OP = 'DELETE' OR old_parent IS DISTINCT FROM parent)
           AND old_parent IS NOT NULL AND NOT %6$s THEN
            INSERT INTO %4$I.stage_looks (parent_id, join_of, arrived)
            VALUES (old_parent, %3$L, false);
            looked := true;
        END IF;$look$, r.current_step, r.status, r.join_of, schema,
            format(too_long, 'parent'), format(too_long, 'old_parent')), '')
            || CASE WHEN announced = 'nothing' THEN '' ELSE $look$
        IF looked THEN
            notified := pg_notify('job_state_listener_join', '');
        END IF;$look$ END || $look$
        IF TG_OP = 'DELETE' OR TG_OP = 'UPDATE'
           AND old_step IS NOT DISTINCT FROM step AND old_state IS NOT DISTINCT FROM state THEN
            RETURN NEW;
        END IF;$look$
        INTO looks
        FROM jsonb_to_recordset(asked -> 'routes') AS r (
            child_table text, join_of text, current_step text, status text)
        WHERE r.child_table = t.name;

        -- A row that comes to another state of the stage than running has left it; so has one that
        -- goes elsewhere from the state that owes the call, or from running. One that goes back from
        -- running to a state that owes the call has not.
        SELECT string_agg(format($move$
        IF (step = %1$L AND state = 'running') IS NOT TRUE AND id IS NOT NULL
           AND (step = %1$L OR %2$s
                OR old_step = %1$L AND old_state = 'running' AND (%3$s) IS NOT TRUE) THEN
            INSERT INTO %4$I.stage_moves (job_id, table_name, stage, is_failed)
            VALUES (id, %5$L, %1$L, coalesce(step = %1$L AND state = 'failed', false));
            moved := true;
        END IF;$move$, s.stage, coalesce(s.old_owes, 'false'), coalesce(s.owes, 'false'),
            schema, t.name), '')
        INTO moves
        FROM (SELECT r.stage,
                     string_agg(format('old_step = %L AND old_state = %L', r.current_step, r.status),
                                ' OR ') FILTER (WHERE r.join_of = '') AS old_owes,
                     string_agg(format('step = %L AND state = %L', r.current_step, r.status),
                                ' OR ') FILTER (WHERE r.join_of = '') AS owes
              FROM jsonb_to_recordset(asked -> 'routes') AS r (
                  table_name text, join_of text, current_step text, status text, stage text,
                  asynchronous boolean)
              WHERE r.table_name = t.name AND r.asynchronous
              GROUP BY r.stage) AS s;

        -- Tenants take turns by the call's own copy. Nothing waits for a lock on the parent's
        -- table: without the parent's tenant the call has the turns of those that have none. So it
        -- has where that table is partitioned: each row would lock and read all partitions.
        WITH RECURSIVE listed AS (
            SELECT * FROM jsonb_to_recordset(asked -> 'tables') AS x (
                name text, tenant_column text, parent_table text)
        ), above AS (
            SELECT p.* FROM listed AS p WHERE p.name = t.parent_table AND t.tenant_column IS NULL
            UNION ALL
            SELECT p.* FROM above AS a JOIN listed AS p ON p.name = a.parent_table
            WHERE a.tenant_column IS NULL
        ), fair AS (
            SELECT array_agg(l.name) AS stages
            FROM jsonb_to_recordset(asked -> 'limits') AS l (name text, is_fair boolean)
            WHERE l.is_fair
        )
        SELECT format($tenant$
        IF route = ANY (%1$L::text[]) AND parent IS NOT NULL THEN
            BEGIN
                LOCK TABLE %2$s IN ACCESS SHARE MODE NOWAIT;
                tenant := left((%3$I.stage_call_row(%4$L, '', parent)).tenant_id #>> '{}', 500);
            EXCEPTION WHEN OTHERS THEN
                tenant := NULL;
            END;
        END IF;$tenant$, fair.stages,
            (SELECT string_agg(format('%I.%I', schema, a.name), ', ') FROM above AS a),
            schema, t.parent_table)
        INTO borrowed
        FROM fair WHERE fair.stages IS NOT NULL AND EXISTS (SELECT FROM above) AND NOT EXISTS (
            SELECT FROM above AS a JOIN pg_class AS c
                ON c.oid = format('%I.%I', schema, a.name)::regclass
            WHERE c.relkind = 'p');

        SELECT string_agg(format('%L, NEW.%I', name, name), ', ' ORDER BY position),
               string_agg(format('%L, ($1).%I', name, name), ', ' ORDER BY position)
        INTO fields, fields_read
        FROM unnest(ARRAY[t.id_column, t.parent_column, 'current_step', 'status', t.tenant_column])
            WITH ORDINALITY AS c (name, position)
        WHERE name IS NOT NULL;

        as_installed := CASE WHEN looks IS NULL THEN '' ELSE $read$
        IF TG_OP <> 'DELETE' THEN$read$ END || format($read$
            id := NEW.%1$I;
            step := NEW.current_step::text;
            state := NEW.status::text;$read$, t.id_column)
            || CASE WHEN t.tenant_column IS NULL THEN '' ELSE format($read$
            tenant := left(NEW.%I::text, 500);$read$, t.tenant_column) END
            || CASE WHEN t.parent_column IS NULL THEN '' ELSE format($read$
            parent := NEW.%I;$read$, t.parent_column) END
            || CASE WHEN t.priority_column IS NULL THEN '' ELSE format($read$
            urgency := least(greatest(coalesce(NEW.%I, 0), -2147483648), 2147483647);$read$, t.priority_column) END
            || CASE WHEN t.run_after_column IS NULL THEN '' ELSE format($read$
            start := CASE WHEN NEW.%1$I IS NOT NULL THEN least(NEW.%1$I, '9999-12-31') END;$read$, t.run_after_column) END
            || CASE WHEN looks IS NULL THEN '' ELSE $read$
        END IF;$read$ END
            || CASE WHEN coalesce(t.parent_column, moves) IS NULL THEN '' ELSE format($read$
        IF TG_OP <> 'INSERT' THEN
            old_step := OLD.current_step::text;
            old_state := OLD.status::text;%s
        END IF;$read$, E'\n            old_parent := OLD.' || quote_ident(t.parent_column) || ';'
                || CASE WHEN moving = '' THEN ''
                        ELSE E'\n            old_id := OLD.' || quote_ident(t.id_column) || ';' END) END;
        -- By way of text, as a cast between numbers would round.
        as_found := format($read$
            IF TG_OP <> 'DELETE' THEN
                EXECUTE %1$L INTO id, step, state, tenant, parent, payload, urgency, start USING NEW;
            END IF;$read$, format('SELECT ($1).%1$I::text::%2$s, ($1).current_step::text,'
                ' ($1).status::text, %3$s, %4$s, json_build_object(%5$s)::text, %6$s, %7$s',
                t.id_column, id_type,
                coalesce('left(($1).' || quote_ident(t.tenant_column) || '::text, 500)', 'NULL'),
                coalesce('($1).' || quote_ident(t.parent_column) || '::text::' || id_type, 'NULL'),
                fields_read,
                coalesce('least(greatest(coalesce(($1).' || quote_ident(t.priority_column)
                         || ', 0), -2147483648), 2147483647)', '0'),
                CASE WHEN t.run_after_column IS NULL THEN 'NULL'
                     ELSE format('CASE WHEN ($1).%1$I IS NOT NULL THEN least(($1).%1$I,'
                                 ' ''9999-12-31''::timestamptz) END', t.run_after_column) END))
            || CASE WHEN coalesce(t.parent_column, moves) IS NULL THEN '' ELSE format($read$
            IF TG_OP <> 'INSERT' THEN
                EXECUTE %1$L INTO old_step, old_state, old_parent, old_id USING OLD;
            END IF;$read$, format('SELECT ($1).current_step::text, ($1).status::text, %1$s,'
                                  ' ($1).%2$I::text::%3$s',
                coalesce('($1).' || quote_ident(t.parent_column) || '::text::' || id_type,
                         'NULL'), t.id_column, id_type)) END;

        -- A new row that owes nothing is not announced, unless it comes from another partition and
        -- has left an asynchronous stage.
        tells := CASE WHEN announced <> 'nothing' THEN format($notify$
    IF %s THEN
        RETURN NEW;
    END IF;%s$notify$,
            CASE WHEN announced = 'all' AND t.channel IS NOT NULL
                 THEN $unless$TG_OP = 'DELETE'
       OR TG_OP = 'INSERT' AND owed IS NOT TRUE AND moved IS NOT TRUE$unless$
                 ELSE 'owed IS NOT TRUE AND moved IS NOT TRUE' END,
            CASE WHEN t.channel IS NULL THEN $notify$
    notified := pg_notify('job_state_listener_wake', '');
$notify$ ELSE format($notify$
    IF payload IS NULL THEN  -- else NEW is not as it was at install, and its types would be kept
        payload := json_build_object(%1$s)::text;
    END IF;
    IF octet_length(payload) > 7999 THEN
        -- NOTIFY would abort the application's transaction: null for what is long. Four
        -- values of 1,900 bytes and their names make 7,999, five of 1,500 less.
        SELECT json_object_agg(field.key, CASE
                   WHEN octet_length(field.value::text) <= %2$s THEN field.value END)::text
        INTO payload
        FROM json_each(payload::json) AS field;
    END IF;
    -- An assignment needs no executor, which PERFORM would start for every row.
    notified := pg_notify(%3$L, payload);
$notify$, fields, CASE WHEN t.name = 'jobs' THEN 1900 ELSE 1500 END, t.channel) END) END;

        EXECUTE format('CREATE OR REPLACE FUNCTION %I() RETURNS trigger'
            ' LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp'
            ' SET enable_seqscan = off AS %L',
            CASE t.name WHEN 'jobs' THEN 'notify_job_state_change'
                 ELSE 'job_state_listener_' || t.name END,
            format($body$
DECLARE
    is_missing boolean;  -- a table that the function writes to, or its owner's right to do so
    id         %10$s;
    tenant     text;
    step       text;
    state      text;
    parent     %10$s;
    old_step   text;
    old_state  text;
    old_parent %10$s;
    old_id     %10$s;
    route    text;
    owed     boolean;
    looked   boolean;
    moved_row  text;
    moved_from text;
    moved    boolean;
    urgency  integer;
    start    timestamptz;
    payload  text;
    notified text;
BEGIN
    <<reading>>
    BEGIN
        -- Without the right to use the schema, to_regclass() is an error, as all that follows.
        IF has_schema_privilege(to_regnamespace(%21$L), 'USAGE') IS NOT TRUE%22$s THEN
            is_missing := true;
            RAISE WARNING 'Job State Listener: its tables are missing, or not for role %% to use, so no call is recorded',
                current_user USING HINT = 'Run: ./jsl verify, which says what to do';
        ELSIF (TG_RELID = %11$s%9$s)
              AND %12$I.stage_column_types('%11$s'::regclass, %13$L) = %14$L THEN%15$s
            EXIT reading;
        END IF;
        BEGIN%16$s
        EXCEPTION WHEN OTHERS THEN
            RAISE WARNING 'Job State Listener: columns of %% have changed, so no call is recorded: %%',
                TG_RELID::regclass, SQLERRM USING HINT = 'Run: ./jsl install';
            RETURN NEW;
        END;
    END;

    IF is_missing IS NULL THEN%3$s%5$s
        route := %2$L::jsonb -> step ->> state;%20$s
        IF route IS NULL THEN
            DELETE FROM %1$s AS c
            WHERE c.job_id = id AND c.table_name = %6$L AND c.join_of = ''
              AND (c.current_step IS DISTINCT FROM step OR c.status IS DISTINCT FROM state);
%8$s        ELSIF id IS NOT NULL THEN
            -- Nearly always there is no open call, and without the clauses for one the
            -- trigger costs a twentieth less.
            INSERT INTO %1$s (job_id, table_name, tenant_id, current_step, status, stage%17$s)
            VALUES (id, %6$L, tenant, step, state, route%18$s)
            ON CONFLICT (job_id, table_name, join_of) DO NOTHING;
            IF NOT FOUND THEN
                -- An open call is replaced, but not one of the same state that is under
                -- way: a row that moves between partitions arrives again without having left.
                INSERT INTO %1$s AS c (job_id, table_name, tenant_id, current_step, status,
                                       stage%17$s)
                VALUES (id, %6$L, tenant, step, state, route%18$s)
                ON CONFLICT (job_id, table_name, join_of) DO UPDATE
                SET call_id = DEFAULT, tenant_id = excluded.tenant_id,
                    current_step = excluded.current_step, status = excluded.status,
                    stage = excluded.stage, created_at = excluded.created_at,
                    due_at = excluded.due_at, attempts = 0, free_attempts = 0,
                    worker = NULL, started_at = NULL, last_error = NULL%19$s
                WHERE c.worker IS NULL
                   OR c.current_step <> excluded.current_step
                   OR c.status <> excluded.status;
            END IF;
            owed := FOUND;
        END IF;
    END IF;

%7$s    RETURN NEW;
END
$body$, format('%I.stage_calls', schema), routes,
            coalesce(looks, ''), t.id_column, coalesce(moves, ''), t.name,
            coalesce(tells, ''),
            CASE WHEN too_long = 'false' THEN '' ELSE format($long$        ELSIF %s THEN
            RAISE WARNING 'Job State Listener: an id of more than 2,600 bytes, no call is recorded';
$long$, format(too_long, 'id')) END,
            -- Its partitions have the trigger, too.
            CASE WHEN (SELECT relkind FROM pg_class WHERE oid = place) = 'p'
                 THEN format(' OR pg_partition_root(TG_RELID) = %s', place::oid) END, id_type, place::oid, schema, columns,
            stage_column_types(place, columns), as_installed, as_found,
            CASE WHEN is_ordered THEN ', priority, run_after, due_at' ELSE '' END,
            CASE WHEN is_ordered THEN ', urgency, start, greatest(clock_timestamp(), start)'
                 ELSE '' END,
            CASE WHEN is_ordered THEN ', priority = excluded.priority, run_after = excluded.run_after'
                 ELSE ', priority = 0, run_after = NULL' END, coalesce(borrowed, ''),
            quote_ident(schema),
            (SELECT string_agg(format($lacking$
           OR has_table_privilege(to_regclass(%1$L), 'INSERT') IS NOT TRUE
           OR row_security_active(to_regclass(%1$L))$lacking$,
                                      format('%I.%I', schema, name)), '')
             FROM unnest(ARRAY['stage_calls', CASE WHEN looks IS NOT NULL THEN 'stage_looks' END,
                               CASE WHEN moves IS NOT NULL THEN 'stage_moves' END]) AS name
             WHERE name IS NOT NULL)));
    END LOOP;
END
$do$;

-- stage_join_is_complete(): whether a parent has rows, and all of them are in the state. STABLE, so
-- that it sees what the statement that asks sees.
-- stage_call_row(): where the row that owes a call is now; of a join that is the parent, and
-- whether the join is complete, and whether the parent has moved since it was first claimed.
-- Both name the tables of the application, which a constant statement cannot.
-- A statement that waited while ALTER TABLE rewrote a table sees none of its rows, as its snapshot
-- is older. Nobody may take that for a deletion: it is refused, and the listener asks again. What
-- pg_class says is of the snapshot, what pg_relation_filenode() says is of now. This has an IF
-- of its own, as PL/pgSQL would run the query of a longer condition for rows that are there, too.
DO $do$
DECLARE
    asked    constant jsonb := current_setting('job_state_listener.pipeline')::jsonb;
    schema   constant text := current_schema();
    id_type  constant text := (SELECT format_type(atttypid, -1) FROM pg_attribute
                               WHERE attrelid = 'stage_calls'::regclass AND attname = 'job_id');
    branches text;
    -- An id of a text type is compared by the collation of its column. The arguments have that of
    -- the call, which is "C" by the names of tables, and then no index on the column serves.
    collated constant jsonb := (
        SELECT jsonb_object_agg(concat_ws(' ', p.relname, a.attname),
                                format(' COLLATE %I.%I', n.nspname, c.collname))
        FROM pg_class AS p JOIN pg_attribute AS a ON a.attrelid = p.oid
        JOIN pg_collation AS c ON c.oid = a.attcollation
        JOIN pg_namespace AS n ON n.oid = c.collnamespace
        WHERE p.relnamespace = quote_ident(current_schema())::regnamespace
          AND (p.relname = 'stage_joins' OR p.relname IN (
               SELECT name FROM jsonb_to_recordset(asked -> 'tables') AS x (name text))));
    is_stale constant text := $stale$EXISTS (
            SELECT FROM pg_class AS c
            WHERE (c.oid = %1$L::regclass
                   OR c.oid IN (SELECT relid FROM pg_partition_tree(%1$L::regclass)))
              AND c.relfilenode <> pg_relation_filenode(c.oid)) THEN
            RAISE serialization_failure USING MESSAGE = 'a table was rewritten meanwhile: ' || %1$L;
        END IF;$stale$;
BEGIN
    SELECT string_agg(format($branch$
    IF a_join = %1$L THEN
        SELECT bool_and((r.current_step::text = %2$L AND r.status::text = %3$L) IS TRUE)
        INTO is_complete FROM %4$I.%5$I AS r WHERE r.%6$I = a_parent%8$s;
        IF is_complete IS NULL THEN
            IF %7$s
        END IF;
        RETURN coalesce(is_complete, false);
    END IF;$branch$, r.join_of, r.current_step, r.status, schema, t.name, t.parent_column,
        format(is_stale, format('%I.%I', schema, t.name)),
        collated ->> concat_ws(' ', t.name, t.parent_column)), '')
    INTO branches
    FROM jsonb_to_recordset(asked -> 'routes') AS r (
             child_table text, join_of text, current_step text, status text)
    JOIN jsonb_to_recordset(asked -> 'tables') AS t (name text, parent_column text)
        ON t.name = r.child_table;

    EXECUTE format('CREATE OR REPLACE FUNCTION stage_join_is_complete(a_join text, a_parent %s)'
        ' RETURNS boolean LANGUAGE plpgsql STABLE AS %L', id_type,
        format(E'\nDECLARE\n    is_complete boolean;\nBEGIN%s\n    RETURN false;\nEND\n', branches));

    SELECT string_agg(format($branch$
    IF a_table = %1$L THEN
        SELECT true, to_jsonb(%2$s), r.current_step::text, r.status::text, %3$s
        INTO is_there, tenant_id, current_step, status, parent_id
        FROM %4$I.%5$I AS r WHERE r.%6$I = an_id%9$s LIMIT 1;
        IF is_there IS NULL THEN
            IF %8$s
        END IF;%7$s
    END IF;$branch$, t.name,
        -- Not a join: one that is planned while both tables have one row reads all of both later.
        CASE WHEN t.tenant_column IS NOT NULL THEN format('r.%I', t.tenant_column)
             WHEN p.tenant_column IS NOT NULL
             THEN format('(SELECT p.%I FROM %I.%I AS p WHERE p.%I = r.%I%s LIMIT 1)',
                         p.tenant_column, schema, p.name, p.id_column, t.parent_column,
                         collated ->> concat_ws(' ', p.name, p.id_column))
             ELSE 'NULL::text' END,
        coalesce('r.' || quote_ident(t.parent_column), 'NULL'), schema, t.name, t.id_column,
        -- The parent has it from its own parent.
        CASE WHEN t.tenant_column IS NULL AND p.tenant_column IS NULL AND p.parent_table IS NOT NULL
             THEN format('
        tenant_id := (%I.stage_call_row(%L, %L, parent_id)).tenant_id;', schema, p.name, '') END,
        format(is_stale, format('%I.%I', schema, t.name)),
        collated ->> concat_ws(' ', t.name, t.id_column)), '')
    INTO branches
    FROM jsonb_to_recordset(asked -> 'tables') AS t (
             name text, id_column text, tenant_column text, parent_table text, parent_column text)
    LEFT JOIN jsonb_to_recordset(asked -> 'tables') AS p (
             name text, id_column text, tenant_column text, parent_table text)
        ON p.name = t.parent_table;

    EXECUTE format('CREATE OR REPLACE FUNCTION stage_call_row('
        'a_table text, a_join text, an_id %1$s, OUT is_there boolean, OUT tenant_id jsonb,'
        ' OUT current_step text, OUT status text, OUT parent_id %1$s, OUT is_complete boolean,'
        ' OUT has_moved boolean) LANGUAGE plpgsql STABLE AS %2$L', id_type, format($body$
BEGIN%1$s
    IF a_join <> '' THEN
        is_complete := %2$I.stage_join_is_complete(a_join, an_id);
        SELECT m.is_noted AND (m.parent_step, m.parent_status)
                              IS DISTINCT FROM (stage_call_row.current_step, stage_call_row.status)
        INTO has_moved
        FROM %2$I.stage_joins AS m WHERE m.parent_id = an_id%3$s AND m.join_of = a_join;
    END IF;
END
$body$, branches, schema, collated ->> 'stage_joins parent_id'));
END
$do$;

-- A function that is replaced keeps its owner, and would run with the rights of whoever made
-- the first version: it belongs to the owner of the tables. Nobody else may hang a function with
-- our rights on a table of their own.
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

-- Triggers are made only where they are missing or different, and removed from tables that are no
-- longer in the pipeline: each locks its table. That may be the table that was jobs before: one
-- that was renamed and is now a partition, or stands aside.
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
           -- It follows a column that is renamed. PostgreSQL adds brackets and casts to it.
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
