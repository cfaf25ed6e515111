"""Small models are quickest on one thread."""

from __future__ import annotations

import pytest
import torch
from transformers.utils import logging


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
