# `make demo` and `make test` are all a newcomer needs; everything is installed in .venv.

PYTHON ?= python3
BIN := .venv/bin
DEMO := out/demo

.PHONY: demo test test-fast lint install sim clean

demo: sim $(DEMO)/bundle/manifest.json
	$(BIN)/otau run $(DEMO)/bundle --robot robosuite:Lift --steps 100 --video $(DEMO)/lift.mp4

$(DEMO)/bundle/manifest.json: $(DEMO)/checkpoint/model.safetensors
	$(BIN)/otau compile $(DEMO)/checkpoint --target cpu --out $(DEMO)/bundle

$(DEMO)/checkpoint/model.safetensors: .venv/installed
	rm -rf $(DEMO)/checkpoint
	$(BIN)/otau init --policy pi05 --size tiny --out $(DEMO)/checkpoint

test: sim lint
	$(BIN)/pytest

test-fast: install
	$(BIN)/pytest -m "not slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[toolchain,training,libero,dev]'
	touch $@

# robosuite and hf-libero ask for packages that otau does not need, and hf-libero for torchvision, which
# exists for CUDA builds of torch only: so they come without their dependencies.
sim: .venv/simulator
	@$(BIN)/python -c 'import ctypes; ctypes.CDLL("libEGL.so.1")' 2>/dev/null || $(MAKE) --no-print-directory libraries

.venv/simulator: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps robosuite==1.4.0 hf-libero==0.1.4 bddl==1.0.1
	touch $@

# Software rendering without a screen.
.PHONY: libraries
libraries:
	@echo "installing the system libraries that MuJoCo renders with"
	@$(if $(filter 0,$(shell id -u)),,sudo) apt-get update -qq
	@$(if $(filter 0,$(shell id -u)),,sudo) apt-get install -y -qq libegl1 libgl1-mesa-dri >/dev/null

clean:
	rm -rf out .venv build dist
