"""Notebooks as the stages of a run: plan, fingerprints, run folder, records, scheduler, verification, report."""
