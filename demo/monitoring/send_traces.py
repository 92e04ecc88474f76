"""Sends finished attempts to a collector of OpenTelemetry, each once; for cron:

    python demo/monitoring/send_traces.py http://localhost:4318/v1/traces FILE

FILE keeps the time up to which attempts were sent. It is written once the collector has taken all
of them: after a failure the next run sends them again, with the same ids. The first run sends the
attempts of the last hour.
"""

import http.client
import os
import subprocess
import sys
import urllib.error
import urllib.request
from datetime import datetime, timedelta, timezone
from pathlib import Path

LISTENER = Path(__file__).parents[2] / "listener.py"
TIME_LIMIT = 10.0  # seconds
# An attempt that has just finished may be committed late: the last seconds wait for the next run.
LAG = timedelta(minutes=1)


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: a redirected POST becomes a GET, whose success says nothing."""

    def redirect_request(self, *_):
        return None


def post(url: str, spans: bytes) -> None:
    """POST a request to the collector; ends the program with a line where that fails."""
    head = {"Content-Type": "application/json"}
    try:
        request = urllib.request.Request(url, spans, head)
        urllib.request.build_opener(NoRedirect).open(request, timeout=TIME_LIMIT).close()
    except urllib.error.HTTPError as error:
        sys.exit(f"{url} did not take the spans: HTTP {error.code}")
    except (OSError, ValueError, http.client.HTTPException) as error:
        sys.exit(f"{url} did not take the spans: {getattr(error, 'reason', error)}")


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: send_traces.py http://localhost:4318/v1/traces FILE")
    url, file = sys.argv[1], Path(sys.argv[2])
    until = (datetime.now(timezone.utc) - LAG).isoformat()
    since = file.read_text() if file.exists() else "1h"
    command = [sys.executable, str(LISTENER), "traces", "--since", since, "--until", until]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            post(url, line)
    if process.returncode:
        sys.exit(process.returncode)
    written = file.with_name(f"{file.name}.tmp")
    written.write_text(until)
    os.replace(written, file)


if __name__ == "__main__":
    main()
