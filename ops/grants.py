"""Keeps the objects of `install` without grants, whatever ALTER DEFAULT PRIVILEGES says."""

import db

OBJECTS = """
    SELECT c.oid, CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END AS kind,
           format('%I', c.relname) AS name, c.relowner AS owner,
           coalesce(c.relacl, acldefault(CASE c.relkind WHEN 'S' THEN 's' ELSE 'r' END::"char",
                                         c.relowner)) AS acl
    FROM pg_class AS c
    WHERE c.relnamespace = quote_ident(current_schema())::regnamespace
      AND c.relkind IN ('r', 'v', 'S') AND (c.relname = ANY (ours) OR EXISTS (
          SELECT FROM pg_depend AS d JOIN pg_class AS t ON t.oid = d.refobjid
          WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'i'
            AND t.relname = ANY (ours)))
    UNION ALL
    SELECT p.oid, 'FUNCTION', format('%I', p.proname), p.proowner,
           coalesce(p.proacl, acldefault('f', p.proowner))
    FROM pg_proc AS p
    WHERE p.pronamespace = quote_ident(current_schema())::regnamespace AND (p.proname = ANY (ours)
      OR p.prorettype = 'trigger'::regtype AND p.proname ^@ 'job_state_listener_')"""

# Runs first: remembers which objects exist and who has which grants. A view or function whose
# columns change their type is dropped and made again, so its grants have to be restored.
NOTE = f"""
DO $do$
DECLARE
    ours constant text[] := {{names}};
BEGIN
    PERFORM set_config('job_state_listener.granted', coalesce((
        SELECT jsonb_object_agg(o.oid, jsonb_build_object(
                   'kind', o.kind, 'name', o.name, 'grants', (
                       SELECT coalesce(jsonb_agg(jsonb_build_object(
                                  'privilege', a.privilege_type, 'option', a.is_grantable,
                                  'role', CASE a.grantee WHEN 0 THEN 'PUBLIC'
                                          ELSE a.grantee::regrole::text END)), '[]')
                       FROM aclexplode(o.acl) AS a WHERE a.grantee <> o.owner)))
        FROM ({OBJECTS}) AS o), '{{{{}}}}')::text, true);
END
$do$;
"""

# Runs last: revokes all grants on new objects but their owner's, and remembers the statement that
# lets roles read the new tables and sequences again that could read them by default. The functions
# that everybody may execute run with the rights of the caller.
SETTLE = f"""
DO $do$
DECLARE
    ours constant text[] := {{names}};
    was  constant jsonb := current_setting('job_state_listener.granted')::jsonb;
    made record;
    one  record;
BEGIN
    PERFORM set_config('job_state_listener.unread', coalesce((
        WITH new AS (
            SELECT o.* FROM ({OBJECTS}) AS o JOIN pg_class AS c ON c.oid = o.oid
            WHERE o.kind <> 'FUNCTION' AND c.relkind <> 'v' AND NOT was ? o.oid::text
        )
        SELECT format('GRANT SELECT ON %s TO %s',
                      (SELECT string_agg(name, ', ' ORDER BY name) FROM new),
                      string_agg(DISTINCT a.grantee::regrole::text, ', '))
        FROM new, aclexplode(new.acl) AS a
        WHERE a.privilege_type = 'SELECT' AND a.grantee NOT IN (0, new.owner)
        HAVING count(*) > 0), ''), true);
    FOR made IN
        SELECT o.*, CASE o.kind WHEN 'FUNCTION' THEN o.oid::regprocedure::text
                        ELSE o.name END AS called
        FROM ({OBJECTS}) AS o WHERE NOT was ? o.oid::text
    LOOP
        FOR one IN
            SELECT DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC'
                            ELSE a.grantee::regrole::text END AS role
            FROM aclexplode(made.acl) AS a WHERE a.grantee <> made.owner
        LOOP
            EXECUTE format('REVOKE ALL ON %s %s FROM %s', made.kind, made.called, one.role);
        END LOOP;
        IF made.name IN ('stage_call_row', 'stage_join_is_complete', 'stage_column_types') THEN
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO PUBLIC', made.called);
        END IF;
        FOR one IN  -- of its predecessor
            SELECT g.* FROM jsonb_each(was) AS w, jsonb_to_recordset(w.value -> 'grants')
                AS g (privilege text, option boolean, role text)
            WHERE w.value ->> 'name' = made.name AND w.value ->> 'kind' = made.kind
              AND (g.role = 'PUBLIC' OR to_regrole(g.role) IS NOT NULL)
        LOOP
            EXECUTE format('GRANT %s ON %s %s TO %s%s', one.privilege, made.kind, made.called,
                           one.role, CASE WHEN one.option THEN ' WITH GRANT OPTION' ELSE '' END);
        END LOOP;
    END LOOP;
    -- An earlier version let its owner alone execute it.
    FOR made IN
        SELECT o.oid::regprocedure AS called FROM ({OBJECTS}) AS o
        WHERE o.name = 'stage_due_calls' AND NOT EXISTS (
            SELECT FROM aclexplode(o.acl) AS a WHERE a.grantee <> o.owner)
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO PUBLIC', made.called);
    END LOOP;
END
$do$;
"""

