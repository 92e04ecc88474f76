"""Whether the application's tables are as PIPELINE declares them; `install` refuses others."""

from collections.abc import Iterator
from typing import NamedTuple

import psycopg2

import db
import pipeline
from ops.problem import Problem
from ops.routes import triggers
from pipeline import State, Table

# All integer types count as one, as our copies are bigint.
COLUMNS = """
SELECT a.attname AS name, quote_ident(a.attname) AS in_sql,
       CASE WHEN a.atttypid IN ('int2'::regtype, 'int4'::regtype) THEN 'bigint'
            ELSE format_type(a.atttypid, -1) END AS type,
       a.attgenerated = 'v' AS is_virtual, t.typtype = 'd' AS is_domain,
       EXISTS (SELECT FROM pg_index AS i
               WHERE i.indrelid = a.attrelid AND i.indisvalid AND i.indpred IS NULL
                 AND i.indkey[0] = a.attnum) AS is_indexed,
       -- A partitioned table can have no such index, unless it is partitioned by its id.
       c.relkind = 'p' AND EXISTS (
               SELECT FROM pg_index AS i
               WHERE i.indrelid = a.attrelid AND i.indisvalid AND i.indkey[0] = a.attnum)
           OR EXISTS (SELECT FROM pg_index AS i
                      WHERE i.indrelid = a.attrelid AND i.indisvalid AND i.indisunique
                        AND i.indpred IS NULL AND i.indnkeyatts = 1 AND i.indkey[0] = a.attnum)
           AS is_unique,
       EXISTS (SELECT FROM pg_opclass AS o JOIN pg_am AS m ON m.oid = o.opcmethod
               WHERE m.amname = 'btree' AND o.opcdefault
                 AND (o.opcintype = base.type OR t.typtype IN ('e', 'r') OR EXISTS (
                      SELECT FROM pg_cast AS c WHERE c.castsource = base.type
                        AND c.casttarget = o.opcintype AND c.castmethod = 'b'
                        AND c.castcontext = 'i')))
           -- What the driver or JSON does not hand back as it was.
           AND t.typcategory NOT IN ('A', 'C')
           AND base.type NOT IN ('jsonb'::regtype, 'bytea'::regtype) AS can_be_id
FROM pg_attribute AS a JOIN pg_type AS t ON t.oid = a.atttypid
JOIN pg_class AS c ON c.oid = a.attrelid
CROSS JOIN LATERAL (SELECT coalesce(nullif(t.typbasetype, 0), t.oid) AS type) AS base
WHERE a.attrelid = %(table)s::regclass AND a.attnum > 0 AND NOT a.attisdropped
"""

# Tables in the schema of jobs: our functions qualify all names with that schema.
PLACE = """
SELECT format('%%I.%%I', n.nspname, c.relname) AS name, quote_ident(c.relname) AS in_sql,
       c.relowner::regrole::text AS owner,
       (SELECT rolsuper FROM pg_roles WHERE oid = c.relowner)
       OR (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)
       OR pg_get_userbyid(c.relowner) = current_user AS may_install,
       quote_ident(n.nspname) AS schema,
       has_schema_privilege(c.relowner, n.oid, 'CREATE') AS may_create,
       (SELECT string_agg(inhrelid::regclass::text, ', ' ORDER BY inhrelid) FROM pg_inherits
        WHERE inhparent = c.oid AND c.relkind = 'r') AS heirs
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.oid = (SELECT relnamespace FROM pg_class WHERE oid = to_regclass('jobs'))
  AND c.relname = %(name)s AND c.relkind IN ('r', 'p')
"""

# Our functions run with the rights of the owner of our tables, and install writes with them.
SHUT_OUT = """
SELECT DISTINCT c.relowner::regrole::text AS owner, quote_ident(n.nspname) AS schema
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.oid IN (to_regclass('jobs'), to_regclass('pipeline_stages'))
  AND NOT has_schema_privilege(c.relowner, n.oid, 'USAGE')
"""


class Fault(NamedTuple):
    """Why a table cannot be used, and what to do about it."""

    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.what}: {self.mend}"


def require_usable(conn) -> None:
    """Raises Problem, which names all faults, where a table of PIPELINE cannot be used."""
    found = [*faults(conn), *faults_of_owner(conn)]
    if found:
        raise Problem(f"{'; '.join(map(str, found))}; nothing was changed")


