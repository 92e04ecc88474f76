"""Joins: a call once every row of a parent is there."""

from contextlib import closing

import pytest
from claims import claim_many, connected, result, settle
from variants import PIPELINE, TABLE, Variants

import db
import joins
from ops.install import apply


@pytest.fixture
def variants(database, use_pipeline) -> Variants:
    use_pipeline(PIPELINE)
    database.rows(TABLE)
    with closing(db.connect(database.settings())) as conn:
        apply(conn)
    return Variants(database)


def test_join_is_owed_once_the_last_row_has_come(variants):
    database = variants.database
    job = database.add_job("img_gen", "queued")
    first, second = variants.add(job, count=2)
    with connected(database) as conn:
        variants.move(first, "iou_eval", "done")
        joins.look(conn)
        assert variants.owed() == []
        variants.move(second, "iou_eval", "done")
        joins.look(conn)
        assert variants.owed() == [("jobs", job, "ad_copy")]
        [row] = claim_many(conn, 1, stages=["ad_copy"]).claimed
        assert (row.key, row.tenant_id, row.owed) == (job, "tenant", True)
        settle(conn, result(row))
        assert not joins.look(conn)
        assert variants.owed() == []
