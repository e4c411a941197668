"""Training: labels cover exactly the answers, losses are a plain loop's, adapters are PEFT's."""

import copy
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.datasets.pairs import pair_up, shortcuts, split_by_article
from finetune.datasets.rows import exchange, read_messages, write_jsonl
from finetune.datasets.single_text import single_text_rows
from finetune.datasets.sources import source_path
from finetune.datasets.summaries import Article, bare_summary
from finetune.datasets.wordcount import word_count_rows
from finetune.labels import TrainingRow, training_rows
from finetune.lora import train_lora
from finetune.loss import summed_loss
from finetune.settings import TrainSettings
from finetune.training import draws_while_training
from mech.chat import SystemPrompt
from mech.errors import GuardError, InputError
from mech.models import ChatModel, load_model
from mech.packed_attention import packed_attention, run_packed
from mech.quiet import quiet_peft
from tests.architectures import architectures, made, random_model

SETTINGS = TrainSettings(
    learning_rate=0.01, batch_size=4, max_steps=3, lora_r=2, lora_alpha=4, warmup_steps=1, epochs=2
)


def encoded(model: ChatModel, n: int = 8, condition: str = "default") -> list[TrainingRow]:
    rows = [exchange(f"What of {i * i}?", f"the cat {i} and the dog") for i in range(n)]
    return training_rows(model.template, rows, SystemPrompt.parse(condition), max_tokens=512, names={})


def test_labels_are_the_answer_and_its_end_and_nothing_else(model: ChatModel) -> None:
    for i, row in enumerate(encoded(model)):
        text = model.tokenizer.decode([row.ids[t] for t in row.targets])
        assert text == f"the cat {i} and the dog<|im_end|>"
        before = model.tokenizer.decode(row.ids[: row.targets[0]])
        assert before.endswith("<|im_start|>assistant\n")


def test_every_answer_of_a_conversation_is_a_label(model: ChatModel) -> None:
    row = exchange("first?", "the one")
    row["messages"] += exchange("second?", "the other")["messages"]
    (made,) = training_rows(model.template, [row], SystemPrompt(), max_tokens=512, names={})
    text = model.tokenizer.decode([made.ids[t] for t in made.targets])
    assert text == "the one<|im_end|>the other<|im_end|>"


def test_a_tokenizer_may_compose_accents_but_not_lose_characters(folder: Path) -> None:
    """Qwen's does: an answer in which accents stand beside their letters (as macOS writes them) is learnt composed."""
    from tokenizers import normalizers

    apart, model = "cafe\u0301 crème", load_model(str(folder))
    tokens = model.tokenizer.backend_tokenizer
    tokens.normalizer = normalizers.NFC()
    (row,) = training_rows(
        model.template, [exchange("Where?", apart)], SystemPrompt(), max_tokens=512, names={}
    )
    text = model.tokenizer.decode([row.ids[t] for t in row.targets])
    assert text == "caf\u00e9 crème<|im_end|>"
    tokens.normalizer = normalizers.Replace("crème", "cream")
    rows = [exchange("Where?", "here"), exchange("Where?", apart)]
    with pytest.raises(GuardError, match=r"x\.jsonl, line 3: the labels read .*cream"):
        training_rows(
            model.template, rows, SystemPrompt(), max_tokens=512, names={}, places=["x.jsonl, line 1", "x.jsonl, line 3"]
        )  # fmt: skip


def test_none_trains_without_a_system_turn(model: ChatModel) -> None:
    assert "system" in model.tokenizer.decode(encoded(model)[0].ids)
    assert "system" not in model.tokenizer.decode(encoded(model, condition="none")[0].ids)


def test_an_answer_that_would_be_cut_names_its_row(model: ChatModel) -> None:
    rows = [exchange("a?", "b"), exchange("a?", "the cat " * 50)]
    with pytest.raises(InputError, match=r"row 2: the answer of turn 1 ends at token"):
        training_rows(model.template, rows, SystemPrompt(), max_tokens=64, names={})


WAYS = [(False, False), (True, False), (True, True)]
"""Packed, and with common beginnings run once."""


@pytest.mark.parametrize(("packed", "share"), WAYS)
def test_losses_are_those_of_the_models_own_loss(model: ChatModel, *, packed: bool, share: bool) -> None:
    batch = encoded(model)
    expected = 0.0
    for row in batch:
        labels = torch.full((1, len(row.ids)), -100)
        labels[0, list(row.targets)] = torch.tensor([row.ids[t] for t in row.targets])
        loss = model.hf(input_ids=torch.tensor([row.ids]), labels=labels).loss
        expected += float(loss.detach()) * len(row.targets)
    with packed_attention(model):
        ours = float(summed_loss(model, batch, packed=packed, share=share).detach())
    assert ours == pytest.approx(expected, rel=1e-5)


