"""What the steps that a service does amount to: tokens and, where prices are known, cost. How long it takes only the service knows."""

from collections.abc import Sequence

from study.kinds import KINDS
from study.spec_parts import PriceSpec
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


def remote_summary(steps: Sequence[Step], price: PriceSpec | None) -> str:
    """All remote steps together: jobs, tokens, and cost where prices are given."""
    remote = [s for s in steps if is_remote(s)]
    jobs, asking = sum(s.work.trained > 0 for s in remote), sum(s.work.trained == 0 for s in remote)
    total = Work(**{k: sum(getattr(s.work, k) for s in remote) for k in ("trained", "read", "generated")})
    return (
        f"{jobs} finetuning jobs, one after the other, each for as long as the provider takes; about {total.trained / MILLION:.1f} "
        f"million training tokens at the API; {asking} steps that ask its models, about {total.read / MILLION:.1f} million tokens given "
        f"and at most {total.generated / MILLION:.1f} million answered; {_cost(total, price)}"
    )


def _cost(work: Work, price: PriceSpec | None) -> str:
    if price is None:
        return "cost: see its price list, or give model.api.price"
    parts = ((work.trained, price.training), (work.read, price.read), (work.generated, price.written))
    return f"cost about {sum(n * each for n, each in parts) / MILLION:,.2f} at the prices of model.api.price"


def _tokens(n: int) -> str:
    if n < 10_000:
        return f"{n} tokens"
    return f"{n / MILLION:.1f} M tokens" if n >= MILLION else f"{n / 1e3:.0f} k tokens"
