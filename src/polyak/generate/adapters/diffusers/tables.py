"""The table of options as text, for the documentation."""

from __future__ import annotations

from polyak.generate.adapters.diffusers.options import TABLE, Acts, Idle, Origin, Refused


def _lines(origin: Origin) -> list[str]:
    """What the options of a scheduler do, one line for each kind of rule."""
    acts = " ".join(f"`{o}`" for o, rule in origin.options.items() if isinstance(rule, Acts))
    lines = [f"acts: {acts}"]
    idle: dict[str, list[str]] = {}
    for option, rule in origin.options.items():
        if isinstance(rule, Idle):
            idle.setdefault(rule.why, []).append(f"`{option}`")
    if idle:
        lines.append("kept, without effect: " + "; ".join(f"{' '.join(o)}, {why}" for why, o in idle.items()))
    refused = [f"`{o}`, {rule.why}" for o, rule in origin.options.items() if isinstance(rule, Refused)]
    if refused:
        lines.append("refused unless off: " + "; ".join(refused))
    return lines


def markdown() -> str:
    """Every scheduler of diffusers that is taken, with what its options mean, and those that are not, with the reason."""
    alike: dict[tuple[str, ...], list[str]] = {}
    whys: dict[str, list[str]] = {}
    for name, origin in TABLE.items():
        if origin.refused:
            whys.setdefault(origin.refused, []).append(name)
        else:
            alike.setdefault(tuple(_lines(origin)), []).append(name)
    taken = []
    for lines, names in alike.items():
        taken += [f"**{', '.join(names)}**", "", *(f"- {line}" for line in lines), ""]
    refused = [f"- {', '.join(names)}: {why}." for why, names in whys.items()]
    return "\n".join([*taken, "### Schedulers that cannot be taken", "", *refused])
