# make demo: set-up and the main job.  make test: set-up and the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
BENCH_ARGS ?=
export OMP_NUM_THREADS ?= 1

.PHONY: demo test bench bench-trainer gpu lint check clean
.DELETE_ON_ERROR:

# Done once per change of the dependencies; torch first and pinned, else pip takes the CUDA build.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "melinoe needs Python >= 3.11; set PYTHON=" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/melinoe demo $(DEMO_ARGS)

test: $(VENV)/.installed
	$(BIN)/pytest -n 2

# ratios to the ceilings and to the peer, a server with 1, 4 and 16 clients, then a tuning step; quiet machine, a few GB in TMPDIR, about ten minutes
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/runtime.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/trainer.py

# a tuning step against PEFT's: speed, what is kept for the backward pass; 3 GB of memory, a few minutes
bench-trainer: $(VENV)/.installed
	$(BIN)/python benchmarks/trainer.py $(BENCH_ARGS)

# a machine with a CUDA GPU and 40 GB free in TMPDIR: parity, bus bandwidth, decode speed against the peers, tuning while paged
gpu: $(VENV)/.installed
	$(BIN)/pytest -m gpu
	$(BIN)/python benchmarks/gpu.py --folder $${TMPDIR:-/tmp}/melinoe-gpu $(BENCH_ARGS)
	for format in auto int4; do $(BIN)/python benchmarks/paged_tuning.py --device cuda --format $$format \
		--shape 2048,1024,64,4 --work $${TMPDIR:-/tmp}/melinoe-gpu-tuning || exit 1; done

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: test lint

clean:
	rm -rf $(VENV) demo-output
