# Every target makes .venv and installs what it needs the first time; `make PYTHON=python3 test` uses that interpreter as it is.
VENV := .venv
ifeq ($(origin PYTHON), undefined)
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
PARALLEL := -n 2
endif

.PHONY: demo test lint docs format gpu bench report nsys ncu clean

demo: $(READY)
	$(PYTHON) -m vgf_fast.cli demo

test: $(READY)
	$(PYTHON) -m pytest -q $(PARALLEL)

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(READY)
	$(PYTHON) -m mkdocs build --strict --quiet

format: $(READY)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

gpu: $(READY)
	$(PYTHON) -m profiling.gpu

bench: $(READY)
	$(PYTHON) -m profiling.bench update act memory $(BENCH)

report: $(READY)
	$(PYTHON) -m profiling.report

nsys ncu: $(READY)
	$(PYTHON) -m profiling.nsight $@

clean:
	rm -rf $(VENV) build dist site *.egg-info

# The d4rl package asks for MuJoCo's old bindings; what the tests compare with needs none of it.
$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "installing into $(VENV): some minutes, this once"
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps -c constraints.txt d4rl gym gym_notices
	touch $@
