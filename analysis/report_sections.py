"""The sections of a report: which tables and figures each holds, and how to read them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """A section of results: its tables, title, how to read it, and its figures."""

    tables: tuple[str, ...]
    title: str
    about: str
    figures: tuple[str, ...] = ()
    asked_by: str = ""
    """The field of a study that asks for it."""


SECTIONS = (
    # What the models do; how their activations moved, and along what; what acts (steering, patching); then weights, tokens, pictures, data.
    Section(
        ("self_recognition",), "Self-recognition",
        "Can the model tell a text it wrote from one it did not? Accuracy means little where judging by length alone "
        "reaches it too, or where the model says yes to everything.",
        ("self_recognition_bars",),
        asked_by="behaviour.self_recognition",
    ),
    Section(
        ("self_report",), "What the models call themselves",
        "Replies to questions that ask the model who it is: how often it gives its own name, and how varied the names "
        "are.",
        ("self_report_bars",),
        asked_by="behaviour.self_report",
    ),
    Section(
        ("shifts", "paraphrases"), "How far finetuning moved the model",
        "Each trained arm against the base, both reading the same text: the change of the activations along a "
        "direction. Look first at the declared layer, then at whether the curve leaves the grey band and the "
        "benign control. Each p value asks whether other directions show as large a shift: p_random takes random "
        "directions, p_covariance directions in which the base varies, p_permutation those that the same fit finds "
        "when the two sides are exchanged within questions, p_paraphrase those of harmless rewordings of one length (the "
        "table paraphrases says how many pairs this tokenizer leaves), p_wrong_name those fitted with an invented name in place "
        "of the model's own, p_unrelated_trait those of the other traits. The last two have few directions (n_...), "
        "and a p value from n directions is never below 1 / (1 + n). largest_... is the largest shift along one of "
        "them, in the units of the residual stream, as raw is.",
        ("arm_direction_heatmap", "shift_by_condition", "shift_by_layer"),
        asked_by="directions",
    ),
    Section(
        ("differences", "undone", "spread_differences", "behaviour_differences"), "Reversal, prevention: arms held against each other",
        "Two arms on the same rows, the second's value taken from the first's, with the interval of the difference itself: two "
        "intervals that overlap do not say that there is none. Differences along directions are in the units and under the nulls of "
        "the shifts; before_sd is where the other arm stands against the base. Undone: of the whole change that the other arm made, the share that "
        "this arm lacks (1: back beside the base, 0: nothing). Distance: how far from the base this arm ends, over the other arm's. A "
        "change that is undone ends near the base; a model that was moved elsewhere has a share undone and a distance near 1 or "
        "above. Spread: change of the log trace from the other arm to this one (negative: narrower). A second training moves a model whatever it teaches: only controls trained in the same place say what is special to one.",
        ("comparison_differences", "undone_by_layer", "behaviour_differences"),
        asked_by="comparisons",
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
        "have given the same direction? Held-out AUROC: does it separate texts that it was not made from? The cosines "
        "say whether two ways to one trait, or two ideas of identity, found the same thing. Elicitation: every vector "
        "of a trait on the same held-out written answers. Rollouts: what a judge's filter dropped, where there is one. "
        "Probes, where the study asks for them, are scored on questions left out of their fit; selectivity is their "
        "AUROC less that of probes fitted to random labels.",
        ("direction_quality", "direction_cosines"),
        asked_by="directions",
    ),
    Section(
        ("identity_cosines", "identity_transfer", "authorship_matching", "authorship_answers"), "Is identity one thing?",
        "Identity directions come from different contrasts, and are one thing only where they agree. Two agree if "
        "their cosine, from questions that they do not share, exceeds that of 97.5 % of directions drawn from the other "
        "contrast's activations and is more than sign flips of its differences give, and if each separates the other's "
        "held-out rows with an interval above one half. The assistant axis is not an identity direction; it is here to "
        "show what leans on it. Ceiling: the cosine that two equally noisy copies of one direction would have; "
        "share_of_ceiling is the disjoint cosine divided by it. Authorship, where the study asks for it: how many "
        "pairs are left once both sides have similar surprisal (gaps in nats a token), and directions from articles "
        "that the base answers rightly or wrongly.",
        ("identity_cosines", "identity_transfer"),
        asked_by="directions",
    ),
    Section(
        ("dispersion",), "How widely activations spread",
        "A character that is destabilised may spread out rather than move. Trace: mean squared distance from the mean; "
        "d_log_trace is the change of its logarithm against the base on the same questions. Effective ranks "
        "(participation ratio; exp of the spectrum's entropy) compare checkpoints on the same rows and are not true "
        "dimensions. Intervals: jackknife over questions. Harmless training changes the spread too, so compare an arm "
        "with the benign control.",
        ("dispersion_by_condition",),
        asked_by="measure",
    ),
    Section(
        ("steering",), "Steering",
        "A direction is added to the running model. An effect counts where a random direction of the same norm does "
        "not have it, and at doses where the replies are still coherent.",
        ("dose_response",),
        asked_by="steering",
    ),
    Section(
        ("sweeps", "sweep_best", "sweep_layers", "sweep_trends"), "Steering sweeps",
        "Directions are added at several layers and strengths, and random directions of the same norm beside them. "
        "Cells and layers are chosen on one half of the questions and reported on the other; beyond is the change less "
        "that of random directions. Broken answers count as no change, and their share is reported. Trends: rank "
        "correlation with strength within each question; read it with p_random, since random directions have trends "
        "too.",
        ("sweep_response",),
        asked_by="sweeps",
    ),
    Section(
        ("adapter_ranges", "patching"), "Where the change is carried",
        "One copy of the weights, with an arm's last adapter switched on and off. The reference is therefore the model "
        "under that adapter: for an arm of two stages the first stage, merged, and not the base. Score: the "
        "log-probability of a given answer above that of others (own_name: a self-statement with the own name above "
        "invented names, nats; a trait: its written high answers above its low ones, nats a token), so that nothing "
        "depends on what a model writes. Patching runs one model with the other's activations at one layer and span, "
        "in both directions, because a hybrid of two models is neither. An effect counts where it exceeds that of an "
        "equally large change in a random direction (beyond_random). Share: the effect over the whole change between "
        "the two models, given only where that change is distinguishable from 0. Intervals are over questions.",
        ("adapter_ranges", "patching"),
        asked_by="patching",
    ),
    Section(
        ("monitoring",), "Does the projection foretell the behaviour?",
        "A question is asked under system prompts that ask for a trait, for its opposite, and for nothing. The "
        "projection at the prompt's last token is correlated with how the answer behaves (judge: its score of a sampled "
        "answer; log-odds: the written trait-high answer above the trait-low one, nats a token). Overall includes what "
        "the system prompt does to both; within subtracts each condition's mean from both, and is what a monitor adds "
        "to knowing the prompt. p_random, p_covariance: how often drawn directions correlate as strongly. No direction "
        "was made from these questions.",
        ("monitoring",),
        asked_by="monitoring",
    ),
    Section(
        ("lora_alignment", "lora_overlap", "lora_alignment_by_layer", "lora_overlap_by_layer"), "What the adapters write",
        "An adapter adds a product of two thin matrices to each weight matrix; what it writes into the residual stream "
        "lies in the span of r vectors of length d. Energy: the share of a direction's squared length in that span; a "
        "random direction has r/d (expected). p_random is exact map by map; over all maps it is that of random directions which "
        "are the same in all layers, the cautious choice. p_covariance, against directions drawn from the base's activations, is the harder null. A stage is named by its trainings, joined by +, and only its last adapter is "
        "measured. Shared: mean squared cosine of the principal angles between the spaces of two adapters (1: the "
        "same). Compare a pair with the pairs that include the benign control, since any two trainings share "
        "something. Weights have no interval over questions: how sure a direction is, its split-half cosine tells; how "
        "sure a training is, the other seeds.",
        ("lora_alignment", "lora_overlap"),
        asked_by="weights",
    ),
    Section(
        ("lens_directions", "lens_shifts", "lens_prompts"), "What directions and shifts say in tokens",
        "The logit lens. A direction, or an arm's mean shift (tuned minus base on the same text, first condition), is "
        "read through the linear part of the base's final norm and its output head: which tokens does moving along it "
        "favour (top) and disfavour (bottom)? Peak: how far the top tokens stand out, in SD over the vocabulary. "
        "p_random and p_covariance: how often random directions, or directions drawn from the base's activations, peak "
        "as high. Any direction has top tokens, so a peak that is common says nothing. Split-half: would other "
        "questions have given the same vector? lens_prompts: the likeliest next tokens at the prompt's last token, as "
        "if each layer were the last; early layers do not yet predict tokens in this sense. Tokens are quoted as the "
        "tokenizer writes them.",
        (),
        asked_by="lens",
    ),
    Section(
        ("embedding",), "Activations in the plane",
        "A picture to get a feeling for the data, fitted on the base alone. No conclusion is drawn from it.",
        ("embedding",),
        asked_by="embedding",
    ),
    Section(
        ("datasets",), "The data",
        "What the trainings were shown. Shortcut: how often the length of the text alone, in words or characters, "
        "gives the right answer; .5 means that length gives nothing away.",
    ),
    Section(
        ("arms", "stages", "training"), "Training",
        "What each arm is made of, how each stage was trained (a system prompt under which it was, and what acted on the model meanwhile, were there "
        "in training only), and its loss. own_loss: on the first rows trained on, before and after, nats a token.",
        ("loss_curves",),
    ),
)  # fmt: skip
