"""The run-time type checker of the tests: beartype that takes an int for a float, as mypy does."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
