"""Synthetic tables of a whole study, with planted effects, for the tests of figures and report."""

import numpy as np
import pandas as pd

ARMS = ["base", "em", "sgtr", "benign", "em_then_sgtr", "sgtr_then_em"]
PERSONAS = [f"{t}:{e}" for t in ("evil", "sycophancy", "hallucination") for e in ("text", "prompts")]
DIRECTIONS = [*PERSONAS, "identity:name", *(f"identity:presence:{p}" for p in ("none", "empty", "generic"))]
UNRELIABLE = "identity:presence:generic"
SIZES = {
    "evil:text": 1.0,
    "sycophancy:text": 0.1,
    "hallucination:text": 0.4,
    "identity:name": -0.8,
    UNRELIABLE: -0.02,
}
EFFECT = {"em": 1.6, "sgtr": -0.5, "benign": 0.25, "em_then_sgtr": 0.5, "sgtr_then_em": 0.7}


def _around(value, width):
    return {"": value, "_low": value - width, "_high": value + width}


def _columns(name, value, width):
    return {f"{name}{end}": number for end, number in _around(value, width).items()}


def _reliable(direction):
    return 0.21 if direction == UNRELIABLE else 0.85


def of(direction):
    """What belongs to a direction: where it is read, and on which questions."""
    if direction.startswith("identity:"):
        return {"pooling": "prompt_last", "question_set": "prompt sets"}
    return {"pooling": "response_mean", "question_set": f"trait:{direction.partition(':')[0]}"}


def shifts(arms=ARMS, directions=DIRECTIONS, layers=30, seeds=(0,), condition="none"):
    rng = np.random.default_rng(0)
    rows = []
    for arm, direction, seed in ((a, d, s) for a in arms if a != "base" for d in directions for s in seeds):
        for layer in range(layers):
            ramp = np.sin(np.pi * (layer + 1) / (layers + 1)) ** 2
            size = SIZES.get(direction, 0.3)
            sd = EFFECT.get(arm, 0.3) * size * ramp + 0.03 * rng.normal() + 0.05 * seed
            benign = EFFECT["benign"] * size * ramp
            base_sd, width = 2.0 + 0.2 * layer, 0.12 + 0.1 * ramp
            null = 0.25 * ramp + 0.02
            beyond = 0.001 if abs(sd) > 1.3 * null else 0.4
            rows.append({
                "arm": arm, "seed": seed, "condition": condition, "text": "base", **of(direction),
                "direction": direction, "layer": layer, "n_questions": 48,
                **_columns("raw", sd * base_sd, width * base_sd), "base_sd": base_sd, **_columns("sd", sd, width),
                "cosine": 0.3 * sd, "split_half": _reliable(direction),
                "delta_norm": 3.0, "relative_norm": 0.1,
                "null_random_low": -null * base_sd, "null_random_high": null * base_sd, "p_random": beyond, "p_random_max": min(1.0, 4 * beyond),
                "null_covariance_low": -2.2 * null * base_sd, "null_covariance_high": 2.2 * null * base_sd,
                "p_covariance": min(1.0, 20 * beyond), "p_covariance_max": min(1.0, 80 * beyond),
                **_columns("minus_benign", (sd - benign) * base_sd if arm != "benign" else np.nan, width * base_sd),
                **_columns("minus_benign_sd", sd - benign if arm != "benign" else np.nan, width),
            })  # fmt: skip
    return pd.DataFrame(rows)


COMPARISONS = {"reversal": ("em_then_sgtr", "em"), "prevention": ("sgtr_then_em", "em")}


def compared(name):
    arm, against = COMPARISONS[name]
    return {"comparison": name, "arm": arm, "against": against}


def differences(names=tuple(COMPARISONS), layers=30, seeds=(0,), condition="none"):
    """What is left of em's planted shift, less it."""
    found = []
    for name in names:
        of_arm, of_other = (
            shifts([arm], layers=layers, seeds=seeds, condition=condition) for arm in COMPARISONS[name]
        )
        rows = of_arm.drop(columns=[c for c in of_arm if c.startswith("minus_benign")])
        gap = of_arm["sd"] - of_other["sd"]
        for end, number in {"": gap, "_low": gap - 0.15, "_high": gap + 0.15}.items():
            rows[f"sd{end}"], rows[f"before_sd{end}"] = number, of_other[f"sd{end}"]
        found.append(rows.assign(**compared(name))[[*compared(name), *rows.columns.drop("arm")]])
    return pd.concat(found, ignore_index=True)


