"""Is this machine fit to run a study? Versions, known conflicts, device, cache, free disk."""

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from mech.cache import cache_dir
from mech.fetch import PACKAGED, is_fetched

NEEDED_FREE_BYTES = 3_000_000_000


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    ok: bool
    found: str


def examine() -> list[Check]:
    """Every check, in the order of reading."""
    return [_python(), *_libraries(), _conflicts(), _device(), _hub(), _cache(), _disk()]


def _python() -> Check:
    return Check("python", sys.version_info >= (3, 11), sys.version.split()[0])


def _libraries() -> list[Check]:
    """Every declared dependency against its declared range."""
    from packaging.requirements import Requirement

    checks = []
    for text in requires("sgtr-mech") or []:
        requirement = Requirement(text)
        if requirement.name == "sgtr-mech":  # an extra that contains another
            continue
        extra = requirement.marker is not None
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            if not extra:
                checks.append(
                    Check(requirement.name, ok=False, found=f"missing; needs {requirement.specifier}")
                )
            continue
        fits = requirement.specifier.contains(found, prereleases=True)
        checks.append(Check(requirement.name, fits, f"{found} (needs {requirement.specifier or 'any'})"))
    return checks


def _conflicts() -> Check:
    """Combinations that install and then misbehave."""
    problems = []
    try:
        if int(version("transformer-lens").split(".")[0]) < 4:
            problems.append("transformer-lens below 4 has no bridge to an in-memory model")
    except PackageNotFoundError:
        pass
    return Check("known conflicts", not problems, "; ".join(problems) or "none")


def _device() -> Check:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return Check(
            "device",
            ok=True,
            found=f"{torch.cuda.get_device_name()}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free",
        )
    return Check("device", ok=True, found=f"CPU, {torch.get_num_threads()} threads")


def _hub() -> Check:
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    return Check(
        "Hugging Face Hub", ok=True, found="offline (HF_HUB_OFFLINE)" if offline else "online when asked"
    )


def _cache() -> Check:
    here = [alias for alias in PACKAGED if is_fetched(alias)]
    return Check("cache", ok=True, found=f"{cache_dir()}; fetched: {', '.join(here) or 'no model yet'}")


def _disk() -> Check:
    place = cache_dir()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    return Check(
        "free disk",
        free > NEEDED_FREE_BYTES,
        f"{free / 1e9:.1f} GB (a study of the small model needs about 1)",
    )
