"""What every message of an error a person can act on is made of."""

from basics.errors import RecordError


def test_hashes_are_shown_by_their_first_digits_except_in_a_path():
    digest = "0123456789ab" + 52 * "c"
    shown = str(RecordError(f"stage sft has weights {digest}, run.json says {digest}: run it"))
    assert shown == "stage sft has weights 0123456789ab, run.json says 0123456789ab: run it"
    for kept in (f"runs/.cache/tokens/{digest}/meta.json", f"x-{digest}", f"a{digest}"):
        assert kept in str(RecordError(f"{kept} is gone"))
