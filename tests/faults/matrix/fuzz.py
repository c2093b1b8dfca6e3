"""Files of strangers: mutated recipes, sites, tars, images, manifests, checkpoints, metrics. Refused by one message, or
read; never a traceback, a hang or memory without bound. Where a digest would see every change, half of the files are
changed behind it, and signed again."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import tarfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import bits
import pyarrow as pa
from core import Injection, Row, hold
from mutants import mutated

from hpc_lbsgd import amend
from hpc_lbsgd.cluster import sites
from hpc_lbsgd.data import archive
from hpc_lbsgd.data.decode import decode_all
from hpc_lbsgd.data.manifest import FILE_NAME, Manifest, content_digest
from hpc_lbsgd.data.storage import SampleError, open_storage
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.recipe import load_resolved, read
from hpc_lbsgd.records import RunFolder, cut_metrics, read_metrics
from hpc_lbsgd.report import facts as reading
from hpc_lbsgd.report.watch import Live
from hpc_lbsgd.theory import noise
from hpc_lbsgd.train import checkpoint, start
from hpc_lbsgd.trained.opened import open_run

BATCH, SECONDS, MEMORY = 50, 60, 8 * 2**30


class Kind:
    """Files of one kind, as a recipe in a folder."""

    name = "case.yaml"

    def first(self, folder: Path) -> bytes:
        """A good one, at `name` in the folder; what else it needs lies there too."""
        package = Path(sites.__file__).parents[1]
        return (package / "recipes" / "goyal-resnet50.yaml").read_bytes()

    def changed(self, content: bytes, rng: random.Random) -> bytes:
        return mutated(content, rng)

    def look(self, path: Path) -> None:
        read(str(path))


class Site(Kind):
    def first(self, folder: Path) -> bytes:
        return sorted((Path(sites.__file__).parent / "sites").glob("*.yaml"))[0].read_bytes()

    def look(self, path: Path) -> None:
        sites.read(str(path))


class Image(Kind):
    name = "case.bin"

    def images(self, folder: Path) -> list[Path]:
        from conftest import write_images

        suffix = random.Random(folder.name).choice([".png", ".jpg"])
        return sorted(write_images(folder / "set", 4, 8, suffix=suffix).rglob(f"*{suffix}"))

    def first(self, folder: Path) -> bytes:
        return self.images(folder)[0].read_bytes()

    def look(self, path: Path) -> None:
        decode_all([path.read_bytes()])


class Tar(Image):
    name = "case.tar"

    def first(self, folder: Path) -> bytes:
        with tarfile.open(folder / "whole.tar", "w") as tar:
            for image in self.images(folder):
                tar.add(image, f"{image.parent.name}/{image.name}")
        return (folder / "whole.tar").read_bytes()

    def look(self, path: Path) -> None:
        archive.samples_of([path], None)


class Tree(Kind):
    """A manifest beside its images: opened, checked as at a start, all samples read."""

    name, made = f"set/{FILE_NAME}", "images"

    def first(self, folder: Path) -> bytes:
        shutil.copytree(bits.sets()[self.made], folder / "set")
        return (folder / self.name).read_bytes()

    def changed(self, content: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return mutated(content, rng)
        table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
        header = reparsed(json.loads(table.schema.metadata[b"hpc_lbsgd"]), rng)
        name = rng.choice(table.column_names)
        column = table.column(name).to_pylist()
        column[rng.randrange(len(column))] = rng.choice(CELLS[pa.types.is_large_string(table.column(name).type)])
        with contextlib.suppress(pa.ArrowInvalid, OverflowError):  # a number that the column's type has no room for
            place = table.column_names.index(name)
            table = table.set_column(place, table.field(name), pa.array(column, table.field(name).type))
        if isinstance(header, dict):
            with contextlib.suppress(ValueError, OverflowError):
                header["digest"] = content_digest(table, header)
        sink = pa.BufferOutputStream()
        table = table.replace_schema_metadata({"hpc_lbsgd": json.dumps(header)})
        with pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
        return sink.getvalue().to_pybytes()

    def look(self, path: Path) -> None:
        found = Manifest(path)
        found.check_files()
        storage = open_storage(found)
        for index in range(len(found)):
            with contextlib.suppress(SampleError):  # what a run then does is its recipe's to say
                storage.content(index)


class Packed(Tree):
    made = "packed"


class State(Kind):
    """state.json of a run's newest checkpoint: taken, passed over, or refused; then what a start reads of it."""

    def first(self, folder: Path) -> bytes:
        run = Path(shutil.copytree(bits.finished_run(), folder / "run"))
        newest = checkpoint.name_of(checkpoint.steps_there(run / "checkpoints")[-1])
        self.name = f"run/checkpoints/{newest}/state.json"
        return (folder / self.name).read_bytes()

    def changed(self, content: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return mutated(content, rng)
        state = json.loads(content)
        del state[checkpoint.SELF]
        state = reparsed(state, rng)
        if isinstance(state, dict):
            state.pop(checkpoint.SELF, None)
            state = checkpoint.signed(state)
        return json.dumps(state).encode()

    def look(self, path: Path) -> None:
        run = path.parents[2]
        _, state, _ = checkpoint.find_newest(RunFolder(run))
        amend.schedule_of(load_resolved(RunFolder(run).recipe), 90, state.decisions, []).at(state.step)
        noise.noise_scale(state.noise)


class Weights(State):
    """A file of tensors in a checkpoint, behind its digest."""

    def first(self, folder: Path) -> bytes:
        super().first(folder)
        self.name = str(Path(self.name).with_name(checkpoint.WEIGHTS))
        return (folder / self.name).read_bytes()

    def changed(self, content: bytes, rng: random.Random) -> bytes:
        return mutated(content, rng)

    def look(self, path: Path) -> None:
        state = json.loads((path.parent / "state.json").read_text())
        del state[checkpoint.SELF]
        state["files"][path.name] = checkpoint.file_sha256(path)
        (path.parent / "state.json").write_text(json.dumps(checkpoint.signed(state)))
        with contextlib.suppress(RequestError):
            start.read(str(path))
        open_run(str(path.parents[2]))


class Metrics(Kind):
    name = "run/metrics.jsonl"

    def first(self, folder: Path) -> bytes:
        shutil.copytree(bits.finished_run(), folder / "run")
        return (folder / self.name).read_bytes()

    def look(self, path: Path) -> None:
        run = RunFolder(path.parent)
        list(read_metrics(path))
        reading.facts(str(run.path))
        live = Live(run)
        live.look()
        live.facts()
        cut_metrics(run, 6)


def reparsed(content: object, rng: random.Random) -> object:
    """What is written in JSON, with a changed word or two that is still JSON: or one value that is another's."""
    text = json.dumps(content).encode()
    for _ in range(20):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(mutated(text, rng))
    key = rng.choice(list(content))
    return {**content, key: rng.choice([None, -1, 1e300, "x", [], {}, [[1]], True, 2**70])}


CELLS = ([-1, 0, 1, 2**15, 2**31 - 1, 2**40, 2**63 - 1, None], ["", "/etc/passwd", "../" * 9, "x" * 5000, "\0", None])
KINDS = {
    "recipe": Kind(), "site": Site(), "tar": Tar(), "image": Image(), "manifest": Tree(), "index": Packed(),
    "state": State(), "weights": Weights(), "metrics": Metrics(),
}  # fmt: skip


def fuzz(kind: str):
    files = KINDS[kind]

    def run(rng: random.Random, folder: Path) -> Iterator[Injection]:
        first = files.first(folder)
        cases = [files.changed(first, rng) for _ in range(BATCH)]
        log, begun = folder / "log", time.monotonic()
        pid = os.fork()
        if not pid:
            try:
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                signal.alarm(SECONDS)
                for number, case in enumerate(cases):
                    path = folder / files.name
                    path.write_bytes(case)
                    try:
                        files.look(path)
                    except (RequestError, RunError):
                        pass
                    except BaseException:
                        log.write_text(f"case {number}: {case[:400]!r}\n{traceback.format_exc()}")
                        os._exit(1)
                os._exit(0)
            finally:
                os._exit(2)
        _, status = os.waitpid(pid, 0)
        said = log.read_text() if log.exists() else f"ended with {os.waitstatus_to_exitcode(status)}"
        hold(status == 0, said)
        seconds = round((time.monotonic() - begun) / BATCH, 4)
        yield Injection(f"{BATCH} cases of a {kind}", "refused, or read", seconds, 0, cases=BATCH)

    return run


ROWS = [
    Row(f"fuzz-{kind}", f"a {kind} with changed bytes", "one message or none; no traceback, hang, memory without bound",
        10_000, fuzz(kind), cost_s=0.006)
    for kind in KINDS
]  # fmt: skip
