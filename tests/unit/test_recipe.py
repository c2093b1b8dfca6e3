"""Recipes: what is refused, and how it is said."""

import pytest
import yaml

from hpc_lbsgd import reading
from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.errors import RequestError


@pytest.mark.parametrize(
    "setting, says",
    [
        ("optim.lr=0.1", r"unknown key optim.lr \(= 0.1\); allowed here: name, base_lr, "),
        ("optimizer.base_lr=1", r"unknown key optimizer .*allowed here: seed, "),
        ("data[=1", r"unknown key data\[ \(= 1\); allowed here: seed, "),
        ("optim.float=1", r"unknown key optim.float \(= 1\); allowed here: name, "),
        ("optim.base_lr=-0.1", r"optim.base_lr = -0.1: .*greater than 0"),
        ("optim.base_lr=.nan", r"optim.base_lr = nan: .*finite"),
        ("optim.momentum=1.0", r"optim.momentum = 1.0: .*less than 1"),
        ("batch.samples_per_worker=0", r"batch.samples_per_worker = 0: .*greater than or equal to 1"),
        ("batch.bn_group=5", r"batch.bn_group = 5 must divide batch.samples_per_worker = 32"),
        ("batch.workers=many", r"batch.workers = 'many': .*integer.* or .*'per_rank'"),
        ("schedule.milestones=[60,30]", r"schedule.milestones = \[60, 30\] must rise"),
        ("schedule.milestones=[30,90]", r"schedule.milestones = \[30, 90\]: .* train.epochs = 90"),
        ("schedule.factor=1", r"schedule.factor = 1: .*greater than 1"),
        ("schedule.warmup_epochs=100", r"schedule.warmup_epochs = 100.0 is more than train.epochs = 90"),
        ("data.mean=[1,2]", r"data.mean has 2 values for data.channels = 3"),
        ("data.crop_area=[0.9,0.1]", r"data.crop_area = \[0.9, 0.1\]"),
        ("precision=fp8", r"precision = 'fp8': .*'float64', 'float32', 'tf32' or 'bf16'"),
        ("model.name=resnet51", r"model.name = 'resnet51'"),
        ("optim.nesterov=off", r"optim.nesterov = 'off': .*; allowed: true, false"),
        ("data.train=1e4", r"data.train = 10000.0: .*valid string; put it in quotes"),
        ("machine.threads", r"--set machine.threads: expected key=value"),
        ("model={name: resnet8, name: resnet50}", r"--set model=.*: key name is there twice"),
        ("data.train=[", r"--set data.train=\[: not YAML"),
        ("seed.x=1", r"--set seed.x=1: seed is a value, not a section"),
    ],
)
def test_refused_with_key_and_value(setting, says):
    with pytest.raises(RequestError, match=says):
        recipes.read("goyal-resnet50", ["seed=0", setting])


ADAPTIVE = ["schedule.kind=adaptive-batch", "schedule.milestones=[]"]


@pytest.mark.parametrize("settings, says", [
    (["batch.workers=1"], "batch.workers = 1 with schedule.kind = adaptive-batch"),
    (["batch.workers=2", "optim.decay_in=loss"], "optim.decay_in = loss with schedule.kind = adaptive-batch"),
    (["batch.workers=2", "train.noise_scale_steps=0"], "train.noise_scale_steps = 0 with schedule.kind"),
])  # fmt: skip
def test_a_batch_that_nothing_measured_can_change_is_refused(settings, says):
    with pytest.raises(RequestError, match=says):
        recipes.read("goyal-resnet50", ADAPTIVE + settings)
    alone = recipes.read("goyal-resnet50", [*ADAPTIVE, "batch.workers=per_rank"]).with_workers(1)
    with pytest.raises(RequestError, match="batch.workers = 1 with schedule.kind = adaptive-batch"):
        alone.build_schedule(1000)


@pytest.mark.parametrize(
    "settings, says",
    [
        (["determinism=any-ranks", "machine.workers_per_pass=2"], "machine.workers_per_pass = 2"),
        (["determinism=any-ranks", "machine.threads=2"], "machine.threads = 2"),
        (["determinism=any-ranks", "wire=fp16"], "wire = fp16"),
        (["determinism=same-ranks", "machine.reduction=fusion"], "machine.reduction = fusion"),
        (["determinism=same-ranks", "machine.allreduce=hierarchical"], "machine.allreduce = hierarchical"),
    ],
)
def test_determinism_refuses_what_would_break_it(settings, says):
    with pytest.raises(RequestError, match=says):
        recipes.read("goyal-resnet50", settings)


@pytest.mark.parametrize("settings, says", [
    (["wire=bf16"], "wire = bf16: Horovod has no such type; allowed: fp32, fp16, or machine.engine = torch"),
    (["wire=bf16", "machine.engine=torch", "determinism=any-ranks"], "wire = bf16: determinism any-ranks"),
    (["machine.engine=torch", "machine.reduction=fusion"], "machine.engine = torch allows: buckets"),
    (["machine.engine=torch", "machine.allreduce=torus"], "machine.engine = torch allows: none"),
])  # fmt: skip
def test_an_engine_refuses_what_it_cannot_do(settings, says):
    assert recipes.read("goyal-resnet50", ["wire=bf16", "machine.engine=torch"]).wire == "bf16"
    with pytest.raises(RequestError, match=says):
        recipes.read("goyal-resnet50", settings)


