# Everything goes through .ci/bootstrap.py, which makes .venv where it is missing or out of date.
PYTHON ?= python3

.PHONY: demo test test-slow lint fix

demo test test-slow lint fix:
	@"$(PYTHON)" .ci/bootstrap.py $@
