"""What all tests share: no hub, the real small model where it has been fetched, and long tests only where they are asked for."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from mech.chat import ChatTemplate, Encoded
from mech.checkpoint import source_of
from mech.fetch import is_fetched
from mech.models import ChatModel, load_model
from mech.resolve import resolve
from study.engines.local import locked
from tests.openai_server import Server, serving

MadeOnce = Callable[[str, Callable[[Path], object]], Path]
REAL = "smollm2-135m-instruct"

# The same examples in every run, and no limit on an example's milliseconds: a busy machine fails no test.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked `long` too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long ones only where asked for: not by a default `-m`, which another `-m` on the command line would put out of force.

    And slow ones first, for the last test to begin decides how long one of two workers stands idle.
    """
    items.sort(key=lambda item: ("slow" in item.keywords, "real" in item.keywords), reverse=True)
    if config.getoption("--long"):
        return
    left_out = [item for item in items if "long" in item.keywords]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """A folder of a name that whichever worker needs it first fills, and all may read: `made_once("study", fill)`."""
    ours = tmp_path_factory.getbasetemp()
    common = ours.parent if "PYTEST_XDIST_WORKER" in os.environ else ours

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder, made = common / name, common / f"{name}.made"
        with locked(common / f"{name}.lock"):
            if not made.exists():
                fill(folder)
                made.touch()
        return folder

    return make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model on disk, the test module's own."""
    from tests.tiny_study import save_model

    return save_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def model(folder: Path) -> ChatModel:
    """The same, loaded once for the module: a test leaves it as it was."""
    return load_model(str(folder))


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    """An adapter on it."""
    from tests.tiny_study import save_adapter

    return save_adapter(folder, folder.parent / "adapter", seed=1)


@pytest.fixture(scope="module")
def live(folder: Path, adapter: Path) -> ChatModel:
    """Both, loaded once for the module, the adapter live."""
    return load_model(f"{folder}:{adapter}", merge=False)


@pytest.fixture(scope="module")
def rows(model: ChatModel) -> list[Encoded]:
    """Six short rows of it, with prompts of three lengths."""
    turns = [
        [{"role": "user", "content": "Who?" * (1 + i % 3)}, {"role": "assistant", "content": f"the dog {i}"}]
        for i in range(6)
    ]
    return [model.template.encode(t) for t in turns]


@pytest.fixture(scope="module")
def vector(model: ChatModel) -> Tensor:
    """Something to add to its stream, as long as to be felt."""
    return torch.randn(model.d_model, generator=torch.Generator().manual_seed(0)) * 4


@pytest.fixture(scope="module")
def home(made_once: MadeOnce) -> Path:
    """A folder with a tiny model and its study."""
    from tests.tiny_study import save_adapter, save_model, write_study

    def fill(folder: Path) -> None:
        write_study(folder)
        save_adapter(save_model(folder / "model"), folder / "given", seed=0)

    return made_once("tiny_study", fill)


@pytest.fixture(scope="module")
def finished(home: Path, made_once: MadeOnce) -> Path:
    """The study's output, run once without any disturbance."""
    from study.run import run_study
    from study.spec import load_spec

    return made_once("tiny_study_out", lambda out: run_study(load_spec(home / "study.yaml"), out))


@pytest.fixture(scope="session")
def real() -> ChatModel:
    """The real small model, in float32."""
    if not is_fetched(REAL):
        pytest.skip(f"{REAL} is not on this machine: run `mech models fetch {REAL}`")
    return load_model(REAL)


@pytest.fixture(scope="session")
def real_template() -> ChatTemplate:
    """The real small model's chat template, with its tokenizer; its weights are not loaded."""
    from transformers import AutoTokenizer

    if not is_fetched(REAL):
        pytest.skip(f"{REAL} is not on this machine: run `mech models fetch {REAL}`")
    folder, kwargs = source_of(resolve(REAL))
    return ChatTemplate(AutoTokenizer.from_pretrained(folder, **kwargs))


@dataclass
class Ended:
    """What a command left behind."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The entry point of `mech`, called in this process: `command("store", "ls", folder)`."""
    from study.cli import main

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["mech", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Ended(int(ended.value.code or 0), said.out, said.err)

    return run


@pytest.fixture
def planted_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key of no worth in the environment, for tests that talk to `server`."""
    from tests.remote_runs import plant_key

    plant_key(monkeypatch)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file of rows for a remote training."""
    from tests.remote_runs import write_rows

    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture
def server() -> Iterator[Server]:
    """A local service that speaks OpenAI's API."""
    pytest.importorskip("openai", reason="the extra `openai` is not installed")
    with serving() as running:
        yield running
