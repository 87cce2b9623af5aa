# `make demo` on a fresh machine does everything: environment, model, data, three stages, table.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test oracles check kill-test bench bench-control bench-returns fmt clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## SFT, reward model and PPO on the film critic, into runs/demo
	@$(BIN)/ppolite demo

test: $(READY) ## the test suite (one file: make test ARGS=tests/ops)
	@$(BIN)/python -m pytest -q $(ARGS)

oracles: .venv-oracles/.installed ## ops against torchrl, stable-baselines3, rlax and TRL
	@.venv-oracles/bin/python -m pytest -q -c tests/oracles/pytest.ini tests/oracles $(ARGS)

check: $(READY) ## format, lint, types, layers, shipped recipes
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/basedpyright --pythonpath $(BIN)/python
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python -m pytest -q tests/test_recipes.py

kill-test: $(READY) ## kill runs at 60 random instants, go on with them, compare (ARGS=--film: the 135M model)
	@$(BIN)/python -m tests.faults.kill $(ARGS)

bench: $(READY) ## time one RLHF step; appends to benchmarks/results
	@$(BIN)/python -m benchmarks.rlhf_step $(ARGS)

bench-control: $(READY) .venv-oracles/.installed ## steps per second on CartPole, beside stable-baselines3
	@$(BIN)/python -m benchmarks.control $(ARGS)

bench-returns: $(READY) .venv-oracles/.installed ## returns on a control task (ARGS='Hopper-v5 --peer'), of both
	@$(BIN)/python -m benchmarks.control_returns $(ARGS)

fmt: $(READY) ## let ruff mend format and lint
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove the environment and caches; runs/ stays
	rm -rf .venv .venv-oracles .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# torch goes first and alone: the others would bring the registry's newest, with gigabytes of CUDA.
.venv-oracles/.installed: tests/oracles/constraints.txt
	@test -x .venv-oracles/bin/python || $(PYTHON) -m venv .venv-oracles
	@echo "Installing torchrl, stable-baselines3, rlax and TRL into .venv-oracles (a few minutes the first time)"
	@.venv-oracles/bin/python -m pip install -qq --disable-pip-version-check -c $< torch
	@.venv-oracles/bin/python -m pip install -qq --disable-pip-version-check -r $<
	@touch $@

# The stamp is newer than the pins, or the environment is brought up to date.
$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "ppolite needs Python 3.11 or newer; try: make PYTHON=python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || { echo "Creating .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; }
	@echo "Installing the versions of constraints.txt into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[control,demo,dev]'
	@touch $@
