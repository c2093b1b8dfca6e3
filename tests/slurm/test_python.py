"""Jobs that a notebook submits, on a real Slurm; stand-ins for ranks."""

import json
import sys

from lab import site

# in place of Python: says what its task was given, and is done; that the run folder is its own is asked in earnest
STUB = f"""\
#!/usr/bin/env bash
case "$*" in *" own "*) exec {sys.executable} "$@" ;; *" suspects "*) exit 0 ;; esac
words="$*"
while [ "$1" != --run ]; do shift; done
printf '{{\\n "status": "done",\\n "words": "%s"\\n}}\\n' "${{words#* train }}" >"$2/status.json"
"""
NOTEBOOK = """\
import json
from hpc_lbsgd.cluster import submit, submit_array
jobs = submit_array("goyal-resnet50", "seed=5,8", site="site.yaml", run="all")
one = submit("goyal-resnet50", ["seed=3"], site="site.yaml", nodes="2-3", run="one")
late = submit("goyal-resnet50", site="site.yaml", nodes=32, run="two")
before = late.state
late.cancel()
results = [job.result(90, 0.5) for job in (*jobs, one)]
print(json.dumps([results, before, late.wait(60, 0.5), str(one.log)]))
"""


def test_a_notebook_submits_an_array_and_a_job_waits_and_cancels(lab, tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "stub").write_text(STUB)
    (folder / "stub").chmod(0o755)
    site(folder, python=str(folder / "stub"), ranks_per_node=1)
    said = lab.call(sys.executable, "-c", NOTEBOOK, cwd=folder, timeout=200)
    results, before, cancelled, log = json.loads(said.stdout)
    words = [found["status"]["words"] for found in results]
    for seed, found in zip((5, 8), words, strict=False):
        assert found == f"goyal-resnet50 --set seed={seed} --run all/seed={seed} --resume-if-exists"
    assert words[2] == "goyal-resnet50 --set seed=3 --run one --resume-if-exists"
    assert before in ("PENDING", "RUNNING", "CONFIGURING") and cancelled == "CANCELLED"
    assert "start 1 on node" in (folder / log).read_text()