def faults_of_owner(conn) -> Iterator[Fault]:
    """The owner of jobs can make our functions run code of theirs (by a cast), with the rights of
    the functions' owner. So both must have the same owner.
    """
    place = db.execute(conn, PLACE, {"name": pipeline.JOBS.name}).fetchone()
    if place and not place.may_install:
        grant = f"GRANT CREATE ON SCHEMA {place.schema} TO {place.owner}, and "
        yield Fault(
            f"jobs belongs to {place.owner}, whose code would run with the rights of "
            f"{conn.info.user}",
            f"{grant * (not place.may_create)}install as {place.owner}, or as a superuser",
        )
    shut_out = db.execute(conn, SHUT_OUT).fetchall()
    for row in shut_out:
        yield Fault(
            f"role {row.owner}, with whose rights our functions run, may not use schema "
            f"{row.schema}",
            f"GRANT USAGE ON SCHEMA {row.schema} TO {row.owner}",
        )
    lacking = [grant for row in triggers(conn) if row.ours for grant in row.grants or ()]
    if lacking and not shut_out:
        what = "the role with whose rights our functions run may not write to our tables"
        yield Fault(what, "; ".join(dict.fromkeys(lacking)))


def faults(conn) -> Iterator[Fault]:
    """The faults of all tables of PIPELINE."""
    joined = {key.table.name for key in pipeline.joins().values()}
    types, owners = {}, {}
    for table in pipeline.tables().values():
        place = db.execute(conn, PLACE, {"name": table.name}).fetchone()
        if place is None:
            if table.name != pipeline.JOBS.name:  # schema.sql makes jobs
                what = f"there is no table {table.name} beside jobs"
                yield Fault(what, "create it, or take it out of PIPELINE")
            continue
        if place.heirs:
            what = f"{place.heirs} INHERITS {table.name}, whose triggers do not see its rows"
            yield Fault(what, f"ALTER TABLE … NO INHERIT {place.in_sql}, or partition it instead")
        columns = {row.name: row for row in db.execute(conn, COLUMNS, {"table": place.name})}
        parent = table.parent_column
        needed = [table.id, table.tenant, "current_step", "status", parent, table.priority,
                  table.run_after, table.trace]  # fmt: skip
        if missing := [name for name in needed if name and name not in columns]:
            what = f"table {table.name} has no column {', '.join(missing)}"
            yield Fault(what, "add it (ALTER TABLE)" + OTHER * (table != pipeline.JOBS))
            continue
        yield from faults_of_columns(table, place.in_sql, columns, table.name in joined)
        yield from faults_of_states(conn, table, columns)
        id_column = columns[table.id]
        if id_column.is_domain and not takes_null(conn, id_column.type):
            what = f"{table.name}.{table.id} is of type {id_column.type}, which refuses NULL"
            yield Fault(what, "give it the type that this domain is made of (ALTER TABLE)")
        types[table.name], owners[place.in_sql] = columns[table.id].type, place.owner
        if parent and columns[parent].type != columns[table.id].type:
            yield Fault(
                f"{table.name}.{parent} is of type {columns[parent].type}, "
                f"{table.name}.{table.id} of {columns[table.id].type}",
                "give all ids one type (ALTER TABLE)" + OTHER,
            )
    first = next(iter(types), "")
    for name, kind in types.items():
        if kind != types[first]:
            yield Fault(
                f"{name} has ids of type {kind}, {first} of {types[first]}",
                "give all ids one type (ALTER TABLE)" + OTHER,
            )
    first = next(iter(owners), "")
    for name, owner in owners.items():
        if owner != owners[first]:
            yield Fault(
                f"{name} belongs to {owner}, {first} to {owners[first]}, and our functions run "
                "with the rights of one owner",
                f"ALTER TABLE {name} OWNER TO {owners[first]}",
            )


ENUMS = """
SELECT t.name AS table_name, a.attname AS column_name, a.atttypid::regtype::text AS type,
       array_agg(e.enumlabel::text) AS labels
FROM unnest(%(tables)s::text[]) AS t (name)
JOIN pg_attribute AS a ON a.attrelid = to_regclass(quote_ident(t.name))
                      AND a.attname IN ('current_step', 'status') AND NOT a.attisdropped
JOIN pg_enum AS e ON e.enumtypid = a.atttypid
GROUP BY t.name, a.attname, a.atttypid
"""


