"""Sherman-Morrison against a matrix inverse."""

import pytest
import torch

from polyak.core.linalg import sherman_morrison


def positive(*shape, seed=0):
    m = torch.randn(*shape, shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    P = m @ m.mT / shape[-1] + 0.1 * torch.eye(shape[-1], dtype=torch.float64)
    return (P + P.mT) / 2


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 4)])
def test_it_is_the_inverse_and_symmetric(shape):
    P = positive(*shape)
    v = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = P.clone(), v.clone()
    J = sherman_morrison(P, v)
    expected = torch.linalg.inv(torch.linalg.inv(P) + v.unsqueeze(-1) * v.unsqueeze(-2))
    torch.testing.assert_close(J, expected, atol=1e-10, rtol=0)
    assert torch.equal(J, J.mT)
    assert torch.equal(P, given[0])
    assert torch.equal(v, given[1])


@pytest.mark.parametrize("d", [4, 33])
def test_symmetric_to_the_last_bit_in_float32_and_in_place(d):
    P, v = torch.eye(d).expand(3, d, d).clone(), torch.randn(3, d, generator=torch.Generator().manual_seed(2))
    for _ in range(20):
        expected = sherman_morrison(P, v)
        assert sherman_morrison(P, v, out=P) is P
        assert torch.equal(P, expected)
        assert torch.equal(P, P.mT)


def test_zero_changes_nothing():
    P = positive(5)
    assert torch.equal(sherman_morrison(P, torch.zeros(5, dtype=torch.float64)), P)


@pytest.mark.parametrize(("P", "v"), [((3, 4), (4,)), ((3, 3), (4,)), ((2, 3, 3), (3,)), ((3,), (3,))])
def test_shapes_must_fit(P, v):
    with pytest.raises(ValueError, match=r"P must be \(\.\.\., d, d\)"):
        sherman_morrison(torch.zeros(P), torch.zeros(v))
