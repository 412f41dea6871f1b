"""What tests of claims share."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker runs all tests of a claim, which keep its trials."""
    for item in items:
        if item.path.name.endswith("_claim.py"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
