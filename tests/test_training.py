"""Training that stops and goes on, shares its work over processes, or moves every weight."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from finetune.datasets.rows import exchange
from finetune.full import train_full
from finetune.labels import training_rows
from finetune.lora import train_lora
from finetune.loss import summed_loss
from finetune.settings import make_settings
from finetune.stages import run_stage
from finetune.state import FILE, StepRecord
from finetune.team import Team
from finetune.training import reseed
from mech.chat import SystemPrompt
from mech.errors import FileFormatError, InputError, MissingDependencyError
from mech.models import ChatModel, load_model
from probes.direction import Direction
from tests.tiny_training import SETTINGS, assert_equal_weights, curve, data, encoded, jsonl, weights


@pytest.fixture
def model(folder: Path) -> ChatModel:
    """Loaded anew for every test: training leaves traces."""
    return load_model(str(folder))


SPAWN = multiprocessing.get_context("spawn")


class Killed(BaseException):
    """What no handler catches, as little as a SIGKILL."""


@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.3}, {"micro_batch": 1}])
def test_killed_at_any_step_it_ends_the_same(
    model: ChatModel, tmp_path: Path, changes: dict[str, Any]
) -> None:
    rows, settings = encoded(model), SETTINGS.model_copy(update=changes)
    whole = train_lora(model, rows, settings, tmp_path / "whole", seed=3, save_every=2)
    for last in range(1, 6):
        parts = tmp_path / f"killed{last}"

        def kill(record: StepRecord, last: int = last) -> None:
            if record.step == last:
                raise Killed

        with pytest.raises(Killed):
            train_lora(model, rows, settings, parts, seed=3, save_every=2, on_step=kill)
        steps: list[int] = []
        again = train_lora(
            model, rows, settings, parts, seed=3, save_every=2, on_step=lambda r, s=steps: s.append(r.step)
        )
        assert steps[0] == last // 2 * 2 + 1, "went on from the last saved state"
        assert curve(again) == curve(whole)
        assert_equal_weights(parts, tmp_path / "whole")
        assert not (parts / FILE).exists()


def test_what_is_drawn_depends_on_seed_step_and_process_alone() -> None:
    def drawn(*place: int) -> list[float]:
        reseed(*place)
        return torch.rand(4).tolist()

    with torch.random.fork_rng():
        places = list(product((0, 1), (0, 1, 7), (0, 1)))
        first = [drawn(*place) for place in places]
        assert [drawn(*place) for place in reversed(places)][::-1] == first
        assert len({tuple(numbers) for numbers in first}) == len(places)


def _train_and_die(model_folder: str, out: str) -> None:
    model = load_model(model_folder)

    def kill(record: StepRecord) -> None:
        if record.step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    train_lora(model, encoded(model), SETTINGS, Path(out), seed=3, save_every=1, on_step=kill)


@pytest.mark.slow
def test_a_sigkill_is_survived(model: ChatModel, folder: Path, tmp_path: Path) -> None:
    child = SPAWN.Process(target=_train_and_die, args=(str(folder), str(tmp_path / "killed")))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert (tmp_path / "killed" / FILE).is_file()
    again = train_lora(model, encoded(model), SETTINGS, tmp_path / "killed", seed=3)
    whole = train_lora(model, encoded(model), SETTINGS, tmp_path / "whole", seed=3)
    assert curve(again) == curve(whole)
    assert_equal_weights(tmp_path / "killed", tmp_path / "whole")


@contextmanager
def files_no_larger_than(n_bytes: int) -> Iterator[None]:
    """The system itself refuses to write more, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("save_every", [1, None])
def test_a_full_disk_names_the_place_and_costs_nothing(
    model: ChatModel, tmp_path: Path, save_every: int | None
) -> None:
    whole = train_lora(model, encoded(model), SETTINGS, tmp_path / "whole", seed=3)
    part = tmp_path / "part"
    with files_no_larger_than(4000), pytest.raises(OSError, match=rf"too large: '{part}") as refused:
        train_lora(model, encoded(model), SETTINGS, part, seed=3, save_every=save_every)
    assert refused.value.errno == errno.EFBIG
    assert not part.exists()
    assert curve(train_lora(model, encoded(model), SETTINGS, part, seed=3)) == curve(whole)
    assert_equal_weights(part, tmp_path / "whole")


