# What CI runs: make check test bench docs. The environment is made once, by the first target that needs it.
PYTHON ?= .venv/bin/python

.PHONY: check test test-slow test-clients swift-test bench mac-check docs goldens demo-accuracy

$(PYTHON):
	python3 -m venv .venv
	$(PYTHON) -m pip install -q -e '.[270m,dev]'

check: $(PYTHON)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) docs/generate.py --check

test: $(PYTHON)
	$(PYTHON) -m pytest

test-slow: $(PYTHON)
	$(PYTHON) -m pytest -m slow

# LiteLLM, llm, pydantic-ai, lm-eval and Schemathesis against the server, in an environment of their own
test-clients:
	python3 -m venv .venv-clients
	.venv-clients/bin/python -m pip install -q -e '.[clients]'
	.venv-clients/bin/python -m pytest -m clients -o filterwarnings= tests/clients

# A Linux without swift gets one in a folder of its own (root needed): docs/swift.md
swift-test:
	@if command -v swift > /dev/null; then $(MAKE) $(PYTHON) && examples/swift/run $(PYTHON) test; \
	else examples/swift/linux test; fi

bench: $(PYTHON)
	$(PYTHON) bench/start.py

# What only a Mac can show (docs/mac.md), in one file for a bug report: make mac-check ARGS=--quick
mac-check: $(PYTHON)
	$(PYTHON) bench/mac_check.py $(ARGS)

docs: $(PYTHON)
	$(PYTHON) docs/generate.py

# Needs the `reference` extra (torch, transformers): pip install -e '.[reference]'
goldens: $(PYTHON)
	$(PYTHON) tests/reference/make_model_goldens.py
	$(PYTHON) tests/reference/make_image_goldens.py
	$(PYTHON) tests/reference/make_gradient_goldens.py
	$(PYTHON) tests/reference/make_adapter_goldens.py

# The table of docs/demo.md, on 500 fresh pictures (another SEED, other pictures)
SEED ?= 2026
demo-accuracy: $(PYTHON)
	$(PYTHON) -m examples.demo_model.accuracy --seed $(SEED) --count 500 --blind