def impossible_states(conn) -> Iterator[Fault]:
    """The states of PIPELINE that no row can come to, as the enum type of a column lacks a value.
    `install` takes them all the same: the value may be added later.
    """
    enums = {(row.table_name, row.column_name): row
             for row in db.execute(conn, ENUMS, {"tables": list(pipeline.tables())})}  # fmt: skip
    missing: dict[tuple[str, str], list[str]] = {}
    for key in pipeline.pipeline():
        state = key if isinstance(key, State) else pipeline.JOBS(*key)
        for column, value in (("current_step", state.step), ("status", state.status)):
            enum = enums.get((state.table.name, column))
            if enum and value not in enum.labels:
                given = enum.type, pipeline.in_sql(value)
                missing.setdefault(given, []).append(str(pipeline.route_of(key)))
    for (type_, value), states in missing.items():
        what = f"no row can come to {', '.join(states)}, as type {type_} has no {value}"
        yield Fault(what, f"ALTER TYPE {type_} ADD VALUE {value}, or correct PIPELINE")


def takes_null(conn, type_: str) -> bool:
    """Whether a variable of this type can be without a value, as those of our functions are."""
    try:
        db.execute(conn, f"SELECT NULL::{type_}")
    except (psycopg2.errors.NotNullViolation, psycopg2.errors.CheckViolation):
        return False
    except psycopg2.errors.InsufficientPrivilege:  # on its schema: not known
        return True
    return True


def faults_of_states(conn, table: Table, columns: dict) -> Iterator[Fault]:
    """Columns of which the triggers could not see that their value has changed."""
    for column in ("current_step", "status"):
        type_ = columns[column].type
        if not is_comparable(conn, type_):
            what = f"{table.name}.{column} is of type {type_}"
            what += ", whose values PostgreSQL cannot compare"
            yield Fault(what, "give it another type, such as text or an enum (ALTER TABLE)")


def is_comparable(conn, type_: str) -> bool:
    """Whether two values of this type can be compared. Those of a domain over an enum cannot,
    though those of the enum can; nor can those of json.
    """
    try:
        # Nothing is evaluated: a domain may refuse NULL.
        db.execute(conn, f"SELECT FROM (SELECT NULL::{type_} WHERE false) AS a (x) WHERE x = x")
    except psycopg2.errors.UndefinedFunction:
        return False
    except psycopg2.errors.InsufficientPrivilege:  # on its schema: not known
        return True
    return True


OTHER = ", or name another column in Table(...)"


def faults_of_columns(table: Table, in_sql: str, columns: dict, is_joined: bool) -> Iterator[Fault]:
    name, id_column = table.name, columns[table.id]
    other = OTHER * (name != pipeline.JOBS.name)
    if not id_column.can_be_id:
        what = f"{name}.{table.id} is of type {id_column.type}, which cannot be an id"
        yield Fault(what, f"give it a type such as uuid, bigint or text (ALTER TABLE){other}")
    elif not id_column.is_unique:
        what = f"{name}.{table.id} is not unique by itself, so a call could go to another row"
        yield Fault(what, f"CREATE UNIQUE INDEX ON {in_sql} ({id_column.in_sql}){other}")
    seen = [table.id, "current_step", "status", table.tenant, table.parent_column, table.priority,
            table.run_after]  # fmt: skip
    for column in seen:
        if column and columns[column].is_virtual:
            what = f"{name}.{column} is a VIRTUAL generated column, which no trigger sees"
            yield Fault(what, f"make it a STORED or a plain one (ALTER TABLE){other}")
    for column, type_ in ((table.priority, "integer"), (table.run_after, "timestamptz")):
        wanted = {"integer": "bigint", "timestamptz": "timestamp with time zone"}[type_]
        if column and columns[column].type != wanted:
            what = f"{name}.{column} is of type {columns[column].type}, not {type_}"
            yield Fault(what, f"give it that type (ALTER TABLE){OTHER}")
    if is_joined and not columns[table.parent_column].is_indexed:
        column = columns[table.parent_column]
        what = (
            f"{name}.{column.name} has no index, so each look at a parent would read all of {name}"
        )
        yield Fault(what, f"CREATE INDEX ON {in_sql} ({column.in_sql})")


# --- what a table does not declare ---------------------------------------------------------

# A table that does not say so may have its own column for the tenant.
HAS_TENANT = """
SELECT c.relname AS name FROM pg_class AS c
JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attname = %(column)s AND NOT a.attisdropped
WHERE c.oid IN (SELECT to_regclass(format('%%I', name)) FROM unnest(%(tables)s::text[]) AS name)
"""


def tenant_columns(conn) -> dict[str, str | None]:
    """The column with the tenant by table; None where a row has its parent's, or none."""
    given = {"tables": list(pipeline.tables()), "column": pipeline.JOBS.tenant}
    has_own = {row.name for row in db.execute(conn, HAS_TENANT, given)}
    return {
        table.name: table.tenant or (pipeline.JOBS.tenant if table.name in has_own else None)
        for table in pipeline.tables().values()
    }
