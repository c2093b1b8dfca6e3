"""`bench step --tune`: what wins on given measurements, what is tried, and the file that recipes include."""

import pytest

from hpc_lbsgd import cli
from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.bench.core.task import PARTS
from hpc_lbsgd.bench.step.run import task_of
from hpc_lbsgd.bench.step.tune import run as tune
from hpc_lbsgd.bench.step.tune import search as searches
from hpc_lbsgd.bench.step.tune import show
from hpc_lbsgd.bench.step.tune.search import Launched, Search, Trial, Verdict, judge, most_launches
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.parallel.horovod_engine import environment

TASK = task_of(2, [8], "resnet20", 32, "float32", 1, 1, 1) | {"mode": "buckets"}


def launched(*seconds, batches=(8,)):
    parts = dict.fromkeys(PARTS, 0.25)
    return [Launched({b: {"batch": b, "step_s": s, "ranks": 2, **parts} for b in batches}, {}) for s in seconds]


@pytest.mark.parametrize(
    "after, wins",
    [
        ([0.9, 0.9, 0.9], True),
        ([0.9, 0.9, 1.01], False),  # slower in one round
        ([0.97, 0.93, 0.9], False),  # faster in every round, by less than rounds differ
        ([1.1, 1.1, 1.1], False),
        ([0.5, 0.5], False),  # two rounds say nothing of a spread
    ],
)
def test_a_setting_wins_by_more_than_the_spread(after, wins):
    assert judge(launched(*[1.0] * len(after)), launched(*after)).wins is wins


def test_drift_that_both_meet_is_no_spread():
    assert judge(launched(1.0, 2.0, 4.0), launched(0.9, 1.8, 3.6)) == pytest.approx((1 / 0.9, 1 / 0.9, 1 / 0.9, 3))


def test_several_batches_count_alike():
    before, after = launched(1.0, batches=(8, 128)), launched(0.5, batches=(8, 128))
    after[0].rows[128]["step_s"] = 2.0  # twice as fast at one, twice as slow at the other
    assert judge(before, after).ratio == pytest.approx(1.0)


class Machine:
    """Settings cost known seconds; what is asked for is kept."""

    def __init__(self, cost, luck=()):
        self.cost, self.luck, self.asked = cost, dict(luck), []

    def __call__(self, group, settings, rounds):
        self.asked.append((group, settings, rounds))
        return [launched(*[self.cost(s) * self.luck.get(group, 1.0) ** bool(s)] * rounds) for s in settings]


def search(machine, groups=None, rounds=5):
    return searches.search(groups or tune.choose(["all"], False, 1), rounds, machine, tune.effect_of(TASK, False))


def test_the_best_of_each_group_is_kept_and_confirmed():
    def cost(setting):
        return (0.8 if setting.get("cycle_time_ms") == 0.5 else 1.0) * (1.0 if "yield_when_idle" in setting else 0.9)

    found = search(Machine(cost))
    assert found.best == {"cycle_time_ms": 0.5}
    last = found.trials[-1]
    assert last.group == "confirmation" and last.verdict == pytest.approx((1.25, 1.25, 1.25, 5))
    all_rounds = [t.setting for t in found.trials if t.group == "cycle" and len(t.launched) == 5]
    assert all_rounds == [{}, {"cycle_time_ms": 0.5}]  # who was not faster left after two rounds


def test_luck_in_a_group_does_not_outlive_the_confirmation():
    found = search(Machine(lambda setting: 1.0, luck={"cycle": 0.8}))
    assert found.best == {} and found.trials[-1].group == "confirmation"
    result = tune.summarise(found, TASK, 2, 5)
    assert "the defaults stay" in show.show(result | {"file": "tuned.yaml"}) and "machine: {}" in show.to_yaml(result)


def test_only_settings_that_do_something_are_tried():
    """ResNet-20 has 1.1 MB of gradients: larger buckets and thresholds are the same cuts, 0.1 ms is the default."""
    machine = Machine(lambda setting: 1.0)
    found = search(machine)
    tried = [t.setting for t in found.trials]
    assert {"bucket_mb": 50.0} not in tried and {"first_bucket_mb": 0.25} in tried
    assert [s["fusion_threshold_mb"] for s in tried if "reduction" in s] == [128.0]
    assert {"cycle_time_ms": 0.1} not in tried and {"yield_when_idle": True} not in tried
    assert sum(len(settings) * rounds for _, settings, rounds in machine.asked) <= most_launches(tune.GROUPS, 5)


