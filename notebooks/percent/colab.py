# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,label,editable,deletable,-all
#     notebook_metadata_filter: -all
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The smoke run in Colab
#
# Installs the project from a GitHub repository, makes the smoke run (a few minutes on a CPU) and shows its report. Set
# `repository` to yours. Not a stage, and not tried: it follows Colab's documentation.

# %%
repository = "https://github.com/OWNER/threefold"
folder = "threefold"

# %%
import subprocess
from pathlib import Path

if not Path(folder).exists():
    subprocess.run(["git", "clone", "--depth", "1", repository, folder], check=True)
subprocess.run(["pip", "install", "--quiet", "-e", folder], check=True)

# %%
subprocess.run(["threefold", "run", "--preset", "smoke"], cwd=folder, check=True)
subprocess.run(["threefold", "report", "--run", "smoke"], cwd=folder, check=True)

# %%
from IPython.display import HTML

HTML(Path(folder, "runs", "smoke", "report", "index.html").read_text(encoding="utf-8"))
