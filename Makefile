# make demo answers the question; make test proves the parts. Both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

# what the extension is built from: a change builds it anew
NATIVE := CMakeLists.txt $(wildcard src/hasten/kernels/cpu/*)
ASAN := build/asan

.PHONY: setup demo test asan check bench smoke docs clean

setup: $(STAMP)

# torch comes first and from the constraints file, so that nothing else chooses its build
$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: setup
	$(BIN)/hasten compare --demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# the kernels' tests with every read and write of memory checked
asan: setup $(ASAN)/.ready
	OMP_NUM_THREADS=2 LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
		HASTEN_NATIVE="$$(ls $(ASAN)/hasten/_native*.so)" $(BIN)/python -m pytest tests/kernels -s -k "not triton"

$(ASAN)/.ready: $(NATIVE) | $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(ASAN) \
		-C cmake.define.HASTEN_SANITIZE=ON -C build-dir=build/asan-objects .
	touch $@

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# without BENCH: list the benchmarks with their durations. make bench BENCH=name runs one; it goes on where it was.
bench: setup
	$(BIN)/python -m benchmarks $(BENCH)

smoke: setup
	$(BIN)/python -m benchmarks --smoke

# the documentation as a site, every warning an error: build/docs/index.html
docs: setup $(VENV)/.docs
	$(BIN)/python scripts/make_cards.py --check
	$(BIN)/python -m sphinx -W -n --keep-going --quiet -b html docs build/docs

$(VENV)/.docs: pyproject.toml | $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build runs
