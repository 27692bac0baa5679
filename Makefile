# Each target sets itself up (scripts/setup.sh): no environment needs to be active. PYTHON=... uses an existing one.
.PHONY: check test lint types format

check:  ## lint, format check, types, then the tests: what CI runs
	@bash scripts/check.sh check

test:  ## the tests alone
	@bash scripts/check.sh test

lint:  ## ruff's rules and its format, changing nothing
	@bash scripts/check.sh lint

types:  ## mypy
	@bash scripts/check.sh types

format:  ## rewrite the files as ruff wants them
	@bash scripts/check.sh format
