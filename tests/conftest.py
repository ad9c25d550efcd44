"""What every test begins with."""

import pytest


@pytest.fixture(autouse=True)
def single_precision(monkeypatch):
    """precision = "auto" is fp32 in a test's own process, whatever the machine multiplies fast: oracles are compared to
    five digits, of which bf16 has two. Tests of bf16 ask for it, those of the choice set this again."""
    from threefold.training import numerics

    monkeypatch.setattr(numerics, "_fast_bf16", lambda kind: False)
