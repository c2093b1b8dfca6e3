"""Batch systems beside Slurm as text: the scripts they get, what they are asked and answer, what they refuse."""

import re
import subprocess

import pytest
from conftest import command
from test_templates import HOSTILE, golden

from hpc_lbsgd import yaml12
from hpc_lbsgd.cluster import sites, submission
from hpc_lbsgd.cluster.jobs import Request
from hpc_lbsgd.cluster.script import Job, render
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.schedulers import known
from hpc_lbsgd.schedulers.known import SCHEDULERS

BESIDE_SLURM = [name for name in SCHEDULERS if name != "slurm"]


def site(system, text=""):
    return sites.Site.model_validate(
        yaml12.mapping(f"scheduler: {system}\ncores_per_rank: 4\npartition: gpu\naccount: proj1\n{text}", "site")
    )


@pytest.mark.parametrize("system", BESIDE_SLURM)
def test_golden(system):
    here = site(system, "modules: [gcc/12]\ntime_limit: 1-02:03:04")
    log = here.batch.output("my run")
    job = Job("train", "resnet", 4, ["r.yaml", "--run", "my run"], log, run="my run")
    golden(f"train.{here.batch.suffix}", render(job, here, "/opt/my env/python"))
    job = Job("scaling", "resnet.report", 1, ["--report", "s"], log, one_task=True)
    golden(f"scaling-report.{here.batch.suffix}", render(job, here, "/opt/env/python"))


@pytest.mark.parametrize("system", SCHEDULERS)
def test_words_that_hold_anything_are_no_directives(system, tmp_path):
    """LSF reads directives up to the last line."""
    text = f"{HOSTILE}\n{SCHEDULERS[system].sentinel} -X"
    here = site(system)
    job = Job("train", "x", 1, [text, "--run", text], here.batch.output(text), run=text)
    script = render(job, here, "python")
    assert not re.search(rf"^{re.escape(SCHEDULERS[system].sentinel)} -X", script, re.M)
    (tmp_path / "job").write_text(script.split("# ---- end of the site's part")[0] + "printf '%s\\0' \"$@\"")
    words = [text, "--run", text] if here.batch.takes_words else []
    said = subprocess.run(["bash", "job", *words], cwd=tmp_path, capture_output=True, text=True)
    assert said.stdout.split("\0")[:-1] == [text, "--run", text], said.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["job"]


@pytest.mark.parametrize(
    "system, asked, said",
    [
        ("pbs", {"nodes": "4-32"}, "--nodes 4-32: not with scheduler = pbs: it starts a job with a fixed number"),
        ("lsf", {"spare": 1}, "--spare 1: not with scheduler = lsf: it starts"),
        ("flux", {"nodes": "2-4", "grow_every_hours": 2.0}, "--nodes 2-4: not with scheduler = flux"),
        ("pbs", {"chain": True}, "--chain: not with scheduler = pbs: a job that is queued again has another number"),
        ("flux", {"chain": True}, "--chain: not with scheduler = flux"),
        ("flux", {"deadline": "2030-01-01"}, "--deadline 2030-01-01: not with scheduler = flux: it knows no time"),
        ("lsf", {"time_min": "1:00:00"}, "--time-min 1:00:00: not with scheduler = lsf: it shortens no limit"),
        (
            "pbs",
            {"time": "5"},
            "the time limit, 5, leaves no time: the job is asked to stop warn_s = 300 s before",
        ),
        ("slurm", {"time": "10", "time_min": "4:59"}, "--time-min, 4:59, leaves no time"),
    ],
)
def test_what_a_system_cannot_do_is_refused_before_anything_is_submitted(system, asked, said, tmp_path):
    (tmp_path / "site.yaml").write_text(f"scheduler: {system}")
    with pytest.raises(RequestError, match=re.escape(said)):
        submission.prepare("goyal-resnet50", [], str(tmp_path / "site.yaml"), Request(**asked))


