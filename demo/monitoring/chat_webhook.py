"""An example of ALERT_COMMAND: posts the alert to a chat webhook that takes {"text": …}, as those
of Slack, Mattermost, Rocket.Chat and Google Chat do. It needs Python and nothing else:

    export CHAT_WEBHOOK_URL=https://chat.example.com/hooks/…
    ALERT_COMMAND="python3 demo/monitoring/chat_webhook.py" ./jsl

The listener gives one JSON object on standard input: event, text, and what the event is about.
"""

import http.client
import json
import os
import re
import sys
import urllib.error
import urllib.request

TIME_LIMIT = 5.0  # seconds; the listener ends a command after ten
LONGEST = 2000
# In Mattermost and Rocket.Chat this mentions everybody, or the whole message is refused.
EVERYBODY = re.compile(r"@(?=(?:all|channel|everyone|here)\b)", re.IGNORECASE)


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: a redirected POST becomes a GET, whose success says nothing."""

    def redirect_request(self, *_):
        return None


def message(alert: dict) -> str:
    """The text for the chat, with markup escaped: an error could otherwise mention everybody."""
    text = EVERYBODY.sub("@\u200b", f"{alert['event']}: {alert['text']}"[:LONGEST])
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def post(url: str, text: str) -> str | None:
    """Post `text`.

    Returns:
        What went wrong, without the URL, which is a secret; None where nothing did.
    """
    body = json.dumps({"text": text}).encode()
    try:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        urllib.request.build_opener(NoRedirect).open(request, timeout=TIME_LIMIT).close()
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return type(getattr(error, "reason", error)).__name__
    return None


def main() -> None:
    url = os.environ.get("CHAT_WEBHOOK_URL", "")
    if not url.startswith(("http://", "https://")):
        sys.exit("CHAT_WEBHOOK_URL is not set to a URL such as https://chat.example.com/hooks/…")
    if problem := post(url, message(json.load(sys.stdin))):
        sys.exit(f"the chat did not take the alert: {problem}")


if __name__ == "__main__":
    main()