def test_fusion_drops_the_buckets_keys():
    found = search(Machine(lambda setting: 1 - 0.1 * ("first_bucket_mb" in setting) - 0.3 * ("reduction" in setting)))
    assert found.best == {"reduction": "fusion", "fusion_threshold_mb": 128.0}


def test_two_level_sums_only_with_gpus_on_several_nodes():
    assert "allreduce" not in tune.choose(["all"], True, 1) and "allreduce" not in tune.choose(["all"], False, 4)
    assert "allreduce" in tune.choose(["all"], True, 4)
    with pytest.raises(RequestError, match="--tune allreduce: only with GPUs on several nodes"):
        tune.choose(["allreduce"], False, 1)


def test_no_setting_touches_the_result_part():
    base = recipes.read("goyal-resnet50")
    for setting in (s for candidates in tune.GROUPS.values() for s in candidates):
        changed = recipes.read("goyal-resnet50", [f"machine.{k}={v}" for k, v in setting.items()])
        assert changed.fingerprint() == base.fingerprint() and changed.machine != base.machine


def written(tmp_path, best):
    trials = [Trial("confirmation", best, Verdict(1.25, 1.2, 1.3, 5), launched(*[0.8] * 5))]
    trials.insert(0, Trial("confirmation", {}, Verdict(1.0, 1.0, 1.0, 5), launched(*[1.0] * 5)))
    path = tmp_path / "tuned.yaml"
    path.write_text(show.to_yaml(tune.summarise(Search(best, trials), TASK, 2, 5)))
    return path


def test_the_file_is_what_recipes_include(tmp_path):
    path = written(tmp_path, {"cycle_time_ms": 0.5, "yield_when_idle": False})
    assert "1.250 times as fast as the defaults (1.200 to 1.300 in 5 rounds)" in path.read_text()
    base = recipes.read("fashion-mnist", ["machine.prefetch=5"])
    tuned = recipes.read("fashion-mnist", ["machine.prefetch=5", f"machine={path}", "machine.cycle_time_ms=2"])
    assert (tuned.machine.prefetch, tuned.machine.cycle_time_ms) == (5, 2.0)  # in the order of the command line
    assert tuned.machine.yield_when_idle is False and tuned.fingerprint() == base.fingerprint()
    assert environment(tuned.machine, "off")["OMPI_MCA_mpi_yield_when_idle"] == "0"
    own = tmp_path / "own.yaml"
    own.write_text(f"machine: {path}\n")
    assert recipes.read(str(own)).machine.cycle_time_ms == 0.5


@pytest.mark.parametrize(
    "text, says",
    [
        ("wire: fp16\nmachine: {prefetch: 1}", "expected one section, machine; found wire, machine"),
        ("{}", "found nothing"),
        ("[]", "expected keys and values, found list"),
        ("- 1", "expected keys and values"),
        ("machine: {buckets: 3}", "unknown key machine.buckets"),
    ],
)
def test_a_file_with_more_than_machine_keys_is_refused(tmp_path, text, says):
    path = tmp_path / "other.yaml"
    path.write_text(text)
    with pytest.raises(RequestError, match=says):
        recipes.read("fashion-mnist", [f"machine={path}"])


def test_a_file_that_is_not_there_is_refused():
    with pytest.raises(RequestError, match="machine = no.yaml: no such file"):
        recipes.read("fashion-mnist", ["machine=no.yaml"])


@pytest.mark.parametrize(
    "words, said",
    [
        (["magic"], "--tune magic: allowed are buckets"),
        (["--engines", "ddp"], "--engines"),
        (["--plot", "x.png"], "--plot x.png"),
        (["--model", "no.such:thing"], "model.name = no.such:thing"),
        (["--out", "no/such/tuned.yaml"], "--out no/such/tuned.yaml: no folder"),
        (["--out", "."], "--out .: a folder"),
    ],
)
def test_wrong_requests_end_before_work_starts(words, said, capsys):
    assert cli.main(["bench", "step", "--tune", *words]) == 2
    said_on_stderr = capsys.readouterr().err
    assert said in said_on_stderr and "round 1" not in said_on_stderr


def test_effects_follow_the_device():
    cpu, gpu = tune.effect_of(TASK, False), tune.effect_of(TASK, True)
    assert cpu({"cycle_time_ms": 0.1}) == cpu({}) != gpu({"cycle_time_ms": 0.1})
    assert gpu({"yield_when_idle": False}) == gpu({})
