"""Shared by the tests: Trainers, models and data, merge callbacks, ranks, made-up outcomes, commands, browsers."""

import pkgutil

import pytest

pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)))
