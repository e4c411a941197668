"""What services do of a study, in tokens and, where prices are known, cost: whole steps of a model behind an API, and a judge's verdicts.

How long whole steps take only the service knows.
"""

from collections.abc import Sequence

from study.kinds import KINDS
from study.spec_parts import FinetuningPriceSpec
from study.step import Step, Work

MILLION = 1e6


def is_remote(step: Step) -> bool:
    """Whether a service does the step."""
    return KINDS[step.kind].remote


def remote_load(step: Step) -> str:
    """One step's part, for a line of the plan."""
    work = step.work
    if work.trained:
        return f"{_tokens(work.trained)} trained on; waits for the provider"
    return f"{_tokens(work.read)} asked, up to {_tokens(work.generated)} answered"


def remote_summary(steps: Sequence[Step], price: FinetuningPriceSpec | None) -> str:
    """All remote steps together: jobs, tokens, and cost where prices are given."""
    remote = [s for s in steps if is_remote(s)]
    jobs, asking = sum(s.work.trained > 0 for s in remote), sum(s.work.trained == 0 for s in remote)
    total = Work(**{k: sum(getattr(s.work, k) for s in remote) for k in ("trained", "read", "generated")})
    return (
        f"{jobs} finetuning jobs, one after the other, each for as long as the provider takes; about {total.trained / MILLION:.1f} "
        f"million training tokens at the API; {asking} steps that ask its models, about {total.read / MILLION:.1f} million tokens given "
        f"and at most {total.generated / MILLION:.1f} million answered; {_cost(total, price)}"
    )


def judge_load(step: Step) -> str:
    """One step's calls to a judge, for a line of the plan; empty where it makes none."""
    asked = step.work.asked
    return f"; {asked.calls} calls to the judge" if asked else ""


def judge_summary(steps: Sequence[Step]) -> str:
    """All calls to judges behind an API together; empty where there are none."""
    asked = [s.work.asked for s in steps if s.work.asked]
    if not asked:
        return ""
    calls, given, written = (sum(getattr(a, k) for a in asked) for k in ("calls", "read", "written"))
    costs = [a.cost for a in asked if a.cost is not None]
    text = (
        f"{calls} calls to judges behind an API (`how: auto` counted as logprobs), about {given / MILLION:.2g} million tokens given and at "
        f"most {written / MILLION:.2g} million answered; "
    )
    if not costs:
        return text + "cost: see the price list, or give judge.api.price"
    missing = (
        ""
        if len(costs) == len(asked)
        else f" (without {len(asked) - len(costs)} steps whose judge has no price)"
    )
    return text + f"cost about {sum(costs):,.2f} at the prices of judge.api.price{missing}"


def _cost(work: Work, price: FinetuningPriceSpec | None) -> str:
    if price is None:
        return "cost: see its price list, or give model.api.price"
    parts = ((work.trained, price.training), (work.read, price.read), (work.generated, price.written))
    return f"cost about {sum(n * each for n, each in parts) / MILLION:,.2f} at the prices of model.api.price"


def _tokens(n: int) -> str:
    if n < 10_000:
        return f"{n} tokens"
    return f"{n / MILLION:.1f} M tokens" if n >= MILLION else f"{n / 1e3:.0f} k tokens"
