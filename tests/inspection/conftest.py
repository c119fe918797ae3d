"""The store that the tests of `verify` copy, damage and repair."""

from __future__ import annotations

import pytest

from tests.helpers.dumped import make


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    return make(tmp_path_factory.mktemp("verify"), tiny)
