"""What every test begins with."""

import sys

import pytest


@pytest.fixture(autouse=True)
def single_precision(monkeypatch):
    """precision = "auto" is fp32 in a test's own process, whatever the machine multiplies fast: oracles are compared to
    five digits, of which bf16 has two. Tests of bf16 ask for it, those of the choice set this again."""
    from threefold.model import device

    monkeypatch.setattr(device, "_fast_bf16", lambda kind: False)


def pytest_terminal_summary(terminalreporter):
    """How many inputs of each kind the property tests of this session tried (CONTRIBUTING.md)."""
    if (campaign := sys.modules.get("properties")) and campaign.RAN:
        terminalreporter.section("generated inputs")
        for kind, number in [*campaign.RAN.items(), ("all", campaign.RAN.total())]:
            terminalreporter.write_line(f"{kind:<22}{number:>8,}")
