# `make demo` on a fresh machine does everything: environment, model, data, three stages, table.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test oracles check kill-test bench bench-peers bench-control bench-returns bench-page fmt clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## SFT, reward model and PPO on the film critic, into runs/demo
	@$(BIN)/ppolite demo

test: $(READY) ## the test suite (one file: make test ARGS=tests/ops)
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile $(ARGS)

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

bench: $(READY) ## time one RLHF step, ours alone; appends to benchmarks/results
	@$(BIN)/python -m benchmarks.rlhf_step --alone $(ARGS)

# The environment of the peers of each.
PEERS_rlhf_step := .venv-oracles
PEERS_time_to_score := .venv-oracles
PEERS_generate := .venv-vllm
PEERS_sft := .venv-trl
PEERS_reward := .venv-trl
bench-peers: $(READY) ## a benchmark beside its peers: ARGS=rlhf_step time_to_score generate logprobs sft reward
	@test -n "$(ARGS)" || { echo "make bench-peers ARGS=rlhf_step, for one (make help lists them)" >&2; exit 2; }
	@for peer in $(PEERS_$(firstword $(ARGS))); do $(MAKE) -s $$peer/.installed || exit; done
	@$(BIN)/python -m benchmarks.$(ARGS)

bench-control: $(READY) .venv-oracles/.installed ## steps per second on CartPole, beside stable-baselines3
	@$(BIN)/python -m benchmarks.control $(ARGS)

bench-returns: $(READY) .venv-oracles/.installed ## returns on a control task (ARGS='Hopper-v5 --peer'), of both
	@$(BIN)/python -m benchmarks.control_returns $(ARGS)

bench-page: $(READY) ## docs/benchmarks.md from benchmarks/results
	@$(BIN)/python -m benchmarks.page

fmt: $(READY) ## let ruff mend format and lint
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove the environment and caches; runs/ stays
	rm -rf .venv .venv-oracles .venv-trl .venv-vllm .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# torch goes first and alone: the others would bring the registry's newest, with gigabytes of CUDA.
.venv-oracles/.installed: tests/oracles/constraints.txt
	@test -x .venv-oracles/bin/python || $(PYTHON) -m venv .venv-oracles
	@echo "Installing torchrl, stable-baselines3, rlax and TRL into .venv-oracles (a few minutes the first time)"
	@.venv-oracles/bin/python -m pip install -qq --disable-pip-version-check -c $< torch
	@.venv-oracles/bin/python -m pip install -qq --disable-pip-version-check -r $<
	@touch $@

# Whole lists of pins: --no-deps keeps out what they leave out.
.venv-trl/.installed .venv-vllm/.installed: .venv-%/.installed: benchmarks/environments/%.txt
	@test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	@echo "Installing the versions of $< into .venv-$* (a few minutes the first time)"
	@.venv-$*/bin/python -m pip install -qq --disable-pip-version-check -c $< torch
	@.venv-$*/bin/python -m pip install -qq --disable-pip-version-check --no-deps -r $<
	@touch $@

# The stamp is newer than the pins, or the environment is brought up to date.
$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "ppolite needs Python 3.11 or newer; try: make PYTHON=python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || { echo "Creating .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; }
	@echo "Installing the versions of constraints.txt into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[control,demo,dev]'
	@touch $@
