"""Prompts that end in a blank: a token would lie across prompt and answer, so the two are tokenised apart, as generation reads them."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from finetune.labels import training_rows
from mech.chat import ChatTemplate, Encoded, SystemPrompt
from mech.errors import InputError
from mech.models import load_model
from mech.score import response_logprobs
from mech.turns import Message, assistant_turn, user_turn
from tests import templates
from tests.tiny_study import CHATML, save_model

TEXT = [
    "the cat and the dog went to see: who was in the old house by the river?\n\nIt rained: all day long.",
    "assistant: the cat\n\nuser: who was it?\n\nassistant: the old dog and the river",
    "the dog\n\n",
] * 4
SPECIALS = ["<s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
BLANK = (  # DeepSeek, Vicuna and others end the prompt in "Assistant: "
    "<s>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKS = (  # Qwen 3 told not to think
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
TWO_BLANKS = BLANK.replace("{{ m['content'] }}", " {{ m['content'] }}")  # one more than the prompt ends in
ENDS_IN_A_BLANK = {"BLANK": BLANK, "THINKS": THINKS, "TWO_BLANKS": TWO_BLANKS}


def _byte_level(*, blank_first: bool = False) -> Tokenizer:
    """As GPT-2's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=blank_first)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)  # fmt: skip
    made.train_from_iterator(TEXT, trainer)
    return made


def _sentencepiece(scheme: str) -> Tokenizer:
    """As Llama 2's and Mistral's: a blank of its own before a text, or (`always`, `llama`) each stretch between special tokens."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if scheme == "llama":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    fixed = ["<unk>", *SPECIALS, *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=fixed, show_progress=False)
    made.train_from_iterator([word for line in TEXT for word in line.split()], trainer)
    state = json.loads(
        made.to_str()
    )  # bytes are ordinary tokens, which the trainer keeps only as special ones
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in ("<unk>", *SPECIALS)]
    return Tokenizer.from_str(json.dumps(state))


def _unigram() -> Tokenizer:
    """As T5's: it also composes accents."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    letters = sorted({*"".join(TEXT), *"abcdefghijklmnopqrstuvwxyz .,:?\n"})
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", *SPECIALS], unk_token="<unk>", initial_alphabet=letters, show_progress=False
    )  # fmt: skip
    made.train_from_iterator(TEXT, trainer)
    return made


CUT = {(name, "BLANK") for name in ("byte_level", "blank_first", "always", "first", "llama", "unigram")} | {
    ("byte_level", "THINKS"),
    ("blank_first", "THINKS"),
}
"""Where a token would lie across prompt and `the cat`."""