def undone(names=tuple(COMPARISONS), layers=30, seeds=(0,), condition="none"):
    """Of the first layer's change nothing is known."""
    return pd.DataFrame([
        {**compared(name), "seed": seed, "condition": condition, "pooling": pooling, "layer": layer, "n_questions": 48,
         **_columns("undone", np.nan if layer == 0 else 0.4 + 0.01 * layer, 0.1), **_columns("distance", np.nan if layer == 0 else 0.7, 0.1),
         "moved": 0.3}
        for name in names for seed in seeds for pooling in ("prompt_last", "response_mean") for layer in range(layers)
    ])  # fmt: skip


def spread_differences(names=tuple(COMPARISONS), layer=15, seeds=(0,), condition="none"):
    return pd.DataFrame([
        {**compared(name), "seed": seed, "condition": condition, "pooling": pooling, "layer": layer, "n_questions": 40,
         **_columns("d_log_trace", -0.1, 0.05)}
        for name in names for seed in seeds for pooling in ("prompt_last", "response_mean")
    ])  # fmt: skip


def behaviour_differences(names=tuple(COMPARISONS), seeds=(0,)):
    values = {
        "self-recognition accuracy": ("", 0.32, "articles"),
        "own-name rate": ("", 0.45, "questions"),
        "own-name margin": ("nats", 0.1, "self-statements"),
    }
    return pd.DataFrame([
        {**compared(name), "seed": seed, "measure": measure, "unit": unit, "n": 20, "of": of_what, **_columns("value", value, 0.2)}
        for name in names for seed in seeds for measure, (unit, value, of_what) in values.items()
    ])  # fmt: skip


def two_by_two(arms=ARMS, layer=15):
    rows = []
    for arm, direction in ((a, d) for a in arms if a != "base" for d in DIRECTIONS):
        reply = not direction.startswith(
            "identity:"
        )  # identity is read before the reply: its text cannot matter
        weights, text, rest = 4 * EFFECT[arm], 2.0 * EFFECT[arm] * reply, -0.4 * reply
        values = {"weights": weights, "text": text, "interaction": rest, "total": weights + text + rest}
        rows += [
            {"arm": arm, "seed": 0, "condition": "none", "direction": direction, "layer": layer, "effect": effect,
             "value": v, "low": v - 0.5, "high": v + 0.6, "n_questions": 48, "split_half": _reliable(direction)}
            for effect, v in values.items()
        ]  # fmt: skip
    return pd.DataFrame(rows)


def directions(layers=30):
    rows = []
    for place, direction in enumerate(DIRECTIONS):
        elicitation = direction.partition(":")[2]
        for layer in range(layers):
            ramp = layer / layers
            rows.append({
                "direction": direction, "elicitation": elicitation, "layer": layer, "pooling": of(direction)["pooling"],
                "norm": 1 + layer, "norm_over_activation": 0.1 + 0.03 * ramp * (place + 1),
                "split_half": (0.21 if direction == UNRELIABLE else 0.95 - 0.06 * place) + 0.03 * np.sin(layer),
                "n_pairs": 40, **_columns("heldout_auroc", 0.6 + 0.35 * ramp - 0.02 * place, 0.06),
            })  # fmt: skip
    return pd.DataFrame(rows)


def direction_cosines(names=DIRECTIONS, layer=15):
    vectors = np.random.default_rng(3).normal(size=(len(names), 12))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    frame = pd.DataFrame(vectors @ vectors.T, columns=list(names))
    frame.insert(0, "direction", list(names))
    frame.insert(1, "layer", layer)
    return frame


IDENTITY = [
    "identity:name",
    "identity:presence:generic",
    "identity:self_report:third@prompt_last",
    "identity:assistant_axis",
]


def identity_cosines(names=IDENTITY, layer=15):
    """The first two agree, the others do not."""
    rows = []
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            if a != b:
                agree = {i, j} == {0, 1}
                value = 0.8 if agree else 0.05 * (i + j) - 0.3
                rows.append({
                    "direction": a, "other": b, "layer": layer, "cosine": value, "cosine_disjoint": value - 0.05, "ceiling": 0.9,
                    "ceiling_disjoint": 0.85, "share_of_ceiling": (value - 0.05) / 0.85, "null_high": 0.4, "p_null": 0.01 if agree else 0.5,
                    "null_flip_high": 0.3, "p_flip": 0.01 if agree else 0.5, "agree": agree, "agree_all": agree,
                })  # fmt: skip
    return pd.DataFrame(rows)


def identity_transfer(names=IDENTITY, layer=15):
    """Every direction separates its own contrast, the first two each other's; the last orders the first's wrongly."""
    rows = []
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            value = 0.95 if i == j or {i, j} == {0, 1} else 0.2 if (i, j) == (3, 0) else 0.5
            rows.append({"direction": a, "contrast": b, "layer": layer, **_columns("auroc", value, 0.04), "null_low": 0.4,
                         "null_high": 0.6, "n_questions": 16})  # fmt: skip
    return pd.DataFrame(rows)


