"""Maps whose weights are used past them: found by trying, left out of trainings, and refused where an adapter changes them."""

import copy
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from activations.capture import capture
from finetune.lora import train_lora
from finetune.state import StepRecord
from mech.adapters import linear_maps
from mech.errors import InputError
from mech.generate import Sampling, generate
from mech.models import ChatModel, load_model
from mech.score import response_logprobs
from mech.weight_use import used_past
from tests.architectures import GROUPED, SHAPE, WIDE, made
from tests.plain_hooks import assert_close, conversations
from tests.tiny_study import make_tokenizer
from tests.tiny_training import SETTINGS, assert_equal_weights, encoded, weights


def recurrent(like: ChatModel) -> ChatModel:
    """Jamba: its blocks multiply by the weight of `dt_proj` themselves."""
    from transformers import JambaConfig

    config = JambaConfig(**WIDE, attn_layer_period=3, attn_layer_offset=1, num_experts=1, mamba_d_state=4)
    return made(config, like)


def sharing(like: ChatModel) -> ChatModel:
    """Zamba: two of its blocks hold the same attention and MLP."""
    from transformers import ZambaConfig

    kinds = ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"]
    shape = {**SHAPE, "num_hidden_layers": 5, "num_key_value_heads": 4, "intermediate_size": 48}
    return made(ZambaConfig(**shape, layers_block_type=kinds, mamba_d_state=4), like)


@pytest.fixture(scope="module")
def jamba(model: ChatModel, tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    folder = tmp_path_factory.mktemp("jamba")
    built = recurrent(model)
    built.hf.save_pretrained(folder)
    built.tokenizer.save_pretrained(folder)
    return load_model(str(folder))


def found(model: ChatModel) -> list[str]:
    return used_past(model.causal, linear_maps(model), in_training=True)


def test_weights_used_past_their_maps_are_found(model: ChatModel, jamba: ChatModel) -> None:
    mode, drawn = jamba.hf.training, torch.random.get_rng_state()
    assert found(jamba) == [f"model.layers.{layer}.mamba.dt_proj" for layer in (0, 2)]
    assert jamba.hf.training == mode
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in jamba.hf.modules())
    assert found(model) == []
    shared = found(sharing(model))
    assert {name.split(".")[4] for name in shared if ".shared_transf." in name} == {
        "self_attn",
        "feed_forward",
    }
    assert "model.layers.2.shared_transf.self_attn.q_proj" in shared
    assert "model.layers.4.shared_transf.self_attn.q_proj" in shared
    assert not any(name.endswith(("in_proj", "out_proj")) for name in shared)


def test_a_module_in_two_places_is_one_weight_in_two_places(model: ChatModel) -> None:
    twice = ChatModel(copy.deepcopy(model.hf), model.tokenizer, model.checkpoint)
    twice.blocks[2].mlp = twice.blocks[1].mlp
    assert found(twice) == [f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up")]


def test_a_training_leaves_them_out(
    jamba: ChatModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        train_lora(jamba, encoded(jamba), SETTINGS, tmp_path / "a", seed=0)
    assert "model.layers.0.mamba.dt_proj and its like (2 in all) get no adapter" in caplog.text
    rows = conversations(jamba, 3)
    live, merged = (load_model(f"{jamba.checkpoint}:{tmp_path / 'a'}", merge=how) for how in (False, True))
    names = [name for name, _ in live.hf.named_parameters() if "lora_A" in name]
    assert any("in_proj" in name for name in names)
    assert not any("dt_proj" in name for name in names)
    read = [capture(m, rows)["resid_post", "prompt_last"] for m in (live, merged, jamba)]
    assert_close(*read[:2])  # type: ignore[arg-type]
    assert abs(read[0] - read[2]).max() > 0.1  # type: ignore[operator]


@pytest.mark.parametrize("stack", ["merge", "stack"])
def test_one_that_is_named_is_refused(jamba: ChatModel, tmp_path: Path, stack: Any) -> None:
    asked = SETTINGS.model_copy(update={"target_modules": ("in_proj", "dt_proj"), "between_stages": stack})
    with pytest.raises(
        InputError, match=r"uses the weight of model\.layers\.0\.mamba\.dt_proj .* leave dt_proj out"
    ):
        train_lora(jamba, encoded(jamba), asked, tmp_path / "a", seed=0)
    assert not any("lora" in name for name, _ in jamba.hf.named_parameters())


@pytest.mark.parametrize("how", [True, False, "stack"])
def test_an_adapter_that_changes_one_is_refused(jamba: ChatModel, tmp_path: Path, how: Any) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "dt_proj"], init_lora_weights=False)
    wrapped = get_peft_model(copy.deepcopy(jamba.hf), config)
    wrapped.save_pretrained(tmp_path / "acts", save_embedding_layers=False)
    with pytest.raises(
        InputError, match=r"acts: changes model\.layers\.0\.mamba\.dt_proj .* two different models"
    ):
        load_model(f"{jamba.checkpoint}:{tmp_path / 'acts'}", merge=how)
    # What PEFT itself trains there stays zero, and is the same everywhere.
    for name, parameter in wrapped.named_parameters():
        if "dt_proj.lora_B" in name:
            parameter.data.zero_()
    wrapped.save_pretrained(tmp_path / "idle", save_embedding_layers=False)
    load_model(f"{jamba.checkpoint}:{tmp_path / 'idle'}", merge=how)


