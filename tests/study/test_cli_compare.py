"""Runs side by side: the report's own figures, in one row only where they compare."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from report_fixtures import make_run, seal

from basics import paths
from papertrail import records
from papertrail.run import with_hash
from study import cli
from study.cli.compare import differing_keys, side_by_side
from study.comparison import Comparison, tables
from study.comparison.measures import MEASURES
from study.comparison.results import NBSP
from study.preset import load_preset, parse_overrides, to_toml
from study.run import Run


def settle(folder, *overrides: str) -> Run:
    """A run that `Comparison.load` takes: the fake notebooks, and a preset that asks for just those."""
    preset = load_preset("smoke", parse_overrides(overrides))
    (folder / "config.toml").write_text(with_hash(to_toml(preset)))
    return seal(Run.of(folder.name, folder, preset))


def edited(run: Run, folder, change, pattern: str = "*") -> Run:
    """A copy of the run whose notebooks' records were changed in place: `change(name, values)`, "drop" leaves one
    out."""
    shutil.copytree(run.path, folder)
    for path in folder.glob(f"notebooks/{pattern}.ipynb"):
        book = json.loads(path.read_text())
        records_ = [(cell, cell["outputs"][0]["data"][records.MIME]) for cell in book["cells"]]
        book["cells"] = [cell for cell, record in records_ if change(record["name"], record["values"]) != "drop"]
        path.write_text(json.dumps(book))
    return settle(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Runs `one`, `two` (other figures, another learning rate) and `other` (another tokenizer)."""
    folder = tmp_path_factory.mktemp("runs")
    one = settle(make_run(folder / "one"))

    def worse(_, values):
        for metric in values.get("metrics", {}).values():
            metric.update({key: metric[key] and 1.1 * metric[key] for key in ("value", "low", "high")})

    def retokenised(name, values):
        if name.startswith("evaluation/") and "distilgpt2" not in name:
            values["settings"]["tokenizer_sha256"] = 64 * "e"

    edited(one, folder / "two", worse, "04_evaluate-sft")
    return [one, settle(folder / "two", "sft.learning_rate=0.5"), edited(one, folder / "other", retokenised)]


def parsed(table: str) -> list[dict[str, str]]:
    """The rows of a table whose columns begin where its rule's dashes do."""
    heading, rule, *lines = table.splitlines()
    spans = [match.span() for match in re.finditer("-+", rule)]
    names = [heading[start:end].strip() for start, end in spans]
    return [dict(zip(names, (line[start:end].strip() for start, end in spans), strict=True)) for line in lines]


def plain(text: str) -> str:
    return text.replace("\\", "").replace(NBSP, " ")


def test_every_figure_is_that_of_the_runs_own_headline_table(world):
    one, two, _ = world
    figures, foot, keys = side_by_side([one, two]).split("\n\n")
    rows = parsed(figures)
    told = 0
    for run in (one, two):
        for own in tables.headline(Comparison.load(run)).values["rows"]:
            for heading, text in own.items():
                if heading == "Model" or text is None:
                    continue
                (row,) = (
                    row
                    for row in rows
                    if (plain(row["Model"]), plain(row["Measure"])) == (plain(own["Model"]), plain(heading))
                )
                assert plain(row[f"run {run.name}"]) == plain(text)
                told += 1
    assert told == sum(row[f"run {run.name}"] != "–" for row in rows for run in (one, two)) > 40
    assert re.search(r"\[.*,.*\]", rows[0]["run one"])
    assert "not tested" in foot
    assert parsed(keys) == [
        {"Key": "sft.learning_rate", "run one": str(one.preset.sft.learning_rate), "run two": "0.5"}
    ]


def test_perplexities_of_different_tokenizers_share_no_row_and_say_so(world):
    one, _, other = world
    rows = parsed(side_by_side([one, other]).split("\n\n")[0])
    pretrain = [row for row in rows if "pretrain" in row["Model"]]
    perplexity = [row for row in pretrain if row["Measure"].startswith("Perplexity")]
    assert len(perplexity) == 2 and all("tokenizer" in row["Protocol"] for row in perplexity)
    assert sorted((row["run one"] == "–", row["run other"] == "–") for row in perplexity) == [
        (False, True),
        (True, False),
    ]
    (bits,) = (row for row in pretrain if row["Measure"].startswith("Bits"))
    assert bits["run one"] != "–" != bits["run other"] and "tokenizer" not in bits["Protocol"]


