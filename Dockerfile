# Both stages share one base, so the virtual environment of the first runs unchanged in the second.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
# For the native CPU backend. Any version of Debian's compiler will do: the interface is plain C.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
# The sources are named one by one: what is not listed here (and in .dockerignore) can not reach the image.
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY adapters adapters
COPY kernels kernels
COPY server server
# The optional secret is a pip.conf for builders behind a private index: it is mounted, never stored in a layer.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    pip wheel . --no-deps --wheel-dir /wheels
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/motet \
    && /opt/motet/bin/pip install -c constraints.txt /wheels/*.whl

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="motet" \
      org.opencontainers.image.description="Many adapters, one resident base model: a multi-adapter inference server" \
      org.opencontainers.image.licenses="Apache-2.0"
# A numeric user lets Kubernetes check runAsNonRoot; the passwd entry is for libraries that ask who they are.
RUN groupadd --gid 10001 motet \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin motet \
    && install --directory --owner 10001 --group 10001 /cache
COPY --from=build /opt/motet /opt/motet
# Everything the server writes goes to /cache (models, lowered adapters, compiled kernels) or /tmp:
# the root file system can be read-only. PYTHONSAFEPATH keeps the working directory off sys.path.
ENV PATH=/opt/motet/bin:$PATH \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1
VOLUME /cache
USER 10001:10001
EXPOSE 8000
# Liveness, not readiness: a supervisor that restarts unhealthy containers must leave a loading or draining one alone.
# No proxy: HTTP_PROXY is often set for model downloads and must not catch a request to ourselves.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ.get('MOTET_PORT', '8000') + '/health', timeout=4)"]
ENTRYPOINT ["motet"]
CMD ["serve", "--host", "0.0.0.0"]
