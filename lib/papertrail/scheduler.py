"""Executes a run's stages: each notebook through papermill in a kernel of its own, several at a time.

Order: of the stages that could start, the one with the longest critical path starts first, so that pretraining, SFT and
DPO do not wait for evaluations.

Cores: with `jobs` notebooks at a time each gets cores // jobs threads, whether or not another one is running at that
moment; a stage beside which nothing can ever run (the data at the start, the comparison at the end) gets all cores. The
number of threads decides how floating-point sums are split, so it must follow from the plan and not from the clock:
the same preset on the same machine gives the same bits.

Processes: the fork server (see kernel_forkserver.py) starts the kernels and ends them when this process ends. papermill
runs in a thread per notebook of this process, because importing it in a process per stage would take a second of each.
"""

import contextlib
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path

from basics import errors, files
from basics.errors import MissingInput, RecordError, ThreefoldError
from basics.machine import cores, free_cores, has_gpu
from basics.processes import handling
from basics.source_code import module_files
from papertrail import notebook_files
from papertrail import stage as stage_folder
from papertrail.estimate import duration_text, earlier_seconds, seconds_left
from papertrail.kernel_forkserver import ForkServer, KernelDied
from papertrail.plan import StageSpec, critical_path, threads_for
from papertrail.run import Run
from papertrail.scrub import scrub
from papertrail.staleness import state

SAVE_SECONDS = 60.0  # for the trainings of an interrupted run to end their step and save their state
JOIN_SECONDS = 10.0  # for a notebook's thread to notice that its kernel was killed
# What a notebook raises where memory runs out: types (of Python, NumPy, Arrow, and torch on a GPU), and what a plain
# RuntimeError says.
NO_MEMORY = ("MemoryError", "_ArrayMemoryError", "ArrowMemoryError", "OutOfMemoryError")
NO_MEMORY_MESSAGES = ("DefaultCPUAllocator", "std::bad_alloc", "Cannot allocate memory")
LOCK = ".lock"  # in the run's folder; held by the process that executes it
PRELOAD_FROM = 3  # further stages from which importing the heavy packages once for all pays


class StageFailed(Exception):
    """A notebook failed. The message is what to show; for a bug it includes the traceback."""


class Interrupted(KeyboardInterrupt):
    """Another signal that ends the run as Ctrl-C does."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class Outcome:
    """What a call of `execute` did."""

    executed: dict[str, float] = field(default_factory=dict)  # stage -> seconds
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0


def forking_is_safe() -> bool:
    """Whether kernels may be forked from a process with torch: on Linux without a GPU (CUDA survives no fork)."""
    return sys.platform == "linux" and not has_gpu()


def execute(
    run: Run,
    *,
    selected: Iterable[str] | None = None,
    force: bool = False,
    jobs: int = 0,
    nproc: int | None = None,
    threads: int = 0,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Execute the selected stages (default: all) that are not fresh, each after what it needs.

    force: execute fresh ones too. jobs: at most so many notebooks at a time, 0 for the default.
    nproc: processes that train a stage together, None for one per GPU; with several, one notebook at a time.
    threads: of each notebook, 0 for `threads_for`.
    Raises StageFailed after stopping the others, MissingInput when a stage outside the selection is needed and not
    there, ThreefoldError when another process works on the same run.
    """
    plan, began, outcome = run.plan, time.monotonic(), Outcome()
    wanted = [name for name in plan if selected is None or name in set(selected)]
    # One notebook at a time where one training fills the machine: on a GPU, or with several processes.
    jobs = jobs or (1 if has_gpu() or (nproc or 1) > 1 else min(2, cores()))
    lengths = critical_path(plan)
    order = TopologicalSorter({name: [need for need in plan[name].needs if need in wanted] for name in wanted})
    order.prepare()
    ready: list[StageSpec] = []
    with lock(run.path), _Notebooks(run, jobs, nproc, say) as notebooks:
        check(run, wanted, say)
        earlier = earlier_seconds(run)
        while order.is_active():
            while names := order.get_ready():  # skipping a fresh stage makes others ready
                for name in names:
                    now = None if force else state(run, name)
                    if now and now.kind == "fresh":
                        if "notebook_sha256" not in now.facts:  # executed by papermill itself, or a crash came between
                            run.seal(name)
                        made = now.facts.get("finished")
                        say(f"{name}: fresh, skipped (fingerprint {now.digest[:12]}, made {made})")
                        outcome.skipped.append(name)
                        order.done(name)
                    else:
                        ready.append(plan[name])
            for spec in sorted(ready, key=lambda spec: -lengths[spec.name]):
                if can_start(spec, [plan[name] for name in notebooks.began], jobs):
                    ready.remove(spec)
                    if not force:
                        run.take_up(spec.name, run.fingerprint(spec.name).digest)
                    ended = {spec.name, *outcome.skipped, *outcome.executed, *notebooks.began}
                    later = [name for name in wanted if name not in ended]
                    left = seconds_left(plan, [*notebooks.began, spec.name, *later], earlier | outcome.executed, jobs)
                    place = f"stage {len(ended)} of {len(wanted)}"
                    place += f", about {duration_text(left)} left" if left else ""
                    # what measures times must not wait for cores that other programs use
                    chosen = free_cores() if spec.alone else threads_for(plan, spec, jobs)
                    notebooks.start(spec, threads or chosen, later, place)
            if notebooks.began:
                name, seconds = notebooks.wait()
                outcome.executed[name] = seconds
                order.done(name)
    outcome.seconds = time.monotonic() - began
    return outcome


