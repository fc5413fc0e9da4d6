# The sandbox service: tier `uid`, which needs no privilege beyond changing user ids. Build from the repository's root:
#
#   docker build -f docker/sandbox.Dockerfile -t retool-sandbox .
#
# BASE: any image with Python 3.11 or newer as `python3`, with `venv`. Where the build has no package index, put wheels
# into docker/wheels/ (pip wheel --wheel-dir docker/wheels '.[serve]' setuptools scipy pandas, then remove retool's own)
# and pass --build-arg PIP_ARGS=--no-index.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG PIP_ARGS=
# Empty: pip's own. Behind a mirror or a proxy: docs/stack.md.
ARG PIP_INDEX_URL=
ARG PIP_EXTRA_INDEX_URL=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_FIND_LINKS=/src/docker/wheels
RUN python3 -m venv /opt/retool
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY docker/ docker/
# An empty package first, so that a change of the source does not install the dependencies again.
RUN mkdir -p docker/wheels retool && touch retool/__init__.py \
 && /opt/retool/bin/python -m pip install -q $PIP_ARGS '.[serve]' numpy sympy scipy pandas \
 && rm -rf build *.egg-info
COPY retool/ retool/
COPY sandbox/ sandbox/
COPY data_gen/ data_gen/
RUN /opt/retool/bin/python -m pip install -q $PIP_ARGS --force-reinstall --no-deps . \
 && /opt/retool/bin/python -m pip uninstall -q -y pip \
 && find /opt/retool/lib -name tests -type d -prune -exec rm -rf {} + \
 && /opt/retool/bin/python -m compileall -q -j 0 /opt/retool/lib

FROM ${BASE}
COPY --from=build /opt/retool /opt/retool
ENV PATH=/opt/retool/bin:/usr/local/bin:/usr/bin:/bin PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# Root inside, without capabilities but those that give every run a user of its own (see sandbox.compose.yml).
WORKDIR /tmp
EXPOSE 8080
HEALTHCHECK --interval=15s --timeout=10s --start-period=30s --retries=3 \
  CMD ["python3", "-c", "import http.client as h, sys; c = h.HTTPConnection('127.0.0.1', 8080, timeout=9); c.request('GET', '/healthz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["retool", "sandbox"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8080", "--tier", "uid", "--token-file", "/run/secrets/sandbox_token"]
