"""Executes a run's stages: notebooks through papermill, side by side where their inputs allow it.

Order: among the stages that could start, the one with the longest road behind it starts first, so that pretraining, SFT
and DPO are not kept waiting by evaluations.

Cores: with `jobs` notebooks side by side each gets cores // jobs threads, whether or not a neighbour is there at that
moment; a stage that can never have a neighbour (the data at the start, the comparison at the end) gets all cores. The
number of threads decides how floating-point sums are split, so it must follow from the plan and not from the clock:
the same preset on the same machine gives the same bits.
"""

import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from basics import errors, names
from basics.errors import MissingInput, RecordError, ThreefoldError
from papertrail import notebook_files
from papertrail import run as run_folder
from papertrail.plan import Plan, StageSpec, ancestors, dependents
from papertrail.run import Run
from papertrail.scrub import scrub
from papertrail.staleness import State, state
from study.preset import OWN_MODELS, TRAINED

# How long a stage takes against the others; only their order matters.
WEIGHTS = {
    "data": 2,
    "pretrain": 8,
    "gpt2": 7,
    "distilgpt2": 6,
    "sft": 4,
    "dpo": 3,
    "evaluate": 4,
    "ablations": 6,
    "speed": 1,
}
EXTERNAL = 16  # evaluating a published model, many times the size of what is trained here
STOP_SECONDS = 5.0  # between asking a worker to leave and killing it
# What a notebook raises where memory runs out: types (NumPy's, Arrow's and torch's for a GPU among them), and what a
# plain RuntimeError says.
NO_MEMORY = ("MemoryError", "_ArrayMemoryError", "ArrowMemoryError", "OutOfMemoryError")
NO_MEMORY_SAID = ("DefaultCPUAllocator", "std::bad_alloc", "Cannot allocate memory")
LOCK = ".lock"  # in the run's folder; held by its pipeline
NURSERY_FROM = 3  # stages still to come from which importing the heavy packages once for all pays


class StageFailed(Exception):
    """A notebook did not come through. The message is what to show; for a bug it is the traceback."""


class Interrupted(BaseException):
    """A signal that ends the run; like KeyboardInterrupt no `except Exception` may take it for an error."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class Outcome:
    """What a call of `execute` did."""

    executed: dict[str, float] = field(default_factory=dict)  # stage -> seconds
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0


def cores() -> int:
    """Cores this process may use: its affinity, cut by a container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, round(int(quota) / int(period))))
    return count


def default_jobs() -> int:
    """Two notebooks side by side on a CPU of two cores or more; one where there is a GPU, which one training fills."""
    return 1 if has_gpu() else min(2, cores())


def has_gpu() -> bool:
    """Whether a GPU's device file is there, without asking torch."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


def forking_is_safe() -> bool:
    """Whether kernels may come from a nursery: on Linux, where no GPU is in play (a CUDA context survives no fork)."""
    return sys.platform == "linux" and not has_gpu()


def execute(
    run: Run,
    *,
    selected: Iterable[str] | None = None,
    force: bool = False,
    jobs: int = 0,
    nproc: int | None = None,
    threads: int = 0,
    environment: Mapping[str, str] | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Executes the selected stages (default: all) that are not fresh, each after what it needs.

    force: execute them although they are fresh. jobs: at most so many notebooks side by side, 0 for `default_jobs()`.
    nproc: processes that train a stage together, None for one a GPU; with several, notebooks come one by one.
    threads: of each notebook, 0 for its `share`. environment: of the kernels, beside this process's.
    Raises StageFailed after stopping the others, MissingInput when a stage outside the selection is needed and not
    there, ThreefoldError when another process works on the same run.
    """
    plan = run.plan
    wanted = {name: step for name, step in plan.items() if selected is None or name in set(selected)}
    jobs = jobs or (1 if nproc and nproc > 1 else default_jobs())
    began = time.monotonic()
    outcome = Outcome()
    with lock(run.path), _Workers(run, jobs, nproc, say, environment or {}) as workers:
        check(run, wanted, say)
        waiting = dict(wanted)
        roads = _roads(plan)
        while waiting or workers.busy:
            startable = _startable(run, waiting, workers.busy, outcome, force, say)
            for step in sorted(startable, key=lambda step: -roads[step.name]):
                if fits(step, [job.step for job in workers.busy.values()], jobs):
                    del waiting[step.name]
                    if not force:
                        run.take_up(step.name, run.fingerprint(step.name).digest)
                    workers.start(step, threads or share(plan, step, jobs), more=len(waiting) >= NURSERY_FROM)
            if workers.busy:
                name, seconds = workers.wait()
                outcome.executed[name] = seconds
    outcome.seconds = time.monotonic() - began
    return outcome


