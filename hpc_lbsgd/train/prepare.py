"""Before the first step: everything that can be wrong with a request is found here, on rank 0, once."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hpc_lbsgd import amend as amends
from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.data import archive, fields, stage, table, tree
from hpc_lbsgd.data import manifest as manifests
from hpc_lbsgd.data.encoders import Encoders
from hpc_lbsgd.data.find import find, is_plain_folder
from hpc_lbsgd.data.loader import check_sizes
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.data.user import UserSet
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.imports import load
from hpc_lbsgd.recipe import Recipe, flatten
from hpc_lbsgd.records import RunFolder, cut_metrics, read_metrics, write_atomically
from hpc_lbsgd.sections import OPTIMIZERS
from hpc_lbsgd.theory.schedule import Schedule
from hpc_lbsgd.train import checkpoint, compiling, losses, metrics, own_optim, services
from hpc_lbsgd.urls import is_url


class Prepared(NamedTuple):
    """What rank 0 found, for all ranks: plain values only."""

    run: str
    recipe: dict
    train_set: str  # path of a manifest, or user:train
    eval_set: str | None
    checkpoint: str | None
    state: dict | None
    attempt: int  # 0 at the first start of this run folder
    notes: list[str]
    amendments: list[list]  # [step, {key: value}]
    amended: bool  # this start brought one
    start_gone: bool  # the file of model.init_from, which a checkpoint makes needless


def prepare(folder: RunFolder, recipe: Recipe, ranks: int, cores: int, amend: dict | None, device) -> Prepared:
    """Check the request, settle the recipe, and set up the run folder, which is ours. Rank 0 only. cores: of a rank.
    amend: keys that change from here on, at a resume. device: of this rank, and by kind of all.

    Raises RequestError; nothing is written before everything has been checked.
    """
    notes: list[str] = []
    check_own(recipe)
    if amend and not folder.exists():
        raise RequestError(f"--amend: no run in {folder.path} to amend; a run that starts has its recipe, and --set")
    if folder.exists():
        recipe = settle_again(recipe, recipes.load_resolved(folder.recipe))
    else:
        recipe = with_start_settled(recipe.with_workers(ranks).with_threads(cores))
    train, evaluation, recipe = open_data(recipe, folder)
    here = compiling.settle(recipe, device)
    if "compile" in recipes.BIT_KEYS[recipe.determinism]:
        recipe = here
    recipe.build_schedule(len(train))  # refuses what cannot be scheduled
    newest = checkpoint.find_newest(folder) if folder.exists() else None
    state = None
    if newest:
        path, state, notes = newest
        if what := checkpoint.other_rules(recipe, state.rules):
            raise RequestError(
                f"{path}: written by a version whose {what} followed other rules ({state.rules}, here "
                f"{checkpoint.RULES}); go on with that version, or start a new run"
            )
        if state.recipe_fingerprint != recipe.fingerprint():  # which is the run's, as its file has it by now
            raise RequestError(f"{path} was made by another recipe than {folder.recipe} is now; set it back")
        if state.data_fingerprint != data_fingerprint(train, evaluation):
            raise RequestError(
                f"data.train = {recipe.data.train}: not the data that {folder.path} was trained on; "
                "resume with the same data, or start a new run"
            )
    if state and state.finished and amend:
        state.finished = False
    elif state and state.finished:
        notes.append(f"a callback finished this run at step {state.step}; --amend KEY=VALUE goes on with it")
    start_gone = bool(state and recipe.model.init_from and not Path(recipe.model.init_from).exists())
    if start_gone:
        what = "gone; the checkpoint has all, but that this start computes what the first one did is not checked"
        notes.append(f"model.init_from = {recipe.model.init_from}: {what}")
    step = state.step if state else 0
    amendments = amends.checked(folder.read_amendments(), str(folder.amendments)) if folder.exists() else []
    before = amendments
    if amend:
        amendments = amends.added(recipe, amendments, step, amend, bool(state and state.decisions))
    now = amends.recipe_now(recipe, amendments, step)
    schedule = amends.schedule_of(recipe, len(train), state.decisions if state else [], amendments)
    if now.machine.engine == "ddp":
        refuse_idle_ranks(now, schedule, ranks)
    if ":" in recipe.schedule.kind:
        refuse_other_rates(recipe, schedule, folder, step)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        kinds = Counter(r["kind"] for r in read_metrics(folder.metrics))
        attempt = max(kinds["start"], int(bool(kinds or state)))  # that one record may be damaged, or the file gone
        folder.clear_status()
        checkpoint.sweep(folder)
        if attempt:
            cut_metrics(folder, state.step if state else 0)
        write_atomically(folder.classes, json.dumps(train.classes) + "\n")
        write_atomically(folder.recipe, recipe.to_yaml())
        if amend:
            folder.write_amendments(amendments)
    except OSError as problem:
        raise RequestError(f"--run {folder.path}: cannot be written: {problem.strerror or problem}") from None
    if start_gone:
        here = here.model_copy(update={"model": here.model.model_copy(update={"init_from": None})})
    return Prepared(
        str(folder.path),
        here.model_dump(mode="json"),
        str(train.path),
        str(evaluation.path) if evaluation else None,
        str(newest[0]) if newest else None,
        vars(state) if state else None,
        attempt,
        notes,
        amendments,
        amendments != before,
        start_gone,
    )


def check_own(recipe: Recipe) -> None:
    """Raise RequestError for what a recipe names of the user's own or of other packages, and is not there."""
    if recipe.optim.name not in OPTIMIZERS:
        own_optim.check(recipe.optim)
    losses.loss_function(recipe.train)
    if metrics.load_all(recipe.train.metrics) and not (recipe.data.eval or recipe.data.dataset):
        raise RequestError(f"train.metrics = {recipe.train.metrics}: nothing to measure them on; set data.eval")
    for name in recipe.train.callbacks:
        load(name, "train.callbacks")
    services.refuse_missing(recipe.train.loggers)


