"""The folder of a run and its stages.

runs/<run>/config.toml              the resolved configuration
runs/<run>/<stage>/                 what a finished stage made, with its run.json (the place is `StageSpec.folder`)
runs/<run>/.<stage>.partial/        the work folder of a stage in progress, kept for resuming
runs/<run>/notebooks/               executed notebooks
"""

import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from basics import files
from basics.errors import CheckpointError, ConfigError, MissingInput, RecordError
from basics.names import did_you_mean
from papertrail import provenance, records
from papertrail.notebook_files import executed_notebooks
from papertrail.plan import Plan, Project, StageSpec
from papertrail.provenance import Fingerprint

RUN_FILE = "run.json"
CONFIG = "config.toml"
CONFIG_HASH = "# SHA-256 of the lines above: "
EXECUTION = ("stage", "started", "finished", "wall_seconds", "outputs")  # what tells one execution from another


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder and the plan of its stages. A study's subclass says what its stages are made from."""

    name: str
    path: Path
    plan: Plan
    project: Project
    parameters: Mapping[str, str] = field(default_factory=dict)  # of a notebook, to open this run again

    # What a stage is made from, for its fingerprint

    def config_of(self, stage: str) -> dict[str, Any]:
        """The parts of the configuration that a stage reads, as JSON values."""
        return {}

    def data_of(self, stage: str, reread: dict[str, str] | None = None) -> dict[str, str]:
        """{source: fingerprint of its content} of what a stage reads from outside the run.

        reread: if given, every byte is read, whatever hashes are cached; a dict shared between calls, in which an
        implementation can keep the hashes that it computed. Raises SourceError.
        """
        return {}

    def seed(self, stage: str) -> int:
        """The seed of a stage."""
        return 0

    def taken_from(self, parent: str, stage: str) -> str:
        """Hash of what a stage takes from a parent, "missing" where that is not finished."""
        facts = self.finished(parent)
        return "missing" if facts is None else files.sha256_json(facts["outputs"])

    def fingerprint(self, stage: str) -> Fingerprint:
        """What the stage's result would depend on if it ran now.

        Raises ConfigError (no such stage), MissingInput (no such notebook), SourceError (data that cannot be found).
        """
        spec, project = self.spec(stage), self.project
        path = project.notebooks / f"{spec.notebook}.ipynb"
        return Fingerprint(
            stage,
            config=json.loads(json.dumps(self.config_of(stage))),  # tuples as lists, as they come back from run.json
            code=files.remembered(provenance.code_behind, path, project.packages),
            data=self.data_of(stage),
            parents={parent: self.taken_from(parent, stage) for parent in spec.needs},
            versions=provenance.versions(project.distributions),
            seed=self.seed(stage),
        )

    # What the scheduler asks

    def environment(self) -> dict[str, str]:
        """Environment variables of this run's kernels, for what must not be a parameter: notebooks show those."""
        return {}

    def private(self) -> dict[str, str]:
        """{text of this machine, such as a path: what replaces it in executed notebooks}."""
        return {}

    # Places

    def spec(self, stage: str) -> StageSpec:
        """The stage of that name. Raises ConfigError for one that the plan does not have."""
        if stage not in self.plan:
            raise ConfigError(
                f"unknown stage {stage!r}{did_you_mean(stage, self.plan)}; run {self.name} has: {', '.join(self.plan)}"
            )
        return self.plan[stage]

    def stage_folder(self, stage: str) -> Path:
        """The folder of a finished stage."""
        return self.path / self.spec(stage).folder

    def partial_folder(self, stage: str) -> Path:
        """The folder in which a stage works until it is finished."""
        return self.path / f".{self.spec(stage).name}.partial"

    def notebook(self, executed: str) -> Path:
        """Path of an executed notebook, by its stem (`StageSpec.executed`)."""
        return self.path / "notebooks" / f"{executed}.ipynb"

    def command(self, stage: str) -> str:
        """The papermill command that makes this stage of this run, from the project's folder."""
        spec = self.spec(stage)
        out = self.notebook(spec.executed)
        if out.is_relative_to(self.project.root):  # not so where the runs folder lies elsewhere
            out = out.relative_to(self.project.root)
        given = [
            f"-p {name} {shlex.quote(str(value))}" for name, value in {**self.parameters, **spec.parameters}.items()
        ]
        return " ".join(["papermill", f"notebooks/{spec.notebook}.ipynb", shlex.quote(str(out)), *given])

    # Finished stages

    def finished(self, stage: str) -> dict[str, Any] | None:
        """The run.json of a finished stage, None when it has not been made. Raises RecordError if it is damaged."""
        return files.remembered(read_run_file, self.stage_folder(stage))

    def require(self, stage: str) -> dict[str, Any]:
        """The run.json of a finished stage. Raises MissingInput, with the command that makes it."""
        if (facts := self.finished(stage)) is None:
            state = " was begun but is not finished" if self.partial_folder(stage).exists() else " is not there yet"
            raise MissingInput(f"stage {stage} of run {self.name}{state}: run `{self.command(stage)}`")
        return facts

    def intact(self, stage: str, *, gone: bool = False) -> Path:
        """Folder of a finished stage, after every byte in it was read and compared with what the stage wrote.

        gone: files may be missing. Raises MissingInput; CheckpointError that names the first file that differs.
        """
        facts, folder = self.require(stage), self.stage_folder(stage)
        for path, problem in damage(folder, facts):
            if problem != STRAY and not (gone and problem == GONE):
                raise CheckpointError(
                    f"{self.spec(stage).folder}/{path} of run {self.name} is not what the stage wrote ({problem}): "
                    f"`threefold verify --run {self.name}` lists everything, "
                    f"`threefold run --run {self.name} --only {stage} --force` makes it again"
                )
        return folder

    def seal(self, stage: str) -> None:
        """Add the executed notebook's hash, which its own record cannot hold, to the stage's run.json."""
        notebook = self.notebook(self.spec(stage).executed)
        facts = {**self.require(stage), "notebook_sha256": files.sha256_file(notebook)}
        write_run_file(self.stage_folder(stage), facts)

    def take_up(self, stage: str, digest: str) -> None:
        """Turn a stage that is finished, but whose executed notebook was never put into place, back into an interrupted
        one if it was made with that fingerprint, so that the next attempt finds its work done. Otherwise a crash
        between the two, or a disk too full for the notebook, would cost the whole training."""
        facts, partial, folder = self.finished(stage), self.partial_folder(stage), self.stage_folder(stage)
        if facts is None or "notebook_sha256" in facts or partial.exists():
            return
        if facts["fingerprint"].get("digest") == digest and not any(damage(folder, facts)):
            used = facts.get("determinism", {})
            write_run_file(folder, {**facts, "threads": used.get("threads", []), "workers": used.get("workers", [1])})
            os.rename(folder, partial)

    def notebook_problem(self, stage: str, digest: Callable[[Path], str] = files.sha256_file) -> str:
        """What is wrong with the executed notebook of a finished stage, "" if nothing: it exists and is the one that
        was sealed; where papermill itself executed it, and nothing is sealed yet, its record of the stage comes from
        the execution that wrote run.json. Raises RecordError for one that cannot be read.

        digest: hashes a file. Of the record only some keys are compared: paths in the configuration (own data, an own
        model) are shortened there.
        """
        facts, spec = self.require(stage), self.spec(stage)
        notebook, sealed = self.notebook(spec.executed), facts.get("notebook_sha256")
        if not notebook.is_file():
            return "is not there"
        if sealed:
            return "" if digest(notebook) == sealed else "was changed since it was executed"
        published = records.read(notebook).get(f"stage/{stage}")
        if published is None:
            return f"holds no record stage/{stage}"
        made = [
            (part.get("fingerprint", {}).get("digest"), *map(part.get, EXECUTION)) for part in (published.values, facts)
        ]
        return "" if made[0] == made[1] else f"is of another execution than {spec.folder}/run.json"

    def check_notebook(self, stage: str) -> None:
        """Raise RecordError if there is an executed notebook of the stage, but not the one that the finished stage
        published: its records are not to be trusted."""
        spec = self.spec(stage)
        file = self.notebook(spec.executed)
        if not file.exists():
            return
        unfinished = f"has no {spec.folder}/{RUN_FILE} that vouches for it"
        problem = self.notebook_problem(stage) if self.finished(stage) is not None else unfinished
        if problem:
            raise RecordError(
                f"notebooks/{file.name} of run {self.name} {problem}: "
                f"`threefold run --run {self.name} --only {stage} --force` makes it again"
            )

    def config_problem(self, *, hashed: bool = True) -> str:
        """What is wrong with config.toml, "" if nothing: its last line holds the hash of the others.

        hashed: False where a file without that line is none that `threefold run` wrote, and so may be anything.
        """
        content, line, digest = (self.path / CONFIG).read_bytes().rpartition(CONFIG_HASH.encode())
        same = digest.decode(errors="replace") == f"{files.sha256_bytes(content)}\n"
        return "is not as `threefold run` wrote it" if not same and (line or hashed) else ""

    def stray_notebooks(self) -> list[str]:
        """Names of executed notebooks that no stage of the plan has written; those that failed are not counted."""
        known = {f"{spec.executed}.ipynb" for spec in self.plan.values()}
        names = [path.name for path in executed_notebooks(self.path / "notebooks")]
        return [name for name in names if name not in known]

    def check_records(self) -> None:
        """`check_notebook` of every stage; RecordError also for a changed config.toml, which says what the stages are,
        and for a notebook that no stage has written."""
        if problem := self.config_problem():
            raise RecordError(f"{CONFIG} of run {self.name} {problem}: restore it, or run its preset again")
        for stage in self.plan:
            self.check_notebook(stage)
        for name in self.stray_notebooks():
            raise RecordError(f"notebooks/{name} of run {self.name} is of no stage of its preset: remove it")