# What each role but the owner and ourselves may do with our tables and views, or with columns of
# them; and who may execute the functions that read the rows of all tenants. Members of two roles of
# PostgreSQL 14 and newer may read or write all tables.
OTHERS = """
WITH ours AS (
    SELECT c.oid, c.relname, c.relowner, c.relacl FROM pg_class AS c
    WHERE c.oid IN (SELECT to_regclass(name) FROM unnest(%(names)s::text[]) AS name)
), acls (name, owner, acl) AS (
    SELECT relname, relowner, relacl FROM ours
    UNION ALL
    SELECT o.relname, o.relowner, t.attacl
    FROM ours AS o JOIN pg_attribute AS t ON t.attrelid = o.oid
    UNION ALL
    SELECT proname, proowner, coalesce(proacl, acldefault('f', proowner)) FROM pg_proc
    WHERE oid IN (to_regprocedure('stalled_jobs()'), to_regprocedure('resting_rows()'))
), granted AS (
    SELECT acls.name, acls.owner, a.grantee, a.privilege_type
    FROM acls CROSS JOIN LATERAL aclexplode(acls.acl) AS a
    UNION ALL
    SELECT ours.relname, ours.relowner, r.oid, of_all.privilege
    FROM ours CROSS JOIN pg_roles AS r CROSS JOIN (
        VALUES ('pg_read_all_data', 'SELECT'), ('pg_write_all_data', 'INSERT'),
               ('pg_write_all_data', 'UPDATE'), ('pg_write_all_data', 'DELETE')
    ) AS of_all (role, privilege)
    WHERE pg_has_role(r.oid, to_regrole(of_all.role), 'MEMBER')
      AND NOT r.rolsuper AND r.rolname <> of_all.role
)
SELECT CASE a.grantee WHEN 0 THEN 'everybody' ELSE a.grantee::regrole::text END AS role,
       concat_ws(', ',
           CASE WHEN bool_or(a.privilege_type IN ('SELECT', 'EXECUTE')) THEN 'read' END,
           CASE WHEN bool_or(a.privilege_type = 'INSERT') THEN 'add' END,
           CASE WHEN bool_or(a.privilege_type = 'UPDATE' AND a.name = 'pipeline_stages')
                THEN 'pause' END,
           CASE WHEN bool_or(a.privilege_type = 'UPDATE' AND a.name <> 'pipeline_stages')
                THEN 'change' END,
           CASE WHEN bool_or(a.privilege_type IN ('DELETE', 'TRUNCATE')) THEN 'delete' END,
           CASE WHEN bool_or(a.privilege_type IN ('TRIGGER', 'REFERENCES')) THEN 'hang on to' END,
           CASE WHEN bool_or(a.privilege_type = 'MAINTAIN') THEN 'maintain' END
       ) AS may
FROM granted AS a
WHERE a.grantee <> a.owner AND pg_get_userbyid(a.grantee) <> current_user
GROUP BY a.grantee ORDER BY 1
"""


def others(conn, names: list[str]) -> list[str]:
    """What other roles may do with our tables and views, such as "dashboard may read"."""
    return [f"{row.role} may {row.may}" for row in db.execute(conn, OTHERS, {"names": names})]
