"""4-bit frozen weights, on whatever device there is. Left out where bitsandbytes is not installed (extra `qlora`, too large for `test`)."""

from pathlib import Path

import pytest
import torch

from activations.capture import capture
from finetune.lora import train_lora
from finetune.state import StepRecord
from mech.errors import InputError
from mech.models import ChatModel, load_model
from tests.tiny_training import SETTINGS, assert_equal_weights, curve, encoded

bnb = pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")

IN_4_BITS = SETTINGS.model_copy(update={"quantise": "nf4"})
STACKED = IN_4_BITS.model_copy(update={"between_stages": "stack"})


def load(reference: Path | str, **options: object) -> ChatModel:
    return load_model(str(reference), quantise="nf4", dtype="float32", **options)


def in_plain_weights(model: ChatModel, folder: Path) -> ChatModel:
    """The model in float32 with the numbers that the 4 bits stand for: bitsandbytes' own, put into torch's linear maps."""
    plain, quantised = load_model(str(folder), device=model.device), dict(model.causal.named_modules())
    n = 0
    for name, module in plain.causal.named_modules():
        if isinstance(found := quantised[name], bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(found.weight.data, found.weight.quant_state)
            assert not torch.equal(weight, module.weight)
            module.weight.data = weight.to(torch.float32)
            n += 1
    assert n == 7 * model.n_layers
    return plain


def test_training_is_that_on_the_numbers_that_the_bits_stand_for(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    plain = in_plain_weights(model, folder)
    ours = train_lora(model, encoded(model), IN_4_BITS, tmp_path / "bits", seed=0)
    theirs = train_lora(plain, encoded(plain), SETTINGS, tmp_path / "plain", seed=0)
    assert [r.loss for r in ours] == pytest.approx([r.loss for r in theirs], rel=1e-4)
    assert ours[-1].loss < ours[0].loss
    assert not any(p.requires_grad for p in model.hf.parameters())


def test_the_adapter_goes_on_the_base_in_4_bits_and_in_float32(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    train_lora(model, encoded(model), IN_4_BITS, tmp_path / "a", seed=0)
    ids = torch.tensor([encoded(model)[0].ids], device=model.device)
    before = model.hf(input_ids=ids).logits
    reference = f"{folder}:{tmp_path / 'a'}"
    for loaded in (load(reference, merge="stack"), load_model(reference)):
        changed = loaded.hf(input_ids=ids.to(loaded.device)).logits
        assert (changed - before.to(changed)).abs().max() > 0.1
    with pytest.raises(InputError, match="has adapters to merge, which 4-bit weights cannot take up"):
        load(reference)


def test_killed_it_ends_the_same(folder: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(record: StepRecord) -> None:
        if record.step == 3:
            raise Killed

    model = load(folder)
    rows = encoded(model)
    whole = train_lora(model, rows, IN_4_BITS, tmp_path / "whole", seed=3)
    with pytest.raises(Killed):
        train_lora(model, rows, IN_4_BITS, tmp_path / "killed", seed=3, save_every=2, on_step=kill)
    again = train_lora(load(folder), rows, IN_4_BITS, tmp_path / "killed", seed=3, save_every=2)
    assert curve(again) == curve(whole)
    assert_equal_weights(tmp_path / "killed", tmp_path / "whole")


def test_a_second_stage_stands_on_a_live_one(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    train_lora(model, encoded(model), IN_4_BITS, tmp_path / "one", seed=0)
    below = load(f"{folder}:{tmp_path / 'one'}", merge="stack")
    records = train_lora(below, encoded(below), STACKED, tmp_path / "two", seed=0)
    assert records[-1].loss < records[0].loss
    assert load_model(f"{folder}:{tmp_path / 'one'}:{tmp_path / 'two'}").checkpoint.adapters


def test_looking_at_a_stack_leaves_the_bits_as_they_are(folder: Path, tmp_path: Path) -> None:
    """Putting adapters on it runs passes; bitsandbytes would pack its weights anew at the first one, and they lose their gradients."""
    model = load(folder)
    train_lora(model, encoded(model), IN_4_BITS, tmp_path / "one", seed=0)
    stack = load(f"{folder}:{tmp_path / 'one'}", merge="stack")
    maps = [m for m in stack.causal.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(maps) == 7 * stack.n_layers
    assert not any(getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in maps)


def test_capture_reads_a_model_in_4_bits(folder: Path) -> None:
    from mech.chat import SystemPrompt
    from mech.turns import assistant_turn, user_turn

    model = load(folder)
    row = model.template.encode([user_turn("What?"), assistant_turn("the cat and the dog")], SystemPrompt())
    found = capture(model, [row], poolings=["prompt_last"])["resid_post", "prompt_last"][0]
    states = model.hf(
        input_ids=torch.tensor([row.ids], device=model.device), output_hidden_states=True
    ).hidden_states
    for layer in range(model.n_layers - 1):  # the last one of transformers' is after the final norm
        expected = states[layer + 1][0, row.n_prompt - 1].float().cpu().numpy()
        assert found[layer] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_bits_and_settings_must_agree(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    with pytest.raises(InputError, match="quantise: None, but the model's weights are in 4 bits"):
        train_lora(model, encoded(model), SETTINGS, tmp_path / "a", seed=0)