def refuse_other_rates(recipe: Recipe, schedule: Schedule, folder: RunFolder, step: int) -> None:
    """The code of a schedule of the user's own may have been changed since: steps that were taken must not move."""
    for r in read_metrics(folder.metrics):
        if r["kind"] == "step" and r["step"] < step:
            point = schedule.at(r["step"])
            if (point.lr, point.global_batch) != (r.get("lr"), r.get("global_batch")):
                raise RequestError(
                    f"schedule.kind = {recipe.schedule.kind}: step {point.step} was taken at lr = {r.get('lr')}, kn = "
                    f"{r.get('global_batch')}, and now it would have {point.lr}, {point.global_batch}: its code is not "
                    "what the run was begun with"
                )


def refuse_idle_ranks(recipe: Recipe, schedule: Schedule, ranks: int) -> None:
    """DistributedDataParallel sums in backward: a rank without samples has none, and the others would wait for it."""
    partial = recipe.batch.last_batch == "partial"
    if recipe.schedule.kind == "adaptive-batch" and partial and ranks > 1:
        raise RequestError(
            "batch.last_batch = partial with schedule.kind = adaptive-batch: machine.engine = ddp needs samples for "
            "every rank at every step; allowed: drop"
        )
    n = schedule.samples_per_worker
    for workers in {s.workers for s in schedule.stages}:
        tail = -(-(schedule.samples % (workers * n)) // n) if partial else 0
        for busy, where in ((workers, "batch.workers"), (tail, "batch.last_batch = partial: the tail's workers")):
            if 0 < busy < ranks:
                raise RequestError(
                    f"{where} = {busy} on {ranks} ranks: machine.engine = ddp needs samples for every rank at every "
                    "step; use fewer ranks, batch.last_batch = drop, or machine.engine = horovod or torch"
                )


def settle_again(asked: Recipe, before: Recipe) -> Recipe:
    """The recipe to resume with: the run's own k, threads and compiled parts; no result key may differ."""
    asked = asked.with_workers(before.batch.workers)
    asked = asked.model_copy(update={"model": asked.model.model_copy(update={"init_from": before.model.init_from})})
    if before.machine.threads:
        asked = asked.with_threads(before.machine.threads)
    if asked.machine.compile == "auto" and "compile" in recipes.BIT_KEYS[asked.determinism]:
        asked = asked.with_compile(before.machine.compile)
    old, new = flatten(before.result_part()), flatten(asked.result_part())
    changed = [
        f"{key} = {new.get(key)} (the run has {old.get(key)})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise RequestError(f"--resume: the run was made by another recipe: {'; '.join(changed)}")
    return asked


def with_start_settled(recipe: Recipe) -> Recipe:
    """model.init_from as a file: of a run its newest checkpoint's weights, the averaged ones where it has them."""
    where = recipe.model.init_from
    if where is None or not Path(where).is_dir():
        return recipe
    found = checkpoint.find_newest(RunFolder(where))
    if found is None:
        raise RequestError(f"model.init_from = {where}: no checkpoint in it")
    averaged = found[0] / checkpoint.AVERAGE
    path = str(averaged if averaged.exists() else found[0] / checkpoint.WEIGHTS)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"init_from": path})})


