"""From a study to its steps: what has to be made, from what, in which order.

`make_plan` reads as the study does. The order is chosen so that something can be looked at early (directions on
the base come before any training) and so that work on one checkpoint is done in one go (it is loaded once).
"""

from study.base import Base
from study.plan_arms import plan_measures, plan_training
from study.plan_base import plan_directions, plan_paraphrases, plan_replies
from study.plan_results import plan_figures, plan_tables
from study.planner import Measured, Plan
from study.questions import check_sources
from study.spec import StudySpec
from study.step import Step


def make_plan(spec: StudySpec, base: Base) -> list[Step]:
    """Every step of a study, inputs before those that read them."""
    return _planned(Plan(spec, base)).steps


def outline(spec: StudySpec, base: Base) -> Plan:
    """The same for an estimate: missing data and adapters are listed instead of being errors."""
    return _planned(Plan(spec, base, tolerant=True))


def _planned(plan: Plan) -> Plan:
    spec = plan.spec
    check_sources(spec)
    replies, directions = None, list[Step]()
    if spec.directions:
        replies = plan_replies(plan, spec.base_arm, ())
        directions = plan_directions(plan)
        plan_paraphrases(plan)
        plan_figures(plan, "early", {"directions": directions})
    measured: Measured = {}
    for arm, seed in arms_by_seed(spec):
        chain = plan_training(plan, arm, seed)
        measured[arm, seed] = plan_measures(plan, arm, seed, chain, replies)
    tables = plan_tables(plan, directions, measured)
    plan_figures(plan, "all", {"tables": [tables]})
    return plan


def arms_by_seed(spec: StudySpec) -> list[tuple[str, int]]:
    """Every arm with every seed; the base, which is not trained, once, and first."""
    trained = [(arm, seed) for seed in spec.seeds for arm, stages in spec.arms.items() if stages]
    return [(spec.base_arm, spec.seeds[0]), *trained]
