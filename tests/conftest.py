"""What all tests share: no hub, and the real small model where it has been fetched."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from mech.fetch import is_fetched
from mech.models import ChatModel, load_model

REAL = "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def real() -> ChatModel:
    """The real small model, in float32."""
    if not is_fetched(REAL):
        pytest.skip(f"{REAL} is not on this machine: run `mech models fetch {REAL}`")
    return load_model(REAL)