def open_data(recipe: Recipe, folder: RunFolder) -> tuple[Manifest, Manifest | None, Recipe]:
    """The manifests, checked against their files and the recipe. A folder without a manifest is indexed now."""
    data = recipe.data
    if data.dataset:
        if recipe.machine.stage_dir:
            raise RequestError(
                "machine.stage_dir: a set of your own (data.dataset) is staged once it is packed (hpc-lbsgd data pack "
                f"{data.dataset} OUT); unset one of them"
            )
        return open_user_data(recipe)
    if not data.train:
        raise RequestError("data.train is not set: name a folder of class folders, or a manifest")
    found = {}
    for key in ("train", "eval"):
        path = getattr(data, key)
        if not path:
            continue
        if not is_url(path) and archive.is_archive(path) and not (Path(path) / manifests.FILE_NAME).exists():
            raise RequestError(f"data.{key} = {path}: index these tar files first (hpc-lbsgd data index {path})")
        if table.is_table(path):
            raise RequestError(f"data.{key} = {path}: index this table first (hpc-lbsgd data index {path})")
        if is_plain_folder(path):
            target = Path(path)
            if not os.access(path, os.W_OK):
                target = folder.path / "manifests" / key
                target.mkdir(parents=True, exist_ok=True)
            found[key] = tree.index(path, target / manifests.FILE_NAME)
        else:
            try:
                found[key] = Manifest(find(path, folder.path / "manifests" / key))
            except RequestError as problem:
                raise RequestError(f"data.{key} = {path}: {problem}") from None
            if key == "train" and data.on_bad_image == "skip" and folder.exists():
                found[key].check_rows()  # others stand in for what went since the first start
            else:
                found[key].check_files()
        check_sizes(data, found[key], key == "train")
    train, evaluation = found["train"], found.get("eval")
    if recipe.machine.stage_dir and not train.remote:
        stage.folder_of(train, recipe.machine.stage_dir)  # refuses what cannot be staged
    if data.samples not in (None, len(train)):
        raise RequestError(f"data.samples = {data.samples}, but {data.train} has {len(train)}")
    settle = with_own if any(m.own for m in found.values()) else with_targets
    return train, evaluation, settle(recipe, train, evaluation)


def with_own(recipe: Recipe, train: Manifest, evaluation: Manifest | None) -> Recipe:
    """The recipe for packed sets of the user's own (own.py), with N and the number of outputs settled."""
    data = recipe.data
    if evaluation is not None and evaluation.own != train.own:
        raise RequestError(f"data.eval = {data.eval}: its samples are made otherwise than those of data.train")
    for key, default in (("inputs", [fields.IMAGE]), ("targets", [fields.CLASS]), ("encode", {})):
        if getattr(data, key) != default:
            raise RequestError(f"data.{key}: {data.train} is a set of your own, which says by itself what is given")
    classes = data.classes or len(train.classes)
    if not classes:
        raise RequestError(f"data.classes is not set, and {data.train} has no classes: set data.classes=N")
    if train.classes and classes != len(train.classes):
        raise RequestError(f"data.classes = {classes}, but {data.train} has {len(train.classes)}")
    settled = data.model_copy(update={"samples": len(train), "classes": classes})
    return recipe.model_copy(update={"data": settled})


