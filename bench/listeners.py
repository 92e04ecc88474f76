"""Other sessions that LISTEN in the same database: python -m bench.listeners DSN COUNT CHANNEL.

They read notifications and drop them. Prints a line when all listen; ends when standard input does.
"""

import select
import sys

import psycopg2


def main(dsn: str, count: str, channel: str) -> None:
    conns = []
    for _ in range(int(count)):
        conn = psycopg2.connect(dsn, application_name="bench")
        conn.autocommit = True
        conn.cursor().execute(f"LISTEN {channel}")
        conns.append(conn)
    print("listening", flush=True)
    while True:
        ready, _, _ = select.select([sys.stdin, *conns], [], [])
        if sys.stdin in ready:
            return
        for conn in ready:
            conn.poll()
            conn.notifies.clear()


if __name__ == "__main__":
    main(*sys.argv[1:])
