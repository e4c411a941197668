"""Planning what looks into weights: adapters against directions and each other, directions and shifts in tokens."""

from collections.abc import Sequence
from itertools import pairwise

from study.planner import Measured, Plan
from study.step import Step, Work


def plan_weights(plan: Plan, directions: Sequence[Step], measured: Measured) -> list[Step]:
    """One step a seed: every adapter against every direction, and pairs of adapters against each other."""
    spec = plan.spec
    if not (spec.weights and directions):
        return []
    (base,), found = measured[spec.base_arm, spec.seeds[0]]["captures"][:1], []
    for seed in spec.seeds:
        chains = [made["checkpoint"] for (_, s), made in measured.items() if s == seed and made["checkpoint"]]
        stages = {step.labels["stage"]: step for chain in chains for step in chain if has_adapter(step)}
        if not stages:
            continue
        pairs = _pairs(chains)
        config = {
            "seed": seed,
            "stages": list(stages),
            "pairs": pairs,
            "statistics": spec.statistics.model_dump(),
        }
        inputs = {"directions": directions, "adapters": list(stages.values()), "base": [base]}
        # Covariance-matched directions cost most: draws x width x (rows + rank) a map.
        size = plan.model.n_layers * plan.model.d_model * spec.statistics.n_null
        work = Work(fixed_seconds=2 + len(stages) * size * 3e-8 + len(pairs) * 0.6)
        found.append(plan.add("weights", f"weights/seed{seed}", config, inputs, work))
    return found


def plan_lens(plan: Plan, directions: Sequence[Step], measured: Measured) -> list[Step]:
    """What directions, every arm's mean shift and some prompts' states say in tokens, through the base's norm and head."""
    spec = plan.spec
    if not (spec.lens and directions):
        return []
    n = plan.model.n_layers
    layers = spec.lens.layers or sorted({spec.layer, n // 2, 3 * n // 4, n - 1})
    arms = [key for key, made in measured.items() if made["checkpoint"]]
    config = {**plan.reader, "layers": list(layers), "tokens": spec.lens.tokens, "prompts": spec.lens.prompts,
              "arms": [list(key) for key in arms], "base_arm": spec.base_arm, "statistics": spec.statistics.model_dump()}  # fmt: skip
    inputs = {
        "checkpoint": (),
        "directions": directions,
        "base": measured[spec.base_arm, spec.seeds[0]]["captures"][:1],
        "tuned": [measured[key]["captures"][0] for key in arms],
    }
    # Every draw is read through the whole vocabulary: some 1e5 tokens, as many positions of an output head.
    work = Work(read=2 * (len(layers) + 1) * 100, fixed_seconds=3 + 0.3 * len(arms))
    return [plan.add("lens", "lens", config, inputs, work)]


def has_adapter(step: Step) -> bool:
    """Whether a training leaves an adapter, and not a whole model."""
    trained = step.inputs["trained"][0] if step.kind == "snapshot" else step
    return trained.kind == "adapter" or (
        trained.kind == "train" and trained.config["settings"]["method"] != "full"
    )


def _pairs(chains: Sequence[Sequence[Step]]) -> list[list[str]]:
    """Which adapters are compared: all first stages; each stage with the one below it, and with itself as a first stage of another arm."""
    first = list(dict.fromkeys(chain[0].labels["stage"] for chain in chains if has_adapter(chain[0])))
    found = [(a, b) for i, a in enumerate(first) for b in first[i + 1 :]]
    for below, step in (two for chain in chains for two in pairwise(chain) if has_adapter(two[1])):
        label = step.labels["stage"]
        found += [(label, below.labels["stage"])] if has_adapter(below) else []
        found += [(label, alone)] if (alone := label.split("+")[-1]) in first else []
    return [list(pair) for pair in dict.fromkeys(found)]
