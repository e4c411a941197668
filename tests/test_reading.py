"""Capture of a model's rows: spans, tokens, heads, notes, whatever the batches; against plain hooks, nnsight and TransformerLens."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from activations.capture import Note, Reading, capture, capture_into
from activations.pooling import pooled_span
from activations.sinks import ArraySink
from mech.chat import Encoded
from mech.errors import GuardError, InputError
from mech.forward import Pass
from mech.models import ChatModel, load_model
from mech.score import response_logprobs
from tests.plain_hooks import assert_close, blocks_output, conversations
from tests.tiny_study import save_model


def test_marked_spans_are_pooled_like_any_other(model: ChatModel) -> None:
    """Marks differ from row to row, also between rows of the same tokens; padded and packed alike."""
    template, rows = model.template, conversations(model)
    marked = [
        template.mark(r, subject="river" if "river" in r.text else "question", half=(2, 9)) for r in rows
    ]
    marked[-1] = template.mark(rows[-1], subject=(1, 7), half=(0, 4))  # its tokens are those of row 3
    for packs in (True, False):
        with patch("mech.forward.can_pack", return_value=packs):
            found = capture(model, marked, poolings=["span:subject", "span:half"], token_budget=150)
        for i, row in enumerate(marked):
            for name in ("subject", "half"):
                start, stop = row.spans[name]
                pieces = model.tokenizer.convert_ids_to_tokens(list(row.ids[start:stop]))
                assert start < stop, pieces
                for layer, h in enumerate(blocks_output(model, row)):
                    assert_close(found["resid_post", f"span:{name}"][i, layer], h[start:stop].mean(0).numpy())
    start, stop = marked[1].spans["subject"]
    assert model.tokenizer.decode(marked[1].ids[start:stop]).strip() == "river"


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ({"response": "river"}, "has one of that name"),
        ({"x": "sea"}, "0 times"),
        ({"x": ""}, "empty"),
        ({"x": "the"}, "times in the row; give its characters"),
        ({"x": (100_000, 100_001)}, "no token lies there"),
    ],
)
def test_marks_that_mean_nothing_are_refused(pieces: dict[str, Any], said: str, model: ChatModel) -> None:
    row = conversations(model)[1]
    with pytest.raises(InputError, match=said):
        model.template.mark(row, **pieces)
    with pytest.raises(InputError, match="row 1: unknown pooling 'span:x'"):
        capture(model, [model.template.mark(row, x="river"), row], poolings=["span:x"])


# -- batches, prefixes, layers --------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 64, 100_000])
def test_batching_changes_nothing(model: ChatModel, budget: int) -> None:
    rows = conversations(model)
    one = capture(model, rows, poolings=["prompt_last", "response_first_2", "span:prompt"], token_budget=512)
    other = capture(
        model, rows[::-1], poolings=["prompt_last", "response_first_2", "span:prompt"], token_budget=budget
    )
    for place, array in one.items():
        assert_close(other[place][::-1], array)
        assert_close(array[3], array[-1])  # the same row twice


def test_some_layers_are_those_of_all(model: ChatModel) -> None:
    rows = conversations(model, 4)
    every = capture(model, rows)["resid_post", "prompt_last"]
    assert_close(capture(model, rows, layers=[2, 0])["resid_post", "prompt_last"], every[:, [2, 0]])


def test_nonsense_is_refused(model: ChatModel) -> None:
    rows = conversations(model, 2)
    for wrong, message in (
        ({"layers": [3]}, "layers 0 to 2"),
        ({"poolings": ["mean"]}, "unknown pooling 'mean'"),
        ({"poolings": []}, "nothing to capture"),
    ):
        with pytest.raises(InputError, match=message):
            capture(model, rows, **wrong)  # type: ignore[arg-type]
    prompt = model.template.encode_prompt([{"role": "user", "content": "Who?"}])
    with pytest.raises(InputError, match="has none for it"):
        capture(model, [prompt], poolings=["response_mean"])


def test_a_model_that_gives_nan_is_stopped_with_row_and_layer(tmp_path: Path) -> None:
    broken = load_model(str(save_model(tmp_path / "m")))
    with torch.no_grad():
        broken.blocks[1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(GuardError, match=r"row \d+: resid_post at layer 1 is not finite"):
        capture(broken, conversations(broken, 2))


# -- what else is read -----------------------------------------------------------------------------------


def test_every_token_and_heads_are_what_hooks_on_one_row_see(model: ChatModel) -> None:
    rows = conversations(model)
    found = capture(model, rows, poolings=["tokens", "prompt_last"], sites=["resid_post", "attn_head_out"])
    for i, row in enumerate(rows):
        heads: list[torch.Tensor] = []

        def keep(_module: Any, inputs: Any, kept: list[torch.Tensor] = heads) -> None:
            kept.append(inputs[0][0].detach())

        handles = [b.self_attn.o_proj.register_forward_pre_hook(keep) for b in model.blocks]  # type: ignore[union-attr,operator]
        blocks = blocks_output(model, row)
        for handle in handles:
            handle.remove()
        assert_close(found["resid_post", "tokens"][i], torch.stack(blocks, 1).numpy())  # type: ignore[arg-type]
        assert_close(found["attn_head_out", "tokens"][i], torch.stack(heads, 1).numpy())  # type: ignore[arg-type]
        last = torch.stack(heads, 1)[row.n_prompt - 1].numpy()
        assert_close(found["attn_head_out", "prompt_last"][i], last)  # type: ignore[arg-type]


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize(
    ("poolings", "notes", "needed"),
    [
        (["prompt_last"], [], lambda r: r.n_prompt),
        (["response_first_2", "prompt_last"], [], lambda r: r.n_prompt + 2),
        (["response_mean"], [], lambda r: r.n_prompt + r.n_response),
        (["prompt_last"], ["surprisal"], lambda r: r.n_prompt + r.n_response - 1),
        (["prompt_last"], ["prompt_surprisal"], lambda r: r.n_prompt),
        (["prompt_last", "tokens"], [], lambda r: len(r.ids)),
    ],
)
def test_no_token_is_run_that_nothing_is_read_from(
    poolings: list[str],
    notes: list[Note],
    needed: Callable[[Encoded], int],
    pack: bool,
    model: ChatModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what is read is what plain hooks see of the whole row."""
    rows = conversations(model)
    longest, run = [], Pass.run
    monkeypatch.setattr(
        Pass,
        "run",
        lambda one: (longest.extend(zip(one.members, map(len, one.places), strict=True)), run(one))[1],
    )
    if not pack:
        monkeypatch.setattr("mech.forward.can_pack", lambda _: False)
    sink = ArraySink([len(r.ids) for r in rows], [0, 1, 2])
    capture_into(sink, model, rows, Reading(tuple(poolings), ("resid_post",), (0, 1, 2), frozenset(notes)))
    assert dict(longest) == {i: needed(r) for i, r in enumerate(rows)}
    for i, row in enumerate(rows):
        h = torch.stack(blocks_output(model, row), 1).numpy()
        for pooling in poolings:
            start, stop = pooled_span(pooling, row)
            expected = h if pooling == "tokens" else h[start:stop].mean(0)
            assert_close(sink.arrays["resid_post", pooling][i], expected)  # type: ignore[arg-type]