@pytest.mark.parametrize(
    "text, said",
    [
        ("scheduler: sge", "scheduler = 'sge'"),
        ("{scheduler: pbs, launcher: srun}", "launcher = srun with scheduler = pbs; allowed: mpirun"),
        ("{scheduler: lsf, qos: high}", "qos = high: not with scheduler = lsf: it has none"),
        ("{scheduler: pbs, gpus_per_node: 'a100:4'}", "gpus_per_node = a100:4: not with scheduler = pbs"),
        ("{scheduler: pbs, preflight_nodes: true}", "preflight_nodes = true: not with scheduler = pbs: a job that is"),
        ("{scheduler: pbs, options: ['-l a=b\\n#PBS -W x']}", "options"),
        ("{container: {runtime: pyxis, image: x}, scheduler: flux}", "container = x: not with scheduler = flux"),
        ("{preflight_nodes: true, container: {runtime: pyxis, image: x}}", "preflight_nodes with container"),
    ],
)
def test_sites_that_do_not_fit_their_system_are_refused(text, said, tmp_path):
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(RequestError, match=re.escape(said)):
        sites.read(str(tmp_path / "site.yaml"))


def test_the_command_asks_no_system_whether_it_would_take_a_job_that_cannot_say(tmp_path):
    (tmp_path / "site.yaml").write_text("{scheduler: pbs, options: ['-l place=excl', '-m abe']}")
    words = ["submit", "goyal-resnet50", "--run", "run", "--site", "site.yaml"]
    refused = command(*words, "--test-only", cwd=tmp_path)
    assert refused.returncode == 2 and "--test-only: not with scheduler = pbs" in refused.stderr, refused.stderr
    shown = command(*words, "--dry-run", cwd=tmp_path).stdout
    assert "\n# qsub -o run/ job.pbs\n" in shown and "#PBS -l place=excl\n#PBS -m abe\n" in shown
    away = command(*words, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"})
    assert away.returncode == 2 and "no qsub on PATH" in away.stderr, away.stderr


@pytest.mark.parametrize("system, number", [("slurm", "7_1"), ("lsf", "7[2]")])
def test_an_array_where_a_task_is_queued_again_under_its_number(system, number):
    found = submission.prepare("goyal-resnet50", [], "generic", Request(array="seed=3-5", run="all"))
    found = submission.Prepared(site(system), found.jobs, found.texts, "all", [])
    assert [t.number for t in found.tasks(found.jobs[0], "7")][1] == number


@pytest.mark.parametrize("system", ["pbs", "flux"])
def test_a_job_a_value_where_a_job_that_is_queued_again_has_another_number(system, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.yaml").write_text(f"scheduler: {system}")
    found = submission.prepare("goyal-resnet50", [], "site.yaml", Request(array="optim.base_lr=0.1,0.2", run="all"))
    assert [job.script_name(found.site) for job in found.jobs] == [
        f"job-optim.base_lr={value}.{system}" for value in ("0.1", "0.2")
    ]
    for job, value in zip(found.jobs, ("0.1", "0.2"), strict=True):
        assert job.words == ["goyal-resnet50", "--set", f"optim.base_lr={value}", "--run", f"all/optim.base_lr={value}"]
        (task,) = found.tasks(job, "7")
        log = {"pbs": "all/7.OU", "flux": f"all/job-optim.base_lr={value}-7.log"}[system]
        assert (task.run, str(task.log)) == (f"all/optim.base_lr={value}", log)


def test_conditions_as_each_system_has_them():
    after = {name: s.after("afterok", ["7"]) + s.after("afterany", ["7", "8"]) for name, s in SCHEDULERS.items()}
    assert after == {
        "slurm": ["--dependency=afterok:7", "--kill-on-invalid-dep=yes"]
        + ["--dependency=afterany:7:8", "--kill-on-invalid-dep=yes"],
        "pbs": ["-W", "depend=afterok:7", "-W", "depend=afterany:7:8"],
        "lsf": ["-w", "done(7)", "-ti", "-w", "ended(7) && ended(8)", "-ti"],
        "flux": ["--dependency=afterok:7", "--dependency=afterany:7", "--dependency=afterany:8"],
    }


PBS = """cat <<'EOF'
Job Id: 7.s
    Job_Name = train
    resources_used.walltime = 00:20:00
    job_state = R
    Resource_List.walltime = 01:00:00
    Variable_List = PBS_O_HOME=/home/me,FOO=005,
\t    job_state = F,HPC_LBSGD_EXPORT=A,B
EOF
"""
ENDED = "printf 'Job Id: 7.s\\n    job_state = F\\n    Exit_status = %s\\n'"


@pytest.mark.parametrize(
    "system, program, answer, seen",
    [
        ("slurm", "squeue", "echo RUNNING 1:00", [("RUNNING", "1:00")]),
        ("slurm", "squeue", "echo 'Invalid job id specified' >&2; exit 1", []),
        ("slurm", "squeue", "true", [("HIDDEN", "")]),
        ("slurm", "squeue", "exit 1", None),
        ("pbs", "qstat", PBS, [("RUNNING", "00:40:00")]),
        ("pbs", "qstat", f"{ENDED} 0", [("COMPLETED", "")]),
        ("pbs", "qstat", f"{ENDED} 271", [("CANCELLED", "")]),
        ("pbs", "qstat", "echo 'no words of a job'; echo Job Id: 7.s", None),
        ("pbs", "qstat", "echo 'qstat: Unknown Job Id 7' >&2; exit 153", []),
        ("pbs", "qstat", "echo 'Connection refused' >&2; exit 255", None),
        ("lsf", "bjobs", """echo '{"RECORDS": [{"STAT": "USUSP", "TIME_LEFT": "-"}]}'""", [("SUSPENDED", "")]),
        ("lsf", "bjobs", """echo '{"RECORDS": [{"STAT": "RUN", "TIME_LEFT": "0:5 L"}]}'""", [("RUNNING", "0:5 L")]),
        ("lsf", "bjobs", """echo '{"RECORDS": [{"JOBID": "7", "ERROR": "Job <7> is not found"}]}'""", []),
        ("lsf", "bjobs", "echo 'LSF is down' >&2; exit 255", None),
        ("flux", "flux", "echo CANCELED", [("CANCELLED", "")]),
        ("flux", "flux", "echo RUNNING 5m", [("RUNNING", "5m")]),
        ("flux", "flux", "echo 'flux-jobs: ERROR: JobID 7 unknown' >&2; exit 1", None),  # to this instance
        ("flux", "flux", "echo 'Unable to connect to Flux: broker socket local was not found' >&2; exit 1", None),
    ],
)
def test_what_systems_answer_about_a_job(system, program, answer, seen, tmp_path, monkeypatch):
    (tmp_path / program).write_text(f"#!/bin/sh\n{answer}\n")
    (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = SCHEDULERS[system].look("7")
    assert (found if found is None else [tuple(one) for one in found]) == seen


@pytest.mark.parametrize(
    "env, system, job",
    [
        ({"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "1"}, "slurm", "6_1"),
        ({"PBS_JOBID": "7.host"}, "pbs", "7.host"),
        ({"LSB_JOBID": "7", "LSB_JOBINDEX": "0"}, "lsf", "7"),
        ({"LSB_JOBID": "7", "LSB_JOBINDEX": "2"}, "lsf", "7[2]"),
        ({"HPC_LBSGD_FLUX_JOB": "9", "SLURM_JOB_ID": "7"}, "flux", "9"),
    ],
)
def test_whose_job_a_process_is(env, system, job):
    found = known.of(env)
    assert (found.name, found.job_of(env)) == (system, job)


def test_limits_as_each_system_has_them():
    def limit(system, **asked):
        return [*site(system).batch.directives(submission_wanted(system, **asked))]

    def submission_wanted(system, **asked):
        from hpc_lbsgd.cluster.script import wanted

        return wanted(Job("train", "x", 1, [], "", **asked), site(system))

    assert "-l walltime=26:00:30" in limit("pbs", time="1-02:00:30")
    lsf = limit("lsf", time="90", deadline="2030-12-24T18:00")
    assert {"-W 90", "-wa USR2", "-wt 5", "-t 2030:12:24:18:00"} < set(lsf)
    assert "--time-limit=5400s" in limit("flux", time="90")
