# Everything a user or developer runs. `make` alone lists the targets.
#   VENV=.venv      the environment, made on first use
#   PYTHON=python3  the interpreter that makes it, 3.10 or newer
#   TORCH_INDEX=    address of an extra package index, for PyTorch's CPU wheels; also from the environment
#   WORKERS=2       processes that run tests
#   GPU_CHECK=      options of gpu-check, such as "--part kernels --seconds 200"; --help names them
#   ROUNDS=200      inputs that each fuzz test tries; SEED= chooses them, and is printed

VENV = .venv
PYTHON = python3
TORCH_INDEX ?=
WORKERS = 2
NAME =
GPU_CHECK =
ROUNDS = 200
SEED := $(shell date +%s)

OLDEST := .venv-oldest
KERNELS := .venv-kernels
TIMM := .venv-timm
BIN := $(VENV)/bin
# Compiling every module at install takes longer than installing. Python does it for those that are imported, once, if
# it is let.
export PYTHONDONTWRITEBYTECODE :=
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --no-compile $(if $(CI),--quiet) \
	$(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") -c constraints.txt
# Tests never reach a hub. Their tensors are small: processes side by side help, threads inside them do harm.
PYTEST_IN = HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n $(WORKERS)
PYTEST = $(call PYTEST_IN,$(VENV))

# Compiled kernels of a test run are nobody else's.
CPP = ATTN_PLUGINS_CPP=1 ATTN_PLUGINS_CACHE="$(CURDIR)/build/cache"
# $(1) names the sanitizers, which have a library each; what they need comes before all others. Without the leaks of Python
# itself, and without what goes on inside libraries that no thread sanitizer has compiled. What they find ends the process:
# pytest -s has it said.
SANITIZED = ATTN_PLUGINS_CPP=1 ATTN_PLUGINS_CACHE="$(CURDIR)/build/cache-$(1)" ASAN_OPTIONS=detect_leaks=0 \
	TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1
PRELOAD = $(foreach name,$(1),$$($${CXX:-g++} -print-file-name=lib$(name).so))

.PHONY: help setup fix check test test-cpp test-cpp-sanitized wheel-cpp test-slow test-real test-peers test-browser test-oldest test-kernels test-timm test-architectures fuzz architectures architectures-timm demo leaderboard bench bench-decode gpu-check docs try dist site clean
.DELETE_ON_ERROR:

help:
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 27

setup: $(VENV)/.installed ## the environment with all extras, at the versions of constraints.txt

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is older than Python 3.10; say make PYTHON=python3.12, or another" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) --quiet pip
	@$(PIP_INSTALL) --quiet --dry-run --no-deps --report $(VENV)/torch.json torch
	@if grep -qE '"(nvidia|cuda|triton)' $(VENV)/torch.json; then echo "note: pip takes the CUDA build of torch," \
		"several gigabytes; make setup TORCH_INDEX=<address of PyTorch's index of CPU wheels> takes the CPU build"; fi
	$(PIP_INSTALL) -e ".[dev]"
	@$(BIN)/python -m pip check
	@touch $@

fix: setup ## repair what ruff can, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: setup ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup ## the default test run: offline, no weights
	$(PYTEST)

test-slow: setup ## tests that take minutes
	$(PYTEST) -m slow

test-real: setup ## tests on real weights; fetches the demo's model
	$(BIN)/python -m attn_plugins.data.demo_model
	$(PYTEST) -m real

test-peers: setup ## numbers beside published implementations; installs them into the environment
	$(PIP_INSTALL) --quiet -e ".[dev,peers,harness]"
	$(PYTEST) -m peers

test-browser: setup ## report.html and the page of inspect in headless Chromium, which has to be there; installs playwright
	$(PIP_INSTALL) --quiet -e ".[dev,browser]"
	$(PYTEST) -m browser -n 0

test-cpp: setup ## build the kernels in C++ into build/, and hold them to the dense forms, with every instruction set
	$(CPP) $(BIN)/attn-plugins build
	$(CPP) $(PYTEST) -m cpp tests/backends

test-cpp-sanitized: setup ## the same under sanitizers of addresses, undefined behaviour and threads: minutes
	$(call SANITIZED,address) $(BIN)/attn-plugins build \
		--flags "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g -O1"
	$(call SANITIZED,address) LD_PRELOAD="$(call PRELOAD,asan ubsan)" $(PYTEST) -m cpp -n 0 -s tests/backends
	$(call SANITIZED,thread) $(BIN)/attn-plugins build --flags "-fsanitize=thread -g -O1"
	$(call SANITIZED,thread) LD_PRELOAD="$(call PRELOAD,tsan)" $(PYTEST) -m cpp -n 0 -s -k threads tests/backends

test-architectures: setup ## the flag on every model type of transformers: minutes
	$(PYTEST) -m architectures

fuzz: setup ## random flags, shapes, schedules of caches and damaged files; ROUNDS=200 and SEED= choose how many and which
	@echo "seed $(SEED): make fuzz ROUNDS=$(ROUNDS) SEED=$(SEED) runs the same again"
	ATTN_PLUGINS_FUZZ_ROUNDS=$(ROUNDS) $(PYTEST) -m fuzz --hypothesis-seed=$(SEED) tests/fuzz

test-oldest: $(OLDEST)/.installed ## tests of the bridge on the oldest transformers that is supported
	$(call PYTEST_IN,$(OLDEST)) tests/hf tests/architectures tests/models tests/torch_modules

test-kernels: $(KERNELS)/.installed ## kernels for GPUs, interpreted on a CPU and compiled for GPUs that need not be there: minutes
	TRITON_INTERPRET=1 $(call PYTEST_IN,$(KERNELS)) -m kernels tests/kernels

test-timm: $(TIMM)/.installed ## modules of timm and torchvision, and model types that are made with timm or torchaudio
	$(call PYTEST_IN,$(TIMM)) tests/torch_modules
	$(call PYTEST_IN,$(TIMM)) -m packages tests/architectures

# Venvs of their own for the few packages that differ; all others are looked up in the first one. torchaudio does without its
# compiled parts, which package indexes have for CUDA alone: they do not load beside a torch for CPUs.
$(OLDEST)/.installed $(KERNELS)/.installed $(TIMM)/.installed: .venv-%/.installed: $(VENV)/.installed constraints-%.txt
	@rm -rf .venv-$*
	@$(BIN)/python -m venv --without-pip .venv-$*
	$(BIN)/python -m pip --python .venv-$*/bin/python install --quiet --no-compile --no-deps \
		$(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") -r constraints-$*.txt
	@rm -f .venv-$*/lib/python*/site-packages/torchaudio/lib/*.so
	@folder=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		.venv-$*/bin/python -c 'import pathlib, sys, sysconfig; \
		pathlib.Path(sysconfig.get_path("purelib"), "base.pth").write_text(f"import site; site.addsitedir({sys.argv[1]!r})\n")' "$$folder"
	@$(BIN)/python -m pip --python .venv-$*/bin/python check
	@touch $@

demo: setup ## fetch a small pretrained model and compare attentions on it: table, plots, report
	$(BIN)/python -m attn_plugins.data.demo_model
	$(BIN)/attn-plugins compare --config configs/compare/demo.yaml

bench: setup ## time and memory of every attention alone, by length: about an hour; goes on where it was
	$(BIN)/attn-plugins bench --config configs/bench/cpu.yaml

bench-decode: setup ## time of a token and size of the cache, 1k to 128k tokens: minutes; goes on where it was
	$(BIN)/attn-plugins bench --decode --config configs/bench/decode.yaml

# For a machine whose Python has torch with CUDA and Triton already: no environment is made, nothing is fetched.
gpu-check: ## contract, time, memory and training steps by every backend on a CUDA GPU: 8 minutes; PYTHON=python3 has torch
	@$(PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else \
		"error: torch " + torch.__version__ + " finds no CUDA GPU; gpu-check needs one")'
	HF_HUB_OFFLINE=1 PYTHONPATH=. $(PYTHON) -m attn_plugins.benchmark.checks.gpu_check $(GPU_CHECK)

# A cell that fails, as that of an attention which a model cannot have, is named on the page and ends nothing.
leaderboard: setup ## hours: measure what docs/leaderboard.md shows, and write it; goes on where it was
	$(BIN)/python -m attn_plugins.data.demo_model
	-$(BIN)/attn-plugins compare --suite leaderboard
	$(BIN)/attn-plugins results merge docs/benchmarks/leaderboard runs/suites/leaderboard
	$(BIN)/python -m attn_plugins.benchmark.pages.attention_page .

docs: setup ## write docs/attentions.md from the docstrings, and the tables of attentions in other pages
	$(BIN)/python -m attn_plugins.benchmark.pages.attention_page .

architectures: setup ## the flag on every model type: docs/architectures.md and .json; goes on where it was
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/architectures/matrix.py --workers $(WORKERS)

architectures-timm: $(TIMM)/.installed ## the same of model types that need timm or torchaudio alone, into the same page
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(TIMM)/bin/python tests/architectures/matrix.py --update --workers $(WORKERS)

# Tests over the registry, and the attention's own. The environment is made where there is none, and not made anew.
try: | $(VENV)/.installed ## NAME=local: all that CI asks of one attention, its part of the pages too, in seconds
	@test -n "$(NAME)" || { echo "error: which attention? say make try NAME=local" >&2; exit 1; }
	@grep -qr 'register_attention("$(NAME)")' attn_plugins/attentions || \
		{ echo "error: no file in attn_plugins/attentions says @register_attention(\"$(NAME)\")" >&2; exit 1; }
	$(PYTEST) -q -x -k "$(NAME) or of_the_registry" $(wildcard tests/*/test_$(NAME).py) $$(grep -rlE \
		--include='test_*.py' --exclude-dir=architectures --exclude-dir=fuzz \
		'\b(list_attentions|every_case|every_class|every_state|cases_together|CAUSAL|BOUNDED|of_the_registry)\b' tests)

dist: setup ## dist/: the sdist, and the wheel that is built from it, as a package index wants them
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

# For this machine's processor, C library and torch; a user of another torch builds them: attn-plugins build.
wheel-cpp: setup ## dist/: a wheel that brings the kernels in C++, compiled here
	rm -rf dist attn_plugins/csrc/built build/lib
	$(BIN)/attn-plugins build --into attn_plugins/csrc/built
	$(BIN)/python -m build --no-isolation --wheel "-C--build-option=--plat-name=$$($(BIN)/python -c \
		'import platform; print("manylinux", *platform.libc_ver()[1].split("."), platform.machine(), sep="_")')"
	rm -rf attn_plugins/csrc/built

site: setup ## build/site: the pages and the API reference as a web site; a broken link is an error
	rm -rf build/pages build/site && mkdir -p build/pages
	cd build/pages && ln -s ../../*.md ../../LICENSE ../../CITATION.cff ../../docs ../../examples ../../configs ../../attn_plugins .
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean: ## remove what make made, except results in runs/
	rm -rf .venv .venv-oldest .venv-kernels .venv-timm build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find attn_plugins tests examples -name __pycache__ -prune -exec rm -rf {} +
