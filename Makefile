# On a fresh machine: `make serve` runs the service, `make test` runs every check. Both make their environment first.
PYTHON ?= python3
PORT ?= $(or $(DDPM_PORT),8000)
UV_VERSION := 0.13.9
BIN := .venv/bin
# uv installs from the registry alone: a stray wheel in a find-links folder cannot give a torch without its torchvision.
UV := env -u PIP_FIND_LINKS -u VIRTUAL_ENV $(BIN)/uv pip

.PHONY: serve test check test-slow test-ray fuzz soak card docs lock audit sbom image clean

serve: .venv/service
	DDPM_PORT=$(PORT) $(BIN)/python -m app

# Threads of several processes must not spin for work on the same cores.
test: check
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m "not slow and not ray" --durations=10 -n auto --maxprocesses 4 --dist loadfile

check: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test-slow: .venv/test
	$(BIN)/python -m pytest -m slow

# The service on a real cluster of three nodes, all of them here: two or three minutes.
test-ray: .venv/ray
	$(BIN)/mypy -p deploy
	$(BIN)/python -m pytest -m ray

fuzz: .venv/test
	$(BIN)/python -m tests.service.fuzz --examples 800

soak: .venv/service
	$(BIN)/python benchmarks/soak.py --seconds 1200

# The model cards of the shipped weights: DATA_ROOT is the folder that holds MNIST/raw.
DATA_ROOT ?= data
card: .venv/service
	$(BIN)/python -m ddpm_core.evaluate --data-root $(DATA_ROOT) --card
	$(BIN)/python -m ddpm_core.evaluate --data-root $(DATA_ROOT) --card --model weights/mnist-2

# The plots and pictures of docs/concepts, by the shipped weights: a minute or two on two cores.
docs: .venv/service
	$(BIN)/python docs/plots.py

lock: $(BIN)/uv
	$(UV) compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
		--upgrade --extra train pyproject.toml -o requirements.lock
	$(UV) compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
		--upgrade --extra train --extra test --extra audit -c requirements.lock pyproject.toml -o requirements-test.lock
	$(UV) compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
		--upgrade --extra ray -c requirements-test.lock pyproject.toml -o requirements-ray.lock

# Known weaknesses of what is locked; what cannot be looked up is a failure too.
audit: .venv/test
	for lock in requirements.lock requirements-ray.lock; do \
		$(BIN)/pip-audit --strict --require-hashes --disable-pip --progress-spinner off -r $$lock || exit 1; \
	done

sbom: .venv/test
	mkdir -p dist
	$(BIN)/cyclonedx-py requirements requirements.lock --output-reproducible --of JSON -o dist/sbom.json

image:
	docker build -t ddpm-service .

clean:
	rm -rf .venv

$(BIN)/uv:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q uv==$(UV_VERSION)

.venv/service: requirements.lock pyproject.toml | $(BIN)/uv
	$(UV) install -q --require-hashes -r requirements.lock
	$(UV) install -q --no-deps -e .
	@touch $@

.venv/test: requirements-test.lock pyproject.toml | $(BIN)/uv
	$(UV) install -q --require-hashes -r requirements-test.lock
	$(UV) install -q --no-deps -e .
	@touch $@

.venv/ray: requirements-ray.lock .venv/test
	$(UV) install -q --require-hashes -r requirements-ray.lock
	@touch $@
