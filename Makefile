# make demo: set up, then learn a backbone from embedded images in about two minutes.
# make test: set up, then run every check that continuous integration runs.
# make dist: build the wheel and the source archive in dist/.
PYTHON ?= python3
UV := .tools/bin/uv
RUN := .venv/bin

.PHONY: demo test setup check dist lock clean

demo: setup
	$(RUN)/mocokit pretrain

test: setup check
	$(RUN)/pytest

setup: .setup-done

.setup-done: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m pip install --quiet --no-warn-script-location --upgrade --target .tools uv
	$(UV) venv --quiet --clear --python $(PYTHON) .venv
	$(UV) pip install --quiet --compile-bytecode --python .venv -c constraints.txt -e '.[dev]'
	touch .setup-done

check: setup
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy

# Includes no address of a registry: uv uses the one that the machine is set up for.
dist: setup
	rm -rf dist
	$(UV) build --quiet --out-dir dist

# Pins for every platform; the file holds no address, so any mirror can serve it.
lock:
	$(UV) pip compile --quiet --universal --no-header --no-annotate --no-emit-index-url \
		--python-version 3.11 --extra dev --upgrade pyproject.toml -o constraints.txt

clean:
	rm -rf .venv .tools .setup-done dist
