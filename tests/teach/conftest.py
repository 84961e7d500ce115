"""What all tests of teachers share."""

from __future__ import annotations

import functools
import ssl

import pytest


@pytest.fixture(scope="session", autouse=True)
def shared_tls_contexts():
    """Client libraries read all certificates of the system for each client; no test connects by them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", functools.cache(ssl.create_default_context))
        yield
