"""What a person asks of a study before and after it ran: the plan, the state, the report again."""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from mech.errors import InputError
from study.base import Base, find_base
from study.estimate import Machine, duration, gpu_named, step_bytes, this_machine
from study.estimate_remote import is_remote, judge_load, judge_summary, remote_load, remote_summary
from study.finished import missing_steps
from study.needs import advice, missing_extras
from study.paths import StudyPaths
from study.plan import make_plan, outline
from study.planner import Plan
from study.spec import StudySpec, load_spec
from study.step import Step


def plan_text(spec: StudySpec, base: Base, out: Path, gpu: str | None = None) -> str:
    """The steps, which of them are done, and an estimate of time, memory and disk for the rest.

    Args:
        spec: the study.
        base: its model, or what is known of it.
        out: the study's folder.
        gpu: estimate for one of these instead of for this machine.
    """
    plan, paths = outline(spec, base), StudyPaths(out)
    machine = gpu_named(gpu) if gpu else this_machine()
    seconds = {s.name: machine.seconds(s.work, base.parameters) for s in plan.steps}
    load = {
        s.name: remote_load(s) if is_remote(s) else f"{duration(seconds[s.name]):>8}{judge_load(s)}"
        for s in plan.steps
    }
    missing = missing_steps(paths, plan.steps)
    lines = [f"{'    ' if s in missing else 'done'}  {s.name:<55} {load[s.name]}" for s in plan.steps]
    extras = missing_extras(spec, [*missing])
    absent = [m for m in (base.missing, *plan.missing, *map(str, extras)) if m]
    lines += ["", "Not here yet:", *[f"  {m}" for m in absent]] if absent else []
    lines += ["", *(f"Warning: {text}" for text in notes)] if (notes := advice(spec, base)) else []
    return "\n".join([*lines, "", _summary(plan, paths, machine, seconds, [*missing])])


def _summary(
    plan: Plan, paths: StudyPaths, machine: Machine, seconds: Mapping[str, float], missing: Sequence[Step]
) -> str:
    total = sum(seconds[s.name] for s in missing) + machine.loading(missing, plan.model.parameters)
    memory = max((step_bytes(s, plan.model.parameters, machine) for s in missing), default=0)
    needed = sum(s.work.stored_bytes for s in missing)
    free = shutil.disk_usage(_existing(paths.root)).free
    if plan.spec.model.api:
        time = remote_summary(missing, plan.spec.model.api.price)
    elif machine.bandwidth is None:
        time = f"time {duration(total)} on this machine ({machine.flops / 1e9:.0f} GFLOP/s in float32)"
    else:
        time = f"{total / 3600:.0f} GPU-hours on {machine.name} (bfloat16, {machine.efficiency:.0%} of its dense speed assumed)"
    if judged := judge_summary(missing):
        time += f"; {judged}"
    kinds = Counter(s.kind for s in missing)
    return (
        f"{len(plan.steps)} steps, {len(plan.steps) - len(missing)} done; missing: "
        f"{', '.join(f'{n} {kind}' for kind, n in kinds.most_common()) or 'none'}. "
        f"Estimates for these: {time}, memory {_bytes(memory)} at the peak{_too_much(memory, machine)}, disk {_bytes(needed)} ({_bytes(free)} free)."
    )


def _too_much(memory: float, machine: Machine) -> str:
    """What to do where one GPU does not hold it."""
    if machine.memory is None or memory <= machine.memory:
        return ""
    return f" (one {machine.name} has {_bytes(machine.memory)}: spread the blocks over several with model.device_map: auto)"


def _bytes(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"


def status_text(folder: Path) -> str:
    """Which steps of a study's folder are done, and what is missing."""
    _, steps = _planned(folder)
    paths = StudyPaths(folder)
    missing = missing_steps(paths, steps)
    state = f"{folder}: {len(steps) - len(missing)} of {len(steps)} steps done"
    if missing:
        damaged = [f"damaged: {step.name}: {wrong}" for step, wrong in missing.items() if wrong]
        old = [f"report: {paths.report}, of an earlier run"] if paths.report.is_file() else []
        go_on = [f"next: {next(iter(missing)).name}", f"to go on: mech run {paths.spec} --out {folder}"]
        return "\n".join([state, *damaged, *old, *go_on])
    return f"{state}\nreport: {paths.report if paths.report.is_file() else f'missing: mech report {folder}'}"


def rewrite_report(folder: Path) -> Path:
    """Write the report of a finished study again.

    Raises:
        InputError: the study is not finished.
    """
    from study.publish import publish

    spec, steps = _planned(folder)
    paths = StudyPaths(folder)
    if missing := missing_steps(paths, steps):
        first = next(iter(missing)).name
        raise InputError(
            f"{folder}: {len(missing)} of {len(steps)} steps are missing (the first is {first}): "
            f"run the study first: mech run {paths.spec} --out {folder}"
        )
    publish(spec, steps, paths)
    return paths.report


def _planned(folder: Path) -> tuple[StudySpec, Sequence[Step]]:
    stored = StudyPaths(folder).spec
    if not stored.is_file():
        what = f"not a study's folder (no {stored.name})" if folder.is_dir() else "no such folder"
        raise InputError(f"{folder}: {what}: name one that `mech run` wrote, such as runs/quickstart")
    spec = load_spec(stored)
    return spec, make_plan(spec, find_base(spec.model))


def _existing(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path
