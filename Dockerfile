FROM python:3.13.15-slim-trixie

# Log lines leave at once, and "docker stop" reaches Python itself: every command is in exec form.
ENV PYTHONUNBUFFERED=1

RUN useradd --system --no-log-init --uid 10001 --shell /usr/sbin/nologin listener

WORKDIR /app

COPY requirements.txt ./
RUN pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore \
    --requirement requirements.txt

# .dockerignore names the files. COPY keeps the modes that they have on the host, where a umask may
# keep them from others, and so from USER.
COPY . ./
# docker exec CONTAINER jsl status
RUN chmod -R a+rX . && ln -s /app/jsl /usr/local/bin/jsl

USER 10001

STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=10s CMD ["python", "listener.py", "check"]

# docker run --init IMAGE is the listener; docker run IMAGE install, verify, status … are its
# commands. --init reaps what stage functions leave behind.
ENTRYPOINT ["python", "listener.py"]
CMD ["run"]