def fits(step: StageSpec, busy: list[StageSpec], jobs: int) -> bool:
    """Whether a stage may start beside those at work: there is room, and none of them must be alone."""
    return len(busy) < jobs and not (busy and any(one.alone for one in (step, *busy)))


def share(plan: Plan, step: StageSpec, jobs: int) -> int:
    """Threads for a stage: all cores when nothing in the plan could ever run beside it, else cores // jobs."""
    alone = step.alone or len(ancestors(plan, step.name)) + len(dependents(plan, step.name)) + 1 == len(plan)
    return cores() if alone else max(1, cores() // jobs)


def _roads(plan: Plan) -> dict[str, int]:
    """The length of the longest road from the start of each stage to the end of the run."""
    roads: dict[str, int] = {}
    for step in reversed(plan.values()):
        after = [roads[other.name] for other in plan.values() if step.name in other.needs]
        kind, _, model = step.name.partition("-")
        external = kind == "evaluate" and names.replicate_of(model)[0] not in OWN_MODELS
        roads[step.name] = (EXTERNAL if external else WEIGHTS.get(kind, 1)) + max(after, default=0)
    return roads


def _startable(
    run: Run, waiting: dict[str, StageSpec], busy: Mapping[str, object], outcome: Outcome, force: bool, say
) -> list[StageSpec]:
    """The waiting stages whose inputs are made and that are not fresh; fresh ones are taken off the list, and said."""
    found: list[StageSpec] = []
    for step in list(waiting.values()):  # in order, so that skipping one lets the next be looked at in the same pass
        if any(need in waiting or need in busy for need in step.needs):
            continue
        now = state(run, step.name)
        if now.kind == "fresh" and not force:
            del waiting[step.name]
            outcome.skipped.append(step.name)
            if "notebook_sha256" not in now.facts:  # executed by papermill itself, or a crash came between
                run.seal(step.name)
            say(f"{step.name}: fresh, skipped (fingerprint {now.digest[:12]}, made {now.facts.get('finished')})")
        else:
            found.append(step)
    return found


def check(run: Run, selected: Iterable[str] | None = None, say: Callable[[str], None] | None = None) -> None:
    """What can be known before anything starts: the sources are to be found, and what the selection needs from outside
    it is there. Raises SourceError or MissingInput; says where such a stage is not fresh."""
    plan = run.plan
    wanted = list(plan) if selected is None else [name for name in plan if name in set(selected)]
    for name in wanted:
        run.fingerprint(name)
        for need in plan[name].needs:
            if need in wanted:
                continue
            if run.finished(need) is None:
                raise MissingInput(
                    f"{name} needs stage {need}, which run {run.name} does not have: `{_again(run, need)}` makes it"
                )
            now = state(run, need)
            if now.kind != "fresh" and say is not None:
                say(f"{name}: built on a stage {need} that is {now.kind} ({'; '.join(now.reasons)})")


def _again(run: Run, stage: str) -> str:
    preset = run.parameters.get("preset")
    return " ".join(["threefold run", *(["--preset", preset] if preset else []), "--run", run.name, "--only", stage])


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One pipeline a run's folder, which is made if it is not there. The lock goes with the process, however it ends.
    Raises ThreefoldError when another holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        if not _locked(file):
            file.seek(0)
            raise ThreefoldError(
                f"run {folder.name} is being worked on by process {file.read().strip() or '?'}; "
                "wait for it, or choose another run with --run"
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def at_work(folder: Path) -> bool:
    """Whether a pipeline works in a run's folder, or a notebook on one of its stages without a pipeline."""
    with contextlib.suppress(FileNotFoundError), open(folder / LOCK, encoding="utf-8") as file:
        if not _locked(file, shared=True):
            return True
    return run_folder.at_work(folder) != ""


def _locked(file: IO, *, shared: bool = False) -> bool:
    """Whether the file's lock could be taken; closing the file gives it back."""
    try:
        import fcntl
    except ImportError:  # Windows has no advisory locks of this kind
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# Workers ------------------------------------------------------------------------------------------------------------


class _Worker:
    """A child process that executes notebooks, one after another (see worker.py)."""

    def __init__(self, inbox: queue.SimpleQueue):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "papertrail.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C in the terminal is for the pipeline, which then stops its workers
        )
        threading.Thread(target=self._read, args=(inbox,), daemon=True).start()

    def _read(self, inbox: queue.SimpleQueue) -> None:
        for line in self.process.stdout:
            inbox.put((self, json.loads(line)))
        inbox.put((self, {"event": "gone"}))

    def send(self, job: Mapping) -> None:
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()


@dataclass
class _Job:
    step: StageSpec
    worker: _Worker
    began: float


class _Workers:
    """The worker processes of one run. Leaving the context stops them and everything they started."""

    def __init__(
        self, run: Run, jobs: int, nproc: int | None, say: Callable[[str], None], environment: Mapping[str, str]
    ):
        self.run = run
        self.jobs = jobs
        self.nproc = nproc
        self.say = say
        self.environment = environment
        self.busy: dict[str, _Job] = {}
        self._started: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._nursery: subprocess.Popen | None = None
        self._sockets = tempfile.TemporaryDirectory(prefix="threefold-")
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()

    def __enter__(self) -> "_Workers":
        self._sweep()
        return self

    def __exit__(self, *_) -> None:
        with _undisturbed():
            _stop([*(worker.process for worker in self._started), *([self._nursery] if self._nursery else [])])
        self._sockets.cleanup()
        self.busy.clear()
        self._sweep()

    def start(self, step: StageSpec, threads: int, *, more: bool) -> None:
        """Begins a stage. more: enough stages follow that their kernels had better come from a nursery."""
        self._idle = [worker for worker in self._idle if worker.process.poll() is None]
        if not self._idle:
            self._idle.append(_Worker(self._inbox))
            self._started.append(self._idle[-1])
        worker = self._idle.pop()
        environment = self._environment(threads)
        if more and self._nursery is None and forking_is_safe():
            # It imports while the first stage, whose kernel starts the usual way, does its work.
            address = ""
            with socket.socket(socket.AF_UNIX) as listener:  # open before the nursery is: who asks early waits
                listener.bind(self._address)
                listener.listen()
                self._nursery = subprocess.Popen(
                    [sys.executable, "-m", "papertrail.kernel_forkserver", str(listener.fileno())],
                    stdin=subprocess.PIPE,
                    stdout=2,  # nothing that escapes a kernel belongs between the pipeline's lines
                    pass_fds=[listener.fileno()],
                    env={**os.environ, **self._environment(max(1, cores() // self.jobs))},
                    start_new_session=True,
                )
        else:
            address = self._address if self._nursery is not None else ""
        notebook = self.run.project.notebooks / f"{step.notebook}.ipynb"
        partial = self._partial(step)
        partial.parent.mkdir(parents=True, exist_ok=True)
        parameters = {
            "preset": self._preset,
            "run": self.run.name,
            **({"overrides": self.run.parameters["overrides"]} if "overrides" in self.run.parameters else {}),
            **step.parameters,
            **({"nproc": self.nproc} if self.nproc and names.replicate_of(step.name)[0] in TRAINED else {}),
        }
        self.busy[step.name] = _Job(step, worker, time.monotonic())
        self.say(f"{step.name}: started ({threads} {'thread' if threads == 1 else 'threads'})")
        worker.send(
            {
                "input": str(notebook),
                "output": str(partial),
                "parameters": parameters,
                "cwd": str(self.run.project.root),
                "environment": environment,
                "nursery": address,
            }
        )

    def wait(self) -> tuple[str, float]:
        """(stage, seconds) of the next stage that ends well. Raises StageFailed for one that does not."""
        while True:
            worker, event = self._inbox.get()
            job = next((job for job in self.busy.values() if job.worker is worker), None)
            if job is None:
                continue  # an idle worker that was closed
            if event["event"] == "text":
                named = event["text"].startswith(job.step.name)  # many a message says whose it is
                self.say(event["text"] if named else f"{job.step.name}: {event['text']}")
                continue
            seconds = time.monotonic() - job.began
            try:
                self._settle(job, event)
            finally:
                del self.busy[job.step.name]
                if event["event"] == "gone":
                    _stop([worker.process])
                else:
                    self._idle.append(worker)
            self.say(f"{job.step.name}: done in {seconds:.1f} s")
            return job.step.name, seconds

    def _settle(self, job: _Job, event: Mapping) -> None:
        """Puts an executed notebook into place, or raises StageFailed with the failed one kept beside it."""
        step, partial = job.step, self._partial(job.step)
        final = self.run.notebook(step.executed)
        failed = self.run.notebook(f"{step.executed}.failed")
        kind = event["event"]
        try:
            notebook = notebook_files.read_notebook(partial)
        except RecordError:
            notebook = None  # the worker went before papermill wrote anything
        raised = notebook_files.errors(notebook) if notebook else []
        if notebook is not None:
            own = {
                **self.run.private(),
                self._preset: Path(self._preset).name,
                str(self.run.path.parent): "runs",
                f"{self.run.project.root}/": "",
                str(self.run.project.root): ".",
            }
            notebook = scrub(notebook, own)
        if kind == "done" and notebook is not None and not raised:
            notebook_files.write_notebook(final, notebook)
            partial.unlink()
            failed.unlink(missing_ok=True)
            self._check_made(step)
            self.run.seal(step.name)
            return
        kept = ""
        if notebook is not None:
            notebook_files.write_notebook(failed, notebook)
            partial.unlink()
            kept = f" (kept: runs/{self.run.name}/notebooks/{failed.name})"
        raise StageFailed(_explanation(step, event, raised) + kept)

    def _check_made(self, step: StageSpec) -> None:
        """A notebook that came through must have finished its stage; otherwise each run would execute it again."""
        if self.run.finished(step.name) is None:
            raise StageFailed(f"{step.name}: the notebook ran to its end without finishing its stage: a bug in it")
        now: State = state(self.run, step.name)
        if now.kind != "fresh":
            self.say(f"{step.name}: not fresh although it was just made: {'; '.join(now.reasons)}")

    def _environment(self, threads: int) -> dict[str, str]:
        """What a kernel's environment has beside or instead of this process's."""
        limits = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
        return {
            **dict.fromkeys(limits, str(threads)),
            # torch.compile would start as many processes as the machine has cores, each with torch in memory
            "TORCHINDUCTOR_COMPILE_THREADS": os.environ.get("TORCHINDUCTOR_COMPILE_THREADS", str(threads)),
            **self.run.environment(),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # debugpy's hint on frozen modules, in every notebook
            **self.environment,
        }

    @property
    def _preset(self) -> str:
        """A preset's file is named from where the person stands; a notebook is executed in the project's folder."""
        preset = self.run.parameters.get("preset", "")
        return str(Path(preset).resolve()) if preset.endswith(".toml") or "/" in preset else preset

    @property
    def _address(self) -> str:
        return f"{self._sockets.name}/nursery"

    def _partial(self, step: StageSpec) -> Path:
        # not beside the executed ones: whoever lists those must not find half of one
        return self.run.path / ".executing" / f"{step.executed}.ipynb"

    def _sweep(self) -> None:
        """Removes notebooks that an execution, now over, left half-written."""
        shutil.rmtree(self.run.path / ".executing", ignore_errors=True)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C or SIGTERM does not cut short what the first one began."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(processes: list[subprocess.Popen]) -> None:
    """Ends worker processes, their kernels and whatever those started: SIGTERM, on which a worker kills its kernel's
    process group and leaves; after a while SIGKILL, to every process group seen below them. No process is left."""
    family: dict[int, psutil.Process] = {}
    groups: set[int] = set()

    def look() -> None:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(ProcessLookupError):
                        family[child.pid] = child
                        groups.add(os.getpgid(child.pid))

    look()
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        look()  # a kernel may just have been started
        time.sleep(0.02)
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
    for group in groups - {os.getpgrp()}:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    for child in family.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(list(family.values()), timeout=STOP_SECONDS)


# Explanations -------------------------------------------------------------------------------------------------------


def _explanation(step: StageSpec, event: Mapping, raised: list[dict]) -> str:
    kind = event["event"]
    if kind == "died":
        return f"{step.name}: {_dead_kernel(step, event.get('status'))}"
    if kind == "gone":
        return f"{step.name}: the process that executed it is gone, probably killed for want of memory; {_lower(step)}"
    if kind == "broken":
        return f"{step.name}: papermill could not execute the notebook\n{event['traceback']}"
    error = {"ename": event.get("ename", "?"), "evalue": event.get("evalue", ""), "traceback": ""}
    error |= raised[0] if raised else {}
    known = getattr(errors, error["ename"], None)
    if isinstance(known, type) and issubclass(known, ThreefoldError):
        return f"{step.name}: {error['evalue']}"
    said = error["evalue"].partition("\n")[0] or error["ename"]
    if error["ename"] in NO_MEMORY or any(text in error["evalue"] for text in NO_MEMORY_SAID):
        return f"{step.name}: out of memory ({said}); {_lower(step)}"
    if any(os.strerror(number) in error["evalue"] for number in errors.DISK_FULL):
        return (
            f"{step.name}: the disk is full ({said}); `threefold status` tells what runs take, `threefold clean` frees "
            "it, and the same command goes on from the last state that was saved"
        )
    return f"{step.name}: {error['ename']}: {error['evalue']}\n{error['traceback']}"


def _dead_kernel(step: StageSpec, status: int | None) -> str:
    if status is not None and status < 0 and -status not in (signal.SIGKILL, signal.SIGTERM):
        return f"the notebook's kernel crashed with {signal.Signals(-status).name}, a fault in a native library"
    how = " (killed)" if status in (-signal.SIGKILL, -signal.SIGTERM) else ""
    return f"the notebook's kernel died{how}, most likely for want of memory; {_lower(step)}"


def _lower(step: StageSpec) -> str:
    """Which keys of the preset take less memory at this stage."""
    kind = step.name.partition("-")[0]
    keys = {
        "data": "max_examples of the largest data.* source",
        "evaluate": "evaluation.batch_tokens",
        "speed": "evaluation.speed_batch_sizes or evaluation.speed_prompt",
        "ablations": "ablations.train.batch_size (and raise ablations.train.accumulate by as much)",
        "compare": "evaluation.bootstrap",
    }.get(kind, f"{kind}.batch_size (and raise {kind}.accumulate by as much) or model.context")
    return f"lower {keys}, or run fewer notebooks side by side with --jobs 1"