def can_start(spec: StageSpec, running: list[StageSpec], jobs: int) -> bool:
    """Whether a stage may start beside those that are running: there is room, and none of them must be alone."""
    return len(running) < jobs and not (running and any(other.alone for other in (spec, *running)))


def check(run: Run, selected: Iterable[str] | None = None, say: Callable[[str], None] = lambda line: None) -> None:
    """Check before anything starts that the data sources exist and that what the selection needs from outside it is
    there. Raises SourceError or MissingInput; says where such a stage is not fresh."""
    wanted = [name for name in run.plan if selected is None or name in set(selected)]
    preset = f"--preset {run.parameters['preset']} " if "preset" in run.parameters else ""
    for name in wanted:
        run.fingerprint(name)
        outside = sorted(set(run.plan[name].needs).difference(wanted))
        there = [need for need in outside if run.finished(need) is not None]
        absent = [need for need in outside if need not in there]
        if absent and not (there and name == run.project.summary):  # the summary is of what there is
            command = f"threefold run {preset}--run {run.name} --only {absent[0]}"
            raise MissingInput(
                f"{name} needs stage {absent[0]}, which run {run.name} does not have: `{command}` makes it"
            )
        if absent:
            say(f"{name}: without {', '.join(absent)}, which run {run.name} does not have")
        for need in there:
            now = state(run, need)
            if now.kind != "fresh":
                say(f"{name}: built on a stage {need} that is {now.kind} ({'; '.join(now.reasons)})")


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Let only one process execute stages in a run's folder, which is made if it does not exist. The lock ends with the
    process, however it ends. Raises ThreefoldError when another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK
    file.touch()
    held = files.try_lock(file)
    if held is None:
        raise ThreefoldError(
            f"run {folder.name} is being worked on by process {file.read_text(encoding='utf-8').strip() or '?'}; "
            "wait for it, or choose another run with --run"
        )
    try:
        file.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        os.close(held)


def at_work(folder: Path) -> bool:
    """Whether `threefold run` works in a run's folder, or a notebook by itself on one of its stages."""
    return files.is_locked(folder / LOCK) or stage_folder.at_work(folder) != ""


