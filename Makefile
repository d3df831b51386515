# Everything a person does with a checkout. `make` alone says what there is.
#
# PYTHON=python3.13 chooses the interpreter; PORT and every other variable of the configuration are
# passed on to `make run`; ARGS="-k stop" to pytest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Nothing outside the checkout is written, so pip gets no cache in the home unless it is given one.
ifndef PIP_CACHE_DIR
export PIP_NO_CACHE_DIR := 1
endif

# pip asks rustc for its version, and rustup's stand-in for rustc then makes its directory in the home.
ifeq ($(RUSTUP_HOME)$(wildcard $(HOME)/.rustup),)
export RUSTUP_HOME := $(CURDIR)/$(VENV)/rustup
endif

.DEFAULT_GOAL := help

# A checkout that was moved or copied needs its .venv built anew: its scripts name where they were.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: install
install: $(STAMP) ## Build .venv with everything that running, testing and linting need

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Sluicegate needs Python 3.11 or newer, and '$(PYTHON)' is not: install one, or say make PYTHON=python3.12" >&2; \
	  exit 1; }
	@[ "$$(cat $@ 2>/dev/null)" = "$(CURDIR)" ] || $(PYTHON) -m venv --clear $(VENV) || { \
	  echo "'$(PYTHON) -m venv' failed: install the venv module (on Debian: apt-get install python3-venv)" >&2; \
	  rm -rf $(VENV); exit 1; }
	@echo "Installing into $(VENV)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev,otel]'
	@printf '%s\n' "$(CURDIR)" > $@

.PHONY: run
run: install ## Run everything; PORT=9000 for another port
	@$(BIN)/sluicegate up

.PHONY: test
# Three at a time, a file of tests each: half of the time they wait. ARGS="-n 0" runs one after another. In the order of
# `testpaths`: the long files first, or one process would be alone with the last of them.
test: install ## Run the unit, integration and functional tests; ARGS="-k stop" for some
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)

.PHONY: test-long
# The same tests as `make test` has, where that has seconds.
test-long: install ## Run the tests of outages, each half a minute long, and of a reader that is silent for one
	SLUICEGATE_TEST_OUTAGE_SECONDS=30 SLUICEGATE_TEST_SILENCE_SECONDS=30 SLUICEGATE_TEST_SILENT_READER_SECONDS=60 \
	  $(BIN)/python -m pytest tests/functional/test_without_database.py tests/functional/test_redis_returns.py \
	  tests/functional/test_isolation.py $(ARGS)

.PHONY: lint
lint: install ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: format
format: install ## Put the code into the one format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: vendor
vendor: ## Copy the pages' libraries from npm, after a version in webapp/pages/vendor/package.json was changed
	python3 webapp/pages/vendor/copy.py

.PHONY: model
model: install ## Check the model of the protocol; needs spin and a C compiler
	@command -v spin >/dev/null || { echo "spin is not installed: get it from your system's packages" >&2; exit 1; }
	$(BIN)/python docs/model/check.py

# Each of these has a target `bench-…`; one whose bound is missed hinders no other.
BENCHES := page stability reaper $(patsubst bench/%.py,%,$(wildcard bench/scale.py)) lost-worker speed work

.PHONY: bench
bench: ## Run all benches one after another, half an hour; `make chaos` and `make fuzz` are not among them
	@missed=; for bench in $(BENCHES); do \
	  echo "bench-$$bench"; \
	  $(MAKE) --no-print-directory bench-$$bench ARGS="--json bench/results/$$(echo $$bench | tr - _).json" \
	    || missed="$$missed bench-$$bench"; \
	done; [ -z "$$missed" ] || { echo "Bounds are missed, or something failed, in:$$missed" >&2; exit 1; }

.PHONY: bench-stability
bench-stability: install ## Measure what streams leave behind, and what each takes; ARGS="--short"
	$(BIN)/python -m bench.stability $(ARGS)

.PHONY: bench-reaper
bench-reaper: install ## Measure a pass of the reaper beside a million ended sessions
	$(BIN)/python -m bench.reaper $(ARGS)

.PHONY: bench-scale
bench-scale: install ## Measure each call beside 100,000 conversations and a million sessions, and beside few
	$(BIN)/python -m bench.scale $(ARGS)