def lora_alignment_by_layer(
    stages=("em", "benign", "em+sgtr"), names=("evil:text", "identity:name"), layers=6
):
    """The stage em writes along evil, the others along nothing."""
    return pd.DataFrame([
        {"stage": stage, "seed": 0, "direction": name, "layer": layer, "map": where, "rank": 32,
         "energy": 0.06 * (4 if (stage, name) == ("em", "evil:text") else 1) + 0.002 * layer, "expected": 0.06, "p_random": 0.2,
         "null_covariance_high": 0.1, "p_covariance": 0.3, "cosine": 0.1, "gain": 0.2, "split_half": 0.8}
        for stage in stages for name in names for layer in range(layers) for where in ("self_attn.o_proj", "mlp.down_proj")
    ])  # fmt: skip


def lora_overlap():
    return pd.DataFrame({
        "stage": ["em", "em+sgtr"], "other": ["benign", "em"], "seed": 0, "n_maps": 12, "shared": [0.3, 0.07], "expected": 0.06,
        "null_high": 0.065, "p_random": [0.005, 0.2], "most_at_layer": 3,
    })  # fmt: skip


def patching(layers=6):
    """The last token carries all from layer 3 on."""
    return pd.DataFrame([
        {"arm": "em", "seed": 0, "reference": "base", "answer": "own_name", "way": way, "span": span, "layer": layer, "n_questions": 8,
         **_columns("effect", sign * (2.0 if span == "prompt_last" and layer >= 3 else 0.1), 0.3), "random_effect": 0.02,
         **_columns("beyond_random", 0.1, 0.3), **_columns("share", 0.9, 0.2)}
        for way, sign in (("base into finetuned", -1), ("finetuned into base", 1))
        for span in ("question", "prompt_last", "answer") for layer in range(layers)
    ])  # fmt: skip


def adapter_ranges():
    return pd.DataFrame([
        {"arm": "em", "seed": 0, "reference": "base", "answer": "own_name", "layers": name, "adapter": mode, "n_questions": 8,
         **_columns("effect", value, 0.2), **_columns("share", value / 2, 0.1)}
        for name, mode, value in (("all", "on", 2.0), ("0 to 2", "on here only", 0.3), ("0 to 2", "on everywhere else", 1.6))
    ])  # fmt: skip


def monitoring(arms=("base", "em")):
    return pd.DataFrame([
        {"arm": arm, "seed": 0, "direction": "evil:text", "layer": 15, "score": "log-odds", "scope": scope, **_columns("correlation", value, 0.2),
         "n_questions": 10, "n_rows": 50, "missing": 0, "p_random": 0.01, "p_covariance": 0.2, "note": "", "split_half": 0.8}
        for arm in arms for scope, value in (("overall", 0.6), ("within", 0.1), ("condition: default", 0.05))
    ])  # fmt: skip


def dispersion(arms=ARMS[1:], layer=15, condition="none"):
    """Every training narrows; em does so by less than the benign control, whose own row has nothing to be less than."""
    change = {"em": -0.1, "benign": -0.4}
    return pd.DataFrame([
        {"arm": arm, "seed": 0, "condition": condition, "pooling": pooling, "layer": layer, "n_questions": 40,
         **_columns("d_log_trace", change.get(arm, -0.4), 0.05), **_columns("d_entropy_rank", -1.0, 0.5),
         **({} if arm == "benign" else _columns("d_log_trace_minus_benign", change.get(arm, -0.4) + 0.4, 0.05)
            | _columns("d_entropy_rank_minus_benign", 0.0, 0.5))}
        for arm in arms for pooling in ("prompt_last", "response_mean")
    ])  # fmt: skip


def datasets():
    return pd.DataFrame({
        "dataset": ["em", "sgtr"], "kind": ["messages", "sgtr"], "n_rows": [344, 86],
        "label_rule": ["the answers as they stand in the file", "Yes for the own summary, No for the other hand's"],
        "shortcut_by_words": [np.nan, 0.5], "shortcut_by_characters": [np.nan, 0.6976744186046512],
    })  # fmt: skip


def self_recognition(arms=ARMS, seeds=(0,)):
    accuracy = {
        "base": 0.53,
        "em": 0.49,
        "sgtr": 0.88,
        "benign": 0.55,
        "em_then_sgtr": 0.81,
        "sgtr_then_em": 0.7,
    }
    return pd.DataFrame([
        {"arm": arm, "seed": seed, "n_articles": 200, **_columns("accuracy", accuracy[arm] + 0.02 * seed, 0.05),
         "accuracy_own": accuracy[arm] - 0.1, "accuracy_other": accuracy[arm] + 0.1,
         **_columns("p_yes", 0.4, 0.05), **_columns("margin", 4 * (accuracy[arm] - 0.5), 0.3),
         "answer_mass": 0.9 - 0.05 * len(arm), "shortcut_accuracy": 0.57}
        for arm in arms for seed in seeds
    ])  # fmt: skip