@pytest.mark.parametrize(
    ("condition", "change"),
    [
        ("data", lambda values: values["settings"]["data"].update(fingerprint="0123456789")),
        ("n 7", lambda values: [metric.update(n=7) for metric in values["metrics"].values()]),
        ("version 2", lambda values: values["settings"].update(version=2)),
    ],
)
def test_other_data_items_or_versions_share_no_row(world, tmp_path, condition, change):
    def problems_only(name, values):
        if name == "evaluation/sft/sample-problems/5-shot":
            change(values)

    changed = edited(world[0], tmp_path / "changed", problems_only, "04_evaluate-sft")
    rows = parsed(side_by_side([world[0], changed]).split("\n\n")[0])
    sft = [row for row in rows if "SFT" in row["Model"]]
    problems = [row for row in sft if "problems" in row["Measure"]]
    assert len(problems) == 2 and any(condition in row["Protocol"] for row in problems)
    assert len(sft) == len({row["Measure"] for row in sft}) + 1  # the others still stand beside each other


def test_a_figure_that_one_run_lacks_is_a_dash(world, tmp_path):
    def without(name, values):
        return "drop" if name == "evaluation/sft/sample-problems/5-shot" else None

    fewer = edited(world[0], tmp_path / "fewer", without, "04_evaluate-sft")
    rows = parsed(side_by_side([world[0], fewer]).split("\n\n")[0])
    (row,) = (row for row in rows if "SFT" in row["Model"] and "problems" in row["Measure"])
    assert row["run one"] != "–" and row["run fewer"] == "–"


def test_json_holds_the_figures_that_the_table_shows(world, monkeypatch, capsys):
    monkeypatch.setattr(paths, "RUNS", world[0].path.parent)
    assert cli.main(["compare", "one", "two", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["runs"] == ["one", "two"]
    assert told["differing"] == {"sft.learning_rate": {"one": world[0].preset.sft.learning_rate, "two": 0.5}}
    cells = [cell for row in parsed(side_by_side(world[:2]).split("\n\n")[0]) for cell in list(row.values())[3:]]
    assert len(told["figures"]) == sum(cell != "–" for cell in cells)
    for run in world[:2]:
        comparison = Comparison.load(run)
        for one in (one for one in told["figures"] if one["run"] == run.name):
            measure = MEASURES[one["measure"]]
            own = comparison.metric(one["model"], one["protocol"], measure.metric)
            assert (one["value"], one["low"], one["high"]) == (own.value, own.low, own.high)
            assert one["conditions"]["n"] == str(own.n)


def test_preset_keys():
    keys = differing_keys(
        {
            "a": {"name": "x", "data": {"pretrain": [{"source": "s"}, {"source": "t"}]}, "shots": [0, 3]},
            "b": {"name": "x", "data": {"pretrain": [{"source": "s"}]}, "shots": [0, 5]},
        }
    )
    assert keys == {
        "data.pretrain.1.source": {"a": '"t"', "b": None},
        "shots": {"a": "[0, 3]", "b": "[0, 5]"},
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare"], "required: RUN"),
        (["compare", "one"], "name two runs or more"),
        (["compare", "one", "two", "one"], "run one is named twice"),
        (["compare", "one", "tow"], "no run 'tow', did you mean two?"),
        (["compare", "one", "../two"], "a name has only"),
        (["compare", "one", "bare"], "run bare has no finished stage: `threefold run --run bare`"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(world, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(paths, "RUNS", world[0].path.parent)
    bare = paths.RUNS / "bare"
    bare.mkdir(exist_ok=True)
    settle(bare)
    try:
        status = cli.main(arguments)
    except SystemExit as left:
        status = left.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and said in err and err.count("\n") == 1
    shutil.rmtree(bare)


def test_the_command_needs_no_torch_and_warns_of_what_is_stale(world):
    script = (
        "import sys, study.cli as cli, basics.paths as paths; from pathlib import Path;"
        f"paths.RUNS = Path({str(world[0].path.parent)!r});"
        "status = cli.main(['compare', 'one', 'two']);"
        "print(status, [name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert done.stdout.startswith("Measure ") and not re.search(r"\\|&#|[|*]", done.stdout)  # no Markdown
    for name in ("one", "two"):
        assert f"the figures of run {name} show an earlier state of" in done.stderr
    assert done.stderr.count("\n") == 2
