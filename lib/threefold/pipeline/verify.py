"""`threefold verify`: every byte against what run.json says was written, and every notebook against run.json."""

from threefold import provenance, records, stages
from threefold.errors import RecordError
from threefold.pipeline.staleness import same_execution
from threefold.provenance import Fingerprint
from threefold.run import RUN_FILE, Run


def verify(run: Run) -> tuple[int, list[str]]:
    """(files read, one line for each thing that does not hold). Only finished stages are looked at.

    Checked: the fingerprint's digest against its components, each output's hash, that there is no output beyond those,
    that a stage was made from the weights its parents now have, and the executed notebook's record against run.json.
    """
    problems: list[str] = []
    files = 0
    weights: dict[str, str] = {}
    for step in stages.steps(run.preset).values():
        folder = run.stage_folder(step.name)
        where = folder.relative_to(run.path).as_posix()
        try:
            facts = run.finished(step.name)
            if facts is None:
                continue
            fingerprint = Fingerprint.from_dict(facts["fingerprint"])
        except RecordError as error:
            problems.append(f"{where}: {error}")
            continue
        have = {path: digest for path, digest in provenance.sha256_tree(folder).items() if path != RUN_FILE}
        files += len(have) + 1
        for path, digest in facts["outputs"].items():
            if path not in have:
                problems.append(f"{where}/{path}: missing")
            elif have[path] != digest:
                problems.append(f"{where}/{path}: changed since the stage wrote it")
        problems += [f"{where}/{path}: not written by the stage" for path in have if path not in facts["outputs"]]
        weights[step.name] = facts["outputs"].get("model.safetensors", "")
        for parent, digest in fingerprint.parents.items():
            if weights.get(parent) and step.name != "compare" and digest != weights[parent]:
                problems.append(f"{where}: made from other weights than {parent} now has")
        problems += _notebook(run, step.executed, step.name, facts)
        files += 1
    return files, problems


def _notebook(run: Run, executed: str, stage: str, facts: dict) -> list[str]:
    name = f"notebooks/{executed}.ipynb"
    try:
        found = records.read(run.notebook(executed))
    except RecordError as error:
        return [f"{name}: {error}"]
    record = found.get(f"stage/{stage}")
    if record is None:
        return [f"{name}: no record stage/{stage}"]
    if not same_execution(record.values, facts):
        return [f"{name}: its record stage/{stage} is not what run.json says"]
    return []
