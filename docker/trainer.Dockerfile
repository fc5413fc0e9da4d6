# The trainer: everything that `retool` does but model-written code, which runs in the sandbox's containers.
# Build from the repository's root:
#
#   docker build -f docker/trainer.Dockerfile -t retool-trainer .
#
# BASE: any image with Python 3.11 or newer as `python3`, with `venv`. CONSTRAINTS: the exact versions of the CPU
# installation; empty takes the newest that fit. For torch with CUDA: --build-arg CONSTRAINTS= --build-arg PIP_EXTRA_INDEX_URL=
# Where the build has no package index, put wheels into docker/wheels/ and pass --build-arg PIP_ARGS=--no-index.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG PIP_ARGS=
# Empty: pip's own. Behind a mirror or a proxy: docs/stack.md.
ARG PIP_INDEX_URL=
# torch's CPU build, which pip prefers where it finds it: without this index torch brings CUDA, gigabytes.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG CONSTRAINTS=requirements/cpu.txt
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_FIND_LINKS=/src/docker/wheels
RUN python3 -m venv /opt/retool
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY requirements/ requirements/
COPY docker/*.sh docker/wheel[s] docker/wheels/
# An empty package first, so that a change of the source does not install the dependencies again.
RUN mkdir -p retool && touch retool/__init__.py \
 && /opt/retool/bin/python -m pip install -q $PIP_ARGS ${CONSTRAINTS:+-c $CONSTRAINTS} '.[train]' \
 && rm -rf build *.egg-info
COPY retool/ retool/
COPY sandbox/ sandbox/
COPY data_gen/ data_gen/
COPY docker/*.sh docker/
RUN /opt/retool/bin/python -m pip install -q $PIP_ARGS --force-reinstall --no-deps . \
 && /opt/retool/bin/python -m pip uninstall -q -y pip \
 && cp docker/trainer-entrypoint.sh docker/viewer.sh /opt/retool/bin/

FROM ${BASE}
COPY --from=build /opt/retool /opt/retool
ENV PATH=/opt/retool/bin:/usr/local/bin:/usr/bin:/bin PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false \
    HOME=/srv/retool USER=retool HF_HOME=/srv/retool/models MPLCONFIGDIR=/tmp/matplotlib
RUN mkdir -p /srv/retool/runs /srv/retool/models /srv/retool/reports /srv/retool/engine && chown -R 1000:1000 /srv/retool
COPY recipes/ /srv/retool/recipes/
USER 1000:1000
WORKDIR /srv/retool
ENTRYPOINT ["sh", "/opt/retool/bin/trainer-entrypoint.sh"]
CMD ["--help"]
