"""The batch scripts as text: what people read, what Slurm gets, and what names cannot do to it."""

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import command

from hpc_lbsgd import yaml12
from hpc_lbsgd.cluster import jobs, script, sites
from hpc_lbsgd.cluster.jobs import Request
from hpc_lbsgd.cluster.script import Job, render
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import read, validate

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
NODES = (1, 2, 4, 8, 16, 32)
HOSTILE = "a 'b\" ; $(touch pwned) `touch pwned`\n#SBATCH --nodes=7\ntouch pwned"
RICH = """
partition: gpu-a100
account: proj_1
qos: high
options: [--constraint=h100&ib, --exclusive]
launcher: mpirun
mpi: openmpi
modules: [gcc/12, "open mpi; touch pwned"]
environment: {NCCL_IB_HCA: mlx5, ODD: "it's $(touch pwned)"}
exclude_interfaces: [docker0]
host_suffix: -ib
"""


def site(text, tmp_path):
    (tmp_path / "site.yaml").write_text(text)
    return sites.read(str(tmp_path / "site.yaml"))


def golden(name, text):
    """Compare with the kept text; HPC_LBSGD_GOLDEN=write keeps a new one, to be read before it is committed."""
    path = GOLDEN / name
    if os.environ.get("HPC_LBSGD_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"{path} is out of date"


@pytest.mark.parametrize("nodes", NODES)
def test_golden_on_the_lab(nodes):
    job = Job("train", "resnet", nodes, [], "")
    golden(f"train-{nodes:02d}.sbatch", render(job, sites.read("lab"), "/opt/env/bin/python"))


def test_golden_of_a_rich_site(tmp_path):
    job = Job("train", "resnet.2", 4, [], "", "2 of 3", time="2-00:00:00")
    golden("train-rich.sbatch", render(job, site(RICH, tmp_path), "/opt/my env/python"))


def test_golden_data():
    job = Job("data", "resnet.data", 1, [], "", one_task=True)
    golden("data.sbatch", render(job, sites.read("lab"), "/opt/env/bin/python"))


@pytest.mark.parametrize("nodes", NODES)
def test_golden_scaling(nodes):
    job = Job("scaling", f"resnet.{nodes}-nodes", nodes, [], "", label=f"{nodes}-nodes")
    golden(f"scaling-{nodes:02d}.sbatch", render(job, sites.read("lab"), "/opt/env/bin/python"))


def test_golden_scaling_and_allreduce_of_a_rich_site(tmp_path):
    for name in ("scaling", "allreduce"):
        job = Job(name, "resnet", 4, [], "", time="2-00:00:00")
        golden(f"{name}-rich.sbatch", render(job, site(RICH, tmp_path), "/opt/my env/python"))


def test_golden_report():
    job = Job("scaling", "resnet.report", 1, [], "", label="report", starts="afterany", one_task=True)
    golden("scaling-report.sbatch", render(job, sites.read("lab"), "/opt/env/bin/python"))


def test_the_shipped_templates_are_the_generic_site():
    spec = importlib.util.spec_from_file_location("render_templates", ROOT / "tools" / "render_templates.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for path in sorted((ROOT / "slurm").glob("*.sbatch")):
        assert path.read_text() == module.by_hand(path.stem), "run tools/render_templates.py"


SCRIPTS = [*sorted((ROOT / "slurm").glob("*.sbatch")), *sorted(GOLDEN.iterdir())]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_bash_and_shellcheck_accept(path):
    result = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    result = subprocess.run(["shellcheck", "--exclude=SC2016", path], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", sites.shipped())
def test_shipped_sites_are_valid(name):
    assert sites.read(name)


def test_the_commented_template_says_every_key_and_its_default():
    content = yaml12.mapping_of(ROOT / "hpc_lbsgd" / "cluster" / "sites" / "template.yaml", "template")
    assert content.keys() == sites.Site.model_fields.keys()
    assert sites.Site.model_validate(content) == sites.Site()


@pytest.mark.parametrize(
    "text, said",
    [
        ("partitoin: gpu", r"unknown key partitoin \(= 'gpu'\); allowed here: scheduler, partition"),
        ("container: {runtime: apptainer, image: x, mount: y}", r"unknown key container.mount .*allowed here: runtime"),
        ('partition: "gpu\\n#SBATCH --uid=0"', "partition = "),
        ("partition: a b", "partition = 'a b'"),
        ('options: ["--wrap=touch pwned"]', "options"),
        ('options: ["--comment=x\\ntouch pwned"]', "options"),
        ('environment: {"A; touch pwned": x}', "environment"),
        ("time_limit: 2 hours", "time_limit = '2 hours'"),
        ("time_limit: 60", "time_limit = 60: input should be a valid string; put it in quotes"),
        ("gpus_per_node: yes", "gpus_per_node = 'yes': input should be a valid integer"),
        ("gpus_per_node: true", "gpus_per_node = True: input should be a valid integer"),
        ("partition: a\naccount: b\npartition: c", "line 3: key partition is there twice, first in line 1"),
        ("gpus_per_node: 0", "ranks_per_node is not set"),
        ("ranks_per_node: 16", "ranks_per_node = 16 is more than gpus_per_node = 8"),
        ("{launcher: mpirun, container: {runtime: pyxis, image: x}}", "container with launcher = mpirun"),
        ("- a", "expected keys and values, found list"),
    ],
)
def test_wrong_sites_are_refused(text, said, tmp_path):
    with pytest.raises(RequestError, match=said):
        site(text, tmp_path)


def test_words_of_a_site_are_what_they_look_like(tmp_path):
    found = site("{time_limit: 2:00:00, partition: on, environment: {UCX_LOG: off, DAY: 2024-01-01}}", tmp_path)
    assert found.time_limit == "2:00:00" and found.partition == "on"
    assert found.environment == {"UCX_LOG": "off", "DAY": "2024-01-01"}


def test_unknown_site_names_those_there_are():
    with pytest.raises(RequestError, match=", ".join(sites.shipped())):
        sites.read("nowhere")


def header(text):
    return text.split(script.BEGIN)[1].split(script.END)[0]


def run_header(text, folder):
    """What the site's part does to a shell: its variables."""
    script = f"module() {{ printf 'module %s\\n' \"$*\"; }}\n#{header(text)}\ndeclare -p python wrap srun_options ODD"
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=folder)


def test_values_of_a_site_are_words_whatever_they_hold(tmp_path):
    text = render(Job("train", "x", 1, [], ""), site(RICH, tmp_path), f"/opt/{HOSTILE}/python")
    result = run_header(text, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "module load open mpi; touch pwned" in result.stdout
    assert not (tmp_path / "pwned").exists()
    directives = [line for line in header(text).splitlines() if line.startswith("#SBATCH")]
    assert sum("--nodes" in line for line in directives if "uid" not in line) == 2  # the second is inside python='...'
    assert text.index("set -euo pipefail") < text.index("python=")  # Slurm stops reading directives at a command


@pytest.mark.parametrize(
    "runtime, words",
    [
        ("apptainer", "wrap=(apptainer exec --nv --bind /data --bind '/my data:/d' /apps/x.sif)"),
        ("pyxis", "srun_options=(--container-image=/apps/x.sif '--container-mounts=/data,/my data:/d')"),
    ],
)
def test_containers(runtime, words, tmp_path):
    box = {"runtime": runtime, "image": "/apps/x.sif", "mounts": ["/data", "/my data:/d"]}
    text = render(Job("train", "x", 1, [], ""), site(json.dumps({"container": box}), tmp_path), "/opt/python")
    assert words in text.splitlines() and "python=python" in text.splitlines()


def test_scratch_is_expanded_where_one_submits_and_the_stage_folder_on_each_node(tmp_path):
    (tmp_path / "site.yaml").write_text("{scratch: $MY_SCRATCH/x, stage_dir: $NODE_DISK/stage}")
    words = ["submit", "goyal-resnet50", "--dry-run", "--site", tmp_path / "site.yaml"]
    env = {"MY_SCRATCH": "/scratch/me", "NODE_DISK": "/not here"}
    shown = command(*words, "--run", "mine", "--json", env=env)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["run"] == "/scratch/me/x/mine"
    assert "export HPC_LBSGD_STAGE_DIR='$NODE_DISK/stage'" in json.loads(shown.stdout)["jobs"][0]["script"]
    assert "--run /scratch/me/x/runs/goyal-resnet50-" in command(*words, env=env).stdout
    assert json.loads(command(*words, "--run", "/abs", "--json", env=env).stdout)["run"] == "/abs"
    refused = command(*words)
    assert refused.returncode == 2 and "scratch = $MY_SCRATCH/x: a variable in it is not set on" in refused.stderr


def test_dry_run_with_hostile_names_is_a_script_that_runs_nothing(tmp_path):
    recipe = tmp_path / f"{HOSTILE.replace('/', '_')}.yaml"
    recipe.write_text("{data: {samples: 1000}}")
    words = [
        "submit",
        recipe,
        "--nodes",
        "2",
        "--run",
        tmp_path / HOSTILE,
        "--set",
        f"data.train={json.dumps(HOSTILE)}",
    ]
    result = command(*words, "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    before = result.stdout.split("set -euo pipefail")[0]
    assert all(line.startswith("#") or not line for line in before.splitlines())
    assert [line for line in before.splitlines() if line.startswith("#SBATCH --nodes")] == ["#SBATCH --nodes=2"]
    assert not (tmp_path / "pwned").exists() and not (tmp_path / HOSTILE).exists()


@pytest.mark.parametrize(
    "more, said",
    [
        (["--time", "1:00:00\ntouch pwned"], "--time = '1:00:00"),
        (["--site", "nowhere"], "site 'nowhere'"),
        (["--set", "optim.base_lr=-1"], "optim.base_lr = -1"),
        (["--data"], "there is nothing to prepare"),
    ],
)
def test_wrong_requests_are_refused(more, said):
    result = command("submit", "goyal-resnet50", "--dry-run", *more)
    assert result.returncode == 2 and said in result.stderr, result.stderr


def test_a_run_that_is_there_is_not_taken_for_a_new_one(tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    words = ["submit", "goyal-resnet50", "--run", tmp_path, "--dry-run"]
    assert "continue it with --resume" in command(*words).stderr
    assert command(*words, "--resume").returncode == 0


def test_a_run_that_is_not_there_is_not_resumed(tmp_path):
    words = ["submit", "goyal-resnet50", "--resume", "--dry-run"]
    refused = command(*words, "--run", tmp_path / "misspelt")
    assert refused.returncode == 2 and f"--resume: no run in {tmp_path / 'misspelt'}" in refused.stderr
    refused = command(*words, cwd=tmp_path)
    assert refused.returncode == 2 and "--resume: no run of goyal-resnet50 in runs" in refused.stderr
    newest = tmp_path / "runs" / "goyal-resnet50-20260101-000000"
    newest.mkdir(parents=True)
    (newest / "recipe.yaml").write_text("")
    shown = json.loads(command(*words, "--json", cwd=tmp_path).stdout)
    assert shown["run"] == str(newest.relative_to(tmp_path)) and shown["jobs"][0]["words"][-1] == "--resume"


@pytest.mark.parametrize(
    "there, words, flag",
    [
        (False, [], "--resume-if-exists"),  # the first start
        (True, [], "--resume"),  # the script is started again
        (False, ["--resume"], "--resume"),  # submit --resume, a chain's later stage: no new run, ever
        (True, ["--resume"], "--resume"),
    ],
)
def test_what_a_start_of_the_script_says_about_its_run(there, words, flag, tmp_path):
    run, log = tmp_path / "my run", tmp_path / "said"
    if there:
        run.mkdir()
        (run / "recipe.yaml").write_text("")
    srun = tmp_path / "srun"
    srun.write_text("""#!/bin/sh
for word; do echo "$word"; done >"$LOG"
echo ' "status": "done"' >"$RUN/status.json"
""")
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho n1\n")
    for program in ("srun", "scontrol"):
        (tmp_path / program).chmod(0o755)
    script = tmp_path / "job.sbatch"
    script.write_text(render(Job("train", "x", 1, [], ""), sites.read("lab"), "true"))
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "1"}
    env = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log), "RUN": str(run)}
    line = ["bash", script, "r.yaml", "--set", "seed=1", *words, "--run", run]
    result = subprocess.run(line, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    given = log.read_text().splitlines()
    assert given[given.index("train") :] == ["train", "r.yaml", "--set", "seed=1", "--run", str(run), flag]


@pytest.mark.parametrize("crashed, code", [(True, 0), (False, 1)])
def test_a_rank_that_was_named_as_hung_queues_the_job_again(crashed, code, tmp_path):
    """What the watchdog leaves; a failure that a rank explains is the end."""
    run, asked = tmp_path / "run", tmp_path / "asked"
    status = json.dumps({"status": "failed", "rank": 1, **({"crashed": True} if crashed else {})}, indent=1)
    for name, text in (
        ("srun", f"case \"$*\" in *true) exit 0 ;; esac\nprintf '%s\\n' '{status}' >{run}/status.json\nexit 1"),
        ("squeue", "echo RUNNING"),
        ("scontrol", f'[ "$1" = requeue ] && echo "$2" >>{asked}; [ "$2" != hostnames ] || echo n1'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\nexit 0\n")
        (tmp_path / name).chmod(0o755)
    script = tmp_path / "job.sbatch"
    script.write_text(render(Job("train", "x", 1, [], ""), sites.read("lab"), "true"))
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "1"}
    env = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURMD_NODENAME": "n1"}
    line = ["bash", script, "r.yaml", "--run", run]
    result = subprocess.run(line, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == code, result.stderr
    assert asked.exists() == crashed


def chain(recipe, nodes, text="{gpus_per_node: 8}", resume=None, run="run"):
    lab = sites.Site.model_validate(yaml12.mapping(text, "lab"))
    return jobs.training_jobs("r", recipe, ["r.yaml"], lab, run, Request(nodes=nodes, resume=resume, chain=True))


def test_a_chain_has_the_nodes_that_each_stage_wants():
    """Smith et al. 2018: kn = 8192 growing fivefold; stages that only change the rate do not make a job."""
    recipe = validate(
        {"data": {"samples": 100000}, "batch": {"workers": 8, "samples_per_worker": 16}, "train": {"epochs": 90},
         "schedule": {"kind": "increasing-batch", "milestones": [30, 60, 80], "factor": 5, "max_batch": 3200}}
    )  # fmt: skip
    jobs = chain(recipe, 1)
    assert [(j.nodes, j.stage) for j in jobs] == [(1, "1 of 3"), (5, "2 of 3"), (25, "3 of 3")]
    schedule = recipe.build_schedule(100000)
    assert [j.words[-1] for j in jobs[:2]] == [f"train.max_steps={schedule.first_step(e)}" for e in (30, 60)]
    assert not any("max_steps" in word for word in jobs[2].words)
    # a later stage goes on with what the one before left, and never starts anew
    assert ["--resume" in j.words for j in jobs] == [False, True, True]
    assert all(j.words.count("--resume") == 1 for j in chain(recipe, 1, resume="--resume"))


def test_a_chain_that_goes_on_leaves_finished_stages_out(tmp_path):
    settings = ["data.samples=100000", "train.epochs=30", "schedule.kind=increasing-batch", "schedule.factor=2"]
    settings += ["schedule.milestones=[10,20]", "batch.samples_per_worker=16", "batch.workers=16"]
    recipe, latest = read("goyal-resnet50", settings), tmp_path / "checkpoints" / "LATEST"
    whole = chain(recipe, 2)
    ends = [int(j.words[-1].removeprefix("train.max_steps=")) for j in whole[:2]]
    latest.parent.mkdir()
    for done, left in ((ends[0] - 1, whole), (ends[0], whole[1:]), (ends[1], whole[2:])):
        latest.write_text(f"step-{done:08d}\n")
        jobs = chain(recipe, 2, resume="--resume", run=str(tmp_path))
        assert [(j.nodes, j.stage) for j in jobs] == [(j.nodes, j.stage) for j in left]
        assert [j.starts for j in jobs] == ["", "afterok", "afterok"][: len(left)]
    latest.write_text("step-99999999\n")
    with pytest.raises(RequestError, match="has done all its 99999999 steps"):
        chain(recipe, 2, resume="--resume", run=str(tmp_path))


def test_a_chain_settles_k_at_its_first_stage():
    settings = ["data.samples=100000", "train.epochs=30", "schedule.kind=increasing-batch", "schedule.factor=2"]
    settings += ["schedule.milestones=[10,20]", "batch.samples_per_worker=16"]
    jobs = chain(read("goyal-resnet50", settings), 2)
    assert [j.nodes for j in jobs] == [2, 4, 8]
    assert all("batch.workers=16" in j.words for j in jobs)


def test_a_sweep_is_a_job_a_size_and_a_report_that_no_failure_stops(tmp_path):
    """All sizes share one k, so that strong scaling compares equal batches."""
    words = ["submit", "goyal-resnet50", "--sweep", "nodes=4,1,2", "--run", tmp_path / "s", "--set", "seed=1"]
    done = command(*words, "--dry-run", "--json", "--site", "lab")
    assert done.returncode == 0, done.stderr
    jobs = json.loads(done.stdout)["jobs"]
    assert [(j["nodes"], j["label"]) for j in jobs] == [(1, "1-nodes"), (2, "2-nodes"), (4, "4-nodes"), (1, "report")]
    for job in jobs[:3]:
        assert job["words"] == ["goyal-resnet50", "--set", "seed=1", "--set", "batch.workers=32",
                                "--out", str(tmp_path / "s")]  # fmt: skip
        assert "--signal" not in job["script"] and not job["starts"]
    report = Job(**{k: v for k, v in jobs[3].items() if k != "script"})
    assert report.words == ["--report", str(tmp_path / "s")]
    assert "--dependency=afterany:7:8:9" in script.line(report, sites.read("lab"), "job", ["7", "8", "9"])
    assert "gpus-per-node" not in header(jobs[3]["script"]) and "#SBATCH --ntasks-per-node=1\n" in jobs[3]["script"]
    shown = command(*words, "--dry-run").stdout
    assert "--dependency=afterany:JOB_1-nodes:JOB_2-nodes:JOB_4-nodes" in shown
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "more, said",
    [
        (["--sweep", "ranks=1,2"], "expected nodes=A,B"),
        (["--sweep", "nodes=1,2", "--set", "batch.workers=4"], "batch.workers = 4 on 16 ranks"),
        (["--sweep", "nodes=1", "--chain"], "not allowed with"),
        (["--rounds", "3"], "--rounds and --steps go with --sweep"),
    ],
)
def test_wrong_sweeps_are_refused(more, said):
    result = command("submit", "goyal-resnet50", "--dry-run", *more)
    assert result.returncode == 2 and said in result.stderr, result.stderr


def test_a_chain_of_an_adaptive_batch_is_refused():
    recipe = read("goyal-resnet50", ["schedule.kind=adaptive-batch", "schedule.milestones=[]"])
    with pytest.raises(RequestError, match="adaptive-batch decides its stages while it runs"):
        chain(recipe, 1)
