"""What all tests share: no hub, the real small model where it has been fetched, and long tests only where they are asked for."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from mech.fetch import is_fetched
from mech.models import ChatModel, load_model

REAL = "smollm2-135m-instruct"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked `long` too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Not by a default `-m`, which another `-m` on the command line would put out of force."""
    if config.getoption("--long"):
        return
    left_out = [item for item in items if "long" in item.keywords]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def real() -> ChatModel:
    """The real small model, in float32."""
    if not is_fetched(REAL):
        pytest.skip(f"{REAL} is not on this machine: run `mech models fetch {REAL}`")
    return load_model(REAL)
