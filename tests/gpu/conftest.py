"""Fixtures of the tests that need a GPU: the small runs of the training tests."""

from tests.train.conftest import make_config as make_config
from tests.train.conftest import shards as shards
