"""The example of docs/your-model.md, taken from the page and run as it says."""

import json
import re
from pathlib import Path

from conftest import command

PAGE = (Path(__file__).parents[2] / "docs/your-model.md").read_text()


def test_the_example_of_the_page_trains_and_does_not_depend_on_ranks(tmp_path):
    for name, language in (("spirals.py", "python"), ("spirals.yaml", "yaml")):
        (tmp_path / name).write_text(re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL).group(1))
    ends = []
    in_processes = ["--set", "machine.loader_processes=2"]
    for words, more in ((["launch", "--np", "2", "--oversubscribe", "--", "train"], in_processes), (["train"], [])):
        job = command(*words, "spirals.yaml", *more, "--run", f"run-{len(ends)}", "--json", cwd=tmp_path, timeout=200)
        assert job.returncode == 0, job.stderr
        ends.append(json.loads(job.stdout))
    assert ends[0]["accuracy"] > 0.98
    assert ends[0]["weights_sha256"] == ends[1]["weights_sha256"]


def test_a_function_that_is_not_there_is_named(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "{data: {dataset: 'nowhere:data'}, model: {name: 'nowhere:model'}, batch: {workers: 1}}"
    )
    job = command("train", "r.yaml", cwd=tmp_path)
    assert job.returncode == 2 and "nowhere" in job.stderr and not (tmp_path / "runs").exists()
