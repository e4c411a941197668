"""Grids: one entry of a study that stands for many.

    grid: {em: [unpop, finrisk], prompt: [default, none]}
    stages:
      "em_{em}": {data: "em_{em}"}
      "sgtr_{prompt}": {data: sgtr, system_prompt: "{prompt}"}
    arms:
      "em_{em}_then_sgtr_{prompt}": ["em_{em}", "sgtr_{prompt}"]

An entry of `data`, `stages`, `arms`, `comparisons` or `figures.groups` whose name has placeholders stands for one entry for each combination
of their values.
"""

import re
from collections.abc import Mapping
from itertools import product
from typing import Any

from mech.errors import InputError

SECTIONS = ("data", "stages", "arms", "comparisons")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


def expand(raw: dict[str, Any]) -> dict[str, Any]:
    """A study without its grid: every entry that it multiplies spelled out.

    Raises:
        InputError: a placeholder that the grid does not have, a name of the grid that no entry has, or two entries that come to
            the same name.
    """
    grid = raw.get("grid") or {}
    if not isinstance(grid, Mapping) or not all(isinstance(v, list) and v for v in grid.values()):
        raise InputError("grid: needs a list of values for each name")
    expanded = {k: v for k, v in raw.items() if k != "grid"}
    for section in SECTIONS:
        entries = raw.get(section)
        if isinstance(entries, Mapping):
            expanded[section] = _section(section, entries, grid)
    figures = raw.get("figures")
    if isinstance(figures, Mapping) and isinstance(groups := figures.get("groups"), Mapping):
        expanded["figures"] = {**figures, "groups": _section("figures.groups", groups, grid)}
    figure_groups = figures.get("groups") if isinstance(figures, Mapping) else None
    named = [raw.get(section) for section in SECTIONS] + [figure_groups]
    names = " ".join(str(name) for entries in named if isinstance(entries, Mapping) for name in entries)
    if idle := [name for name in grid if f"{{{name}}}" not in names]:
        raise InputError(f"grid.{idle[0]}: no name in {', '.join(SECTIONS)} has {{{idle[0]}}}")
    return expanded


def _section(section: str, entries: Mapping[str, Any], grid: Mapping[str, list[Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, entry in entries.items():
        wanted = list(dict.fromkeys(_PLACEHOLDER.findall(str(name))))
        if unknown := [w for w in wanted if w not in grid]:
            raise InputError(
                f"{section}.{name}: the grid has no {unknown[0]!r}; it has {', '.join(grid) or 'nothing'}"
            )
        for values in product(*(grid[w] for w in wanted)):
            chosen = dict(zip(wanted, map(str, values), strict=True))
            filled = _fill(str(name), chosen, f"{section}.{name}")
            if filled in found:
                raise InputError(f"{section}.{filled}: stands twice (once from {name})")
            found[filled] = _fill_all(entry, chosen, f"{section}.{name}") if chosen else entry
    return found


def _fill_all(entry: Any, chosen: Mapping[str, str], where: str) -> Any:
    if isinstance(entry, str):
        return _fill(entry, chosen, where)
    if isinstance(entry, list):
        return [_fill_all(e, chosen, where) for e in entry]
    if isinstance(entry, Mapping):
        return {k: _fill_all(v, chosen, where) for k, v in entry.items()}
    return entry


def _fill(text: str, chosen: Mapping[str, str], where: str) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in chosen:
            raise InputError(f"{where}: the placeholder {match[0]} is not in the entry's name")
        return chosen[match[1]]

    return _PLACEHOLDER.sub(value, text)
