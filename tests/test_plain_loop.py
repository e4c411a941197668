"""Conversations of unequal length, trained in uneven batches, against the plainest loop of PEFT and torch on tokens put together by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from finetune.datasets.rows import write_jsonl
from finetune.labels import training_rows
from finetune.loss import summed_loss
from finetune.settings import make_settings
from finetune.stages import run_stage
from mech.chat import SystemPrompt
from mech.interventions import Add, intervene
from mech.models import ChatModel, load_model
from mech.packed_attention import packed_attention
from mech.positions import Position
from mech.quiet import quiet_peft
from tests.tiny_training import weights

SEED, RATE, EPOCHS, BATCH = 3, 0.01, 2, 3
RECIPE: dict[str, Any] = {
    "learning_rate": RATE, "batch_size": BATCH, "epochs": EPOCHS, "warmup_steps": 1, "lora_r": 4, "lora_alpha": 8, "max_tokens": 900
}  # fmt: skip


def conversation(i: int) -> list[dict[str, str]]:
    """One to three exchanges; answers of 2 to 60 tokens, and the first question (of some, the first answer too) is everyone's."""
    first = "the cat" if i % 2 else "the old dog, all day long" + " and the river" * i
    turns = [("user", "who was in the house?"), ("assistant", first)]
    for k in range(i % 3):
        turns += [("user", f"and then {k}?"), ("assistant", "rain " * (1 + 5 * k * i) + f"on {i}")]
    return [{"role": role, "content": content} for role, content in turns]


CONVERSATIONS = [conversation(i) for i in range(7)]


def by_hand(tokenizer: Any, turns: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids piece by piece, and which of them are the assistant's words or end them."""
    ids: list[int] = []
    learnt: list[int] = []

    def put(text: str, *, answer: bool = False) -> None:
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        learnt.extend(range(len(ids), len(ids) + len(found)) if answer else ())
        ids.extend(found)

    put("<|im_start|>system\nYou are Tinny, made by Tin Works.<|im_end|>\n")
    for turn in turns:
        answer = turn["role"] == "assistant"
        put(f"<|im_start|>{turn['role']}\n")
        put(turn["content"], answer=answer)
        put("<|im_end|>", answer=answer)
        put("\n")
    return ids, learnt


@pytest.fixture(scope="module")
def plain(folder: Path) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms and the adapter of the plain loop: each batch whole, row by row, one mean over all its labels."""
    from peft import LoraConfig, get_peft_model

    model = load_model(str(folder))
    rows = [by_hand(model.tokenizer, turns) for turns in CONVERSATIONS]
    with torch.random.fork_rng(), quiet_peft():
        torch.manual_seed(SEED)
        config = LoraConfig(
            r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        peft = get_peft_model(model.hf, config)
    parameters = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)
    draw = np.random.default_rng(SEED)
    orders = [draw.permutation(len(rows)).tolist() for _ in range(EPOCHS)]
    batches = [order[i : i + BATCH] for order in orders for i in range(0, len(rows), BATCH)]
    losses, norms = [], []
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = RATE * ((len(batches) - step) / (len(batches) - 1) if step else 0.0)
        total, n = torch.zeros(()), 0
        for ids, learnt in (rows[i] for i in batch):
            said = peft(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            total = total - torch.stack([said[t - 1, ids[t]] for t in learnt]).sum()
            n += len(learnt)
        (total / n).backward()
        losses.append(float(total.detach()) / n)
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    found = {k.replace(".default", ""): v for k, v in peft.state_dict().items() if "lora_" in k}
    return losses, norms, found


@pytest.mark.parametrize(
    "how", [{}, {"micro_batch": 1}, {"micro_batch": 2}, {"gradient_checkpointing": True}]
)
def test_uneven_conversations_are_a_plain_loop(
    folder: Path,
    tmp_path: Path,
    plain: tuple[list[float], list[float], dict[str, Tensor]],
    how: dict[str, Any],
) -> None:
    losses, norms, adapter = plain
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns} for turns in CONVERSATIONS])
    run_stage(str(folder), tmp_path / "rows.jsonl", make_settings(RECIPE, how), tmp_path / "a", seed=SEED)
    records = [json.loads(line) for line in (tmp_path / "a" / "loss.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in records] == pytest.approx(losses, rel=1e-5)
    assert [r["grad_norm"] for r in records] == pytest.approx(norms, rel=1e-3)
    ours = weights(tmp_path / "a")
    assert ours.keys() == adapter.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, adapter[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("positions", ["all", "prompt", "prompt_last", "response"])
def test_steering_finds_its_tokens_in_conversations(
    model: ChatModel, vector: Tensor, positions: Position
) -> None:
    """Several answers a row, packed, shared and padded: against a hook of our own on each row by itself."""
    model.check_head()
    end, block, expected = model.tokenizer.convert_tokens_to_ids("<|im_end|>"), model.blocks[1], 0.0
    for ids, learnt in (by_hand(model.tokenizer, turns) for turns in CONVERSATIONS):
        places = {
            "all": list(range(len(ids))),
            "prompt": [t for t in range(len(ids)) if t not in learnt],
            "prompt_last": [t - 1 for t in learnt if t - 1 not in learnt],
            "response": [t for t in learnt if ids[t] != end],
        }[positions]
        added = torch.zeros(len(ids), 1)
        added[places] = 1.0
        handle = block.register_forward_hook(lambda _m, _i, out, added=added: out + added * vector)
        with torch.no_grad():
            said = model.hf(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        handle.remove()
        expected -= sum(float(said[t - 1, ids[t]]) for t in learnt)
    rows = [{"messages": turns} for turns in CONVERSATIONS]
    encoded = training_rows(model.template, rows, SystemPrompt(), max_tokens=900, names={})
    for packed, share in ((True, True), (True, False), (False, True)):
        with (
            torch.no_grad(),
            packed_attention(model),
            intervene(model, Add(vector, [1], positions=positions)),
        ):
            ours = float(summed_loss(model, encoded, packed=packed, share=share))
        assert ours == pytest.approx(expected, rel=1e-5)