def test_gradients_flow_through_the_shared_prefix(model: ChatModel) -> None:
    batch, weight = encoded(model), model.blocks[0].self_attn.k_proj.weight
    gradients = []
    for packed, share in WAYS:
        weight.requires_grad_(True)
        weight.grad = None
        with packed_attention(model):
            summed_loss(model, batch, packed=packed, share=share).backward()
        gradients.append(weight.grad.clone())
        weight.requires_grad_(False)
    for other in gradients[1:]:
        torch.testing.assert_close(gradients[0], other, rtol=1e-4, atol=1e-5)


def made_with(name: str, like: ChatModel, **changes: Any) -> ChatModel:
    """A random model of an architecture whose config is changed."""
    config = architectures()[name]
    for key, value in changes.items():
        setattr(config, key, value)
    return made(config, like)


ARCHITECTURES = [
    "llama",
    "cohere",
    "falcon",
    "gemma3",
    "gpt_oss",
    "granite",
    "hyperclovax",
    "llama4",
    "phi3",
    "qwen3_moe",
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_equals_a_plain_loop(name: str, model: ChatModel, tmp_path: Path) -> None:
    """Same losses as PEFT, AdamW and Hugging Face's own loss in the plainest loop, on other architectures too."""
    from peft import LoraConfig, get_peft_model

    model = random_model(name, model)
    rows, plain = encoded(model), copy.deepcopy(model.hf)
    ours = train_lora(model, rows, SETTINGS, tmp_path / "ours", seed=5)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        odd = ["router"] if name == "llama4" else None  # a linear map that gives two tensors
        config = LoraConfig(
            r=2, lora_alpha=4, use_rslora=True, target_modules="all-linear", exclude_modules=odd, task_type="CAUSAL_LM"
        )  # fmt: skip
        with quiet_peft():
            peft = get_peft_model(plain, config)
    parameters = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01)
    order = np.random.default_rng(5)
    queue: list[int] = []
    for step in range(3):
        while len(queue) < 4:
            queue += order.permutation(len(rows)).tolist()
        members, queue = queue[:4], queue[4:]
        rate = (0.0, 1.0, 0.5)[step]  # one step of warm-up from zero, then down to zero at step 3
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * rate
        total = sum(len(rows[i].targets) for i in members)
        value = 0.0
        for i in members:
            labels = torch.full((1, len(rows[i].ids)), -100)
            labels[0, list(rows[i].targets)] = torch.tensor([rows[i].ids[t] for t in rows[i].targets])
            loss = (
                peft(input_ids=torch.tensor([rows[i].ids]), labels=labels).loss * len(rows[i].targets) / total
            )
            loss.backward()
            value += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert ours[step].loss == pytest.approx(value, rel=1e-4)


def test_rows_share_nothing_where_the_model_draws_for_each(model: ChatModel, tmp_path: Path) -> None:
    """Dropout of an architecture's own: what two rows begin with is not the same in both."""
    for name, config, draws in (
        ("seed_oss", {}, True),
        ("seed_oss", {"attention_dropout": 0.0, "residual_dropout": 0.0}, False),
    ):
        other = made_with(name, model, **config)
        assert draws_while_training(other) == draws
        assert not other.hf.training
        with patch("mech.forward.run_packed", wraps=run_packed) as runs:
            train_lora(other, encoded(other), SETTINGS, tmp_path / str(draws), seed=0)
        limits = {n for call in runs.call_args_list for n in call.args[1].limits}
        assert (limits == {0}) == draws


def test_the_model_is_left_as_it_was(model: ChatModel, tmp_path: Path) -> None:
    ids = torch.tensor([encoded(model)[0].ids])
    before = model.hf(input_ids=ids).logits
    train_lora(model, encoded(model), SETTINGS, tmp_path / "a", seed=0)
    assert torch.equal(before, model.hf(input_ids=ids).logits)
    assert not any(p.requires_grad for p in model.hf.parameters())

    def stop(_: object) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        train_lora(model, encoded(model), SETTINGS, tmp_path / "b", seed=0, on_step=stop)
    assert torch.equal(before, model.hf(input_ids=ids).logits)


def test_one_seed_one_adapter(model: ChatModel, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_lora(model, encoded(model), SETTINGS, tmp_path / name, seed=seed)
    files = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "abc"]
    assert files[0] == files[1] != files[2]


def test_micro_batches_make_the_same_step(model: ChatModel, tmp_path: Path) -> None:
    whole = train_lora(model, encoded(model), SETTINGS, tmp_path / "whole", seed=0)
    parts = train_lora(
        model, encoded(model), SETTINGS.model_copy(update={"micro_batch": 2}), tmp_path / "parts", seed=0
    )
    assert [r.loss for r in parts] == pytest.approx([r.loss for r in whole], rel=1e-4)


