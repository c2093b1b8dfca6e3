"""`bench step`: all ways do the same work, and what is made of their seconds."""

import pytest
import torch
from conftest import command

from hpc_lbsgd.bench.core.task import PARTS
from hpc_lbsgd.bench.step import measure, run, show, ways
from hpc_lbsgd.errors import RequestError

CPU = torch.device("cpu")
TASK = {"engine": "hpc_lbsgd", "mode": "buckets", "model": "resnet8", "image_size": 16, "precision": "float32",
        "batches": [4], "warm_ups": 1, "steps": 3, "threads": 1}  # fmt: skip


def test_ours_and_the_peers_loop_make_the_same_updates():
    """Equal weights and running statistics after three steps: same model, start, pictures, loss, optimizer, decay."""
    ours, peer = ways.Ours(TASK, CPU), ways.Peer(TASK, CPU)
    for way in (ours, peer):
        way.prepare(4)
        for _ in range(3):
            way.step()
    found, expected = ours.replica.model.state_dict(), peer.model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    start = ways.Peer(TASK, CPU)
    start.prepare(4)
    assert not torch.equal(start.model.state_dict()["fc.weight"], expected["fc.weight"])


@pytest.mark.parametrize("way", [ways.Ours, ways.Peer])
def test_parts_are_timed_and_leave_the_way_as_it_was(way):
    found = measure.time_batch(way(TASK, CPU), 4, TASK, CPU)
    assert found["batch"] == 4 and found["step_s"] > 0
    assert all(found[part] >= 0 for part in PARTS)
    assert found["forward_s"] > 0 and found["backward_s"] > 0 and found["optimizer_s"] > 0


def launched(step_s, ranks=2):
    parts = {"forward_s": 0.2, "backward_s": 0.5, "exposed_comm_s": 0.1, "optimizer_s": 0.2}
    return {"batch": 8, "step_s": step_s, "ranks": ranks, **parts}


def test_rows_and_ratios():
    """Ratios are taken inside each round, where the machine's drift is the same for both."""
    found = {("hpc_lbsgd", 8): [launched(1.0), launched(2.0), launched(4.0)],
             ("ddp", 8): [launched(1.5), launched(2.0), launched(6.0)]}  # fmt: skip
    result = run.summarise(found, TASK, 3, {})
    ours = next(r for r in result["rows"] if r["way"] == "hpc_lbsgd")
    assert (ours["images_per_s"], ours["images_per_s_low"], ours["images_per_s_high"]) == (8.0, 4.0, 16.0)
    assert ours["exposed_comm_share"] == pytest.approx(0.1) and ours["default"] is True
    (ratio,) = result["ratios"]
    assert (ratio["over"], ratio["ratio"], ratio["ratio_low"], ratio["ratio_high"]) == ("ddp", 1.5, 1.0, 1.5)
    assert "conclude nothing" in show.show(result)


def test_stock_is_stock_and_tuned_has_our_settings():
    assert run.contender("horovod-stock", 2, TASK, False).settings == {}
    tuned = run.contender("horovod-tuned", 2, TASK, False)
    assert tuned.settings["HOROVOD_CYCLE_TIME"] == "0.1" and tuned.settings["OMPI_MCA_mpi_yield_when_idle"] == "1"
    assert run.contender("none", 4, TASK, False).ranks == 1
    with pytest.raises(RequestError, match="--engines magic: allowed are hpc_lbsgd"):
        run.choose(["magic"])


@pytest.mark.parametrize(
    "words, said", [(["--engines", "magic"], "--engines magic"), (["--model", "magic"], "model.name = 'magic'")]
)
def test_command_line_refuses_by_name(words, said):
    done = command("bench", "step", *words)
    assert done.returncode == 2 and said in done.stderr