def stage_at_work(run: Run, stage: str) -> bool:
    """Whether a notebook works on a stage now: `threefold run` executes it, or it holds the stage's work folder."""
    executing = run.path / ".executing" / f"{run.plan[stage].executed}.ipynb"
    return files.is_locked(run.partial_folder(stage)) or (executing.exists() and files.is_locked(run.path / LOCK))


# Notebooks ----------------------------------------------------------------------------------------------------------


class _Notebooks:
    """The notebooks of one run that are being executed. Leaving the context ends them and everything they started."""

    def __init__(self, run: Run, jobs: int, nproc: int | None, say: Callable[[str], None]):
        self.run, self.jobs, self.nproc, self.say = run, jobs, nproc, say
        self.began: dict[str, float] = {}  # running stage -> its start
        self._executing = run.path / ".executing"  # apart from the executed ones, none of which is ever incomplete
        self._server: ForkServer | None = None
        self._threads: list[threading.Thread] = []
        # (stage, a line that it printed) or (stage, how it ended: None or an error)
        self._events: queue.SimpleQueue[tuple[str, str | Exception | None]] = queue.SimpleQueue()
        preset = run.parameters.get("preset", "")  # a path is relative to the user's folder, not to the project's
        self._preset = str(Path(preset).resolve()) if preset.endswith(".toml") or "/" in preset else preset

    def __enter__(self) -> "_Notebooks":
        shutil.rmtree(self._executing, ignore_errors=True)  # left by a killed process
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self._server is not None and isinstance(error, KeyboardInterrupt):
            if any(self.run.plan[name].parallel for name in self.began):
                self.say("stopping after the step that each training is in; a second Ctrl-C stops at once")
            with contextlib.suppress(KeyboardInterrupt):
                self._server.terminate_kernels()
                deadline = time.monotonic() + SAVE_SECONDS
                for thread in self._threads:
                    thread.join(max(0.0, deadline - time.monotonic()))
        with handling(signal.SIG_IGN, "SIGINT", "SIGTERM"):  # a second one does not interrupt the cleaning up
            if self._server is not None:
                self._server.stop()
            for thread in self._threads:
                thread.join(JOIN_SECONDS)
            shutil.rmtree(self._executing, ignore_errors=True)

    def start(self, spec: StageSpec, threads: int, later: list[str], place: str) -> None:
        """Begin a stage. later: the stages that are still to come after it. place: where in the run it is, as text."""
        if self._server is None:
            sources = self._sources([spec.name, *later]) if len(later) >= PRELOAD_FROM and forking_is_safe() else ()
            self._server = ForkServer(self._variables(max(1, cores() // self.jobs)), sources)
        from papertrail import notebook_client  # late: it takes a second, which a run without work need not spend

        parameters = {"preset": self._preset, "run": self.run.name, **spec.parameters}
        if "overrides" in self.run.parameters:
            parameters["overrides"] = self.run.parameters["overrides"]
        if self.nproc and spec.parallel:
            parameters["nproc"] = self.nproc
        self._executing.mkdir(parents=True, exist_ok=True)
        self.began[spec.name] = time.monotonic()
        self.say(f"{spec.name}: started, {place} ({threads} {'thread' if threads == 1 else 'threads'})")

        def work() -> None:
            ended = None
            try:
                notebook_client.execute(
                    self.run.project.notebooks / f"{spec.notebook}.ipynb",
                    self._executing / f"{spec.executed}.ipynb",
                    parameters,
                    server=self._server,
                    env=self._variables(threads),
                    folder=self.run.project.root,
                    say=lambda line: self._events.put((spec.name, line)),
                )
            except Exception as error:  # whatever it is, the main thread reports it
                ended = error
            self._events.put((spec.name, ended))

        self._threads.append(threading.Thread(target=work, daemon=True))
        self._threads[-1].start()

    def wait(self) -> tuple[str, float]:
        """(stage, seconds) of the next stage that succeeds. Raises StageFailed for one that does not."""
        while True:
            name, event = self._events.get()
            if isinstance(event, str):  # many messages begin with their stage
                self.say(event if event.startswith(name) else f"{name}: {event}")
                continue
            seconds = time.monotonic() - self.began.pop(name)
            self._settle(self.run.plan[name], event)
            self.say(f"{name}: done in {seconds:.1f} s")
            return name, seconds

    def _settle(self, spec: StageSpec, error: Exception | None) -> None:
        """Put an executed notebook into its place, or raise StageFailed with the failed one kept beside it."""
        partial = self._executing / f"{spec.executed}.ipynb"
        final, failed = self.run.notebook(spec.executed), self.run.notebook(f"{spec.executed}.failed")
        try:
            notebook = notebook_files.read_notebook(partial)
        except RecordError:  # papermill has not written anything
            raise StageFailed(explanation(spec, error, [])) from error
        raised = notebook_files.errors(notebook)
        private = {
            **self.run.private(),
            self._preset: Path(self._preset).name,
            str(self.run.path.parent): "runs",
            f"{self.run.project.root}/": "",
            str(self.run.project.root): ".",
        }
        notebook_files.write_notebook(failed if error or raised else final, scrub(notebook, private))
        if error or raised:
            kept = f" (kept: runs/{self.run.name}/notebooks/{failed.name})"
            raise StageFailed(explanation(spec, error, raised) + kept) from error
        failed.unlink(missing_ok=True)
        if self.run.finished(spec.name) is None:  # each run would execute it again
            raise StageFailed(f"{spec.name}: the notebook ended without finishing its stage: a bug in it")
        now = state(self.run, spec.name)
        if now.kind != "fresh":
            self.say(f"{spec.name}: not fresh although it was just made: {'; '.join(now.reasons)}")
        self.run.seal(spec.name)

    def _sources(self, stages: list[str]) -> list[str]:
        """The files of the project's packages that these stages' notebooks import."""
        known = module_files(self.run.project.packages)
        modules = {module for stage in stages for module in self.run.fingerprint(stage).code}
        return [known[module][0] for module in sorted(modules & known.keys())]

    def _variables(self, threads: int) -> dict[str, str]:
        """The environment of a kernel."""
        limits = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
        return {
            # torch.compile would start as many processes as the machine has cores, each with torch in memory
            "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
            **os.environ,
            **dict.fromkeys(limits, str(threads)),
            **self.run.environment(),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # debugpy's hint on frozen modules, in every notebook
        }


# Explanations -------------------------------------------------------------------------------------------------------


def explanation(spec: StageSpec, error: Exception | None, raised: list[dict]) -> str:
    """Why a stage failed, and the way out. raised: the notebook's error outputs."""
    lower = f"lower {spec.memory_keys}, or run fewer notebooks at a time with --jobs 1"
    if isinstance(error, KernelDied):
        killed = error.status in (-signal.SIGKILL, -signal.SIGTERM)
        if error.status < 0 and not killed:
            crash = signal.Signals(-error.status).name
            return f"{spec.name}: the notebook's kernel crashed with {crash}, a fault in a native library"
        how = " (killed)" if killed else ""
        return f"{spec.name}: the notebook's kernel died{how}, most likely because memory ran out; {lower}"
    if not raised:
        trace = "".join(traceback.format_exception(error)) if error else "no notebook was written"
        return f"{spec.name}: papermill could not execute the notebook\n{trace}"
    kind, text = raised[0]["ename"], raised[0]["evalue"]
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, ThreefoldError):
        return f"{spec.name}: {text}"
    first = text.partition("\n")[0] or kind
    if kind in NO_MEMORY or any(message in text for message in NO_MEMORY_MESSAGES):
        return f"{spec.name}: out of memory ({first}); {lower}"
    if any(os.strerror(number) in text for number in errors.DISK_FULL):
        return (
            f"{spec.name}: the disk is full ({first}); `threefold status` shows what runs take, `threefold clean` "
            "frees it, and the same command resumes from the last state that was saved"
        )
    return f"{spec.name}: {kind}: {text}\n{raised[0]['traceback']}"
