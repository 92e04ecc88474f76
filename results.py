"""What came of calls, kept until the database has it."""

import dataclasses

import settling
from alerts import Alerts
from settling import Settlement


class Results:
    """The results of one worker that are not settled yet. Outlives its connection."""

    def __init__(self, alerts: Alerts):
        self.alerts = alerts
        self.unwritten: list[Settlement] = []  # in the order of their calls
        self.locked: list[Settlement] = []  # recorded, but the stage still holds the row

    def call_ids(self) -> list[int]:
        return [result.call_id for result in (*self.locked, *self.unwritten)]

    def write(self, conn, but: int = 0) -> None:
        """Settle what is unwritten, `but` so many."""
        while len(self.unwritten) > but:
            self.written(settled=settling.settle(conn, self.unwritten[0]))

    def written(self, settled: bool) -> None:
        """The first result is recorded; where the stage still holds the row, it is kept."""
        result = self.unwritten.pop(0) if self.unwritten else None
        if result and not settled:
            # Its hold, if any, has begun: settling it again must not lengthen it.
            self.locked.append(dataclasses.replace(result, hold=False))
        if result and result.outcome == "failed":
            text = f"job {result.job_id}: {result.stage} was given up: {result.error}"
            about = {"job": result.job_id, "stage": result.stage, "error": result.error}
            self.alerts.send("given_up", text, **about, http_status=result.http_status)

    def settle_locked(self, conn) -> None:
        """A stage may answer before it commits; once it has, its call can be settled."""
        self.locked = [result for result in self.locked if not settling.settle(conn, result)]
