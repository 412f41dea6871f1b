"""A comparison's figures where there is no page: in a notebook."""

from __future__ import annotations

import io
import struct
from typing import Any

from matplotlib.figure import Figure

from polyak.lab import plots

SHARP = 144  # dots per inch, twice as many as a page's drawings have CSS pixels
_SHOWN = 1.3  # times as large as on a page, since nothing stands beside it


class Drawing(Figure):
    """A figure that a notebook shows by itself, with or without ``%matplotlib inline``."""

    def savefig(self, fname: Any, **options: Any) -> None:
        """As matplotlib's; by default with a little room around."""
        with plots.styled():
            super().savefig(fname, **{"bbox_inches": "tight", "pad_inches": 0.1} | options)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """The drawing, and how large it is to be shown: in CSS pixels, half as many as it has dots."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=SHARP * _SHOWN)
        data = buffer.getvalue()
        wide, high = struct.unpack(">II", data[16:24])  # where a PNG says its size
        return data, {"width": wide // 2, "height": high // 2}
