# Two commands do it all on a fresh machine: `make train` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# a stamp, so that installing happens once per change of the package's requirements
STAMP := .venv/.installed

.PHONY: train test bench resources lint model clean

train: $(STAMP)
	$(BIN)/python -m pcpo_fast.train $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto --maxprocesses 8 --dist worksteal $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m pytest bench $(ARGS)

# registers, spills, access widths and instructions of every kernel, compiled for GPUs that need not be here
resources: $(STAMP)
	$(BIN)/python bench/resources.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# rebuilds the embedded digits models from nothing (needs no download)
model: $(STAMP)
	$(BIN)/python -m pcpo_fast.digits.build $(ARGS)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,study,bench,test,dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info runs