def test_surprisal_and_norms_are_noted(model: ChatModel) -> None:
    rows = conversations(model)
    sink = ArraySink([len(r.ids) for r in rows], [0, 2])
    notes: frozenset[Note] = frozenset(("surprisal", "prompt_surprisal", "norms"))
    reading = Reading(("response_mean",), ("resid_post",), (0, 2), notes)
    capture_into(sink, model, rows, reading, token_budget=200)
    plain = [-float(s.mean()) for s in response_logprobs(model, rows)]
    np.testing.assert_allclose(sink.notes["surprisal"], plain, rtol=1e-4)
    for i, row in enumerate(rows):
        ids = torch.tensor([row.ids[: row.n_prompt]])
        loss = float(
            model.causal(input_ids=ids, labels=ids).loss
        )  # Hugging Face's own mean over all tokens but the first
        assert sink.notes["prompt_surprisal"][i] == pytest.approx(loss, rel=1e-4)
        start, stop = row.spans["response"]
        norms = [float(blocks_output(model, row)[layer][start:stop].norm(dim=-1).mean()) for layer in (0, 2)]
        np.testing.assert_allclose(sink.notes["norms.resid_post.response_mean"][i], norms, rtol=1e-4)


def test_out_of_memory_halves_the_budget_and_goes_on(
    model: ChatModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = conversations(model)
    expected = capture(model, rows)["resid_post", "prompt_last"]
    run = Pass.run

    def little_memory(one: Pass) -> torch.Tensor:
        if one.layout.shape[0] * one.layout.shape[1] > 120:
            raise torch.OutOfMemoryError("planted")
        return run(one)

    monkeypatch.setattr(Pass, "run", little_memory)
    found = capture(model, rows)["resid_post", "prompt_last"]
    assert_close(found, expected)  # type: ignore[arg-type]
    assert "out of memory: going on with" in caplog.text
    monkeypatch.setattr(Pass, "run", lambda _one: (_ for _ in ()).throw(torch.OutOfMemoryError("planted")))
    with pytest.raises(torch.OutOfMemoryError):
        capture(model, rows)


def test_what_is_captured_in_memory_is_laid_out_once(
    model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not again for every layer of every pass: that grows with the square of the rows."""
    made, empty = [], ArraySink._empty

    def counted(self: ArraySink, n: int, width: int) -> Any:
        made.append((n, width))
        return empty(self, n, width)

    monkeypatch.setattr(ArraySink, "_empty", counted)
    rows = conversations(model)
    capture(model, rows, poolings=["prompt_last", "tokens"], token_budget=60)
    assert sorted(made) == sorted([(len(rows), model.d_model), *((len(r.ids), model.d_model) for r in rows)])


def test_an_adapter_reads_alike_live_and_merged(model: ChatModel, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    live = get_peft_model(
        copy.deepcopy(model.hf), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    merged = copy.deepcopy(live).merge_and_unload()
    rows, sites = conversations(model, 4), ["resid_pre", "attn_out", "mlp_out", "attn_head_out", "resid_post"]
    both = [
        capture(ChatModel(hf, model.tokenizer, model.checkpoint), rows, sites=sites)  # type: ignore[arg-type]
        for hf in (live, merged)
    ]
    for place, array in both[0].items():
        assert_close(array, both[1][place])  # type: ignore[arg-type]


# -- other libraries ------------------------------------------------------------------------------------


def test_nnsight_reads_the_same(model: ChatModel) -> None:
    import nnsight

    rows = conversations(model, 3)
    ours = capture(model, rows)["resid_post", "prompt_last"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = nnsight.NNsight(copy.deepcopy(model.hf))
        for i, row in enumerate(rows):
            ids = torch.tensor([row.ids])
            outputs: dict[int, torch.Tensor] = {}
            with traced.trace(ids):
                for layer, block in enumerate(traced.model.layers):
                    outputs[layer] = block.output.save()
            assert len(outputs) == model.n_layers
            for layer, h in outputs.items():
                assert_close(ours[i, layer], h[0, row.n_prompt - 1].detach().numpy())


@pytest.mark.slow
def test_transformer_lens_reads_the_same(model: ChatModel) -> None:
    rows = conversations(model, 3)
    ours = capture(model, rows)["resid_post", "prompt_last"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens.model_bridge import TransformerBridge

        bridge = TransformerBridge.boot_transformers(
            str(model.checkpoint.path),
            hf_model=copy.deepcopy(model.hf),
            tokenizer=copy.deepcopy(model.tokenizer),
            device="cpu",
        )
        for i, row in enumerate(rows):
            _, cache = bridge.run_with_cache(torch.tensor([row.ids]))
            for layer in range(model.n_layers):
                assert_close(
                    ours[i, layer], cache[f"blocks.{layer}.hook_out"][0, row.n_prompt - 1].detach().numpy()
                )