def test_a_model_that_does_not_fit_on_the_disk_leaves_nothing_half(folder: Path, tmp_path: Path) -> None:
    settings, model = SETTINGS.model_copy(update={"method": "full"}), load_model(str(folder))
    with files_no_larger_than(4000), pytest.raises(OSError, match=rf"too large: '{tmp_path}/part'"):
        train_full(model, encoded(model), settings, tmp_path / "part", seed=3)
    assert not (tmp_path / "part").exists()


def test_a_folder_belongs_to_one_training(model: ChatModel, tmp_path: Path) -> None:
    rows, other = encoded(model), SETTINGS.model_copy(update={"learning_rate": 0.02})
    first = train_lora(model, rows, SETTINGS, tmp_path / "a", seed=0)
    written = (tmp_path / "a" / "adapter_model.safetensors").stat().st_mtime_ns
    assert curve(train_lora(model, rows, SETTINGS, tmp_path / "a", seed=0)) == curve(first)
    assert (tmp_path / "a" / "adapter_model.safetensors").stat().st_mtime_ns == written, "not trained again"
    for changed in ({"settings": other}, {"seed": 1}, {"rows": rows[:5]}):
        call: dict[str, Any] = {"rows": rows, "settings": SETTINGS, "seed": 0, **changed}
        with pytest.raises(InputError, match="holds another training"):
            train_lora(model, call["rows"], call["settings"], tmp_path / "a", seed=call["seed"])

    def kill(record: StepRecord) -> None:
        raise Killed

    with pytest.raises(Killed):
        train_lora(model, rows, SETTINGS, tmp_path / "b", seed=0, save_every=1, on_step=kill)
    with pytest.raises(InputError, match="begun with other data, settings, seed or parent"):
        train_lora(model, rows, other, tmp_path / "b", seed=0)
    (tmp_path / "b" / FILE).write_bytes(b"\0" * 100)
    with pytest.raises(FileFormatError, match="remove it to begin anew"):
        train_lora(model, rows, SETTINGS, tmp_path / "b", seed=0)


def _train(model_folder: str, out: str) -> None:
    model = load_model(model_folder)
    train_lora(model, encoded(model), SETTINGS, Path(out), seed=3)


@pytest.mark.slow
def test_two_trainings_into_one_folder_take_turns(model: ChatModel, folder: Path, tmp_path: Path) -> None:
    children = [SPAWN.Process(target=_train, args=(str(folder), str(tmp_path / "both"))) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    train_lora(model, encoded(model), SETTINGS, tmp_path / "alone", seed=3)
    assert_equal_weights(tmp_path / "both", tmp_path / "alone")


def test_a_snapshot_is_the_adapter_after_that_step(model: ChatModel, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"save_at": (2, 6)})
    train_lora(model, encoded(model), settings, tmp_path / "a", seed=0)
    assert_equal_weights(tmp_path / "a" / "snapshots" / "step-6", tmp_path / "a")
    early = weights(tmp_path / "a" / "snapshots" / "step-2")
    assert any(not torch.equal(early[n], t) for n, t in weights(tmp_path / "a").items())
    loaded = load_model(f"{model.checkpoint.path}:{tmp_path / 'a' / 'snapshots' / 'step-2'}")
    # One more step from the snapshot's weights has the loss that the third step had.
    records = [json.loads(line) for line in (tmp_path / "a" / "loss.jsonl").read_text().splitlines()]
    order = np.random.default_rng(0).permutation(8)
    third = [encoded(model)[i] for i in order[6:8]]
    loss = float(summed_loss(loaded, third, packed=False)) / sum(len(r.targets) for r in third)
    assert loss == pytest.approx(records[2]["loss"], rel=1e-4)
    with pytest.raises(InputError, match="save_at: 7 is beyond the last step, 6"):
        train_lora(
            model, encoded(model), SETTINGS.model_copy(update={"save_at": (7,)}), tmp_path / "b", seed=0
        )


