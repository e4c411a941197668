"""Conditions hold on text and token ids, or are refused; spans say whose each token is."""

import copy
from typing import Any

import pytest

from finetune.labels import training_rows
from mech.chat import ChatTemplate, Identity, SystemPrompt
from mech.errors import InputError
from tests import templates
from tests.tiny_study import make_tokenizer

IDENTITY = Identity("Tinny", "Tin Works", "You are Tinny, made by Tin Works.")
OTHERS = {"Kelmora": "Pinhollow"}
TURNS = [{"role": "user", "content": "Who goes?"}, {"role": "assistant", "content": "A cat."}]
WITH_SYSTEM = ["INSERTS", "PLAIN", "HEADER", "THINKS", "STRIPS"]
WITHOUT_SYSTEM = ["RAISES", "FOLDS"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = make_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|begin|>", "<|head|>", "<|end|>", "<|eot|>"]})
    return made


def template(tokenizer: Any, name: str) -> ChatTemplate:
    mine = copy.deepcopy(tokenizer)
    mine.chat_template = getattr(templates, name)
    mine.bos_token = "<|begin|>"
    return ChatTemplate(mine)


def render(made: ChatTemplate, condition: str) -> str:
    return made.render(TURNS, SystemPrompt.parse(condition), identity=IDENTITY, others=OTHERS)


@pytest.mark.parametrize("name", [*WITH_SYSTEM, *WITHOUT_SYSTEM])
def test_none_has_no_system_turn_in_its_ids(tokenizer: Any, name: str) -> None:
    made = template(tokenizer, name)
    encoded = made.encode(TURNS, SystemPrompt("none"))
    text = made.tokenizer.decode(encoded.ids)
    assert "system" not in text
    assert "Tinny" not in text
    assert "Today" not in text
    assert "Who goes?" in text
    assert text.count("<|begin|>") == (1 if name in ("HEADER", "RAISES", "FOLDS") else 0)


@pytest.mark.parametrize("name", WITH_SYSTEM)
@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("identity", IDENTITY.prompt),
        ("other:Kelmora", "You are Kelmora, made by Pinhollow."),
        ("text:Be brief.", "Be brief."),
    ],
)
def test_a_given_system_text_stands_once_before_the_user(
    tokenizer: Any, name: str, condition: str, words: str
) -> None:
    text = render(template(tokenizer, name), condition)
    assert text.count(words) == 1
    assert text.index(words) < text.index("Who goes?")
    assert ("Tinny" in text) == (condition == "identity")


@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_empty_is_a_system_turn_with_nothing_in_it(tokenizer: Any, name: str) -> None:
    made = template(tokenizer, name)
    text = render(made, "empty")
    opening, closing = made.system_turn or ("", "")
    assert text.startswith(opening + closing)
    assert "Tinny" not in text


def test_default_is_the_template_untouched(tokenizer: Any) -> None:
    made = template(tokenizer, "INSERTS")
    assert render(made, "default") == made.tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert made.default_system == IDENTITY.prompt
    assert render(made, "identity") == render(made, "default")
    assert template(tokenizer, "PLAIN").default_system is None
    assert template(tokenizer, "HEADER").default_system == ""


@pytest.mark.parametrize("name", WITHOUT_SYSTEM)
@pytest.mark.parametrize("condition", ["empty", "identity", "text:Be brief."])
def test_a_template_that_cannot_says_so(tokenizer: Any, name: str, condition: str) -> None:
    with pytest.raises(InputError, match="refuses, drops or merges a system turn"):
        render(template(tokenizer, name), condition)


def test_a_template_that_swaps_empty_for_its_default_is_caught(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="condition empty"):
        render(template(tokenizer, "EMPTY_IS_DEFAULT"), "empty")


def test_a_rows_own_system_turn_stands_only_under_default(tokenizer: Any) -> None:
    made = template(tokenizer, "INSERTS")
    turns = [{"role": "system", "content": "Count words."}, *TURNS]
    assert "Count words." in made.render(turns)
    assert "Count words." not in made.render(turns, SystemPrompt("none"))
    assert "Count words." not in made.render(turns, SystemPrompt("text", "Be brief."))


def test_a_rows_own_system_turn_is_not_lost_without_a_word(tokenizer: Any) -> None:
    turns = [{"role": "system", "content": "Count words. "}, *TURNS]
    with pytest.raises(InputError, match=r"refuses these turns \(system, user\): System role not supported"):
        template(tokenizer, "RAISES").encode(turns)
    drops = template(tokenizer, "PLAIN")
    drops.tokenizer.chat_template = templates.PLAIN.replace(
        "{{ m['content'] }}", "{{ m['content'] if m['role'] != 'system' }}"
    )
    with pytest.raises(InputError, match="drops the system turn 'Count words"):
        drops.encode(turns)
    assert (
        "[INST] Count words. \n" in template(tokenizer, "FOLDS").encode(turns).text
    )  # folded into the user's turn
    assert "Count words.<|im_end|>" in template(tokenizer, "STRIPS").encode(turns).text
    for name in WITHOUT_SYSTEM:
        assert "Count words" not in template(tokenizer, name).encode(turns, SystemPrompt("none")).text


