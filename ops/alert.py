"""`alert-test`: sends one alert, to see that it arrives."""

import logging
import time

import click

import config
from alerts import TIME_LIMIT, Alerts
from ops.problem import Problem


@click.command("alert-test", short_help="Send one alert by ALERT_COMMAND and see it arrive.")
def alert_test() -> None:
    """Send one alert by ALERT_COMMAND; exit 0 only if the command took it."""
    settings = config.settings()
    if not settings.ALERT_COMMAND:
        raise Problem("ALERT_COMMAND is not set: nobody is told of anything (see .env.example)")
    logging.getLogger("listener").addHandler(logging.NullHandler())  # errors are printed below
    alerts = Alerts(settings)
    alerts.send("test", "a test alert of Job State Listener: nothing is wrong")
    if not alerts.running:
        raise Problem(
            f"ALERT_COMMAND cannot be started: {settings.ALERT_COMMAND[0]}: {alerts.start_error}"
        )
    [run] = alerts.running
    while run.process.poll() is None and time.monotonic() < run.until:
        time.sleep(0.05)
    code = run.process.poll()
    run.output.seek(0)
    said = run.output.read(300).decode(errors="replace").strip()
    run.end_if_over()
    if code is None:
        raise Problem(f"ALERT_COMMAND did not end within {TIME_LIMIT:.0f} s")
    if code:
        raise Problem(f"ALERT_COMMAND ended with exit code {code}: {said or 'it printed nothing'}")
    click.echo(f"sent: {settings.ALERT_COMMAND[0]} took it{': ' + said if said else ''}")