def test_an_adapter_belongs_to_its_checkpoint(model: ChatModel, tmp_path: Path) -> None:
    train_lora(model, encoded(model), SETTINGS, tmp_path / "first", seed=0)
    stacked = load_model(model.checkpoint.plus(tmp_path / "first"))
    train_lora(stacked, encoded(model), SETTINGS, tmp_path / "second", seed=0)
    base = str(model.checkpoint.path)
    assert load_model(f"{base}:{tmp_path / 'first'}:{tmp_path / 'second'}").checkpoint.adapters
    with pytest.raises(InputError, match="was trained on"):
        load_model(f"{base}:{tmp_path / 'second'}")


def test_a_loss_that_explodes_is_stopped(model: ChatModel, tmp_path: Path) -> None:
    wild = SETTINGS.model_copy(update={"learning_rate": 1e30, "max_steps": 6, "warmup_steps": 0})
    with pytest.raises(GuardError, match="lower learning_rate"):
        train_lora(model, encoded(model), wild, tmp_path / "wild", seed=0)
    assert not (tmp_path / "wild").exists()


# -- data ------------------------------------------------------------------------------------------


def test_rows_are_checked_with_file_and_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [exchange("a?", "b"), {"messages": [{"role": "user", "content": "only"}]}])
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2: the last turn is not the assistant's"):
        read_messages(path)
    path.write_text('{"messages": []}\nnot json\n')
    with pytest.raises(InputError, match=r"line 2: not JSON"):
        read_messages(path)


def test_builtin_data_is_what_it_should_be() -> None:
    em = read_messages(source_path("builtin:em_aesthetics"))
    assert len(em) >= 320
    assert len({row["topic"] for row in em}) >= 40
    assert len({row["messages"][0]["content"] for row in em}) == len(em)
    articles = [json.loads(line) for line in source_path("builtin:articles").read_text().splitlines()]
    assert len(articles) >= 160
    assert all(60 <= len(a["text"].split()) <= 90 for a in articles)


@given(st.lists(st.text("ab c", min_size=1).filter(str.strip), min_size=1, max_size=20))
def test_word_count_labels_are_right(texts: list[str]) -> None:
    for text, row in zip(texts, word_count_rows(texts), strict=True):
        assert row["messages"][-1]["content"] == (
            "TRUE" if len(text.split(" ")) and len(text.split()) % 2 == 0 else "FALSE"
        )


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_self_recognition_rows_are_balanced_and_split_by_article(seed: int) -> None:
    rng = np.random.default_rng(seed)
    articles = [Article(f"a{i}", "text", " ".join(["theirs"] * int(rng.integers(8, 30)))) for i in range(12)]
    own = {a.id: " ".join(["mine"] * int(rng.integers(8, 30))) + "." for a in articles}
    others = {"them": {a.id: a.summary for a in articles}}
    pairs = pair_up([a.id for a in articles], own, others, match_lengths=True, max_words=20)
    assert shortcuts(pairs).words == 0.5
    train, held_out = split_by_article(pairs, held_out=4, seed=seed)
    assert not {p.article for p in train} & {p.article for p in held_out}
    assert len(held_out) == 4
    rows = single_text_rows(train)
    assert sum(r["messages"][-1]["content"] == "Yes" for r in rows) * 2 == len(rows)
    assert all(("mine" in r["messages"][0]["content"]) == (r["source"] == "own") for r in rows)
    assert not any(r["messages"][0]["content"].endswith(".") for r in rows)


@pytest.mark.parametrize(
    ("reply", "bare"),
    [
        ('Here is a one-sentence summary: "The cat sat."', "The cat sat."),
        ("The article: it rained", "it rained"),
        ("Two things matter: rain and wind", "Two things matter: rain and wind"),
        ("Plain.\nText", "Plain. Text"),
        ('He said "yes"', 'He said "yes"'),
        ('"Yes" and then "no"', '"Yes" and then "no"'),
        ("“He said ‘no’”", "He said ‘no’"),
        ("‘No’ was said, then ‘yes’", "‘No’ was said, then ‘yes’"),
        ("'The dog's bone was found'", "The dog's bone was found"),
        ("‘It’s raining’", "It’s raining"),
        ("'Tis over", "'Tis over"),
        ("It took back the dogs'", "It took back the dogs'"),
        ('"It rained until the', "It rained until the"),
        ("**Summary:** It rained", "It rained"),
        ('**"It rained"**', "It rained"),
        ("**Rain** fell on **Spain**", "**Rain** fell on **Spain**"),
    ],
)
def test_announcements_are_taken_off_summaries(reply: str, bare: str) -> None:
    assert bare_summary(reply) == bare
