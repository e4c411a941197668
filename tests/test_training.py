"""Training that stops and goes on, acts under interventions, shares its work over processes, or moves every weight."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from finetune.datasets.rows import exchange, write_jsonl
from finetune.full import train_full
from finetune.fused import fused_lora
from finetune.labels import TrainingRow, training_rows
from finetune.lora import train_lora
from finetune.loss import summed_loss
from finetune.settings import TrainSettings, make_settings
from finetune.stages import run_stage
from finetune.state import FILE, StepRecord
from mech.chat import SystemPrompt
from mech.errors import FileFormatError, InputError, MissingDependencyError
from mech.interventions import Ablate, Add, Patch, intervene
from mech.models import ChatModel, load_model
from mech.packed_attention import packed_attention
from probes.direction import Direction
from tests.tiny_study import save_model

SETTINGS = TrainSettings(
    learning_rate=0.01, batch_size=3, max_steps=6, lora_r=2, lora_alpha=4, warmup_steps=1, epochs=3
)
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def model(folder: Path) -> ChatModel:
    return load_model(str(folder))


def data(n: int = 8) -> list[dict[str, Any]]:
    return [exchange(f"What of {i * i}?", f"the cat {i} and the dog") for i in range(n)]


def encoded(model: ChatModel, n: int = 8) -> list[TrainingRow]:
    return training_rows(model.template, data(n), SystemPrompt(), max_tokens=512, names={})


def curve(records: list[StepRecord]) -> list[tuple[float, ...]]:
    return [(r.step, r.loss, r.learning_rate, r.grad_norm, r.tokens) for r in records]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_equal_weights(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


# -- killed and going on ---------------------------------------------------------------------------


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


# -- snapshots -------------------------------------------------------------------------------------


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


# -- interventions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("positions", ["all", "prompt", "response", "prompt_last"])
def test_preventative_steering_is_in_the_loss_and_its_gradient(
    model: ChatModel, tmp_path: Path, positions: Any, *, checkpointed: bool
) -> None:
    """The first loss is that of the plain model under the same hook written by hand, one row at a time."""
    rows = encoded(model, 3)
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    settings = SETTINGS.model_copy(update={"gradient_checkpointing": checkpointed, "max_steps": 2})
    ours = train_lora(
        model,
        rows,
        settings,
        tmp_path / "a",
        seed=0,
        interventions=[Add(vector, [1], 3.0, positions=positions)],
    )
    total = 0.0
    for row in rows:
        (start, stop), n = row.answers[0], len(row.ids)
        where = {
            "all": (0, n),
            "prompt": (0, start),
            "response": (start, stop - 1),
            "prompt_last": (start - 1, start),
        }
        a, b = where[positions]

        def add(_m: Any, _i: Any, out: Any, a: int = a, b: int = b) -> Any:
            h = (out[0] if isinstance(out, tuple) else out).clone()
            h[:, a:b] += 3.0 * vector
            return (h, *out[1:]) if isinstance(out, tuple) else h

        handle = model.blocks[1].register_forward_hook(add)
        labels = torch.full((1, n), -100)
        labels[0, list(row.targets)] = torch.tensor([row.ids[t] for t in row.targets])
        with torch.no_grad():
            total += float(model.hf(input_ids=torch.tensor([row.ids]), labels=labels).loss) * len(row.targets)
        handle.remove()
    assert ours[0].loss == pytest.approx(total / sum(len(r.targets) for r in rows), rel=1e-4)
    about = json.loads((tmp_path / "a" / "trainer_state.json").read_text())
    assert about["interventions"][0]["coefficient"] == 3.0
    assert about["interventions"][0]["norms"] == [pytest.approx(float(vector.norm()))]


def test_checkpointing_changes_memory_not_the_result(model: ChatModel, tmp_path: Path) -> None:
    runs = {}
    for on in (False, True):
        settings = SETTINGS.model_copy(update={"gradient_checkpointing": on})
        runs[on] = train_lora(model, encoded(model), settings, tmp_path / str(on), seed=0)
    assert [r.loss for r in runs[True]] == pytest.approx([r.loss for r in runs[False]], rel=1e-4)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.hf.modules())


def test_ablation_takes_a_direction_from_the_gradient_too(model: ChatModel, tmp_path: Path) -> None:
    """Everything is ablated at the last layer: no gradient reaches the adapters, and training says so."""
    rows = encoded(model, 3)
    values = torch.zeros(1, 3, max(len(r.ids) for r in rows), model.d_model)
    with pytest.raises(Exception, match=r"no gradient|does not require grad|every adapter at zero"):
        train_lora(model, rows, SETTINGS, tmp_path / "a", seed=0, interventions=[Patch(values, [2])])
    plain = train_lora(model, rows, SETTINGS, tmp_path / "b", seed=0)
    vector = torch.ones(model.d_model)
    ablated = train_lora(model, rows, SETTINGS, tmp_path / "c", seed=0, interventions=[Ablate(vector, [2])])
    assert ablated[0].loss != pytest.approx(plain[0].loss, rel=1e-6)


def test_no_hook_stays_behind(model: ChatModel, tmp_path: Path) -> None:
    ids = torch.tensor([encoded(model)[0].ids])
    before = model.hf(input_ids=ids).logits
    vector = torch.ones(model.d_model)
    train_lora(model, encoded(model), SETTINGS, tmp_path / "a", seed=0, interventions=[Add(vector, [1])])
    assert torch.equal(before, model.hf(input_ids=ids).logits)
    hooks = [m for m in model.hf.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks


# -- every weight; 4 bits --------------------------------------------------------------------------


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
    # It is a checkpoint in its own right: a second stage stands on it.
    made = {
        "checkpoint": {"digest": model.checkpoint.digest}
    }  # a direction of what it was trained from still fits
    known = Direction("d", np.ones((3, 32), np.float32), np.ones(3, np.float32), 2, made)
    known.require(n_layers=3, d_model=32, base=loaded.checkpoint.origins)
    with pytest.raises(InputError, match="made on another base"):
        known.require(n_layers=3, d_model=32, base=loaded.checkpoint.digest)
    second = run_stage(str(tmp_path / "full"), _jsonl(tmp_path), SETTINGS, tmp_path / "second", seed=0)
    assert second.digest == loaded.checkpoint.digest
    assert len(second.adapters) == 1


def _jsonl(folder: Path) -> Path:
    write_jsonl(folder / "rows.jsonl", data())
    return folder / "rows.jsonl"


def test_two_stages_are_a_stack(folder: Path, tmp_path: Path) -> None:
    rows = _jsonl(tmp_path)
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


# -- several processes -----------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
from finetune.settings import TrainSettings
from finetune.stages import run_stage
model, rows, out, shard = sys.argv[1:]
settings = TrainSettings(learning_rate=0.01, batch_size=3, max_steps=3, lora_r=2, lora_alpha=4, warmup_steps=1,
                         epochs=3, shard=shard == "shard")
run_stage(model, Path(rows), settings, Path(out), seed=3)
"""


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["copy", "shard"])
def test_two_processes_take_the_same_steps_as_one(folder: Path, tmp_path: Path, shard: str) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    rows = _jsonl(tmp_path)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "--num_cpu_threads_per_process", "1"]  # fmt: skip
    command = [*launch, str(tmp_path / "train.py"), str(folder), str(rows), str(tmp_path / "two"), shard]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    settings = SETTINGS.model_copy(update={"max_steps": 3})
    model = load_model(str(folder))
    alone = train_lora(model, encoded(model), settings, tmp_path / "one", seed=3)
    records = json.loads((tmp_path / "two" / "trainer_state.json").read_text())
    assert records["processes"] == 2
    assert [r["loss"] for r in records["log_history"]] == pytest.approx([r.loss for r in alone], rel=1e-5)
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=1e-3, atol=1e-5)


