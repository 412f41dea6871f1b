"""The table of options as text, for the documentation."""

from __future__ import annotations

from polyak.generate.adapters.diffusers.options import TABLE, Acts, Idle, Origin, Refused


def _line(name: str, origin: Origin) -> str:
    acts = " ".join(f"`{o}`" for o, rule in origin.options.items() if isinstance(rule, Acts))
    idle: dict[str, list[str]] = {}
    for option, rule in origin.options.items():
        if isinstance(rule, Idle):
            idle.setdefault(rule.why, []).append(f"`{option}`")
    kept = "; ".join(f"{' '.join(options)}: {why}" for why, options in idle.items())
    refused = "; ".join(f"`{o}`: {rule.why}" for o, rule in origin.options.items() if isinstance(rule, Refused))
    return f"| {name} | {acts} | {kept} | {refused} |"


def markdown() -> str:
    """Every scheduler of diffusers that is taken, with what its options mean, and those that are not, with the reason."""
    taken = [_line(name, origin) for name, origin in TABLE.items() if not origin.refused]
    refused = [f"| {name} | {origin.refused} |" for name, origin in TABLE.items() if origin.refused]
    return "\n".join(
        [
            "| scheduler | acts | kept, without effect | refused unless off |",
            "| --- | --- | --- | --- |",
            *taken,
            "",
            "| scheduler | why it cannot be taken |",
            "| --- | --- |",
            *refused,
        ]
    )
