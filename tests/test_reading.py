"""Capture against Hugging Face, nnsight and TransformerLens, on every architecture."""

import copy
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activations.capture import Note, Reading, capture, capture_into
from activations.sinks import ArraySink
from mech.batching import plan_batches
from mech.chat import Encoded
from mech.errors import GuardError, InputError
from mech.forward import Pass
from mech.hooks import odd_blocks
from mech.interventions import Add, intervene
from mech.lens import final_norm
from mech.models import ChatModel, load_model
from mech.packed_attention import attends_to_everything, can_pack
from mech.packing import Pack, plan_packs
from mech.score import next_token_logits, response_logprobs
from mech.sites import SITES
from tests.tiny_study import make_tokenizer, save_model

TOLERANCE = 1e-4
"""Relative to the largest activation, float32; batch composition changes rounding, nothing else."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    return load_model(str(save_model(tmp_path_factory.mktemp("model") / "m")))


def conversations(model: ChatModel, n: int = 9) -> list[Encoded]:
    """Rows of many lengths, some with the same prompt, one twice."""
    made = []
    for i in range(n):
        question = (
            "Who goes by the river?" if i % 2 else f"Number {i * i}, and a long question at that, who is it?"
        )
        answer = "the cat " * (1 + i % 4) + str(i)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        made.append(model.template.encode(turns))
    return [*made, made[3]] if n > 3 else made


def blocks_output(model: ChatModel, row: Encoded) -> list[torch.Tensor]:
    """Each block's output for one row alone, by plain torch hooks."""
    found: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output)[0].detach())

    handles = [block.register_forward_hook(keep) for block in model.blocks]
    try:
        with torch.no_grad():
            model.hf(input_ids=torch.tensor([row.ids]))
    finally:
        for handle in handles:
            handle.remove()
    return found


def assert_close(ours: np.ndarray, expected: np.ndarray) -> None:
    scale = float(np.abs(expected).max())
    assert float(np.abs(ours - expected).max()) <= TOLERANCE * scale


# -- architectures, found by structure ---------------------------------------------------------------

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.1}
WIDE = {**SHAPE, "num_key_value_heads": 2, "intermediate_size": 48}
GROUPED = {**WIDE, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
SCALED = {"residual_multiplier": 0.3, "logits_scaling": 4.0}


def architectures() -> dict[str, Any]:
    import transformers as t

    return {
        "llama": t.LlamaConfig(**GROUPED),
        "qwen2": t.Qwen2Config(**GROUPED),
        "qwen3": t.Qwen3Config(**GROUPED),
        "gemma2": t.Gemma2Config(**GROUPED, sliding_window=4096, query_pre_attn_scalar=8),
        "gemma3": t.Gemma3TextConfig(**GROUPED, sliding_window=4096, query_pre_attn_scalar=8),
        "seed_oss": t.SeedOssConfig(**GROUPED),
        "mistral-sliding": t.MistralConfig(**GROUPED, sliding_window=8),
        "mixtral": t.MixtralConfig(**GROUPED, num_local_experts=3, num_experts_per_tok=2),
        "olmo2": t.Olmo2Config(**WIDE),
        "glm4": t.Glm4Config(**GROUPED),
        "gpt_neox": t.GPTNeoXConfig(**SHAPE, intermediate_size=48, use_parallel_residual=True),
        "gpt2": t.GPT2Config(n_embd=32, n_layer=3, n_head=4, initializer_range=0.1),
        "bloom": t.BloomConfig(hidden_size=32, n_layer=3, n_head=4, initializer_range=0.1),
        "cohere": t.CohereConfig(**WIDE, logit_scale=0.25),
        "cohere2": t.Cohere2Config(**WIDE, logit_scale=0.25, sliding_window=4096),
        "falcon": t.FalconConfig(**SHAPE, num_kv_heads=2, new_decoder_architecture=True, alibi=False),
        "gpt_oss": t.GptOssConfig(**GROUPED, num_local_experts=3, num_experts_per_tok=2, sliding_window=4096),
        "granite": t.GraniteConfig(**WIDE, **SCALED, embedding_multiplier=3.0, attention_multiplier=0.2),
        "hyperclovax": t.HyperCLOVAXConfig(**WIDE, **SCALED, use_post_norm=True),
        "llama4": t.Llama4TextConfig(**GROUPED, num_local_experts=2, intermediate_size_mlp=48),
        "mpt": t.MptConfig(
            d_model=32, n_layers=3, n_heads=4, max_seq_len=2048, initializer_range=0.1, use_cache=True
        ),
        "opt": t.OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, init_std=0.1),
        "phi": t.PhiConfig(**WIDE),
        "phi3": t.Phi3Config(**WIDE),
        "qwen3_moe": t.Qwen3MoeConfig(**GROUPED, **EXPERTS, num_experts=3),
        "recurrent_gemma": t.RecurrentGemmaConfig(**WIDE, logits_soft_cap=1.0),
        "stablelm": t.StableLmConfig(**WIDE, use_parallel_residual=True),
        "starcoder2": t.Starcoder2Config(**WIDE),
    }


