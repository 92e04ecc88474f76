"""The peers' worker processes: python -m bench.workers.NAME. They import nothing of the harness, as
their memory is measured, and are told by the environment what to do.
"""

import os

DSN = os.environ.get("BENCH_DSN", "")
API = os.environ.get("BENCH_API", "")
IN_FLIGHT = int(os.environ.get("BENCH_IN_FLIGHT", "1"))
NUMBER = int(os.environ.get("BENCH_NUMBER", "0"))  # of this process
OF = int(os.environ.get("BENCH_OF", "1"))
TIMEOUT = 600  # seconds for a call, as the listener's default
