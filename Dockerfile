# syntax=docker/dockerfile:1
FROM python:3.12-slim AS build
WORKDIR /src
RUN python -m venv /opt/tuma
COPY constraints.txt pyproject.toml README.md NOTICE ./
COPY billing billing
COPY config config
COPY proxy proxy
COPY scripts scripts
RUN /opt/tuma/bin/pip install --no-cache-dir --constraint constraints.txt .

FROM python:3.12-slim
RUN useradd --system --uid 10001 --no-create-home tuma
COPY --from=build /opt/tuma /opt/tuma
ENV PATH=/opt/tuma/bin:$PATH PYTHONUNBUFFERED=1 TUMA_HOST=0.0.0.0 TUMA_PORT=8080
USER tuma
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=15s CMD ["python", "-c", \
    "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"TUMA_PORT\"]}/healthz', timeout=2)"]
CMD ["tuma", "serve"]
