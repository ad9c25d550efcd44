"""Every wrong step of a first walk ends in one line within two seconds of a processor, before anything is written."""

import json
import os
import subprocess
import sys

import pytest
from test_cli import PRESET

from basics import paths

SECONDS = 2.0  # of a processor, the interpreter's start and imports included

STEPS = {
    "rn": "invalid choice: 'rn'",
    "run --preset smokee": "did you mean smoke?",
    "run --preset missing.toml": "no such file",
    "run --preset typo.toml": "did you mean sft.steps?",
    "run --preset broken.toml": "broken.toml: cannot be read as TOML",
    "run --preset tiny.toml --set sft.learning_rte=1e-3": "did you mean sft.learning_rate?",
    "run --preset tiny.toml --set sft.steps=many": "expected a whole number",
    "run --preset tiny.toml --set sft.steps": "expected key=value",
    "run --preset tiny.toml --set sft.batch_size=0": "sft.batch_size = 0: expected at least 1",
    "run --preset tiny.toml --only stf": "did you mean sft?",
    "run --preset tiny.toml --only sft": "sft needs stage pretrain",
    "run --preset tiny.toml --run ../x": "a name has only",
    "run --preset tiny.toml --data-dir nowhere": "no such folder",
    "run --preset tiny.toml --jobs 0": "expected a whole number of at least 1",
    "doctor --preset smokee": "did you mean smoke?",
    "status --run tinny": "did you mean tiny?",
    "status --run tiny --set sft.stpes=1": "did you mean sft.steps?",
    "verify --run nope": "no run 'nope'",
    "verify --run tiny --rerun stf": "did you mean sft?",
    "report --run nope": "no run 'nope'",
    "report --run tiny": "has no comparison yet: `threefold run --run tiny` makes it",
    "compare tiny": "name two runs or more",
    "compare tiny tiny": "run tiny is named twice",
    "compare tiny nope": "no run 'nope'",
    "generate --run nope Once": "no run 'nope'",
    "generate --run tiny Once": "stage dpo of run tiny is not there yet",
    "generate --stage sfft Once": "invalid choice: 'sfft'",
    "generate --form questin Once": "invalid choice: 'questin'",
    "generate --run tiny --temperature -1 Once": "temperature = -1.0: allowed is",
    "chat --run nope": "no run 'nope'",
    "chat --run tiny": "no finished stage to talk to",
    "chat --run tiny --top-p 2": "top_p = 2.0: allowed is",
    "export --run nope out": "no run 'nope'",
    "export --run tiny --stage sft out": "stage sft of run tiny is not there yet",
    "train stf --run tiny": "allowed are pretrain",
    "train dpo-seed9 --run tiny": "unknown stage 'dpo-seed9'",
    "new study": "name a text to pretrain on",
    "new full --text text.txt": "full exists already",
    "new study --text missing.txt": "no such file",
    "new study --text empty.txt": "no items",
    "new study --text binary.txt": "not UTF-8",
    "new study --text text.txt --instructions rows.jsonl": "no column 'output'",
    "new study --text text.txt --preferences text.txt": "text.txt",
    "tensorboard --run nope": "no run 'nope'",
    "clean --run nope": "no run 'nope'",
    "completion fish": "invalid choice: 'fish'",
}

# Forks a process a step, so that each imports what it needs for itself; what all of them share is counted in each.
DRIVER = """
import json, os, sys, time, traceback
import study.cli
found, steps, shared = {}, json.load(sys.stdin), time.process_time()
for step in steps:
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(write, 1), os.dup2(write, 2), os.close(write)
        status = 1
        try:
            status = study.cli.main(step.split())
        except SystemExit as left:
            status = left.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush(), os._exit(status)
    os.close(write)
    said = os.fdopen(read, encoding="utf-8").read()
    _, status, used = os.wait4(pid, 0)
    found[step] = [os.waitstatus_to_exitcode(status), said, shared + used.ru_utime + used.ru_stime]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """{step: [exit status, what it printed, seconds of a processor]}."""
    home = tmp_path_factory.mktemp("walk")
    (home / "tiny.toml").write_text(PRESET)
    (home / "typo.toml").write_text(PRESET.replace("[sft]\nsteps", "[sft]\nstpes"))
    (home / "broken.toml").write_text("a = [")
    (home / "empty.txt").write_text("")
    (home / "binary.txt").write_bytes(bytes(range(128, 256)))
    (home / "text.txt").write_text("\n\n".join(f"The {n}th ladder leans on the wall of the mill." for n in range(900)))
    (home / "rows.jsonl").write_text('{"instruction": "Add."}\n' * 30)
    (home / "full").mkdir()
    (home / "full" / "file").write_text("x")
    environment = os.environ | {"THREEFOLD_RUNS": str(home / "runs"), "PYTHONPATH": str(paths.PACKAGES)}
    made = "from study.run import open_run; open_run('tiny.toml')"
    options = {"cwd": home, "env": environment, "check": True, "text": True, "capture_output": True}
    subprocess.run([sys.executable, "-c", made], **options)
    before = list(home.rglob("*"))
    done = subprocess.run([sys.executable, "-c", DRIVER], input=json.dumps(list(STEPS)), **options)
    made = {path.relative_to(home).as_posix() for path in set(home.rglob("*")).difference(before)}
    assert made <= {"runs/.cache", "runs/.cache/code.json", "runs/tiny/.lock"}
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("step", STEPS)
def test_a_wrong_step_is_one_line_at_once(ends, step):
    status, said, seconds = ends[step]
    assert status == 2 and STEPS[step] in said and said.count("\n") == 1 and said.startswith("threefold"), said
    assert seconds < SECONDS
