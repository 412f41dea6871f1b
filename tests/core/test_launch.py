"""Launches of Triton kernels: what is skipped from the second one on, and what never is."""

import pytest
import torch

from polyak.core.launch import Launcher, build, function, is_elsewhere


class Kernel:
    """Notes how it is launched, as Triton's kernels (and what these make) are."""

    def __init__(self):
        self.seen = []

    def __call__(self):
        self.seen.append("looked for")
        return self

    def __getitem__(self, grid):
        def launch(*arguments, num_warps=None):
            self.seen.append((grid, arguments, num_warps))
            return self

        return launch


def test_the_second_launch_of_a_kind_skips_the_look_at_arguments():
    kernel, launch = Kernel(), Launcher()
    x, y = torch.zeros(3), torch.ones(3)
    launch(kernel, 5, (x, 2.0, 7), 4, "a")
    assert kernel.seen == ["looked for", ((5,), (x, 2.0, 7), 4)]
    launch(kernel, 5, (y, 3.0, 7), 4, "a")
    assert kernel.seen[2:] == [((5, 1, 1), (y.data_ptr(), 3.0, 7), None)]


@pytest.mark.parametrize("keys", [("a", "b"), (None, None)])
def test_another_kind_or_none_is_looked_at(keys):
    kernel, launch = Kernel(), Launcher()
    x = torch.zeros(3)
    for key in keys:
        launch(kernel, 5, (x,), 4, key)
    assert kernel.seen == ["looked for", ((5,), (x,), 4)] * 2


def test_what_makes_nothing_is_launched_in_full_every_time():
    """As Triton's interpreter."""
    seen = []

    class Interpreted:
        def __getitem__(self, grid):
            return lambda *arguments, num_warps: seen.append(arguments)

    launch = Launcher()
    for _ in range(2):
        launch(Interpreted, 1, (1.0,), 4, "a")
    assert seen == [(1.0,)] * 2


def test_a_text_is_made_once():
    pytest.importorskip("triton")
    text = function("nothing", ["x"], ["tl.store(x, 1.0)"])
    assert build(text) is build(text)
    assert build(text)["nothing"] is not build(text.replace("1.0", "2.0"))["nothing"]


def test_launches_are_on_the_tensors_device(monkeypatch):
    monkeypatch.setattr("polyak.core.launch._devices", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert [is_elsewhere(place) for place in (-1, 0, 1)] == [False, True, False]