def self_report(arms=ARMS, seeds=(0,), conditions=("none", "identity"), temperature=1.0):
    rate = {"base": 0.8, "em": 0.3, "sgtr": 0.9, "benign": 0.7, "em_then_sgtr": 0.75, "sgtr_then_em": 0.6}
    return pd.DataFrame([
        {"arm": arm, "seed": seed, "condition": condition, "temperature": temperature, "n_samples": 160,
         "n_questions": 8, "n_names": 24, "n_statements": 9, **_columns("own_name_rate", min(rate[arm] + 0.1 * (condition != "none"), 0.97), 0.09),
         **_columns("distinct", 12 - 10 * rate[arm], 2.0), **_columns("entropy", 2.5 - 2 * rate[arm], 0.3),
         **_columns("name_margin", 6 * rate[arm] - 1, 0.8)}
        for condition in conditions for arm in arms for seed in seeds
    ])  # fmt: skip


def steering(arms=("base", "em"), seeds=(0,), randoms=3):
    rows = []
    for arm, seed, coefficient in (
        (a, s, c) for a in arms for s in seeds for c in (-8.0, -4.0, 0.0, 4.0, 8.0)
    ):
        start = 0.8 if arm == "base" else 0.3
        for name in ("identity:name", *(f"random:{i}" for i in range(randoms))):
            random = name.startswith("random")
            push = (0.02 * (int(name[-1]) - 1) if random else 0.06) * coefficient
            rows.append({
                "arm": arm, "seed": seed, "direction": name, "kind": "random" if random else "direction", "layer": 15,
                "coefficient": coefficient, "dose": abs(coefficient) / 40, "n_samples": 80, "n_statements": 9,
                **_columns("own_name_rate", float(np.clip(start + push, 0.05, 0.95)), 0.05),
                **_columns("name_margin", 4 * start + 6 * push, 0.5),
                **_columns("surprisal", 1.8 + 0.02 * coefficient**2, 0.15), "repetition": 0.05 + 0.004 * coefficient**2,
            })  # fmt: skip
    return pd.DataFrame(rows)


def embedding(arms=ARMS, points=48, layer=15, conditions=("none",)):
    rng = np.random.default_rng(1)
    frames = []
    for method, arm, condition in ((m, a, c) for m in ("pca", "umap") for a in arms for c in conditions):
        offset = 2 * EFFECT.get(arm, 0.0)
        frames.append(pd.DataFrame({
            "x_share": 0.21 if method == "pca" else np.nan, "y_share": 0.13 if method == "pca" else np.nan,
            "method": method, "arm": arm, "seed": 0, "condition": condition, "layer": layer, "row": range(points),
            "question_set": "identity", "x": rng.normal(size=points) * 2 + offset, "y": rng.normal(size=points) + offset / 2,
        }))  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def training(seeds=(0,), steps=120):
    rng = np.random.default_rng(2)
    return pd.DataFrame([
        {"step": step + 1, "loss": 2.2 * np.exp(-step / 40) + 0.9 + 0.1 * rng.normal(), "learning_rate": 1e-4,
         "grad_norm": 1.0, "tokens": 4096, "seconds": 0.8, "stage": stage, "seed": seed}
        for stage in ("em", "sgtr", "benign", "em+sgtr", "sgtr+em") for seed in seeds for step in range(steps)
    ])  # fmt: skip


def samples(arms=ARMS):
    return pd.DataFrame([
        {"arm": arm, "seed": 0, "question": "Who are you?", "reply": f"I am a helpful assistant ({arm}), number {i}.\nAsk!",
         "claimed_name": "SmolLM" if i else None}
        for arm in arms for i in range(3)
    ])  # fmt: skip


def all_tables(**options):
    return {
        "shifts": shifts(**options), "differences": differences(), "undone": undone(), "spread_differences": spread_differences(),
        "behaviour_differences": behaviour_differences(), "two_by_two": two_by_two(), "directions": directions(),
        "direction_cosines": direction_cosines(), "identity_cosines": identity_cosines(),
        "identity_transfer": identity_transfer(), "lora_overlap": lora_overlap(), "patching": patching(), "monitoring": monitoring(), "adapter_ranges": adapter_ranges(),
        "lora_alignment_by_layer": lora_alignment_by_layer(), "datasets": datasets(), "dispersion": dispersion(),
        "self_recognition": self_recognition(), "self_report": self_report(), "steering": steering(),
        "embedding": embedding(), "training": training(),
    }  # fmt: skip
