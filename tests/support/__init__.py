"""Shared by the tests: Trainers, models and data, merge callbacks, ranks, made-up outcomes, commands, browsers."""

import pytest

pytest.register_assert_rewrite("tests.support")
