"""Whether the application's tables are as PIPELINE declares them; `install` refuses others."""

from collections.abc import Iterator

import db
import pipeline
from ops.problem import Problem
from pipeline import Table

# Integers count as one type: our copies are as wide as they go.
COLUMNS = """
SELECT a.attname AS name,
       CASE WHEN a.atttypid IN ('int2'::regtype, 'int4'::regtype) THEN 'bigint'
            ELSE format_type(a.atttypid, -1) END AS type,
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
                 AND (o.opcintype = a.atttypid OR t.typtype <> 'b' OR EXISTS (
                      SELECT FROM pg_cast AS c WHERE c.castsource = a.atttypid
                        AND c.casttarget = o.opcintype AND c.castmethod = 'b'))) AS is_comparable
FROM pg_attribute AS a JOIN pg_type AS t ON t.oid = a.atttypid
JOIN pg_class AS c ON c.oid = a.attrelid
WHERE a.attrelid = %(table)s::regclass AND a.attnum > 0 AND NOT a.attisdropped
"""

PLACE = """
SELECT format('%%I.%%I', n.nspname, c.relname) AS name, c.relowner::regrole::text AS owner
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.oid = (SELECT relnamespace FROM pg_class WHERE oid = to_regclass('jobs'))
  AND c.relname = %(name)s AND c.relkind IN ('r', 'p')
"""


def require_usable(conn) -> None:
    """Raises Problem, which names all faults, where a table of PIPELINE cannot be used."""
    if found := "; ".join(faults(conn)):
        raise Problem(f"{found}; nothing was changed")


def faults(conn) -> Iterator[str]:
    """What keeps the tables of PIPELINE from being used, and the way out, a line each."""
    tables = pipeline.tables()
    joined = {key.table.name for key in pipeline.joins().values()}
    types, owners = {}, {}
    for table in tables.values():
        place = db.execute(conn, PLACE, {"name": table.name}).fetchone()
        if place is None:
            if table.name != pipeline.JOBS.name:  # which schema.sql makes
                yield f"there is no table {table.name} beside jobs"
            continue
        columns = {
            row.name: row
            for row in db.execute(conn, COLUMNS, {"table": place.name, "tenant": table.tenant})
        }
        needed = [
            table.id,
            table.tenant,
            "current_step",
            "status",
            table.parent and table.parent[1],
        ]
        if missing := [name for name in needed if name and name not in columns]:
            yield f"table {table.name} has no column {', '.join(missing)}"
            continue
        yield from faults_of_columns(table, columns, table.name in joined)
        types[table.name], owners[table.name] = columns[table.id].type, place.owner
        if table.parent and columns[table.parent[1]].type != columns[table.id].type:
            yield (
                f"{table.name}.{table.parent[1]} is of type {columns[table.parent[1]].type}, "
                f"{table.name}.{table.id} of {columns[table.id].type}: all ids must be of one type"
            )
    first = next(iter(types), None)
    for name, kind in types.items():
        if kind != types[first]:
            yield f"{name} has ids of type {kind}, {first} of {types[first]}: one type is needed"
        if owners[name] != owners[first]:
            yield (
                f"{name} belongs to {owners[name]}, {first} to {owners[first]}: our functions "
                f"run with the rights of one owner; ALTER TABLE {name} OWNER TO {owners[first]}"
            )


def faults_of_columns(table: Table, columns: dict, is_joined: bool) -> Iterator[str]:
    name, id_column = table.name, columns[table.id]
    if not id_column.is_comparable:
        yield f"{name}.{table.id} is of type {id_column.type}, whose values cannot be compared"
    elif not id_column.is_unique:
        yield (
            f"{name}.{table.id} is not unique by itself, so a call could go to another row: "
            f"CREATE UNIQUE INDEX ON {name} ({table.id}), or name another column in Table(...)"
        )
    if is_joined and not columns[table.parent[1]].is_indexed:
        column = table.parent[1]
        yield (
            f"{name}.{column} has no index, so each look at a parent would read all of {name}: "
            f"CREATE INDEX ON {name} ({column})"
        )