.PHONY: bench-lost-worker
bench-lost-worker: install ## Measure how soon the streams of a killed worker go on, at the default lease
	$(BIN)/python -m bench.lost_worker $(ARGS)

.PHONY: bench-speed
bench-speed: install ## Measure what tokens, stops and streams cost beside others; ARGS="--short --only stops"
	$(BIN)/python -m bench.speed $(ARGS)

.PHONY: bench-page
bench-page: install ## Measure the chat page in a browser: stop to screen, token to paint, frames; ARGS="--short"
	$(BIN)/python -m bench.page $(ARGS)

.PHONY: screenshots
screenshots: bench-extra ## Take the pictures in docs/images anew
	$(BIN)/python -m docs.images.take

.PHONY: bench-extra
bench-extra: install
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'

.PHONY: bench-profile
bench-profile: bench-extra ## Measure where time goes in web and worker, by py-spy, as root; ARGS="--seconds 20"
	$(BIN)/python -m bench.speed_profile $(ARGS)

.PHONY: bench-plots
bench-plots: bench-extra ## Draw the plots of docs/performance.md from bench/results/speed.json; installs matplotlib
	$(BIN)/python -m bench.speed_plots bench/results/speed.json docs/images

.PHONY: bench-work
bench-work: install ## Count what tokens, starts and stops make the system do, against their limits; ARGS="--json PATH"
	$(BIN)/python -m bench.work $(ARGS)

.PHONY: chaos
chaos: install ## Break one thing after another under load, and audit every stream; ARGS="--seed 7 --minutes 10"
	$(BIN)/python -m bench.chaos $(ARGS)

.PHONY: fuzz
fuzz: fuzz-parser fuzz-log fuzz-protocol fuzz-http ## Tell each part whatever it may be told; SLUICEGATE_FUZZ_SEED=7 repeats a run

# Each fuzzer by itself: how many examples it tries, unless SLUICEGATE_FUZZ_EXAMPLES says otherwise. The seed is printed.
define fuzzed
SLUICEGATE_FUZZ_EXAMPLES=$${SLUICEGATE_FUZZ_EXAMPLES:-$(1)} SLUICEGATE_FUZZ_SEED=$${SLUICEGATE_FUZZ_SEED:-$$$$} \
  sh -c 'echo "SLUICEGATE_FUZZ_SEED=$$SLUICEGATE_FUZZ_SEED"; exec "$$@"' fuzz \
  $(BIN)/python -m pytest --hypothesis-show-statistics $(2)
endef

.PHONY: fuzz-parser
fuzz-parser: install ## Tell the upstream's parser anything: 10,000 answers in each of three ways
	$(call fuzzed,10000,tests/unit/test_ollama_fuzz.py)

.PHONY: fuzz-log
fuzz-log: install ## Call the token log's verbs in any order: 10,000 sequences beside a model of it
	$(call fuzzed,10000,tests/integration/test_token_log_fuzz.py)

.PHONY: fuzz-http
fuzz-http: install ## Ask REST and GraphQL for whatever their documents allow, 10,000 times each, and see what it leaves behind
	SLUICEGATE_FUZZ_CASES=$${SLUICEGATE_FUZZ_CASES:-10000} SLUICEGATE_FUZZ_SECONDS=$${SLUICEGATE_FUZZ_SECONDS:-300} \
	  $(call fuzzed,200,-s tests/functional/test_schema.py)

.PHONY: fuzz-protocol
fuzz-protocol: install ## Explore the stop protocol: 10,000 orders of its steps; SLUICEGATE_FUZZ_SECONDS=1800 ends sooner
	$(call fuzzed,10000,tests/integration/test_protocol_machine.py)

.PHONY: lock
lock: ## Write constraints.txt anew, with the newest version of everything
	rm -rf .lock
	$(PYTHON) -m venv .lock
	.lock/bin/python -m pip install --quiet '.[test,dev,otel,bench]'
	{ head -1 constraints.txt; .lock/bin/python -m pip freeze --exclude sluicegate; } > .lock/constraints.txt
	mv .lock/constraints.txt constraints.txt
	rm -rf .lock build

.PHONY: clean
clean: ## Remove .venv and caches; var/, where your data is, stays
	rm -rf $(VENV) .lock .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
