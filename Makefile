# make demo    raw text to a trained model, its samples and its loss curve
# make test    the whole test suite, on the CPU
# make test-faults
#              thousands of deaths, power cuts, disk errors, damaged and malicious files (tests/faults): 10 to 20 minutes.
#              Ends with one line of figures. A few of each kind are in make test; here are all: a test that is marked
#              "faults" runs only here. Run it after a change of commit.py, publish.py, saver.py, checkpoint.py or lock.py
# make test-slow
#              what is the same at greater length, or the tenth of its kind: half an hour
# make test-network
#              several machines (network namespaces: Linux, root), links that are cut, launchers that shrink: two minutes.
#              Run it after a change of launchers.py, launch_checks.py, machines.py, slurm.py or watchdog.py
#
# Both make .venv and install what they need. To use the Python environment that is active instead, and the torch it has
# (2.11 or newer): make test ENV=active

PYTHON ?= python3
ifeq ($(ENV),active)
  PY := $(PYTHON)
  PIP := $(PY) -m pip install --quiet
  DEMO := .active-demo
  DEV := .active-dev
else
  PY := .venv/bin/python
  PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
  DEMO := .venv/.installed-demo
  DEV := .venv/.installed-dev
endif

.PHONY: demo test test-faults test-slow test-network lint clean .active-demo .active-dev

demo: $(DEMO)
	$(PY) -m prep.tokenize --demo -o data/demo
	$(PY) -m accelerate.commands.launch --config_file accelerate_config.yaml -m accel_pretrain.train --config configs/demo.yaml
	$(PY) -m accel_pretrain.evaluate --checkpoint runs/demo --data data/demo --xz
	$(PY) -m accel_pretrain.sample --checkpoint runs/demo --prompt "def read_lines(path):" --prompt "class Stack:" --max_new_tokens 100
	$(PY) -m accel_pretrain.plot runs/demo

test: lint
	$(PY) -m pytest --numprocesses 2 --dist loadfile --durations 15

test-faults: $(DEV)
	$(PY) -m pytest -m "faults or controls" tests/faults --durations 15

test-slow: $(DEV)
	$(PY) -m pytest -m slow --durations 15

test-network: $(DEV)
	$(PY) -m pytest -m network tests/test_launch.py tests/test_multinode.py --durations 15

lint: $(DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath "$$($(PY) -c 'import sys; print(sys.executable)')"

.venv/bin/python:
	$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('Python 3.11 or newer is needed; type: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv .venv

.venv/.installed-demo: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[bpe,plot]'
	touch $@

.venv/.installed-dev: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	touch $@

.active-demo:
	$(PIP) --editable '.[bpe,plot]'

.active-dev:
	$(PIP) --editable '.[dev]'

clean:
	rm -rf .venv runs data/demo .pytest_cache .ruff_cache
