"""What tests of the compiled core share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from operators import native
from operators.native import build


@pytest.fixture(scope="session")
def compiled() -> None:
    """The core, built if need be; without a compiler what needs it is skipped."""
    try:
        build.build()
    except RuntimeError as error:
        pytest.skip(f"the core cannot be built here: {error}")


@pytest.fixture
def core(compiled: None) -> Iterator[None]:
    """The core in use."""
    assert native.use(True)
    yield
    native.use(False)
