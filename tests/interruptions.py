"""A tiny stage from begin to finish in processes that are killed, starved of disk or memory, and started again.

    python tests/interruptions.py FOLDER SEED KILLS

Forks the stage again and again from one process that has imported torch, so that twenty kills take seconds. Prints one
JSON object, which tests/papertrail/test_interruptions.py judges.
"""

import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # or every child would, at its optimizer's first step

from basics import paths
from basics.errors import ThreefoldError
from papertrail.provenance import Fingerprint
from study.preset import TRAINED, Preset, section, to_toml
from study.run import Run, open_run, open_stage
from threefold.config import ModelConfig, TrainConfig
from threefold.data.packing import pack_documents
from threefold.model.decoder import Decoder
from threefold.training import NextToken
from threefold.training.loop import RESULT
from threefold.training.loop import train as train_model
from threefold.training.state import STATE, read_metrics, read_tensors

MODEL = ModelConfig(n_layer=2, d_model=32, n_head=2, d_ff=48, context=32, vocab_size=61)
EVERY = 3  # steps between states
TRAIN = TrainConfig(steps=40, batch_size=4, optimizer="muon", checkpoint_every=EVERY, evaluate_every=10, compile="off")
TIMES = ("seconds", "tokens_per_second")


def rows(seed: int, n: int):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 50, (n,), generator=generator).tolist()
    documents = [torch.randint(2, 61, (length,), generator=generator).tolist() for length in lengths]
    return pack_documents(documents, MODEL, 0, [1])


def one_stage(train: TrainConfig = TRAIN) -> None:
    """What a notebook does, from `open_stage` to run.json."""
    stage = open_stage("pretrain", preset=str(paths.RUNS / "tiny.toml"))
    folder = stage.begin(Fingerprint("pretrain", {}, {"c": "1"}, {}, {}, {}, 1))
    model = Decoder(MODEL)
    model.initialise(torch.Generator().manual_seed(1))
    made = train_model(
        *(model, NextToken(), rows(1, 200), train, folder),
        seed=1,
        heldout=rows(2, 10),
        device="cpu",
        progress=lambda line: None,
        name="pretrain",
    )
    stage.finish(tokens=made.result.tokens)


def forked(runs: Path, prepare=lambda: None, train: TrainConfig = TRAIN) -> tuple[int, "os.PathLike"]:
    """(pid, file that takes what the child says) of a child that makes the stage in a runs folder."""
    said = runs / ".said"
    pid = os.fork()
    if pid:
        return pid, said
    text = "done"
    try:
        paths.RUNS = runs
        prepare()
        one_stage(train)
    except ThreefoldError as error:
        text = f"{type(error).__name__}: {error}"
    except BaseException:
        text = traceback.format_exc()
    finally:
        for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_AS):
            resource.setrlimit(limit, (resource.getrlimit(limit)[1],) * 2)
        said.write_text(text)
        os._exit(0)


def ended(pid: int, said: Path) -> str:
    """What the child said; "" where it was killed."""
    _, status = os.waitpid(pid, 0)
    text = said.read_text() if said.exists() and not os.WIFSIGNALED(status) else ""
    said.unlink(missing_ok=True)
    return text


def fresh(home: Path, name: str) -> Path:
    runs = home / name
    runs.mkdir()
    preset = Preset(name="tiny", **dict.fromkeys(map(section, TRAINED), TrainConfig(steps=1)))
    (runs / "tiny.toml").write_text(to_toml(preset))
    return runs


def opened(runs: Path) -> Run:
    paths.RUNS = runs
    return open_run(runs / "tiny.toml", create=False)


def result(runs: Path) -> dict:
    """Hashes and course of a finished stage, after every byte of it was checked."""
    folder = opened(runs).intact("pretrain")
    facts = json.loads((folder / "run.json").read_text())
    lines = [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(folder)]
    training = json.loads((folder / "training.json").read_text())["result"]
    return {
        "weights": facts["weights_sha256"],
        "tokens": facts["tokens"],
        "lines": lines,
        "loss": [training["loss_first"], training["loss_last"]],
    }


def at_event(number: int):
    """Kill this process at its so manieth event on a file: opening one to write, moving, removing, making a folder."""
    left = [number]

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.addaudithook(hook)


def last_step(folder: Path) -> int:
    try:
        return max((line["step"] for line in read_metrics(folder)), default=0)
    except (FileNotFoundError, ValueError):  # a torn last line, which the next attempt cuts
        return 0


def kills(home: Path, seed: int, wanted: int) -> dict:
    draw = random.Random(seed)
    straight = fresh(home, "straight")
    began = time.monotonic()
    first = ended(*forked(straight))
    took = time.monotonic() - began
    reference = result(straight) if first == "done" else {}
    found = {"first": first, "kills": 0, "finished": 0, "wrong": [], "lost": []}
    runs = fresh(home, "killed")
    while found["kills"] < wanted or not found["finished"]:
        last_round = found["kills"] >= wanted
        by_event = draw.random() < 0.5
        prepare = at_event(draw.randint(1, 60)) if by_event and not last_round else lambda: None
        pid, said = forked(runs, prepare)
        if not by_event and not last_round:
            time.sleep(draw.uniform(0.0, 0.8 * took))
            os.kill(pid, signal.SIGKILL)
        text = ended(pid, said)
        run = opened(runs)
        if text not in ("", "done"):
            found["wrong"].append(text)
            break
        found["kills"] += text == ""
        whole = run.finished("pretrain")
        if whole is not None:  # the stage took its place, whole or not at all
            got = result(runs)
            if got != reference:
                other = [key for key in got if got[key] != reference[key]]
                found["wrong"].append(f"after {found['kills']} kills, in {runs.name}: other {', '.join(other)}")
            found["finished"] += 1
            runs = fresh(home, f"killed{found['finished']}")
            continue
        partial = run.partial_folder("pretrain")
        if text == "" and (partial / "metrics.jsonl").exists():
            state = partial / STATE
            saved = TRAIN.steps if (partial / RESULT).exists() else 0  # trained: the state has gone
            if state.exists():
                saved = read_tensors(state)[1]["state"]["step"]
            found["lost"].append(last_step(partial) - saved)
    return found


def full_disk(home: Path) -> dict:
    """No room for the next state: the last one stays, and the training resumes from it once there is room again."""
    runs = fresh(home, "full")
    pid, said = forked(runs, at_event(30))
    ended(pid, said)
    state = opened(runs).partial_folder("pretrain") / STATE
    before = state.read_bytes()
    limit = len(before) // 2
    text = ended(*forked(runs, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))))
    kept = {
        "said": text,
        "same": state.read_bytes() == before,
        "left": sorted(path.name for path in state.parent.glob(".*")),
    }
    again = ended(*forked(runs))
    return {**kept, "again": again, "result": result(runs) == result(home / "straight")}


def no_memory(home: Path) -> str:
    def limit() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))

    large = TrainConfig(steps=2, batch_size=8192, optimizer="adamw", compile="off")
    return ended(*forked(fresh(home, "memory"), limit, large))


def diverging(home: Path) -> str:
    high = TrainConfig(
        steps=60, batch_size=4, optimizer="adamw", learning_rate=1e18, warmup=0.0, checkpoint_every=1, compile="off"
    )
    return ended(*forked(fresh(home, "diverging"), train=high))


if __name__ == "__main__":
    place, chosen, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    print(
        json.dumps(
            {
                "kills": kills(place, chosen, count),
                "full_disk": full_disk(place),
                "no_memory": no_memory(place),
                "diverging": diverging(place),
            }
        )
    )