def _killed_at_two(record: StepRecord) -> None:
    if record.step == 2:
        raise KeyboardInterrupt


def test_a_map_that_nothing_comes_to_is_told_of(
    model: ChatModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No weight of it is used past it, so it is no error: an expert may be idle by chance."""
    other = ChatModel(copy.deepcopy(model.hf), model.tokenizer, model.checkpoint)
    other.blocks[1].mlp.idle = torch.nn.Linear(32, 32)
    with caplog.at_level(logging.WARNING):
        train_lora(other, encoded(other), SETTINGS, tmp_path / "a", seed=0)
    assert "1 of 22 adapters are still zero" in caplog.text
    assert "model.layers.1.mlp.idle" in caplog.text
    # Without a gradient it has no moments either; killed and run again, that is no obstacle.
    with pytest.raises(KeyboardInterrupt):
        train_lora(
            other, encoded(other), SETTINGS, tmp_path / "c", seed=0, save_every=1, on_step=_killed_at_two
        )
    train_lora(other, encoded(other), SETTINGS, tmp_path / "c", seed=0)
    assert_equal_weights(tmp_path / "c", tmp_path / "a")
    caplog.clear()
    train_lora(model, encoded(model), SETTINGS, tmp_path / "b", seed=0)
    assert "still zero" not in caplog.text


@pytest.fixture
def on_disk(model: ChatModel, tmp_path: Path) -> ChatModel:
    """Every layer on disk, brought to the CPU to compute."""
    model.hf.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    return load_model(
        str(tmp_path / "model"), device_map={"": "disk"}, offload_folder=str(tmp_path / "offloaded")
    )


def test_offloaded_weights_are_not_taken_for_others(on_disk: ChatModel, model: ChatModel) -> None:
    """What is put in a weight's place for a while must not get its id: it would be left out of trainings unseen."""
    assert {p.device.type for p in on_disk.hf.parameters()} == {"meta"}
    assert found(on_disk) == []
    rows = conversations(model, 3)
    here, there = (capture(m, rows)["resid_post", "prompt_last"] for m in (model, on_disk))
    assert_close(there, here)
    for a, b in zip(response_logprobs(on_disk, rows), response_logprobs(model, rows), strict=True):
        torch.testing.assert_close(a, b)
    sampling = Sampling(max_new_tokens=4)
    assert generate(on_disk, rows, sampling) == generate(model, rows, sampling)


def test_a_training_on_offloaded_weights_is_refused(on_disk: ChatModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="offloaded cannot be trained on"):
        train_lora(on_disk, encoded(on_disk), SETTINGS, tmp_path / "adapter", seed=0)
    assert not any("lora" in name for name, _ in on_disk.hf.named_parameters())
    assert not list(tmp_path.glob("adapter/*.safetensors"))


def test_a_part_that_reads_pictures_gets_no_adapter(
    model: ChatModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`all-linear` of a model that also reads pictures is all of what reads text."""
    seeing = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = transformers.Gemma3Config(
        text_config={**GROUPED, "sliding_window": 4096, "query_pre_attn_scalar": 8},
        vision_config={"hidden_size": 16, "intermediate_size": 16, **seeing},
        mm_tokens_per_image=4,
    )
    tokenizer = make_tokenizer()
    config.text_config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    other = ChatModel(transformers.Gemma3ForConditionalGeneration(config).eval(), tokenizer, model.checkpoint)
    with caplog.at_level("INFO"):
        train_lora(other, encoded(other), SETTINGS, tmp_path / "a", seed=0)
    assert re.search(r"vision_tower\S+ and its like \(9 in all\) read no text", caplog.text)
    keys = [k for k in weights(tmp_path / "a") if "lora_A" in k]
    assert len(keys) == 7 * 3
    assert all("language_model" in k for k in keys)
