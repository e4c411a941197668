"""`--set key=value`, and options of the same form."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from mech.errors import InputError
from mech.files import parse_yaml

log = logging.getLogger(__name__)


def parse_overrides(texts: Sequence[str], option: str = "--set") -> dict[str, Any]:
    """`key=value` texts, given to a command by `option`, as one nested mapping.

    Raises:
        InputError: see `parse_override`.
    """
    found: dict[str, Any] = {}
    for text in texts:
        set_key(found, *parse_override(text, option))
    return found


def parse_override(text: str, option: str = "--set") -> tuple[str, Any]:
    """Key and value of `key=value`, the value read as YAML.

    Raises:
        InputError: it has another form.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"{option} {text!r}: write key=value, with dots between keys")
    try:
        return key.strip(), parse_yaml(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{option} {text!r}: the value is not YAML") from error


def set_key(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, making the mappings on its way.

    Raises:
        InputError: something on the way is no mapping.
    """
    *parents, last = key.split(".")
    place = raw
    for i, parent in enumerate(parents):
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise InputError(f"{key}: {'.'.join(parents[: i + 1])} is not a mapping")
    place[last] = _numbers(value)


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as text; a number is what anyone means."""
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() else value
        except ValueError:
            return value
    return value


def without_lost_comparisons(raw: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A study without the comparisons whose arms an override took away (a smaller grid, fewer arms); what is left out is logged.

    Args:
        raw: the study, its grid expanded.
        keys: what was overridden: a comparison that was itself is kept, for then its arm is a mistake.
    """
    arms, compared = raw.get("arms"), raw.get("comparisons")
    if not keys or not isinstance(arms, Mapping) or not isinstance(compared, Mapping):
        return raw
    if any(key.partition(".")[0] == "comparisons" for key in keys):
        return raw
    lost = [
        name
        for name, pair in compared.items()
        if isinstance(pair, Mapping) and not {pair.get("arm"), pair.get("against")} <= {*arms}
    ]
    if lost:
        log.info("without the comparisons of arms that are not there now: %s", ", ".join(lost))
    return {**raw, "comparisons": {name: pair for name, pair in compared.items() if name not in lost}}
