# Everything that a fresh machine needs is set up by the target itself, in a virtual environment of its own.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A package index may hold a newer torch with gigabytes of CUDA libraries; the pinned one runs on any CPU.
TORCH := torch==2.13.0

.PHONY: setup demo notebooks test test-slow lint format clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	touch $@

# Segments the sample CT that ships with medseg3d and writes everything that a run can write.
demo: setup
	$(BIN)/medseg3d predict -i "$$($(BIN)/python -c 'import medseg3d; print(medseg3d.sample_ct())')" \
		-o demo/seg.nii.gz --statistics --preview --report
	@echo "Look at demo/seg.preview.png; the segmentation is demo/seg.nii.gz."

# Runs each notebook in a Jupyter kernel, in an empty folder.
notebooks: $(VENV)/.notebooks
	$(BIN)/python scripts/run_notebooks.py -o demo/notebooks
	@echo "Open what is in demo/notebooks to read them with their figures."

$(VENV)/.notebooks: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[notebooks]" -c constraints.txt
	touch $@

test: setup
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache
