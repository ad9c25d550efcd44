"""Own data: `threefold new` writes a preset, and a preset is checked whole before anything runs."""

from study import stages
from study.preset import Preset, from_dict, load_preset, model_names, to_dict, validate


def without(*parts: str) -> Preset:
    """The smoke preset without these stages: neither data nor settings of them."""
    table, default = to_dict(load_preset("smoke")), to_dict(Preset())
    for part in parts:
        table[part] = default[part]
        table["data"] |= {part: [], f"{part}_heldout": []}
    return validate(from_dict(table, "own"), "own")


# Stages that a preset leaves out --------------------------------------------------------------------------------------


def test_a_preset_that_says_nothing_about_a_stage_has_no_such_stage():
    plan = stages.plan(without("sft", "dpo"))
    assert "pretrain" in plan and not {"sft", "dpo", "evaluate-sft", "evaluate-dpo"} & set(plan)
    assert plan["speed"].needs == ("data", "pretrain", "gpt2", "distilgpt2")
    assert model_names(without("dpo")) == ["random", "gpt2", "distilgpt2", "pretrain", "sft"]
    assert stages.plan(without("dpo"))["evaluate-sft"].needs == ("sft",)