# -- the faster ways are the same ------------------------------------------------------------------


def test_fused_layers_are_pefts(model: ChatModel) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear", init_lora_weights=False
    )
    adapted = get_peft_model(model.hf, config)
    model.check_head()
    found = []
    for fused in (False, True):
        adapted.zero_grad()
        context = fused_lora(adapted) if fused else nullcontext()
        with context as changed:
            assert not fused or changed == 7 * model.n_layers
            with packed_attention(model):
                loss = summed_loss(model, encoded(model), packed=True)
            loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in adapted.parameters() if p.requires_grad)])
    for a, b in zip(*found, strict=True):  # a summed loss: some gradients are in the hundreds
        assert float((a - b).abs().max()) <= 2e-5 * float(a.abs().max())
    assert not any("forward" in vars(m) for m in adapted.modules())


def test_dropout_and_dora_are_left_to_peft(model: ChatModel) -> None:
    from peft import LoraConfig, get_peft_model

    for odd in ({"lora_dropout": 0.1}, {"use_dora": True}):
        adapted = get_peft_model(
            load_model(model.checkpoint).hf, LoraConfig(r=2, target_modules=["q_proj"], **odd)
        )
        with fused_lora(adapted) as changed:
            assert changed == 0


@pytest.mark.parametrize("frozen", [True, False])
def test_the_heads_loss_is_cross_entropy(model: ChatModel, *, frozen: bool) -> None:
    """Also for more labels than one chunk holds, with a head that learns, and in float64 against finite differences."""
    from finetune.loss import _FrozenHeadLoss

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, dtype=torch.float64)
    targets = torch.randint(50, (300,), generator=generator)
    ours = _FrozenHeadLoss.apply(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(ours, hidden)
    theirs = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    (expected,) = torch.autograd.grad(theirs, hidden)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    model.hf.get_output_embeddings().requires_grad_(not frozen)
    with packed_attention(model):
        losses = [float(summed_loss(model, encoded(model), packed=p).detach()) for p in (True, False)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# -- settings --------------------------------------------------------------------------------------


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


def test_a_tracker_is_told_of_every_step(folder: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_stage(str(folder), _jsonl(tmp_path), SETTINGS, tmp_path / "a", seed=0, trackers=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    events.Reload()
    records = [json.loads(line) for line in (tmp_path / "a" / "loss.jsonl").read_text().splitlines()]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([r["loss"] for r in records])
    with pytest.raises(InputError, match="tracker 'paper' is not one of wandb, tensorboard"):
        run_stage(str(folder), _jsonl(tmp_path), SETTINGS, tmp_path / "b", seed=0, trackers=["paper"])


def test_four_bits_need_a_gpu_to_be_trained_on(model: ChatModel, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"quantise": "nf4"})
    with pytest.raises(InputError, match="carry no gradient on a CPU"):
        train_lora(model, encoded(model), settings, tmp_path / "a", seed=0)


def test_four_bits_need_their_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'sgtr-mech\[qlora\]'"):
        load_model(str(folder), quantise="nf4")


def test_an_intervention_acts_under_shared_prefixes_as_without(model: ChatModel) -> None:
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    with (
        torch.no_grad(),
        packed_attention(model),
        intervene(model, Add(vector, [0, 2], 2.0, positions="prompt")),
    ):
        shared, packed, plain = (
            float(summed_loss(model, encoded(model), packed=p, share=s))
            for p, s in ((True, True), (True, False), (False, True))
        )
    assert shared == pytest.approx(plain, rel=1e-5)
    assert packed == pytest.approx(plain, rel=1e-5)