@pytest.mark.parametrize(
    "setting",
    ["seed=true", "seed=yes", "seed=1.0", "seed='1'", "checkpoint.keep=true", "batch.workers=true", "batch.workers=4.0",
     "batch.samples_per_worker=32.0", "data.channels=true", "data.channels=1.0", "model.widths=[true,1,1]",
     "optim.nesterov=1", "optim.nesterov=yes", "optim.nesterov='true'", "machine.yield_when_idle=0",
     "optim.base_lr=true", "optim.base_lr='0.1'", "data.crop_area=[true,1]", "data.crop_area=['0.1',1]",
     "precision=true", "data.train=17"],
)  # fmt: skip
def test_a_value_of_another_kind_is_not_taken_for_one(setting):
    key, _, value = setting.partition("=")
    with pytest.raises(RequestError, match=rf"{key}[.01]* = .*: (input should be a valid|.*'bf16')"):
        recipes.read("goyal-resnet50", [setting])


def test_words_and_numbers_are_those_of_yaml_1_2(tmp_path):
    recipe = recipes.read("goyal-resnet50", ["determinism=off", "optim.base_lr=1e-4", "data.train=on", "seed=017",
                                             "train.ema_decay=null", "schedule.factor=2"])  # fmt: skip
    assert recipe.determinism == "off" and recipe.optim.base_lr == 1e-4 and recipe.data.train == "on"
    assert recipe.seed == 17
    assert type(recipe.schedule.factor) is float  # an int where a number is wanted, fingerprinted as the float
    path = tmp_path / "r.yaml"
    path.write_text("determinism: off\ndata: {train: yes}\noptim:\n  weight_decay: 1e-4\n")
    assert recipes.read(str(path)).determinism == "off" and recipes.read(str(path)).data.train == "yes"
    path.write_text("seed: 1\noptim:\n  base_lr: 0.1\n  momentum: 0.5\n  base_lr: 0.2\n")
    with pytest.raises(RequestError, match=r"recipe .*r.yaml: line 5: key base_lr is there twice, first in line 3"):
        recipes.read(str(path))
    path.write_text("machine: {threads: 1, threads: 2}")
    with pytest.raises(RequestError, match=r"machine = .*r.yaml: line 1: key threads is there twice"):
        recipes.read("goyal-resnet50", [f"machine={path}"])


@pytest.mark.parametrize("train", ["off", "1e-4", "0o17", "2024-01-01", "1:30", "/data/x", "null"])
def test_a_settled_recipe_reads_back_by_any_reader(train, tmp_path):
    recipe = recipes.read("goyal-resnet50", [f"data.train='{train}'", "determinism=off", "optim.weight_decay=1e-8"])
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert recipes.load_resolved(path) == recipes.validate(yaml.safe_load(path.read_text())) == recipe
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))  # as run folders have it from before
    assert train == "1e-4" or train == "0o17" or recipes.load_resolved(path) == recipe


def test_all_problems_at_once_and_one_line_each():
    with pytest.raises(RequestError) as caught:
        recipes.read("goyal-resnet50", ["seed=-1", "optim.base_lr=0", "batch.workers=0"])
    assert len(str(caught.value).splitlines()) == 3


def test_unknown_recipe_names_the_shipped_ones():
    with pytest.raises(RequestError, match="goyal-resnet51.*fashion-mnist, .*goyal-resnet50"):
        recipes.read("goyal-resnet51")


def test_machine_part_is_not_fingerprinted():
    base = recipes.read("goyal-resnet50").fingerprint()
    same = ["machine.workers_per_pass=4", "train.max_steps=3", "checkpoint.minutes=1", "data.train=/elsewhere",
            "batch.bn_group=32"]  # fmt: skip
    assert recipes.read("goyal-resnet50", same).fingerprint() == base
    for setting in ("seed=1", "optim.base_lr=0.2", "batch.bn_group=16", "precision=float32", "train.epochs=91"):
        assert recipes.read("goyal-resnet50", [setting]).fingerprint() != base


def test_per_rank_is_settled_once():
    recipe = recipes.read("goyal-resnet50").with_workers(16)
    assert recipe.batch.workers == 16
    assert recipe.with_workers(99).batch.workers == 16
    assert recipes.validate(yaml.safe_load(recipe.to_yaml())) == recipe


def test_a_folder_of_a_shipped_recipes_name_is_not_in_its_way(tmp_path, monkeypatch):
    """`train fashion-mnist --run fashion-mnist` made one, and its `--resume` was refused for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fashion-mnist").mkdir()
    (tmp_path / "mine").mkdir()
    assert recipes.read("fashion-mnist").batch.workers == 16
    with pytest.raises(RequestError, match="recipe mine: a folder, not a file"):
        recipes.read("mine")


@pytest.mark.parametrize("name", recipes.shipped())
def test_shipped_recipes_are_valid(name):
    assert recipes.read(name).with_workers(8).build_schedule(1_281_167).steps > 0


def test_the_schema_for_editors_takes_what_is_shipped_and_no_unknown_key():
    from jsonschema import Draft202012Validator

    schema = recipes.schema()
    Draft202012Validator.check_schema(schema)
    check = Draft202012Validator(schema)
    for name in recipes.shipped():
        assert [e.message for e in check.iter_errors(reading.recipe_content(name))] == []
    assert not check.is_valid({"optim": {"base_rl": 0.1}}) and not check.is_valid({"batch": {"workers": 0}})
    assert check.is_valid({"machine": "tuned.yaml"})


def test_a_word_that_is_nearly_right_is_suggested():
    with pytest.raises(RequestError, match="did you mean base_lr"):
        recipes.read("fashion-mnist", ["optim.base_rl=0.1"])
    with pytest.raises(RequestError, match="did you mean goyal-resnet50"):
        recipes.read("goyal-resnet5")
