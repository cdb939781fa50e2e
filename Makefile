# Set-up is part of every target: `make demo` and `make test` work in a fresh clone with nothing else typed.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DOCS := .venv/docs
# A process a core, of one thread each: threads of their own would only wait for each other.
# A test that has two all the same lets them sleep, not spin, while they wait for a core.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# Where it is set, as in many images, each start of the program would compile again what it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-short test unit check lint docs bench gpu-pack soak kits toolchains constraints docs-constraints clean

demo: $(READY)
	$(BIN)/bingo-compress demo --overwrite

demo-short: $(READY)
	$(BIN)/bingo-compress demo --overwrite --out runs/demo-short --epochs 0.25 --photos 600

test: $(READY)
	$(PYTEST) --cov --cov-report=term:skip-covered --cov-fail-under=85

unit: $(READY)
	$(PYTEST) -m "not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

# Pages made of the source, the notebook from top to bottom, then the site in build/site; a link that leads nowhere ends it.
docs: $(DOCS)/.ready
	$(DOCS)/bin/python docs/generate.py
	$(DOCS)/bin/jupyter-execute docs/tutorial.ipynb
	$(DOCS)/bin/mkdocs build --quiet --strict

# The long part. Kills, stops, full disks, a lost worker; then stale state: an hour at most for each. The last results are in docs/reliability.md.
soak: $(READY)
	mkdir -p runs
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --json runs/soak.json
	for source in list tar; do OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --source $$source --traced-once --trials 30 --stops 10 \
		--two-trials 0 --two-stops 0 --disks 0 --workers 0 --decodes 0 --minutes 10 --json runs/soak-$$source.json || exit 1; done
	OMP_NUM_THREADS=1 $(BIN)/python tests/stale_state.py --minutes 60 --json runs/stale_state.json
	for source in list tar; do OMP_NUM_THREADS=1 $(BIN)/python tests/stale_state.py --source $$source --sequences 60 --minutes 20 \
		--json runs/stale_state-$$source.json || exit 1; done

# The C++ and the browser example against the Python kit, which `make test` skips where their parts are not installed.
# On Debian: apt-get install cmake g++ nlohmann-json3-dev chromium nodejs npm
kits: $(READY)
	sh export/cpp/onnxruntime.sh .venv/onnxruntime $(BIN)/python
	npm ci --prefix export/browser
	ONNXRUNTIME_ROOT=$(CURDIR)/.venv/onnxruntime $(PYTEST) tests/edge/test_cpp.py tests/edge/test_browser.py

# The students of benchmarks/export_models.py in every toolchain that pip installs, each in an environment of its own (15 GB, hours).
toolchains: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/toolchains.py --environments .venv/toolchains --json runs/toolchains.json
	TOOLCHAINS=$(CURDIR)/.venv/toolchains $(PYTEST) tests/toolchains

bench: $(READY)
	$(BIN)/python benchmarks/first_step.py

# Photos, weights and wheels for benchmarks/gpu.sh on a machine that reaches no network: copy the repository and gpu-pack/ there.
gpu-pack: $(READY)
	$(BIN)/python benchmarks/gpu_pack.py

$(READY): constraints.txt pyproject.toml export/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: expected Python 3.11 or newer, found $$($(PYTHON) --version 2>&1); try make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv || { echo "error: $(PYTHON) cannot make a virtual environment; on Debian: apt-get install python3-venv"; exit 2; }
	sed -n '/^uv==/,/[^\\]$$/p' constraints.txt > .venv/uv.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --require-hashes -r .venv/uv.txt
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --require-hashes -r constraints.txt
	$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation -e .
	touch $(READY)

# The tools of the docs in an environment of their own, which sees the program's packages too.
$(DOCS)/.ready: $(READY) docs/requirements.txt
	$(BIN)/python -m venv --without-pip $(DOCS)
	$(BIN)/uv pip install --python $(DOCS)/bin/python --quiet --require-hashes -r docs/requirements.txt
	cd $(DOCS)/lib/python3*/site-packages && $(CURDIR)/$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' > program.pth
	touch $@

# Versions and hashes of everything CI and the demo install, for Linux and macOS, Python 3.11 and newer.
constraints: $(READY)
	$(BIN)/uv pip compile pyproject.toml --extra cpu --extra demo --extra dev --universal --python-version 3.11 \
		--generate-hashes --no-annotate --no-header --no-emit-index-url --quiet --upgrade -o constraints.txt

docs-constraints: $(READY)
	$(BIN)/uv pip compile docs/requirements.in --universal --python-version 3.11 \
		--generate-hashes --no-annotate --no-header --no-emit-index-url --quiet --upgrade -o docs/requirements.txt

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .coverage
