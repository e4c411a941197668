"""Adapters stacked unmerged compute, and train, what merged ones do; PEFT reads the result without us."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from activations.store import ActivationStore
from finetune.datasets.rows import exchange, write_jsonl
from finetune.labels import training_rows
from finetune.lora import _adapted, _check_learnt, train_lora
from finetune.settings import TrainSettings, make_settings
from finetune.stages import run_stage
from mech.adapters import adapter_layers, updates
from mech.chat import SystemPrompt
from mech.checkpoint import Checkpoint
from mech.errors import GuardError, InputError
from mech.fetch import is_fetched
from mech.models import ChatModel, load_model
from study.spec import load_spec
from tests.tiny_study import run_needed, save_adapter, save_model, write_study

MERGED = TrainSettings(
    learning_rate=0.01, batch_size=3, max_steps=5, lora_r=2, lora_alpha=4, warmup_steps=1, epochs=3
)
STACKED = MERGED.model_copy(update={"between_stages": "stack"})
SMALL = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def stack(folder: Path) -> str:
    """Two adapters of different rank, the first on some of the maps only."""
    some = save_adapter(folder, folder.parent / "a", seed=1, r=3, targets=["q_proj", "down_proj"])
    every = save_adapter(folder, folder.parent / "b", seed=2, r=2)
    return f"{folder}:{some}:{every}"


def jsonl(folder: Path) -> Path:
    rows = [exchange(f"What of {i * i}?", f"the cat {i} and the dog") for i in range(8)]
    write_jsonl(folder / "rows.jsonl", rows)
    return folder / "rows.jsonl"


def logits(model: Any, n: int = 20) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(5, 5 + n).unsqueeze(0)).logits
    return found


def train(
    model: ChatModel, settings: TrainSettings, folder: Path, *, seed: int = 0, **options: Any
) -> list[Any]:
    rows = [exchange(f"What of {i * i}?", f"the cat {i} and the dog") for i in range(8)]
    encoded = training_rows(model.template, rows, SystemPrompt(), max_tokens=512, names={})
    return train_lora(model, encoded, settings, folder, seed=seed, **options)


def test_stacked_and_merged_adapters_agree_on_logits(folder: Path, stack: str) -> None:
    merged, stacked = load_model(stack), load_model(stack, merge="stack")
    assert list(stacked.hf.active_adapters) == ["stage1", "stage2"]
    torch.testing.assert_close(logits(stacked.hf), logits(merged.hf), rtol=0, atol=1e-4)
    assert (logits(merged.hf) - logits(load_model(str(folder)).hf)).abs().max() > 0.1
    below = load_model(stack.rpartition(":")[0], merge="stack")
    assert (logits(merged.hf) - logits(below.hf)).abs().max() > 0.1, "the second one acts too"
    assert not any(p.requires_grad for p in stacked.hf.parameters())
    with adapter_layers(stacked, []):  # all off is the bare base
        torch.testing.assert_close(logits(stacked.hf), logits(load_model(str(folder)).hf))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "DoRA scales the weights"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "cannot be stacked, only merged"),
        ({"target_modules": ["q_proj", "lm_head"]}, "can be merged, not stacked"),
    ],
)
def test_what_depends_on_what_lies_below_it_is_merged_not_stacked(
    more: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """Each is its own first stage: the second stage of its kind was made on that one merged, and reads so."""
    folder = save_model(tmp_path / "m", tie_word_embeddings=False)
    reference = str(folder)
    for seed, stage in enumerate(("first", "second")):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, init_lora_weights=False, **more)
        made = get_peft_model(load_model(reference).hf, config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT says that it saves the head too
            made.save_pretrained(tmp_path / stage)
        reference += f":{tmp_path / stage}"
    torch.testing.assert_close(logits(load_model(reference).hf), logits(made.eval()), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=said):
        load_model(reference, merge="stack")


def test_a_stacks_updates_are_what_merging_adds(folder: Path, stack: str) -> None:
    base, merged = load_model(str(folder)), load_model(stack)
    found = updates(load_model(stack, merge="stack"))
    assert len(found) == 3 * 7
    for update in found:
        before, after = (m.blocks[update.layer].get_submodule(update.name).weight for m in (base, merged))
        torch.testing.assert_close(after - before, update.left @ update.right, rtol=1e-3, atol=1e-5)


def test_a_second_stage_trains_alike_on_a_stack_and_on_a_merge(stack: str, tmp_path: Path) -> None:
    losses, adapters = {}, {}
    for name, settings in (("merge", MERGED), ("stack", STACKED)):
        made = run_stage(stack, jsonl(tmp_path), settings, tmp_path / name, seed=0)
        about = json.loads((tmp_path / name / "trainer_state.json").read_text())
        losses[name] = [r["loss"] for r in about["log_history"]]
        adapters[name] = made
        assert about["settings"]["between_stages"] == name
        assert json.loads((tmp_path / name / "checkpoint.json").read_text())["between_stages"] == name
    assert losses["stack"] == pytest.approx(losses["merge"], abs=1e-4)
    assert losses["stack"][-1] < losses["stack"][0]
    one, other = logits(load_model(adapters["merge"]).hf), logits(load_model(adapters["stack"]).hf)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-3)
    assert (one - logits(load_model(stack).hf)).abs().max() > 0.05
    assert "between_stages" not in _first_stage(stack, tmp_path), "nothing lies below a first stage"


def _first_stage(stack: str, tmp_path: Path) -> dict[str, Any]:
    run_stage(stack.partition(":")[0], jsonl(tmp_path), STACKED, tmp_path / "first", seed=0)
    found: dict[str, Any] = json.loads((tmp_path / "first" / "checkpoint.json").read_text())
    return found


def test_only_the_new_adapter_has_gradients_and_the_stack_is_left_as_it_was(
    stack: str, tmp_path: Path
) -> None:
    model = load_model(stack, merge="stack")
    before = {n: p.detach().clone() for n, p in model.hf.named_parameters()}
    said, modules = logits(model.hf), [n for n, _ in model.hf.named_modules()]
    seen: set[str] = set()

    def look(_record: Any) -> None:
        seen.update(n for n, p in model.hf.named_parameters() if p.requires_grad)
        frozen = (p.grad for n, p in model.hf.named_parameters() if not p.requires_grad)
        assert all(g is None for g in frozen)

    train(model, STACKED, tmp_path / "a", on_step=look)
    assert seen
    assert all(".default." in name for name in seen)
    after = dict(model.hf.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], p) for n, p in before.items())
    assert torch.equal(logits(model.hf), said)
    assert [n for n, _ in model.hf.named_modules()] == modules, (
        "also where the new one alone had wrapped a map"
    )
    assert list(model.hf.active_adapters) == ["stage1", "stage2"]
    assert not any(p.requires_grad for p in after.values())


def test_a_stack_is_as_it_was_after_an_error_and_trains_again(stack: str, tmp_path: Path) -> None:
    model = load_model(stack.rpartition(":")[0], merge="stack")
    said = logits(model.hf)
    with pytest.raises(InputError, match="target_modules"):
        train(model, STACKED.model_copy(update={"target_modules": ("no_such_map",)}), tmp_path / "x")
    assert torch.equal(logits(model.hf), said)

    def stop(record: Any) -> None:
        if record.step == 3:
            raise GuardError("enough")

    with pytest.raises(GuardError, match="enough"):
        train(model, STACKED, tmp_path / "parts", on_step=stop, save_every=1)
    assert torch.equal(logits(model.hf), said)
    again = train(model, STACKED, tmp_path / "parts", save_every=1)
    whole = train(model, STACKED, tmp_path / "whole")
    assert [r.loss for r in again] == [r.loss for r in whole]


def test_an_untrained_adapter_on_a_trained_stack_is_noticed(stack: str) -> None:
    model = load_model(stack, merge="stack")
    with _adapted(model, STACKED) as adapted, pytest.raises(GuardError, match="left every adapter at zero"):
        _check_learnt(adapted)


def test_peft_alone_reads_a_stack(folder: Path, stack: str, tmp_path: Path) -> None:
    made = run_stage(stack, jsonl(tmp_path), STACKED, tmp_path / "c", seed=0)
    first, *rest = [str(a.path) for a in made.adapters]
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), first, adapter_name="1")
    for name, path in enumerate(rest, 2):
        theirs.load_adapter(path, adapter_name=str(name))
    theirs.base_model.set_adapter(["1", "2", "3"])
    theirs.eval()
    torch.testing.assert_close(logits(theirs), logits(load_model(made).hf), rtol=0, atol=1e-4)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "checkpoint.json", "loss.jsonl", "trainer_state.json"]  # fmt: skip


@pytest.mark.parametrize(
    ("merge", "settings", "message"),
    [
        (True, STACKED, "between_stages: stack, but 0 of the 2 adapters below are live"),
        ("stack", MERGED, "between_stages: merge, but 2 of the 2 adapters below are live"),
        (False, MERGED, "has a live adapter"),
        (False, STACKED, "has a live adapter"),
    ],
)
def test_a_model_loaded_otherwise_than_the_settings_say_is_refused(
    stack: str, tmp_path: Path, merge: Any, settings: TrainSettings, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(load_model(stack, merge=merge), settings, tmp_path / "a")


def test_a_stack_in_bfloat16_keeps_its_adapters_in_float32(stack: str, tmp_path: Path) -> None:
    model = load_model(stack, dtype="bfloat16", merge="stack")
    kinds = {"lora_" in n: p.dtype for n, p in model.hf.named_parameters()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}
    records = train(model, STACKED.model_copy(update={"dtype": "bfloat16"}), tmp_path / "a")
    assert records[-1].loss < records[0].loss


def test_full_finetuning_has_no_stack() -> None:
    with pytest.raises(InputError, match=r"method: full has no .*between_stages: stack"):
        make_settings({"method": "full", "between_stages": "stack"})


@pytest.mark.slow
def test_a_study_stacks_its_stages(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    save_adapter(tmp_path / "model", tmp_path / "given", seed=3)
    path = write_study(tmp_path)
    changes = ["arms={base: [], em: [em], em_then_given: [em, given], three: [em, given, benign]}", "benign=em",
               "steering=", "patching=", "measure.own_text=[]", "training.between_stages=stack"]  # fmt: skip
    read = "capture/three/seed0/default/text=base"
    bench, steps = run_needed(load_spec(path, changes), tmp_path / "out", read, "weights/seed0")
    three = steps["train/em+given+benign/seed0"]
    assert three.config["settings"]["between_stages"] == "stack"
    about = json.loads((bench.folder(three) / "checkpoint.json").read_text())
    with ActivationStore.open(bench.folder(steps[read]) / "activations.h5") as store:
        assert len(store.metadata["checkpoint"]["adapters"]) == 3
    assert about["between_stages"] == "stack"
    assert len(about["trained_on"]["adapters"]) == 2


@pytest.mark.real
@pytest.mark.skipif(not is_fetched(SMALL), reason=f"mech models fetch {SMALL}")
def test_the_real_model_agrees_too(tmp_path: Path) -> None:
    settings = make_settings(
        {"preset": "small-135m", "learning_rate": 1e-3, "warmup_steps": 0, "max_steps": 2, "epochs": 4}
    )
    first = run_stage(SMALL, jsonl(tmp_path), settings, tmp_path / "first", seed=0)
    losses = []
    for name in ("merge", "stack"):
        chosen = settings.model_copy(update={"between_stages": name})
        second = run_stage(first, jsonl(tmp_path), chosen, tmp_path / name, seed=0)
        about = json.loads((tmp_path / name / "trainer_state.json").read_text())
        losses.append([r["loss"] for r in about["log_history"]])
    assert isinstance(second, Checkpoint)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    # In float64, for float32 alone is worth several 1e-4 of these logits' scale.
    merged, stacked = (logits(load_model(second, merge=how).hf.double(), 40) for how in (True, "stack"))
    assert (stacked - merged).abs().max() < 1e-4 * merged.abs().max()
    assert (merged - logits(load_model(first).hf, 40)).abs().max() > 0.1
