"""Dmcmc's picture: what it shows, in a line."""

from __future__ import annotations


def picture():
    """What is drawn, from ``polyak.generate.dmcmc:Dmcmc`` itself, in two seconds: see :mod:`polyak.lab.pictures`."""
    raise NotImplementedError("the picture of dmcmc")
