"""How parameters lie in buckets."""

import pytest
import torch
from torch import nn

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.parallel.layout import plan_layouts
from hpc_lbsgd.train import models
from hpc_lbsgd.train.optim import no_decay_names


def test_layout_covers_every_parameter_aligned_and_in_backward_order():
    model = models.build(recipes.Model(name="resnet20"), 3, 10, 0)
    named = list(model.named_parameters())
    layouts = plan_layouts(named, no_decay_names(model), 100, 200_000, 50_000)
    assert layouts[0].statistics == 100 and all(x.statistics == 0 for x in layouts[1:])
    names = [v.name for x in layouts for v in x.views]
    assert sorted(names) == sorted(n for n, _ in named)
    assert layouts[0].views[0].name == "fc.weight"
    for x in layouts:
        places = sorted((v.offset, v.offset + v.parameter.numel()) for v in x.views)
        assert all(a_end <= b for (_, a_end), (b, _) in zip(places, places[1:], strict=False))
        assert all(v.offset * 4 % 64 == 0 for v in x.views if v.offset != x.statistics)
        assert all((v.offset < x.decay_end) == (v.parameter.dim() > 1) for v in x.views)
    first_of = [min(names.index(v.name) for v in x.views) for x in layouts]
    assert first_of == sorted(first_of)


@pytest.mark.parametrize("bucket_bytes", [0, 64, 100])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_an_empty_parameter_has_no_bucket_to_itself(bucket_bytes, place):
    """Nothing can be summed there, and no unit be found."""
    named = [(f"p{i}", nn.Parameter(torch.zeros(0 if i == place else 32))) for i in range(4)]
    layouts = plan_layouts(named, set(), 0, bucket_bytes, bucket_bytes)
    assert len(layouts) == 3 and all(x.size == 32 for x in layouts)
    assert sorted(v.name for x in layouts for v in x.views) == ["p0", "p1", "p2", "p3"]
