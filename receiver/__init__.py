"""For stage APIs: takes the row of each request of the listener once, works, and answers.

Copy this folder into the stage API's code, or import it from here. It needs a driver of the
DB-API (psycopg2 or psycopg 3) and the table of schema.sql. docs/RECEIVER.md shows it in Flask and
FastAPI.

A request is remembered under its Idempotency-Key in the transaction that takes its row, and its
answer in the transaction that sets the row done or failed. That second transaction also has what
the work writes, and begins with the fence: only the present owner of the request may finish it. So
whatever is repeated, killed or cut off, the effects of a request are there once or not at all.
"""

from .answers import Answer, Failed
from .receiver import Job, Receiver
from .rows import Stage
from .signature import SecretError

__all__ = ["Answer", "Failed", "Job", "Receiver", "SecretError", "Stage"]