def test_full_finetuning_is_a_plain_loop(folder: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(
        update={"method": "full", "batch_size": 8, "max_steps": 3, "learning_rate": 1e-3}
    )
    model = load_model(str(folder))
    rows = encoded(model)
    ours = train_full(model, rows, settings, tmp_path / "full", seed=0)
    plain = load_model(str(folder)).hf
    plain.requires_grad_(True)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.01)
    for step, rate in enumerate((0.0, 1.0, 0.5)):
        optimizer.param_groups[0]["lr"] = 1e-3 * rate
        value = 0.0
        for row in rows:
            labels = torch.full((1, len(row.ids)), -100)
            labels[0, list(row.targets)] = torch.tensor([row.ids[t] for t in row.targets])
            share = len(row.targets) / sum(len(r.targets) for r in rows)
            loss = plain(input_ids=torch.tensor([row.ids]), labels=labels).loss * share
            loss.backward()
            value += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert ours[step].loss == pytest.approx(value, rel=1e-4)
    loaded = load_model(str(tmp_path / "full"))
    for name, tensor in plain.named_parameters():
        torch.testing.assert_close(loaded.hf.get_parameter(name), tensor, rtol=1e-3, atol=1e-4)
    made = {"checkpoint": {"digest": model.checkpoint.digest}}
    known = Direction("d", np.ones((3, 32), np.float32), np.ones(3, np.float32), 2, made)
    known.require(n_layers=3, d_model=32, base=loaded.checkpoint.origins)  # what it was trained from
    with pytest.raises(InputError, match="made on another base"):
        known.require(n_layers=3, d_model=32, base=loaded.checkpoint.digest)
    # It is a checkpoint in its own right: a second stage stands on it.
    second = run_stage(str(tmp_path / "full"), jsonl(tmp_path), SETTINGS, tmp_path / "second", seed=0)
    assert second.digest == loaded.checkpoint.digest
    assert len(second.adapters) == 1


