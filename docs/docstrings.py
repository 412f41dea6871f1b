"""How the reference reads docstrings: what they have of reStructuredText and doctest becomes Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe


def markdown(text: str) -> str:
    """Roles become plain code, and doctests blocks of code: in a section by the name that griffe knows, elsewhere by fences."""
    text = re.sub(r"(^\s*|: )(>=? ?\d)", r"\1\\\2", text, flags=re.MULTILINE)  # "> 0" is no quotation
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    text = re.sub(r":(?:class|func|meth|attr|mod|data|exc|obj):`~?", "`", text)
    return re.sub(r"^(>>> .*(?:\n(?!\n).*)*)", r"```pycon\n\1\n```", text, flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Applies :func:`markdown` to every docstring that is loaded."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