NEARSIGHTED = ("cohere2", "gemma2", "gemma3", "gpt_oss", "llama4", "mistral-sliding", "recurrent_gemma")
"""Not every layer attends to the whole past."""
OWN_ATTENTION = ("bloom", "falcon", "mpt")
"""Attention goes past Hugging Face's registry, or has no positions: rows are padded."""
ODD = ("bloom", "llama4", "mpt")
"""Attention or MLP give something else than what the block adds."""
WITHOUT_A_PART = ("opt", "recurrent_gemma")
"""Its blocks have no attention or MLP by itself."""


def random_model(name: str, like: ChatModel) -> ChatModel:
    """A tiny random model of an architecture; its checkpoint is another's, and names nothing."""
    return made(architectures()[name], like)


def made(config: Any, like: ChatModel) -> ChatModel:
    """A random model of a config."""
    import transformers

    tokenizer = make_tokenizer()
    config.vocab_size, config.pad_token_id, config.bos_token_id = len(tokenizer), 1, 1
    config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    built = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in built.parameters():  # some that a checkpoint would fill are left as memory happens to be
        p.data = torch.where(p.isfinite() & (p.abs() < 1e3), p, 0.1)
    return ChatModel(built, tokenizer, like.checkpoint)


@pytest.mark.parametrize("name", sorted(architectures()))
def test_capture_equals_the_blocks_outputs_on_every_architecture(name: str, model: ChatModel) -> None:
    other = random_model(name, model)
    rows = conversations(other)
    assert attends_to_everything(other) == (name not in NEARSIGHTED)
    assert can_pack(other) == (name not in (*NEARSIGHTED, *OWN_ATTENTION))
    ours = capture(other, rows, poolings=["prompt_last", "response_mean"], token_budget=200)
    for i, row in enumerate(rows):
        for layer, h in enumerate(blocks_output(other, row)):
            start, stop = row.spans["response"]
            assert_close(ours["resid_post", "prompt_last"][i, layer], h[row.n_prompt - 1].numpy())
            assert_close(ours["resid_post", "response_mean"][i, layer], h[start:stop].mean(0).numpy())
    logits = next_token_logits(other, rows)
    plain = torch.stack(
        [other.hf(input_ids=torch.tensor([r.ids[: r.n_prompt]])).logits[0, -1].detach() for r in rows]
    )
    torch.testing.assert_close(logits, plain, rtol=1e-3, atol=1e-4)
    last = torch.as_tensor(ours["resid_post", "prompt_last"][:, -1])
    with torch.no_grad():
        lens = other.logits(final_norm(other)(last))
    torch.testing.assert_close(lens, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", sorted(architectures()))
def test_half_precision_packs_where_float32_does(name: str, model: ChatModel) -> None:
    """Rounding in bfloat16 is as large as what wrong positions change, so it is not what is looked at."""
    half = random_model(name, model)
    half.hf.to(torch.bfloat16)
    with patch.object(Pack, "tensors", _through_the_pack):
        assert not can_pack(half)
    del vars(half)["_can_pack"]
    assert can_pack(half) == (name not in (*NEARSIGHTED, *OWN_ATTENTION))
    assert not odd_blocks(half) or name in ODD
    assert {p.dtype for p in half.hf.parameters()} == {torch.bfloat16}
    assert len(half.blocks) == 3


def _through_the_pack(pack: Pack, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A pack's tokens with wrong positions: counted through all rows."""
    ids = torch.zeros(1, len(pack), dtype=torch.long)
    for row, places in zip(pack.rows, pack.places, strict=True):
        ids[0, list(places)] = torch.tensor(row)
    return ids.to(device), torch.arange(len(pack), device=device).unsqueeze(0)


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


@pytest.mark.parametrize("name", sorted(set(architectures()) - {*ODD, *WITHOUT_A_PART}))
def test_what_the_parts_add_is_what_the_block_adds(name: str, model: ChatModel) -> None:
    other = random_model(name, model)
    h = capture(other, conversations(other, 3), poolings=["prompt_last"], sites=list(SITES))
    parts = {site: h[site, "prompt_last"] for site in SITES}
    assert_close(parts["resid_pre"] + parts["attn_out"] + parts["mlp_out"], parts["resid_post"])
    assert_close(parts["resid_pre"][:, 1:], parts["resid_post"][:, :-1])


@pytest.mark.parametrize("name", [*ODD, *WITHOUT_A_PART])
def test_parts_that_are_not_what_the_block_adds_are_refused(name: str, model: ChatModel) -> None:
    other = random_model(name, model)
    said = "mlp_out is not supported: what its attention" if name in ODD else "no part for mlp_out; its parts"
    with pytest.raises(InputError, match=said):
        capture(other, conversations(other, 2), sites=["mlp_out"])
    with pytest.raises(InputError, match=said), intervene(other, Add(np.ones(32), [1], site="mlp_out")):
        other.hf(input_ids=torch.tensor([[5, 6]]))


def test_streams_and_heads_that_differ_are_refused(model: ChatModel) -> None:
    from transformers import Gemma3nTextConfig

    several = Gemma3nTextConfig(**GROUPED, num_kv_shared_layers=0, layer_types=["full_attention"] * 3, laurel_rank=4,
                                vocab_size_per_layer_input=200, hidden_size_per_layer_input=8, altup_num_inputs=2)  # fmt: skip
    other = made(several, model)
    with pytest.raises(InputError, match=r"resid_post at layer 0 has shape .* not \[batch, sequence, d\]"):
        capture(other, conversations(other, 2))
    uneven = ChatModel(copy.deepcopy(model.hf), model.tokenizer, model.checkpoint)
    uneven.blocks[2].self_attn.o_proj = torch.nn.Linear(64, 32)
    with pytest.raises(InputError, match=r"heads differ .64 numbers at layer 2, 32 at layer 0"):
        capture(uneven, conversations(uneven, 2), sites=["attn_head_out"])


# -- batches, prefixes, layers --------------------------------------------------------------------------


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(1, 200))
def test_every_row_is_in_one_batch_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = plan_batches(lengths, token_budget=budget)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= budget for b in batches)


ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=25), min_size=1, max_size=9)


