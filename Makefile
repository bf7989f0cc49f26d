# make test        sets up and tests every notebook and tests/
# make lint        ruff and mypy on the package, the tests and profiles/: nothing is run, nothing is written
# make test-slow   runs what takes minutes: tests marked slow, cells under `#| slow`; kills runs twenty times each (or KILLS=6), in one process
#                  and in two, and leaves records
# make planted     plants twenty faults, one after the other, in a copy of the package: each must be caught by what `make test` runs
# make reproduce   runs the argument of the paper on digits, five seeds (or SEEDS=2), and writes figures/
# make evidence    makes the runs behind the ledger of claims that have no record yet, and the ledger; it may be stopped at any time
# make bench       what a RepOptimizer's step costs over torch's own, on this machine
# make notebooks   executes every notebook in place, cleans it, and writes README.md from index.ipynb
# make lab         opens JupyterLab on the notebooks
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
JOBS   ?= 2
SEEDS  ?= 5
KILLS  ?= 20
EPOCHS ?=
# not what papermill was told to write there
NOTEBOOKS = $(wildcard nbs/[0-9]*.ipynb) $(wildcard nbs/lab/[a-z]_*.ipynb) nbs/index.ipynb
# programs are given to Python by name: the first line of a script cannot hold the path of every folder
RUN    := $(BIN)/python
# two notebooks or runs at a time, one thread each: on a small net a second thread costs more than it gives
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: setup lint test test-slow planted reproduce evidence bench notebooks lab clean

setup: $(READY)

$(READY): requirements.lock settings.ini setup.py
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"repopt needs Python 3.11 or newer, this is {v.major}.{v.minor}; name another one with make PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -U pip setuptools
	$(BIN)/python -m pip install -q -c requirements.lock -e '.[dev]'
	touch $@

test: $(READY)
	$(ONE_THREAD) $(RUN) tests/run.py --jobs $(JOBS)

lint: $(READY)
	$(RUN) -m ruff check
	$(RUN) -m mypy

test-slow: $(READY)
	$(ONE_THREAD) $(RUN) tests/run.py --slow --jobs $(JOBS)
	$(ONE_THREAD) $(RUN) tests/test_interrupt.py --kills $(KILLS) --out $(if $(filter 20,$(KILLS)),figures,build)

planted: $(READY)
	$(ONE_THREAD) $(RUN) tests/planted.py

# exec and tied.py: where make is killed, everything behind it ends; where it is called again, runs go on from their checkpoints
reproduce: $(READY)
	exec env $(ONE_THREAD) $(RUN) profiles/tied.py $(RUN) -m snakemake --profile profiles/local --cores $(JOBS) \
	    --config seeds=$(SEEDS) $(if $(EPOCHS),epochs=$(EPOCHS))

evidence: $(READY)
	$(ONE_THREAD) $(RUN) -m repopt evidence --out figures --jobs $(JOBS)
	$(ONE_THREAD) $(RUN) -m repopt claims --out figures

bench: $(READY)
	$(RUN) -m repopt speed --optimizers --models b1,l2 --out figures

notebooks: $(READY)
	$(RUN) $(BIN)/nbdev_export --file_re '^(\d.*|[a-z]_.*|index)\.ipynb$$'
	$(ONE_THREAD) $(RUN) -m nbconvert --log-level WARN --to notebook --execute --inplace $(NOTEBOOKS)
	$(RUN) $(BIN)/nbdev_clean
	$(MAKE) README.md

README.md: nbs/index.ipynb $(READY)
	$(RUN) -m nbconvert --log-level WARN --to markdown --output-dir . --output README \
	    --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags=remove_cell \
	    --TagRemovePreprocessor.remove_input_tags=remove_input nbs/index.ipynb

lab: $(READY)
	$(RUN) -m jupyterlab nbs

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .snakemake nbs/.ipynb_checkpoints nbs/lab/.ipynb_checkpoints
