# make run: the main job on the embedded default.   make test: every test, the slow ones included, but for the one that
# brings up a cluster of two hosts, which is make test-hosts.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: run test test-hosts lint site bench-depth bench-distill clean

run: $(VENV)/.installed
	$(BIN)/python -m minitron_search.run $(ARGS)

# A file to a process, so that fixtures are made once.
test: $(VENV)/.installed
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m "not hosts"
endif

# ray up and ray job submit on two hosts made of namespaces, which lose power: eight minutes, most of them spent waiting
# until Ray notices
test-hosts: $(VENV)/.installed
	$(BIN)/python -m pytest -m hosts

lint: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy minitron_search analysis

# the documents as pages that need no network: site/index.html
site: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[site]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# the depth sweep against a forward pass per cut and against lm-eval, and its peak memory
bench-depth: $(VENV)/.installed
	$(BIN)/python -m benchmarks.depth_speed $(ARGS)

# distillation's speed, memory, exactness and what the teacher is paid, against their bars
bench-distill: $(VENV)/.installed
	$(BIN)/python -m benchmarks.distillation_speed $(ARGS)

# the stamp is written last: an installation that was cut off is done again
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