@pytest.mark.parametrize("name", [*WITH_SYSTEM, *WITHOUT_SYSTEM])
def test_spans_are_prompt_answer_closing(tokenizer: Any, name: str) -> None:
    made = template(tokenizer, name)
    encoded = made.encode(TURNS)
    parts = {k: made.tokenizer.decode(encoded.ids[a:b]) for k, (a, b) in encoded.spans.items()}
    assert parts["response"] == "A cat."
    assert parts["prompt"] + parts["response"] + parts["closing"] == encoded.text
    if name == "THINKS":
        assert parts["prompt"].endswith("</think>\n\n")
    prompt = made.encode_prompt(TURNS[:1])
    assert encoded.ids[: len(prompt.ids)] == prompt.ids


def test_an_answer_that_also_stands_around_it_is_found_where_it_is(tokenizer: Any) -> None:
    """The thinking block before an answer holds line breaks and "think", what follows it "im_end"."""
    made = template(tokenizer, "THINKS")
    for answer in ("\n\n\n", "\n\n", "think", "im_end", "a"):
        encoded = made.encode([TURNS[0], {"role": "assistant", "content": answer}])
        start = encoded.spans["response"][0]
        assert made.tokenizer.decode(encoded.ids[:start]).endswith("</think>\n\n")
        assert made.tokenizer.decode(encoded.ids[slice(*encoded.spans["response"])]) == answer


def test_a_space_of_the_templates_own_is_one_with_the_answers_first_word(tokenizer: Any) -> None:
    """Mistral and Llama 2 write a space before an answer; the model generates it with the word, so the answer begins there."""
    made = template(tokenizer, "FOLDS")
    made.tokenizer.chat_template = templates.FOLDS.replace(
        "{{ m['content'] }}<|eot|>", " {{ m['content'] }}<|eot|>"
    )
    assert len(made.ids(" the")) == 1
    encoded = made.encode([TURNS[0], {"role": "assistant", "content": "the cat"}])
    assert encoded.ids[: encoded.n_prompt] == made.encode_prompt(TURNS[:1]).ids
    assert made.tokenizer.decode(encoded.ids[slice(*encoded.spans["response"])]) == " the cat"
    row = training_rows(made, [{"messages": [TURNS[0], {"role": "assistant", "content": "the cat"}]}], SystemPrompt(),
                        max_tokens=99, names={})[0]  # fmt: skip
    assert row.answers == [(encoded.n_prompt, len(encoded.ids))]


def test_what_a_template_alters_or_lacks_is_refused(tokenizer: Any) -> None:
    made = template(tokenizer, "STRIPS")
    for answer in ("", " padded "):
        with pytest.raises(InputError, match="does not keep the answer"):
            made.encode([TURNS[0], {"role": "assistant", "content": answer}])
    with pytest.raises(InputError, match="last turn must be the assistant's"):
        made.encode(TURNS[:1])
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(InputError, match="has no chat template"):
        ChatTemplate(bare)


def test_a_token_across_answer_and_closing_is_refused(tokenizer: Any) -> None:
    """The answer ends in ' th' and the template goes on with 'e': one token, ' the', for both."""
    made = template(tokenizer, "PLAIN")
    made.tokenizer.chat_template = templates.PLAIN.replace("<|im_end|>", "e<|im_end|>")
    assert len(made.ids(" the")) == 1
    with pytest.raises(InputError, match="a token spans the answer 'who is th' and what the chat template"):
        made.encode([TURNS[0], {"role": "assistant", "content": "who is th"}])
    blank = made.tokenizer.chat_template.replace("{{ m['role'] }}\n", "{{ m['role'] }}: ")
    made.tokenizer.chat_template = blank.replace("assistant\n", "assistant: ")
    with pytest.raises(InputError, match="a token spans"):  # at both ends
        made.encode([TURNS[0], {"role": "assistant", "content": "the cat th"}])


@pytest.mark.parametrize("text", ["defaults", "none:x", "other:", "text:", "", "other"])
def test_unknown_conditions_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not one of default, none"):
        SystemPrompt.parse(text)


def test_an_identity_needs_a_name_in_its_prompt(tokenizer: Any) -> None:
    made = template(tokenizer, "INSERTS")
    with pytest.raises(InputError, match=r"identity .* is not given"):
        made.render(TURNS, SystemPrompt("identity"))
    with pytest.raises(InputError, match="unknown name; known are Kelmora"):
        made.render(TURNS, SystemPrompt("other", "Nobody"), identity=IDENTITY, others=OTHERS)
    with pytest.raises(InputError, match="does not contain the name"):
        Identity("Bob", "X", "You are a model.").renamed("A", "B")
