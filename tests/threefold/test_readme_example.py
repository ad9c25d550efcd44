"""The README's example of training with the library alone runs as it is printed there."""

import shutil
import subprocess
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from basics import paths

SECTION = "## Training a model with the library alone"


def test_the_readmes_example_trains_a_checkpoint(tmp_path):
    section = (paths.PROJECT / "README.md").read_text(encoding="utf-8").partition(SECTION)[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    sample = tmp_path / "data" / "sample"
    sample.mkdir(parents=True)
    shutil.copy(paths.DATA / "sample" / "wiki.train.txt", sample)
    code += "\nimport sys\nassert not {'papertrail', 'study'} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "50 steps" in done.stdout and "done, loss" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "models" / "tiny")
    assert model.config.vocab_size == len(tokenizer) == 512
