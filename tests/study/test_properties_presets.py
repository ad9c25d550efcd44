"""Presets, overrides and names of any shape: a preset that means what it says, or one line that names the fault."""

import tomllib

import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from properties import damaged, documented, examples, mutated

from basics import names, paths
from study import run
from study.preset import Preset, from_dict, load_preset, override, parse_overrides, to_dict, to_toml, validate
from threefold.config import all_keys

SMOKE = load_preset("smoke")
FILE = (paths.PRESETS / "smoke.toml").read_bytes()


def without_null(value):
    """TOML has no null."""
    if isinstance(value, dict):
        return {key: without_null(item) for key, item in value.items() if item is not None}
    return [without_null(item) for item in value if item is not None] if isinstance(value, list) else value


def sound(preset: Preset) -> None:
    """What was accepted is what would be read from its own TOML, and cannot leave the runs folder."""
    assert validate(preset) == preset
    assert from_dict(tomllib.loads(to_toml(preset)), "x") == preset
    assert (paths.RUNS / preset.name).resolve().parent == paths.RUNS.resolve()


@examples("preset", 120)
@given(table=mutated(to_dict(SMOKE)))
def test_a_preset_with_values_of_any_kind(tmp_path_factory, table):
    file = tmp_path_factory.getbasetemp() / "any.toml"
    try:
        file.write_text(tomli_w.dumps(without_null(table)), encoding="utf-8", errors="surrogatepass")
    except (TypeError, ValueError):  # nothing that TOML can write: given as a table below
        return
    preset = documented(lambda: load_preset(file), "any.toml")
    if preset is not None:
        sound(preset)


@examples("preset", 150)
@given(data=damaged(FILE))
def test_a_damaged_preset_file(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "damaged.toml"
    file.write_bytes(data)
    preset = documented(lambda: load_preset(file), "damaged.toml")
    if preset is not None:
        sound(preset)


@examples("override", 150)
@given(
    key=st.sampled_from(all_keys(Preset)) | st.text(max_size=12) | st.just("data.pretrain.0.split"),
    text=st.text(max_size=12)
    | st.sampled_from(["[" * 3000, "1" * 5000, "1e999", "-0", "0x" + "f" * 9999, "nan", "''"]),
)
def test_an_override_of_any_text(key, text):
    preset = documented(lambda: override(SMOKE, parse_overrides([f"{key}={text}"])))
    if preset is not None:
        sound(preset)


@examples("parameter", 200)
@given(name=st.text(max_size=30) | st.from_regex(r"[A-Za-z0-9./\\-]{1,120}", fullmatch=True))
def test_a_name_stays_in_its_folder(name):
    """Of a run, a model and a stage: it is refused, or a file of that name lies where it should."""
    if documented(lambda: names.check_name(name, "run"), "run") is not None:
        assert (paths.RUNS / name).parent == paths.RUNS and len(name.encode()) <= 100
        assert name.partition(".")[0].upper() not in ("CON", "NUL", "AUX", "PRN", "COM1", "LPT9")
    opened = run.Run.of("smoke", paths.RUNS / "smoke", SMOKE)
    for stage in (name, f"evaluate-{name}", f"sft-seed{name}"):
        for place in (
            opened.partial_folder,
            opened.stage_folder,
            lambda one: opened.notebook(opened.spec(one).executed),
        ):
            path = documented(lambda stage=stage, place=place: place(stage))
            if path is not None:
                assert path.resolve().is_relative_to(opened.path.resolve()) and len(path.name.encode()) < 200


def test_names_that_were_tried(tmp_path, monkeypatch):
    """Each by hand: parent, absolute, NUL, long, reserved, turned around, a digit of another script, a link."""
    long, many = "a" * 101, "9" * 5000
    for name in ("../x", "/etc", "a/b", "a\\b", "a\0", long, "CON", "nul.txt", "lpt1", "a.", ".a", "", "\u202ea", "é"):
        assert documented(lambda name=name: names.check_name(name, "run"), "run") is None
    for stage in (
        "evaluate-../../x",
        "evaluate-/etc",
        "evaluate-..",
        f"evaluate-{long}",
        f"sft-seed{many}",
        "sft-seed1٢",
    ):
        assert documented(lambda stage=stage: run.Run.of("smoke", tmp_path, SMOKE).spec(stage)) is None
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "away").symlink_to(tmp_path, target_is_directory=True)
    assert documented(lambda: run.open_run("smoke", "away"), "away is a link out of the runs folder") is None
    for preset in ("../smoke", "a\0.toml", "a/" * 3000 + ".toml", "\u202esmoke", "x" * 3000):
        assert documented(lambda preset=preset: load_preset(preset)) is None
    (tmp_path / "big.toml").write_text("# " + "x" * (1 << 20))
    assert documented(lambda: load_preset(tmp_path / "big.toml"), "big.toml") is None
