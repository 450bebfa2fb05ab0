# Every target sets itself up in .venv; `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin

# What `make reproduce` runs: each is a parameter of the notebook.
TABLE ?= table3
DATASET ?= simulated
PROFILE ?= quick
SEEDS ?= 5
WORKERS ?= 2
DEVICE ?= auto
DATA_ROOT ?=
OUT_DIR ?= results
CLUSTER ?=
STUDY ?= table1 table1_trained table1_parts table2 table3 mechanism table4 table5 table6 tableA1 tableA2 tableA3 controls sensitivity figures

# Parallelism comes from worker processes, so each of them keeps to one thread.
export OMP_NUM_THREADS ?= 1

.PHONY: help look reproduce study gpu test kill fuzz docs export readme check clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12
	@echo
	@echo "make reproduce takes, with these values now:"
	@echo "  TABLE=$(TABLE) DATASET=$(DATASET) PROFILE=$(PROFILE) SEEDS=$(SEEDS) WORKERS=$(WORKERS)" \
	      "DEVICE=$(DEVICE) DATA_ROOT=$(DATA_ROOT) OUT_DIR=$(OUT_DIR) CLUSTER=$(CLUSTER)"

.venv/.ok: pyproject.toml
	@echo "Setting up .venv (once; a few minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=python3.11 ...")'
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -q --no-compile -e '.[dev]'
	@$(BIN)/python -m compileall -q -j 0 .venv/lib > /dev/null || :  # on all cores, where pip has one; some files are templates
	@touch $@

