# Everything a developer, the CI and a first-time user run. Needs make, a POSIX shell and Python 3.11 or later.
.POSIX:

PYTHON = python3
VENV = .venv
BIN = $(VENV)/bin
CXX = c++
# The constraints matter: the bare name torch is several gigabytes of CUDA.
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
VIEW = build/dev/motet
SANITIZED = build/sanitized/motet
CHECK = build/wheel

help:
	@echo 'make serve [HOST=127.0.0.1] [PORT=8000]   install, then serve the default model and the example adapters'
	@echo 'make test  [ARGS="-k name"]               all tests'
	@echo 'make lint                                 ruff, import contracts, hadolint'
	@echo 'make types                                mypy on the sources, and on the installed wheel'
	@echo 'make dev                                  the development environment in $(VENV)'
	@echo 'make native                               compile the native backend again, after a change of its sources'
	@echo 'make sanitize                             its tests with address and undefined-behaviour sanitizers'
	@echo 'make bench ARGS="--url http://…"          load a running server and measure it'
	@echo 'make clean                                remove what these made, $(VENV) too'

# Any option of `motet serve` can also be given as MOTET_<OPTION> in the environment.
serve: $(VENV)/.installed
	@set --; \
	for config in examples/adapters/*/adapter_config.json; do \
		if [ -f "$$config" ]; then \
			folder=$${config%/*}; set -- "$$@" --adapter "$${folder##*/}=$$folder"; \
		fi; \
	done; \
	if [ -n "$$HOST" ]; then set -- "$$@" --host "$$HOST"; fi; \
	if [ -n "$$PORT" ]; then set -- "$$@" --port "$$PORT"; fi; \
	exec $(BIN)/motet serve "$$@"

# pytest's summary is the last line. Without kubectl or the other clients their tests are skipped, or fail where CI is set.
test: $(VENV)/.installed-dev
	@[ -x build/tools/kubectl ] || $(BIN)/python -m tests.unit.deploy.kubectl || echo 'kubectl could not be fetched'
	@[ -x build/tools/clients/bin/python ] || $(BIN)/python -m tests.e2e.clients.environment || echo 'no other clients'
	@exec $(BIN)/python -m pytest $(ARGS)

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=build/dev $(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

types: dev
	$(BIN)/mypy -p motet.adapters -p motet.kernels -p motet.server
	@# Remnants in build/lib would enter the wheel.
	rm -rf $(CHECK) build/lib* build/temp.* build/bdist.*
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(CHECK) .
	$(BIN)/python -m venv --without-pip $(CHECK)/venv
	$(BIN)/python -m pip --quiet --disable-pip-version-check --python $(CHECK)/venv/bin/python \
		install --no-deps $(CHECK)/*.whl
	@# The dependencies are those of $(VENV), whose editable motet is invisible to mypy.
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "`$(CHECK)/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`/dependencies.pth"
	@# An ignore that is not needed is an error too: it is one if the wheel's types do not arrive.
	printf '%s\n' 'from motet.adapters.version import AdapterVersion' \
		'from motet.kernels.errors import BackendUnavailableError' \
		'from motet.server.model.errors import ModelError' '' \
		'def short(version: AdapterVersion) -> str:' '    return version.short' '' \
		'AdapterVersion(1, 2)  # type: ignore[arg-type]' \
		'wrong: int = BackendUnavailableError()  # type: ignore[assignment]' \
		'wrong = ModelError()  # type: ignore[assignment]' > $(CHECK)/consumer.py
	$(BIN)/mypy --strict --config-file= --python-executable $(CHECK)/venv/bin/python $(CHECK)/consumer.py

# Static tools do not follow the hook of an editable install: they get the package as links.
dev: $(VENV)/.installed-dev
	@mkdir -p $(VIEW)
	@for part in adapters kernels server; do \
		[ -L "$(VIEW)/$$part" ] || ln -s "../../../$$part" "$(VIEW)/$$part"; \
	done

native: $(VENV)/.installed-dev
	$(INSTALL) --quiet --no-deps --editable .

# A view of the package whose native backend is the sanitized one; its kernels are a copy.
sanitize: $(VENV)/.installed-dev
	rm -rf build/sanitized
	mkdir -p $(SANITIZED)/kernels
	cp -R kernels/. $(SANITIZED)/kernels
	rm -f $(SANITIZED)/kernels/cpu/_native*.so
	ln -s ../../../adapters ../../../server $(SANITIZED)
	$(CXX) -std=c++20 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Wall -Wextra -Werror -Wno-psabi \
		-fPIC -shared kernels/cpu/native/*.cpp -pthread -o $(SANITIZED)/kernels/cpu/_native.so
	LD_PRELOAD="`$(CXX) -print-file-name=libasan.so` `$(CXX) -print-file-name=libubsan.so`" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitized $(BIN)/python -m pytest -q -s -p no:cacheprovider \
		tests/unit/kernels/test_native.py tests/unit/kernels/test_int8.py tests/unit/server/model/test_native.py

bench: $(VENV)/.installed-dev
	@exec $(BIN)/python -m tests.bench.bench_serving $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f kernels/cpu/_native*.so
	find adapters kernels server tests examples -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt kernels/cpu/native/*
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) --editable '.[train,test,lint]'
	@touch $@

.PHONY: help serve test lint types dev native sanitize bench clean