def with_targets(recipe: Recipe, train: Manifest, evaluation: Manifest | None) -> Recipe:
    """The recipe with N and the number of outputs settled. Refuses targets that both sets do not have alike, or that
    its loss cannot be taken of."""
    data, sets = recipe.data, [m for m in (train, evaluation) if m is not None]
    outputs = fields.outputs(data.targets, train.fields, len(train.classes))
    if data.targets == [fields.CLASS] and data.classes not in (None, outputs):
        raise RequestError(f"data.classes = {data.classes}, but {data.train} has {outputs}")
    if fields.CLASS in data.targets and any(m.classes != train.classes for m in sets):
        raise RequestError(f"data.eval = {data.eval}: its classes are not those of data.train = {data.train}")
    for name in dict.fromkeys([*data.inputs, *data.targets]):
        first, *others = (m.fields[name] for m in sets)
        if any(other != first and not other.kind == first.kind == "mask" for other in others):
            raise RequestError(
                f"data.eval = {data.eval}: {name} is {others[0]} there, and {first} in data.train = {data.train}; "
                "index it with --classes-of the training set's manifest"
            )
    classes, asked = data.classes or outputs, ", ".join(data.targets)
    if not classes:
        raise RequestError(f"data.classes is not set: how many outputs a model is to have for {asked} is yours to say")
    settled = data.model_copy(update={"samples": len(train), "classes": classes})
    recipe = recipe.model_copy(update={"data": settled})
    for m in sets:
        check_targets(recipe, m)
        try_encoders(recipe, m)
    return recipe


def try_encoders(recipe: Recipe, manifest: Manifest) -> None:
    """Ask the user's functions for a first text: what they cannot do shows before work."""
    for name in recipe.data.encode:
        if manifest.fields[name].kind == "text":
            try:
                Encoders(recipe.data.encode, manifest).encoded(name, np.array([0]), manifest.values(name)[[0]])
            except RunError as problem:
                raise RequestError(str(problem)) from None


def check_targets(recipe: Recipe, manifest: Manifest) -> None:
    """Refuse a set with other targets than the loss can be taken of."""
    if manifest.own:
        return
    fields.refuse_unknown(recipe.data, manifest.fields, str(manifest.path))
    losses.check(recipe.train.loss, recipe.data.targets, manifest, recipe.data.classes)


def stage_folder(recipe: Recipe) -> str | None:
    """This node's folder for copies of packed sets: the recipe's, else the site's, which binds no other set."""
    own = recipe.machine.stage_dir
    path = own or os.environ.get(recipes.STAGE_DIR)
    return recipes.expanded(path, "machine.stage_dir" if own else recipes.STAGE_DIR) if path else None


def open_user_data(recipe: Recipe) -> tuple[UserSet, UserSet, Recipe]:
    train, evaluation = (UserSet(recipe.data.dataset, part) for part in ("train", "eval"))
    for key, there in (("samples", len(train)), ("classes", len(train.classes) or None)):
        asked = getattr(recipe.data, key)
        if there and asked not in (None, there):
            raise RequestError(f"data.{key} = {asked}, but {recipe.data.dataset} has {there}")
    classes = recipe.data.classes or len(train.classes)
    if not classes:
        raise RequestError(f"data.classes is not set, and {recipe.data.dataset} has no `classes`: set data.classes=N")
    settled = recipe.data.model_copy(update={"samples": len(train), "classes": classes})
    return train, evaluation, recipe.model_copy(update={"data": settled})


def data_fingerprint(train: Manifest, evaluation: Manifest | None) -> str:
    return f"{train.fingerprint}+{evaluation.fingerprint if evaluation else ''}"
