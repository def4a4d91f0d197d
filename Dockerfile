FROM python:3.12-slim AS build
WORKDIR /src
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/tuma
# What Tuma needs changes seldom, its code often: two layers.
COPY constraints.txt pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt \
    && /opt/tuma/bin/pip install --constraint constraints.txt --requirement requirements.txt
COPY README.md LICENSE NOTICE ./
COPY billing billing
COPY config config
COPY proxy proxy
COPY scripts scripts
RUN /opt/tuma/bin/pip install --no-deps .

FROM python:3.12-slim
RUN groupadd --gid 10001 tuma \
    && useradd --uid 10001 --gid tuma --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin tuma
COPY --from=build /opt/tuma /opt/tuma
ENV PATH=/opt/tuma/bin:$PATH PYTHONUNBUFFERED=1 TUMA_HOST=0.0.0.0 TUMA_PORT=8080
USER 10001:10001
WORKDIR /
EXPOSE 8080
STOPSIGNAL SIGTERM
# Without a proxy: HTTP_PROXY may be set for the way to the provider.
HEALTHCHECK --interval=10s --timeout=3s --start-period=15s CMD ["python", "-c", \
    "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:%s/healthz' % os.environ['TUMA_PORT'], timeout=2)"]
CMD ["tuma", "serve"]
