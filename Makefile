# Everything is run with the Python of the virtual environment that set-up makes. To use another folder for it:
# make MINPRO_VENV=/path/to/venv test
VENV := $(or $(MINPRO_VENV),.venv)
PYTHON := $(VENV)/bin/python
export MINPRO_VENV := $(VENV)
# The code of this checkout, also where the environment was made by another one.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

HF_MODEL := artifacts/tiny_moe/hf/config.json
MEGATRON_MODEL := artifacts/tiny_moe/megatron/manifest.json
# The long files come first, so that both processes have work until the end.
TIERS := $(wildcard tests/e2e tests/mesh tests/gpu tests/integration tests/unit)
# Files of tests in two processes: more would only take turns here, and tests start processes of their own.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder
# Rehearsals (docs/rehearsal.md) use the Python files of the version that GPU machines install.
TE_PYTHON := $(VENV)/share/transformer_engine_python
SHELL_SCRIPTS := environment/setup.sh .ci/run

.DEFAULT_GOAL := help
.PHONY: help setup transformer-engine-python demo test test-unit test-integration test-mesh test-matrix test-crashes test-chaos test-e2e test-gpu gpu-check gpu-check-wheels test-long lint format constraints clean
# A model whose writing was interrupted is made again.
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22
	@echo "ARGS=... is passed on, for example: make test-unit ARGS='-k packing -x'"

setup: ## make or update the virtual environment (.venv or $MINPRO_VENV)
	@environment/setup.sh

transformer-engine-python: $(TE_PYTHON) ## fetch Transformer Engine's Python files (1 MB), for rehearsals without a GPU

$(TE_PYTHON): environment/constraints_gpu.txt | setup
	rm -rf $@ $@.new
	$(PYTHON) -m pip install --quiet --no-deps --target $@.new $$(grep '^transformer-engine==' $<)
	mv $@.new $@

demo: setup $(HF_MODEL) $(MEGATRON_MODEL) ## train a tiny MoE here: real Megatron-Core, real SGLang
	$(PYTHON) -m minpro_megatron launch recipes.demo:tiny_moe $(ARGS)

# Set-up is an order-only prerequisite: it runs before, and does not make the files out of date.
$(HF_MODEL): minpro_megatron/tiny_model/warm_start.py | setup
	$(PYTHON) tools/make_tiny_model.py --output $(@D)

$(MEGATRON_MODEL): $(HF_MODEL) minpro_megatron/conversion/convert.py | setup
	$(PYTHON) tools/convert_checkpoint.py to-megatron --hf $(<D) --output $(@D)

test: setup transformer-engine-python ## the tests that run on this machine within minutes: unit, integration, mesh, e2e
	$(PYTHON) -m pytest $(SIDE_BY_SIDE) -m "not long" $(TIERS) $(ARGS)

test-unit: setup ## what starts no process and does not sleep: functions, records, settings (a minute)
	$(PYTHON) -m pytest $(SIDE_BY_SIDE) -m "not long" tests/unit $(ARGS)

test-integration: setup transformer-engine-python ## single parts with the processes they start: launcher, graders, templates, submission
	$(PYTHON) -m pytest $(SIDE_BY_SIDE) -m "not long" tests/integration $(ARGS)

test-mesh: setup ## Megatron-Core on 2 to 8 gloo ranks
	$(PYTHON) -m pytest tests/mesh $(ARGS)

test-matrix: setup ## all meshes of up to 8 ranks, into tests/mesh/matrix_result.md; RESUME=1 goes on (20-40 min)
	MATRIX_RESUME=$(RESUME) $(PYTHON) -m pytest tests/mesh/matrix.py $(ARGS)

test-long: setup transformer-engine-python ## what make test leaves out: more runs, kills, SGLang, eval, Slurm, full-size meshes (more than an hour)
	$(PYTHON) -m pytest -m long tests/unit tests/integration tests/mesh tests/e2e $(ARGS)

test-gpu: setup ## the checks of gpu-check as tests (skipped without a GPU)
	$(PYTHON) -m pytest tests/gpu $(ARGS)

gpu-check: setup ## check on one GPU that kernels, memory and copies work, into benchmarks/gpu_checks.md (8 min)
	$(PYTHON) -m minpro_megatron gpu-check $(ARGS)

gpu-check-wheels: setup ## collect the wheels that gpu-check needs on a machine without a network, into build/
	$(PYTHON) environment/gpu_check_wheels.py

test-crashes: setup ## every role killed in every phase, into tests/e2e/crash_matrix_result.md; RESUME=1 goes on (1-2 h)
	CRASHES_RESUME=$(RESUME) $(PYTHON) -m pytest tests/e2e/crash_matrix.py $(ARGS)

test-chaos: setup ## 100 runs with processes killed at random moments, into tests/e2e/chaos_result.md; RESUME=1 continues (2-4 h)
	CHAOS_RESUME=$(RESUME) $(PYTHON) -m pytest tests/e2e/chaos.py $(ARGS)

test-e2e: setup ## trainer ranks, collector and an SGLang server
	$(PYTHON) -m pytest tests/e2e $(ARGS)

lint: setup ## formatting, ruff, pyright, shellcheck, hadolint; changes nothing
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pyright --pythonpath $(PYTHON)
	$(VENV)/bin/shellcheck $(SHELL_SCRIPTS)
	$(VENV)/bin/hadolint cluster/Dockerfile

format: setup ## format the code and apply ruff's safe fixes
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

# Not after set-up, which would undo the version being tried.
constraints: ## pin the installed versions (ARGS=--gpu: those of GPU machines too)
	$(PYTHON) environment/write_constraints.py $(ARGS)

clean: ## remove the tiny models, caches and build leftovers; keeps the environment, runs/ and what else is in artifacts/
	rm -rf artifacts/tiny_moe artifacts/prefix_rl artifacts/products build dist *.egg-info .pytest_cache .ruff_cache environment/sglang_cpu/build
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
