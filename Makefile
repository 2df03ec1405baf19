# make demo answers the question; make test proves the parts. Both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: setup demo test check bench smoke clean

setup: $(STAMP)

# torch comes first and from the constraints file, so that nothing else chooses its build
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: setup
	$(BIN)/hasten compare --demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# without BENCH: list the benchmarks with their durations. make bench BENCH=name runs one; it goes on where it was.
bench: setup
	$(BIN)/python -m benchmarks $(BENCH)

smoke: setup
	$(BIN)/python -m benchmarks --smoke

clean:
	rm -rf $(VENV) runs
