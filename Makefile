# The targets for everyday work. Each one first makes sure that .venv is complete, which takes no time when it is.
PYTHON ?= python3
BIN := .venv/bin
TESTS ?=
VERSIONS ?=
KEEP ?=
SEED ?= 0
MUTANTS ?= 200
JOBS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full mutate compat lint format dist clean

help:
	@echo 'make setup      create or complete .venv (CPU, or GPU where there is one)'
	@echo 'make demo       serve a small model with the plugin and ask it about pictures'
	@echo 'make test       the tests; TESTS="tests/packaging -k docker" selects'
	@echo 'make test-full  the tests, those that take long included'
	@echo 'make mutate     are faults of engine/ and server/ noticed? hours; MUTANTS=200 SEED=0 JOBS=1'
	@echo 'make compat     a smoke in every supported vLLM release with a CPU build; VERSIONS="0.30 0.31" selects, KEEP=1'
	@echo '                keeps the environments'
	@echo 'make lint       ruff, mypy and who may import whom;  make format  lets ruff repair what it can'
	@echo 'make dist       wheel and sdist in dist/, proven in a fresh environment'

setup:
	@$(PYTHON) .ci/cpu_env.py

demo: setup
	$(BIN)/fsr-vllm demo

test: setup
	$(BIN)/python -m pytest -m "not full" $(TESTS)

test-full: setup
	$(BIN)/python -m pytest $(TESTS)

mutate: setup
	$(BIN)/python .ci/mutate.py --seed $(SEED) --mutants $(MUTANTS) --jobs $(JOBS)

compat:
	@$(PYTHON) .ci/compat.py $(if $(VERSIONS),--versions $(VERSIONS)) $(if $(KEEP),--keep)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# No isolation: the setuptools that vLLM pins is recent enough, so nothing is downloaded. `build` makes the wheel from
# the sdist, which proves both.
dist: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist . > /dev/null
	$(BIN)/python .ci/prove_wheel.py dist

clean:
	rm -rf dist build out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
