# `make demo` needs what a user needs, `make test` and `make check` what a developer needs. Each target installs it first.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-slow test-vllm check format docs lock clean

demo: .venv/user
	$(BIN)/trtqwen demo

# Tests start hundreds of interpreters: bytecode is written once, not compiled by each of them.
test test-slow test-vllm: export PYTHONDONTWRITEBYTECODE =

# One process more than cores (tests/conftest.py): tests of servers often wait. They are forked from one that has imported
# the libraries.
# Tests that share a server run in one process, and theirs come first (tests/conftest.py). What is exhaustive is slow:
# `make test` does without it, `make test-slow` runs it.
PYTEST := $(BIN)/pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder
test: .venv/developer
	$(PYTEST) -m "not slow"

test-slow: .venv/developer .venv/transformers5
	$(PYTEST) -m slow

# A real vLLM, in an environment of its own: the client tests of the serving layer on one server, and the exports.
VLLM := TRTQWEN_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python
test-vllm: .venv/developer .venv-vllm/installed
	$(VLLM) TRTQWEN_TEST_BACKEND=vllm $(BIN)/pytest --timeout=600 tests/triton/test_serving.py tests/gateway/test_openai.py
	$(VLLM) $(BIN)/pytest tests/vllm/test_real.py tests/vllm/test_restart.py tests/vllm/test_migration.py

.venv-vllm/installed: scripts/install_vllm.py
	$(PYTHON) scripts/install_vllm.py .venv-vllm
	touch $@

check: .venv/developer
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/developer
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: .venv/developer
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict

# pip reads dependency groups from 25.1 on.
.venv/pip:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	touch $@

.venv/user: .venv/pip pyproject.toml constraints.txt
	$(INSTALL) '.[torch,triton]' --no-compile
	touch $@

.venv/developer: .venv/pip pyproject.toml constraints.txt
	$(INSTALL) '.[all]' --group dev
	touch $@ .venv/user

# An oracle of the tests beside transformers 4.57: its own dependencies are those of the environment, but for two.
.venv/transformers5: .venv/developer
	rm -rf $@
	$(BIN)/python -m pip install --quiet --no-deps --target $@ transformers==5.24.0 tokenizers==0.23.3 huggingface_hub==2.4.0

# The exact versions that CI installs; needs uv.
lock:
	uv pip compile --universal --python-version 3.10 --no-header --no-annotate --quiet --all-extras --group dev \
		--output-file constraints.txt pyproject.toml

clean:
	rm -rf .venv .venv-vllm site
