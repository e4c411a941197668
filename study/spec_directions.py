"""The section `directions` of a study: what is found on the base, by what contrasts, and who judges them."""

from typing import Any, Literal

from pydantic import Field, model_validator

from study.spec_parts import ApiSpec, Part, PriceSpec


class JudgeApiSpec(ApiSpec):
    """An API at which answers are judged."""

    price: PriceSpec | None = None
    """What the API charges, so that `mech plan` can give the cost; left out, it gives the number of tokens alone."""


class JudgeSpec(Part):
    """Who scores rollouts, and what passes: positive side >= `trait`, negative side < `trait`, both >= `coherence`."""

    model: str = Field(min_length=1)
    """Behind `api`: its name there. Without: a checkpoint on this machine, read off its logits."""
    api: JudgeApiSpec | None = None
    """An OpenAI-compatible API; `api: {}` is OpenAI's own."""
    how: Literal["auto", "logprobs", "samples", "text"] = "auto"
    """`api`: how a score is read (evals/judge_endpoint.py)."""
    samples: int = Field(5, ge=1)
    """`api`: replies a case where they are sampled."""
    trait: float = Field(50.0, ge=0, le=100)
    """Threshold of the trait score."""
    coherence: float = Field(50.0, ge=0, le=100)
    """Threshold of the coherence score."""

    @property
    def scoring(self) -> dict[str, Any]:
        """All that determines its scores, JSON-able; what it costs does not."""
        return self.model_dump(mode="json", exclude={"api": {"price"}})


class AuthorshipSpec(Part):
    """Identity *authorship*: where it is read, and what is kept apart."""

    read_at: tuple[Literal["content", "judgement", "pair_content", "pair_answer"], ...] = Field(
        ("content", "judgement"), min_length=1
    )
    """`content`: over the text itself. `judgement`: where the answer to "did you write this?" begins. `pair_content`, `pair_answer`: over each
    text, or over the given answer's token, of a question that shows two texts; both orders are read, which cancels what a text's place adds."""
    articles: int | None = Field(None, ge=4)
    """Use the first so many articles of each half; as many as `identity_questions` when left out."""
    surprisal_within: float | None = Field(None, gt=0)
    """Keep only so many pairs that own and other texts differ by no more than this in mean surprisal under the base, in nats a token;
    left out: not matched."""
    by_answer: bool = False
    """Also a direction from the articles that the base answers rightly, and one from the others."""


class AdjustSpec(Part):
    """What to take out of an identity member; the result is added as `identity:MEMBER:adjusted`."""

    project_out: tuple[str, ...] = ()
    """Other members (`presence:generic`, `assistant_axis`) or directions (`evil:text`): whatever lies in their span is removed."""
    regress_out: tuple[Literal["length", "surprisal", "norm"], ...] = ()
    """Covariates, with slopes within questions of the extraction half: tokens and surprisal (nats a token) of what is read: an answer, or the
    prompt where its last token is read; `norm`, layer by layer, of the vector that is read."""

    @model_validator(mode="after")
    def _something(self) -> "AdjustSpec":
        if not self.project_out and not self.regress_out:
            raise ValueError("name what to take out: project_out or regress_out")
        return self


class DirectionSpec(Part):
    """Which directions are found on the base."""

    layer: int = Field(ge=0)
    """The layer of the headline numbers, declared before any of them is seen."""
    traits: tuple[str, ...] = ("evil", "sycophancy", "hallucination")
    """Persona vectors: built-in names or YAML files."""
    elicitation: tuple[Literal["text", "prompts"], ...] = ("text", "prompts")
    """Written answer pairs, contrastive system prompts, or both."""
    questions: int | None = Field(None, ge=2)
    """Use the first so many questions of each trait and half."""
    pairs_per_question: int = Field(1, ge=1)
    """`prompts`: how many instruction pairs each question is asked under."""
    rollout_samples: int = Field(1, ge=1)
    """`prompts`: answers to each prompt (the published way is 10)."""
    rollout_tokens: int = Field(32, ge=4)
    """`prompts`: the longest answer, in tokens."""
    rollout_temperature: float = Field(1.0, ge=0)
    """`prompts`: sampling temperature (the published way is 1)."""
    judge: JudgeSpec | None = None
    """`prompts`: who filters the answers by pair; left out: unfiltered, for models too small to be judged."""
    identity: tuple[Literal["name", "presence", "authorship", "self_report", "assistant_axis"], ...] = (
        "name",
        "presence",
    )
    """Members of the identity family: own name against invented ones; identity prompt against none; own text against
    others' (needs `behaviour.self_recognition`); first person against third, own name against another's, in answers; and
    the assistant against roles, which is not identity but stands beside it."""
    authorship: AuthorshipSpec = AuthorshipSpec()
    """Identity *authorship*: how."""
    roles: int = Field(40, ge=2)
    """Identity *assistant_axis*: against this many roles."""
    assistant_axis_at: tuple[Literal["prompt_last", "fixed_answer"], ...] = Field(
        ("prompt_last",), min_length=1
    )
    """Identity *assistant_axis*: read at the prompt's last token, and over an answer that is the same under every role."""
    self_report_at: tuple[Literal["answer", "prompt_last"], ...] = Field(("answer",), min_length=1)
    """Identity *self_report*: read over the written answer, and at the question's last token."""
    identity_questions: int | None = Field(10, ge=2)
    """Identity: use the first so many questions of each prompt set and half."""
    invented_names: int = Field(10, ge=2)
    """Identity *name*: contrasts with this many invented identities."""
    presence: tuple[Literal["none", "empty", "generic"], ...] = ("none", "empty", "generic")
    """Identity *presence*: what the identity prompt is contrasted with."""
    adjust: dict[str, AdjustSpec] = Field(default_factory=dict)
    """Identity members, by name, of which an adjusted version is added: without covariates, or without other directions."""
    folds: int = Field(1, ge=1)
    """How held-out rows are scored: 1 fits on the extraction half and tests on the other; more cross-fits over so many folds of all
    questions. The direction itself is always that of the extraction half."""
    paraphrases: int = Field(4, ge=0)
    """Under how many identity questions the paired rewordings of equal length are read: they give every shift its null of harmless rewordings
    (`p_paraphrase`). 0 leaves that null out."""
    probes: tuple[Literal["difference_of_means", "mass_mean", "lda", "logistic"], ...] = ()
    """Linear probes of every contrast, cross-validated by question on the base; none when left out."""