GONE, CHANGED, STRAY = "missing", "changed since the stage wrote it", "not written by the stage"


def damage(folder: Path, facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(path in the folder, problem) of everything in a finished stage's folder that differs from its run.json; every
    byte is read."""
    have, wrote = written_files(folder), facts["outputs"]
    for path in {**wrote, **have}:
        if have.get(path) != wrote.get(path):
            yield path, GONE if path not in have else CHANGED if path in wrote else STRAY


def with_hash(config: str) -> str:
    """The text of a config.toml with a last line that holds its hash."""
    return f"{config}{CONFIG_HASH}{files.sha256_bytes(config.encode())}\n"


def written_files(folder: Path) -> dict[str, str]:
    """{path: SHA-256} of everything in a stage's folder except its run.json."""
    return {path: digest for path, digest in files.sha256_tree(folder).items() if path != RUN_FILE}


def intact_run_file(folder: Path) -> dict[str, Any] | None:
    """The run.json in a folder, None when there is none or it is not what was written."""
    facts = files.read_note(folder / RUN_FILE)
    kinds = {"stage": str, "fingerprint": dict, "outputs": dict}
    return facts if facts and all(isinstance(facts.get(name), kind) for name, kind in kinds.items()) else None


def read_run_file(folder: Path) -> dict[str, Any] | None:
    """The run.json in a folder, None when there is none. Raises RecordError if it is not what was written."""
    facts, file = intact_run_file(folder), folder / RUN_FILE
    if facts is None and os.path.lexists(file):
        shown = "/".join(file.parts[-3:])
        raise RecordError(f"{shown} is not as it was written; remove the folder and run the stage again")
    return facts


def write_run_file(folder: Path, facts: Mapping[str, Any]) -> None:
    files.write_note(folder / RUN_FILE, facts, indent=2)
