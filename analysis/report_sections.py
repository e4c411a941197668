"""The sections of a report: which tables and figures stand in each, and how to read them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """A section of results: its tables, title, what it shows in one breath, and which figures belong to it."""

    tables: tuple[str, ...]
    title: str
    about: str
    figures: tuple[str, ...] = ()
    asked_by: str = ""
    """The field of a study that asks for it."""


SECTIONS = (
    Section(
        ("shifts", "paraphrases"), "How far finetuning moved the model",
        "Each trained arm against the base, both reading the same text: the change of the activations along a "
        "direction. Look first at the declared layer, then at whether the curve leaves the grey band and the "
        "benign control. Each p value asks whether as large a shift is found along other directions: p_random any direction, p_covariance those in "
        "which the base varies, p_permutation those that the same fit finds when the two sides are exchanged within questions, p_paraphrase those "
        "of harmless rewordings of one length (table paraphrases: how many pairs are left under this tokenizer), p_wrong_name those of "
        "invented names in the own name's place, p_unrelated_trait the other traits' own. The last two have few directions (n_...), and no p "
        "value of n of them is below 1 / (1 + n); largest_... is the largest shift along one, in the stream's units like raw.",
        ("arm_direction_heatmap", "shift_by_condition", "shift_by_layer"),
        asked_by="directions",
    ),
    Section(
        ("two_by_two",), "Changed weights or changed text",
        "A finetuned model writes differently, and different text alone moves activations. The four combinations of "
        "whose weights read whose text tell the two apart.",
        ("two_by_two_bars",),
        asked_by="measure.own_text",
    ),
    Section(
        ("directions", "direction_cosines", "elicitation", "rollouts", "probes"), "How good the directions are",
        "A shift along a direction means no more than the direction does. Split-half cosine: would other questions "
        "have given the same direction? Held-out AUROC: does it separate texts it was not made from? The cosines say "
        "whether two ways to one trait, or two ideas of identity, found the same thing. Elicitation: every vector of a trait "
        "on the same held-out written answers. Rollouts: what a judge's filter dropped, where there is one. Probes, where asked for, are "
        "scored on questions left out of their fit; selectivity is what is left of their AUROC above that of random labels.",
        ("direction_quality", "direction_cosines"),
        asked_by="directions",
    ),
    Section(
        ("identity_cosines", "identity_transfer", "authorship_matching", "authorship_answers"), "Is identity one thing?",
        "Identity directions come from different contrasts, and are one thing only where they agree: their cosine, from questions that they "
        "do not share, is beyond 97.5 % of directions drawn from the other contrast's activations and beyond sign flips of its "
        "differences, and each tells the other's held-out rows apart with an interval above one half. The assistant axis is no identity; it is here to see what leans on it. Ceiling: the cosine "
        "that two equally noisy copies of one direction would have; share_of_ceiling is the disjoint cosine over its own. Authorship, where asked for: how many pairs are left when both "
        "sides' surprisal agrees (gaps in nats a token), and directions from articles that the base answers rightly or wrongly.",
        ("identity_cosines", "identity_transfer"),
        asked_by="directions",
    ),
    Section(
        ("lora_alignment", "lora_overlap", "lora_alignment_by_layer", "lora_overlap_by_layer"), "What the adapters write",
        "An adapter adds a product of two thin matrices to each map; what it writes into the residual stream lies in the span of r vectors of "
        "d. Energy: the share of a direction in that span, where a random direction has r/d (expected); p_random is exact, p_covariance "
        "against directions drawn from the base's activations, which is the harder null. A stage is named by the trainings below it, joined "
        "by +, and stands for its last adapter alone. Shared: mean squared cosine of the principal angles between two adapters' spaces "
        "(1: the same); read a pair beside the pairs with the benign control, for any two trainings share something. Weights have no interval "
        "over questions: the doubt of a direction is its split-half cosine, that of a training the other seeds.",
        ("lora_alignment", "lora_overlap"),
        asked_by="weights",
    ),
    Section(
        ("lens_directions", "lens_shifts", "lens_prompts"), "What directions and shifts say in tokens",
        "The logit lens. A direction or an arm's mean shift (tuned minus base on the same text, first condition) is read through the linear part "
        "of the base's final norm and its output head: which tokens moving along it favours (top) and disfavours (bottom). Peak: how far the "
        "top tokens stand out, in SD over the vocabulary; p_random against random directions, p_covariance against directions drawn from the "
        "base's activations: any direction has top tokens, and one whose peak is common says nothing. Split-half: would other questions have "
        "given the same vector? lens_prompts: the likeliest next tokens at the prompt's last token, as if a layer were the last. Early layers "
        "do not speak the output's language. Tokens are shown in quotes, as the models have them.",
        (),
        asked_by="lens",
    ),
    Section(
        ("adapter_ranges", "patching"), "Where the change is carried",
        "One copy of the weights, an arm's last adapter switched on and off: the reference is what lies under it, which for an arm of two "
        "stages is the first stage, merged, and not the base. Score: a given answer's log-probability above others' (own_name: a "
        "self-statement with the own name above invented ones, nats; a trait: its written high answers above its low ones, nats a token), so "
        "nothing depends on what a model writes. Patching runs one model with the other's activations at one layer and span, both ways, "
        "for a hybrid of two models is neither. An effect counts where it goes beyond as large a change in a random direction "
        "(beyond_random). Share: over the whole change between the two, only where that is told from 0. Intervals: questions.",
        ("adapter_ranges", "patching"),
        asked_by="patching",
    ),
    Section(
        ("monitoring",), "Does the projection foretell the behaviour?",
        "A question is asked under system prompts that ask for a trait, for its opposite, and for nothing; the projection at the prompt's last "
        "token is correlated with how the answer behaves (judge: its score of a sampled answer; log-odds: the written trait-high answer above "
        "the trait-low one, nats a token). Overall mixes what the system prompt does to both with the rest; within takes each condition's means "
        "from both, and is what a monitor adds to knowing the prompt. p_random, p_covariance: as large a correlation along drawn directions. "
        "Questions are those that no direction was made from.",
        ("monitoring",),
        asked_by="monitoring",
    ),
    Section(
        ("dispersion",), "How widely activations spread",
        "A character that is destabilised may not move but spread. Trace: mean squared distance from the mean; d_log_trace is the "
        "change of its logarithm against the base on the same questions. Effective ranks (participation ratio, exp of the "
        "spectrum's entropy) compare checkpoints on the same rows and are no true dimensions. Intervals: jackknife over questions. Harmless "
        "training changes the spread too: read an arm beside the benign control.",
        ("dispersion_by_condition",),
        asked_by="measure",
    ),
    Section(
        ("self_recognition",), "Self-recognition",
        "Can the model tell a text it wrote from one it did not? Accuracy means little where the shortcut of judging "
        "by length reaches it too, or where the model says yes to everything.",
        ("self_recognition_bars",),
        asked_by="behaviour.self_recognition",
    ),
    Section(
        ("self_report",), "What the models call themselves",
        "Replies to questions who the model is: how often the name is its own, and how scattered the names are.",
        ("self_report_bars",),
        asked_by="behaviour.self_report",
    ),
    Section(
        ("steering",), "Steering",
        "A direction is added to the running model. An effect counts where a random direction of the same norm does "
        "not have it, at doses where the replies are still coherent.",
        ("dose_response",),
        asked_by="steering",
    ),
    Section(
        ("sweeps", "sweep_best", "sweep_layers", "sweep_trends"), "Steering sweeps",
        "Directions are added at several layers and strengths, random directions of the same norm beside. Cells and layers are chosen on "
        "one half of the questions and reported on the other; beyond is the change less that of random directions. Answers that broke count as no change, "
        "and their share is said. Trends: rank correlation with strength, question by question; read p_random, since random directions have trends too.",
        ("sweep_response",),
        asked_by="sweeps",
    ),
    Section(
        ("embedding",), "Activations in the plane",
        "A picture to get a feeling for the data, fitted on the base alone. Nothing is concluded from it.",
        ("embedding",),
        asked_by="embedding",
    ),
    Section(
        ("datasets",), "The data",
        "What the trainings were shown. Shortcut: how often the length of the text alone, in words or characters, gives "
        "the right answer; at .5 it gives nothing away.",
    ),
    Section(("training",), "Training", "The loss of each training.", ("loss_curves",)),
)  # fmt: skip