@given(ROWS, st.integers(0, 12), st.data())
@settings(max_examples=150)
def test_a_pack_holds_every_row_and_shares_within_limits(
    rows: list[list[int]], start: int, data: Any
) -> None:
    rows = [[9] * start + row for row in rows]
    limits = [data.draw(st.integers(0, len(r))) for r in rows]
    packs = plan_packs(rows, limits, token_budget=40, max_rows=3)
    assert sorted(i for members in packs for i in members) == list(range(len(rows)))
    for members in packs:
        pack = Pack(tuple(tuple(rows[i]) for i in members), tuple(limits[i] for i in members))
        assert len(members) == 1 or len(pack) <= 40
        assert len(members) <= 3
        ids, positions = (t[0].tolist() for t in pack.tensors(torch.device("cpu")))
        owners: dict[int, list[tuple[int, int]]] = {}
        for row, (i, places) in enumerate(zip(members, pack.places, strict=True)):
            assert [ids[p] for p in places] == rows[i]
            assert [positions[p] for p in places] == list(range(len(rows[i])))
            for t, place in enumerate(places):
                owners.setdefault(place, []).append((row, t))
        assert sorted(owners) == list(range(len(pack)))
        assert all(t < limits[members[row]] for of in owners.values() if len(of) > 1 for row, t in of)
        # Each token lies in one segment, and what the segment has before it is what its rows have before it.
        seen: list[int] = []
        for s in pack.segments:
            seen += range(s.start, s.start + s.length)
            row, t = owners[s.start][0]
            assert pack.places[row][: t + s.length] == (*s.before, *range(s.start, s.start + s.length))
        assert sorted(seen) == list(range(len(pack)))


def test_a_system_turn_and_a_question_are_run_once() -> None:
    system, questions = list(range(100, 120)), [list(range(200, 210)), list(range(300, 308))]
    rows = [[*system, *q, *answer] for q in questions for answer in ([1, 2, 3], [4, 5])]
    assert plan_packs(rows, [len(r) for r in rows], token_budget=100) == [[0, 1, 2, 3]]
    assert len(Pack(tuple(map(tuple, rows)), tuple(map(len, rows)))) == 20 + 10 + 8 + 2 * 5
    assert len(Pack(tuple(map(tuple, [*rows, rows[0]])), (99,) * 5)) == 48  # a row twice costs nothing


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