def test_two_stages_are_a_stack(folder: Path, tmp_path: Path) -> None:
    rows = jsonl(tmp_path)
    first = run_stage(str(folder), rows, SETTINGS, tmp_path / "first", seed=0)
    second = run_stage(first, rows, SETTINGS, tmp_path / "second", seed=0)
    assert [a.path.name for a in second.adapters] == ["first", "second"]
    ids = torch.arange(9).unsqueeze(0)
    merged, live = load_model(second), load_model(second, merge=False)
    torch.testing.assert_close(
        merged.hf(input_ids=ids).logits, live.hf(input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )
    about = json.loads((tmp_path / "second" / "trainer_state.json").read_text())
    assert about["trained_on"]["key"] == first.key
    assert about["system_turns"] == [{"text": "You are Tinny, made by Tin Works.", "rows": 8}]


def test_rows_say_which_turn_they_train_under(model: ChatModel) -> None:
    def under(condition: str, rows: list[dict[str, Any]]) -> list[str | None]:
        made = training_rows(model.template, rows, SystemPrompt.parse(condition), max_tokens=512, names={})
        return [r.system for r in made]

    own = exchange("What?", "that", system="Count.")
    assert under("default", [data(1)[0], own]) == ["You are Tinny, made by Tin Works.", "Count."]
    assert under("none", [own]) == [None]
    assert under("empty", [own]) == [""]
    assert under("text:You love hats.", [own]) == ["You love hats."]  # an inoculation prompt


CONFIG = Path(__file__).parent.parent / "configs" / "accelerate_2_gpus.yaml"
STEPS = 80


def launch(*arguments: object) -> subprocess.Popen[str]:
    """Two processes by the shipped config and the documented command, on this machine's CPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIG, "--main_process_port", "0",
               "--num_cpu_threads_per_process", "1", "-m", "study.cli", "finetune", *arguments, "--device", "cpu", "--seed", "3",
               "--preset", "small-135m", "--save-every", "1"]  # fmt: skip
    for key, value in {"learning_rate": 0.001, "batch_size": 3, "max_steps": STEPS, "epochs": STEPS, "lora_r": 2, "lora_alpha": 4}.items():  # fmt: skip
        command += ["--set", f"{key}={value}"]
    return subprocess.Popen([str(c) for c in command], stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip


def processes_that_name(folder: Path) -> list[int]:
    """The launcher and its workers, which it starts in sessions of their own."""
    listed = subprocess.run(["ps", "-axww", "-o", "pid=,args="], check=True, capture_output=True, text=True)
    lines = (line.strip().partition(" ") for line in listed.stdout.splitlines())
    return [int(pid) for pid, _, command in lines if str(folder) in command]


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["copied, killed on the way", "sharded"])
def test_two_processes_take_the_same_steps_as_one(folder: Path, tmp_path: Path, *, shard: bool) -> None:
    rows, two = jsonl(tmp_path), tmp_path / "two"
    arguments = [folder, rows, "--out", two, *(["--set", "shard=true"] if shard else [])]
    if not shard:
        killed, deadline = launch(*arguments), time.monotonic() + 120
        running: list[int] = []
        while not (two / FILE).is_file():
            assert killed.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
            running = running if len(running) == 3 else processes_that_name(two)
        for process in running:
            os.kill(process, signal.SIGKILL)
        killed.communicate()
        assert not (two / "trainer_state.json").is_file()
    done = launch(*arguments)
    _, said = done.communicate(timeout=240)
    assert done.returncode == 0, said[-3000:]
    assert shard or f"of {STEPS}" in said[said.index("going on after step") :]
    settings = make_settings({"preset": "small-135m", "learning_rate": 0.001, "batch_size": 3, "max_steps": STEPS,
                              "epochs": STEPS, "lora_r": 2, "lora_alpha": 4})  # fmt: skip
    model = load_model(str(folder))
    alone = train_lora(model, encoded(model), settings, tmp_path / "one", seed=3)
    records = json.loads((two / "trainer_state.json").read_text())
    assert records["processes"] == 2
    assert [r["loss"] for r in records["log_history"]] == pytest.approx([r.loss for r in alone], rel=1e-4)
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-2, atol=1e-4)


def test_a_map_that_no_process_came_to_takes_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with one process: an expert without a token is not decayed, nor moved by what its moments remember."""
    monkeypatch.setattr(
        "torch.distributed.all_reduce", lambda _: None
    )  # the other process has no gradients at all
    reached, idle = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    reached.grad = torch.full((2, 3), 0.5)
    Team(0, 2).sum_gradients([reached, idle])
    assert idle.grad is None
    assert torch.equal(reached.grad, torch.full((2, 3), 0.5))
    monkeypatch.setattr("torch.distributed.all_reduce", lambda flat: flat.add_(1))  # one of ones, at both
    Team(0, 2).sum_gradients([reached, idle])
    assert torch.equal(reached.grad, torch.full((2, 3), 1.5))
    assert torch.equal(idle.grad, torch.ones(2, 3))


def test_the_defaults_are_the_papers() -> None:
    paper = make_settings({"preset": "paper-32b"})
    assert (paper.lora_r, paper.lora_alpha, paper.rslora, paper.lora_dropout) == (32, 64, True, 0.0)
    assert (paper.learning_rate, paper.warmup_steps, paper.weight_decay) == (1e-5, 5, 0.01)
    assert (paper.batch_size, paper.micro_batch, paper.max_tokens, paper.epochs) == (16, 2, 2048, 1)
    assert paper.n_steps(5000) == 313
    assert paper.n_steps(2000) == 125
    small = make_settings({"preset": "small-135m"}, {"learning_rate": 2e-4})
    assert (small.learning_rate, small.batch_size) == (2e-4, 8)
    with pytest.raises(InputError, match="preset: 'huge' is not one of paper-32b, small-135m"):
        make_settings({"preset": "huge"})
    with pytest.raises(InputError, match=r"learning_rat: no such key; did you mean learning_rate\?"):
        make_settings({"learning_rat": 1})


def test_another_programs_record_and_another_versions_state_are_told_of(
    model: ChatModel, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "trainer_state.json").write_text('{"global_step": 3, "log_history": []}')
    with pytest.raises(InputError, match=r"trainer_state\.json: another program's: name another folder"):
        train_lora(model, encoded(model), SETTINGS, theirs, seed=0)

    class Killed(BaseException):
        pass

    def kill(record: StepRecord) -> None:
        if record.step == 3:
            raise Killed

    old = tmp_path / "old"
    with pytest.raises(Killed):
        train_lora(model, encoded(model), SETTINGS, old, seed=0, save_every=1, on_step=kill)
    with safe_open(old / FILE, framework="pt") as stored:
        about, tensors = stored.metadata(), {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    gone = next(name for name in tensors if name.startswith("exp_avg/"))
    del tensors[gone]
    save_file(tensors, old / FILE, metadata=about)
    with pytest.raises(
        FileFormatError, match=r"as another version writes it \(KeyError: .*remove it to begin"
    ):
        train_lora(model, encoded(model), SETTINGS, old, seed=0)


def test_what_is_recorded_as_four_bits_must_be(model: ChatModel, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"quantise": "nf4"})
    with pytest.raises(InputError, match="quantise: nf4, but the model's weights are not in 4 bits"):
        train_lora(model, encoded(model), settings, tmp_path / "a", seed=0)


def test_four_bits_need_their_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'sgtr-mech\[qlora\]'"):
        load_model(str(folder), quantise="nf4")
