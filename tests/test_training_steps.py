"""What a training step computes: under interventions, fused layers and shared beginnings, the same gradients."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.fused import fused_lora
from finetune.lora import train_lora
from finetune.loss import summed_loss
from mech.errors import InputError
from mech.interventions import Ablate, Add, Patch, intervene
from mech.models import ChatModel, load_model
from mech.packed_attention import packed_attention
from tests.tiny_training import SETTINGS, encoded


@pytest.fixture
def model(folder: Path) -> ChatModel:
    """Loaded anew for every test: training leaves traces."""
    return load_model(str(folder))


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


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("how", ["patch", "rows"])
def test_what_acts_by_row_finds_its_rows_however_batches_are_made(
    model: ChatModel, tmp_path: Path, how: str, *, checkpointed: bool
) -> None:
    """Every loss is that of the plain model under the row's own hook by hand: rows of unequal lengths, shuffled, sorted, or in packs."""
    rows = encoded(model, 5)
    rate = {"learning_rate": 1e-30, "warmup_steps": 0, "max_steps": 4, "batch_size": 2}
    settings = SETTINGS.model_copy(update={"gradient_checkpointing": checkpointed, **rate})
    draw = torch.Generator().manual_seed(1)
    values = torch.randn(1, 5, max(len(r.ids) for r in rows), model.d_model, generator=draw)
    vector, steered = torch.randn(model.d_model, generator=draw), (1, 4)
    given = Patch(values, [1], positions="prompt") if how == "patch" else Add(vector, [1], 3.0, rows=steered)
    ours = train_lora(model, rows, settings, tmp_path / "a", seed=0, interventions=[given])
    losses = []
    for i, row in enumerate(rows):

        def edit(_m: Any, _i: Any, out: Any, i: int = i, end: int = row.answers[0][0]) -> Any:
            if how == "rows":
                return out + 3.0 * vector if i in steered else out
            return torch.cat([values[0, i : i + 1, :end], out[:, end:]], 1)

        handle = model.blocks[1].register_forward_hook(edit)
        labels = torch.full((1, len(row.ids)), -100)
        labels[0, list(row.targets)] = torch.tensor([row.ids[t] for t in row.targets])
        with torch.no_grad():
            loss = model.hf(input_ids=torch.tensor([row.ids]), labels=labels).loss
        losses.append(float(loss) * len(row.targets))
        handle.remove()
    order, numbers = np.random.default_rng(0), list[int]()
    for record in ours:
        numbers = numbers or order.permutation(5).tolist()
        batch, numbers = numbers[:2], numbers[2:]
        n = sum(len(rows[i].targets) for i in batch)
        assert record.loss == pytest.approx(sum(losses[i] for i in batch) / n, rel=1e-4), record.step


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Add(torch.ones(4), [1], positions="generated"), "nothing is generated while training"),
        (Add(torch.ones(4), [1], rows=[8]), "rows: 8 is not one of the 8 training rows"),
        (Patch(torch.zeros(1, 7, 999, 4), [1]), "8 training rows of up to"),
        (Patch(torch.zeros(1, 8, 9, 4), [1]), "8 training rows of up to"),
    ],
)
def test_interventions_that_training_cannot_serve_are_refused_at_once(
    model: ChatModel, tmp_path: Path, given: Any, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        train_lora(model, encoded(model), SETTINGS, tmp_path / "a", seed=0, interventions=[given])


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


@pytest.mark.parametrize("packed", [True, False])
def test_what_is_only_predicted_is_not_read(model: ChatModel, *, packed: bool) -> None:
    """The end of an answer has a loss and a gradient as ever, yet never enters the model."""
    rows = encoded(model)
    model.check_head()
    read: list[torch.Tensor] = []
    handle = model.causal.get_input_embeddings().register_forward_hook(lambda _m, i, _o: read.append(i[0]))
    with packed_attention(model), torch.no_grad():
        ours = float(summed_loss(model, rows, packed=packed, share=False))
    handle.remove()
    total, theirs = sum(len(r.ids) - 1 for r in rows), 0.0
    longest = max(len(r.ids) - 1 for r in rows)
    assert [t.numel() for t in read] == [total if packed else len(rows) * longest]
    for row in rows:
        logits = model.hf(input_ids=torch.tensor([row.ids])).logits[0, [t - 1 for t in row.targets]]
        wanted = torch.tensor([row.ids[t] for t in row.targets])
        theirs += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        assert row.targets[-1] == len(row.ids) - 1
    assert ours == pytest.approx(theirs, rel=1e-5)


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
    scale = 1.0 if frozen else 0.3
    ours = _FrozenHeadLoss.apply(hidden, weight, targets, scale)
    (gradient,) = torch.autograd.grad(ours, hidden)
    theirs = torch.nn.functional.cross_entropy(hidden @ weight.T * scale, targets, reduction="sum")
    (expected,) = torch.autograd.grad(theirs, hidden)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    model.hf.get_output_embeddings().requires_grad_(not frozen)
    with packed_attention(model):
        losses = [float(summed_loss(model, encoded(model), packed=p).detach()) for p in (True, False)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