# Papermill runs in the repository's root, so OUT_DIR and DATA_ROOT are relative to it. The executed
# notebook is written to a temporary folder first: a run that fails leaves none in OUT_DIR. Of the progress
# bar its last state is kept. What nbs/ says of the outputs stored there is left out. Links lead from the copy to
# where they led from nbs/.
reproduce: .venv/.ok  ## train the rows of a table of the paper and write the table, its pictures and the verdict
	@set -euo pipefail; \
	data="$$(cd "$(DATASET)" >/dev/null 2>&1 && pwd || echo "$(DATASET)")"; \
	out="$(OUT_DIR)/$$(basename "$$data")-$(PROFILE)"; \
	mkdir -p runs; tmp=$$(mktemp -d runs/.$(TABLE).XXXXXX); trap 'rm -rf "$$tmp"' EXIT; \
	$(BIN)/papermill nbs/reproduce_$(TABLE).ipynb "$$tmp/$(TABLE).ipynb" --progress-bar --stderr-file >(cat >&2) \
	  -r dataset "$(DATASET)" -r profile "$(PROFILE)" -r data_root "$(DATA_ROOT)" -p seeds "$(SEEDS)" \
	  -r device "$(DEVICE)" -p workers "$(WORKERS)" -r out_dir "$(OUT_DIR)" \
	  -r cluster "$(CLUSTER)"; \
	$(BIN)/jupyter nbconvert --log-level=WARN --to notebook --inplace --CoalesceStreamsPreprocessor.enabled=True \
	  --RegexRemovePreprocessor.enabled=True --RegexRemovePreprocessor.patterns='\*\*Stored here' \
	  --RegexRemovePreprocessor.patterns='\#\# Results' "$$tmp/$(TABLE).ipynb"; \
	$(BIN)/nbdev_clean --fname "$$tmp/$(TABLE).ipynb"; $(BIN)/python docs/small_pictures.py "$$tmp/$(TABLE).ipynb"; \
	sed -i.bak -E -e 's#\]\(\.\./#](../../#g' -e 's#\]\(([A-Za-z0-9_]+\.ipynb)#](../../nbs/\1#g' \
	  "$$tmp/$(TABLE).ipynb"; \
	mkdir -p "$$out"; mv "$$tmp/$(TABLE).ipynb" "$$out/$(TABLE).ipynb"; \
	echo; cat "$$out/$(TABLE).md" 2>/dev/null || true; echo; ls "$$out"/*.png "$$out/$(TABLE).ipynb" 2>/dev/null || true

# The runs of a look are in the same cache: the whole table is not to compute them again.
look: SEEDS = 1
look: OUT_DIR = results-look
look: reproduce  ## a first look in minutes: the same with one seed, into results-look/

# Runs are shared: what a table needs and another has computed is found in the cache, so a second call computes nothing.
study: .venv/.ok  ## all tables and figures of the paper, and results/claims.md
	@set -e; for table in $(STUDY); do $(MAKE) --no-print-directory reproduce TABLE=$$table SEEDS=$(SEEDS); done
	@$(BIN)/python -c 'from selfdetr.study import write_claims; print(write_claims("$(OUT_DIR)").read_text())'

MINUTES ?= 9.5

gpu: .venv/.ok  ## on a GPU: its numbers against the CPU's, the benchmarks, Table 3 at the paper's size; stops after MINUTES
	$(BIN)/python benchmarks/gpu.py --minutes $(MINUTES)

# Notebooks with exercises are left to pytest, which runs the solutions after their cells.
EXERCISES = ^(0[1-7]|34)_

test: .venv/.ok  ## run every notebook but the studies as a test, then pytest
	$(BIN)/nbdev_test --n_workers 2 --skip_file_re '$(EXERCISES)|^[_.]'
	$(BIN)/pytest -q --numprocesses 2 --dist loadfile

KILLS ?= 100
SEED ?= 0

kill: .venv/.ok  ## kill training runs and studies KILLS times and see that nothing is lost (pytest does it a few times)
	$(BIN)/python tests/kill_runs.py --kills $(KILLS) --seed $(SEED)

INPUTS ?= 100000

fuzz: .venv/.ok  ## send INPUTS hostile files to all readers: only a DataError may come out
	INPUTS=$(INPUTS) $(BIN)/pytest -q -rP tests/test_hostile.py -k data_errors_only --numprocesses 2 \
	  --hypothesis-profile fuzz --hypothesis-seed $(SEED)

.venv/.docs: .venv/.ok
	@$(BIN)/pip install -q -e '.[docs]'
	@touch $@

# Nothing is executed and nothing fetched: the site shows the outputs that the notebooks hold.
docs: .venv/.docs  ## build the site: notebooks, results and modules, with search, to be read without a network
	@rm -rf _docs
	$(BIN)/python docs/gather.py _docs/source
	$(BIN)/sphinx-build -q -W --keep-going -c docs -d _docs/doctrees _docs/source _docs/html
	$(BIN)/python docs/check_site.py _docs/html
	@echo "Open _docs/html/index.html"

export: .venv/.ok  ## write selfdetr/ from the notebooks, clean these and make their pictures small
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python docs/small_pictures.py nbs/*.ipynb

# The notebook is executed first, since it shows tables from results/. Hidden cells are left out, tables come as
# Markdown and pictures only as committed files. Paths in the notebook are relative to nbs/; those in the README to the root.
readme: .venv/.ok  ## execute nbs/index.ipynb and write README.md from it
	@$(BIN)/jupyter nbconvert --log-level=WARN --to notebook --execute --inplace nbs/index.ipynb
	@$(BIN)/nbdev_clean --fname nbs/index.ipynb
	@set -euo pipefail; { \
	echo '<!-- Written by `make readme` from nbs/index.ipynb: edit that notebook. -->'; echo; \
	$(BIN)/jupyter nbconvert --log-level=WARN --to markdown --stdout nbs/index.ipynb \
	  --RegexRemovePreprocessor.patterns='["^#\|\\s*hide"]' \
	  --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_input_tags='["hide-input"]' \
	  --NbConvertBase.display_data_priority='["text/markdown", "text/plain"]' \
	| sed -E -e 's#\]\(\.\./#](#g' -e 's#\]\(([A-Za-z0-9_]+\.ipynb)#](nbs/\1#g' -e 's#(src|href)="\.\./#\1="#g' \
	| cat -s; } > README.md.tmp && mv README.md.tmp README.md || { rm -f README.md.tmp; exit 1; }

# The state of all files that git does not ignore, committed or not, as one tree.
TREE = GIT_INDEX_FILE="$$tmp/index" git add -A && GIT_INDEX_FILE="$$tmp/index" git write-tree

check: .venv/.ok  ## what CI asks besides the tests: notebooks, selfdetr/ and README agree; words; ruff; mypy
	@set -euo pipefail; tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	before=$$($(TREE)); $(MAKE) --no-print-directory export readme; after=$$($(TREE)); \
	git --no-pager diff --stat --exit-code $$before $$after \
	|| { echo "The files above did not agree with the notebooks: they are rewritten now, commit them."; exit 1; }
	$(BIN)/python docs/check_words.py
	$(BIN)/ruff check
	$(BIN)/mypy selfdetr

clean:  ## remove .venv, builds and caches; results/ and the trained runs/ stay
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache _proc _docs
	find . -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