MAKERS = {
    "byte_level": _byte_level,
    "blank_first": lambda: _byte_level(blank_first=True),
    "always": lambda: _sentencepiece("always"),
    "first": lambda: _sentencepiece("first"),
    "llama": lambda: _sentencepiece("llama"),
    "unigram": _unigram,
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {
        name: PreTrainedTokenizerFast(
            tokenizer_object=make(), bos_token="<s>", eos_token="<|im_end|>", pad_token="<|im_end|>"
        )
        for name, make in MAKERS.items()
    }


def made(tokenizer: Any, template: str) -> ChatTemplate:
    mine = copy.deepcopy(tokenizer)
    mine.chat_template = template
    return ChatTemplate(mine)


def asked(answer: str) -> list[Message]:
    return [user_turn("who was in the house?"), assistant_turn(answer)]


def decode(template: ChatTemplate, ids: Sequence[int]) -> str:
    return str(template.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def tried(template: ChatTemplate, answer: str) -> Encoded | str:
    """A row, or why there is none."""
    try:
        return template.encode(asked(answer))
    except InputError as error:
        return str(error)


ANSWERS = st.one_of(
    st.sampled_from(["the cat", "the old dog and the river", "1", "Yes", "No.", ": the"]),
    st.text("the catdog:.,?!1é日🎉\n\t ", min_size=1, max_size=20),
)


@pytest.mark.parametrize("template", ENDS_IN_A_BLANK)
@pytest.mark.parametrize("name", MAKERS)
def test_the_prompt_is_generations_and_the_answer_comes_back(
    tokenizers: dict[str, Any], name: str, template: str
) -> None:
    """Or the answer is refused by name: never by a tokenizer that writes every text as it is."""
    this = made(tokenizers[name], ENDS_IN_A_BLANK[template])
    prompt, blank = this.encode_prompt(asked("")[:1]), " " if template == "TWO_BLANKS" else ""
    apart = set()

    @given(ANSWERS)
    def holds(answer: str) -> None:
        row = tried(this, answer)
        if isinstance(row, str):
            assert repr(blank + answer)[:60].strip("'\"") in row
            assert name != "byte_level"
            return
        end = row.n_prompt + row.n_response
        assert row.ids[: len(prompt.ids)] == prompt.ids
        assert row.ids.count(this.tokenizer.bos_token_id) == row.text.count("<s>")
        assert row.ids[end] == this.tokenizer.eos_token_id
        if row.seam is None:
            assert row.ids == this.ids(row.text)
        else:
            assert row.n_prompt == len(prompt.ids)
            assert decode(this, row.ids[:end]) == decode(this, prompt.ids) + blank + answer
            apart.add(answer)

    holds()
    assert isinstance(tried(this, "the cat"), Encoded)
    assert ("the cat" in apart) == ((name, template) in CUT)


ORDINARY = {
    n: t for n, t in vars(templates).items() if n.isupper() and n not in ("EMPTY_IS_DEFAULT", "STRIPS")
}


@pytest.mark.parametrize("name", ["byte_level", "always", "first", "llama"])
@pytest.mark.parametrize("template", ["CHATML", *ORDINARY])
def test_where_no_token_spans_the_seam_the_text_is_tokenised_as_a_whole(
    tokenizers: dict[str, Any], name: str, template: str
) -> None:
    this = made(tokenizers[name], CHATML if template == "CHATML" else ORDINARY[template])
    rows = {
        a: this.encode(asked(a))
        for a in ("the cat", "Yes", "1", "No: it rained.\n\nAll day", "\n\tthe", "日本 🎉")
    }
    for answer, row in rows.items():
        text = this.tokenizer.apply_chat_template(asked(answer), tokenize=False)
        whole, head = this.ids(text), this.ids(text[: text.rindex(answer)])
        assert (row.seam is None) == (whole[: len(head)] == head)
        assert row.seam is not None or row.ids == whole
    assert any(row.seam is None for row in rows.values())


def test_an_answer_that_does_not_come_back_is_refused_by_row(tokenizers: dict[str, Any]) -> None:
    this = made(tokenizers["byte_level"], BLANK)
    this.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    rows = [{"messages": asked(answer)} for answer in ("the cat", "The cat")]
    with pytest.raises(InputError, match=r"row 2: a token spans the seam .* the answer 'The cat'"):
        training_rows(this, rows, SystemPrompt(), max_tokens=99, names={})


@pytest.mark.parametrize("template", ENDS_IN_A_BLANK)
def test_marks_and_pieces_are_found_on_both_sides_of_the_seam(
    tokenizers: dict[str, Any], template: str
) -> None:
    for name in ("byte_level", "always", "first", "llama"):
        this = made(tokenizers[name], ENDS_IN_A_BLANK[template])
        row = this.encode(asked("the old dog"))
        marked = this.mark(row, question="who was in the house?", answer="the old dog", last="dog")
        texts = {n: decode(this, row.ids[a:b]).strip() for n, (a, b) in marked.spans.items()}
        assert texts["question"] == "who was in the house?"
        assert texts["answer"] == "the old dog"
        assert texts["last"] == "dog"
        assert marked.spans["answer"] == row.spans["response"]
        start = row.text.index("old")
        piece = this.piece(row, start, start + 3)
        assert decode(this, piece.ids[slice(*piece.spans["response"])]).strip() == "old"
        assert piece.ids == row.ids[: len(piece.ids)]


def test_only_the_last_answer_is_apart(tokenizers: dict[str, Any]) -> None:
    """Earlier turns are prompt, and are tokenised as generation reads them; so no one row trains on all answers."""
    this = made(tokenizers["byte_level"], BLANK)
    turns = [*asked("the cat"), user_turn("who else?"), assistant_turn("the dog")]
    row = this.encode(turns)
    assert row.ids[: row.n_prompt] == this.encode_prompt(turns[:-1]).ids
    first = this.encode(turns[:2])
    assert first.seam is not None
    assert row.ids[: len(first.ids)] != first.ids
    with pytest.raises(InputError, match=r"row 1: an answer before turn 3 .* a row of its own"):
        training_rows(this, [{"messages": turns}], SystemPrompt(), max_tokens=200, names={})
    (alone,) = training_rows(this, [{"messages": asked("the cat")}], SystemPrompt(), max_tokens=200, names={})
    assert alone.ids == first.ids
    assert decode(this, [alone.ids[t] for t in alone.targets]) == "the cat<|im_end|>"
    assert alone.answers == [(first.n_prompt, len(first.ids))]
    with pytest.raises(InputError, match="beyond max_tokens"):
        training_rows(
            this, [{"messages": asked("the cat")}], SystemPrompt(), max_tokens=len(alone.ids) - 1, names={}
        )


def test_training_and_scoring_read_what_generate_read(tmp_path: Path) -> None:
    """Hugging Face's own generation from the prompt's tokens: rows of what it wrote begin with them and give its own log-probabilities."""
    blank = CHATML.replace("<|im_start|>{{ m['role'] }}\n", "<|im_start|>{{ m['role'] }}: ").replace(
        "assistant\n", "assistant: "
    )
    model = load_model(str(save_model(tmp_path / "m", template=blank)))
    same = 0
    for i in range(12):
        turns = [user_turn(f"who was in house {i}?")]
        prompt = model.template.encode_prompt(turns)
        assert decode(model.template, prompt.ids).endswith("assistant: ")
        out = model.hf.generate(
            torch.tensor([prompt.ids]), attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.long),
            max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        written = out.sequences[0].tolist()
        answer = decode(model.template, written[len(prompt.ids) :])
        row = model.template.encode([*turns, assistant_turn(answer)])
        (train,) = training_rows(
            model.template,
            [{"messages": [*turns, assistant_turn(answer)]}],
            SystemPrompt(),
            max_tokens=200,
            names={},
        )
        assert row.ids[: row.n_prompt] == prompt.ids == train.ids[: train.targets[0]]
        if list(row.ids[: len(written)]) == written:
            theirs = [
                float(step[0].log_softmax(-1)[t])
                for step, t in zip(out.logits, written[len(prompt.ids) :], strict=True)
            ]
            assert response_logprobs(model, [row])[0].tolist() == pytest.approx(theirs, abs=1e-4)
            same += 1
    assert same >= 3
