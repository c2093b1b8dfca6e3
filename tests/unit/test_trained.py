"""`predict`, `evaluate`, `export`: what they see of data and of a run's model."""

from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_RECIPE, changed
from PIL import Image

from hpc_lbsgd import recipe
from hpc_lbsgd.data import tree
from hpc_lbsgd.data.decode import pixels
from hpc_lbsgd.data.orientation import TAG
from hpc_lbsgd.data.source import Request, Source
from hpc_lbsgd.trained.predict import window_of


@pytest.mark.parametrize("orientation", ["apply", "ignore"])
@pytest.mark.parametrize("eval_resize", [0, 10])
def test_predict_sees_what_evaluation_sees_whichever_way_a_camera_was_held(tmp_path, orientation, eval_resize):
    rng = np.random.default_rng(0)
    for value in range(1, 9):
        path = tmp_path / "photos" / f"class-{value % 2}" / f"{value}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[TAG] = value
        shape = (8, 8, 3) if not eval_resize else (17 + value, 12, 3)
        Image.fromarray(rng.integers(0, 255, shape).astype(np.uint8)).save(path, exif=exif.tobytes())
    found = tree.index(tmp_path / "photos", None, 1)
    look = {"data__orientation": orientation, "data__eval_resize": eval_resize, "data__channels": 3}
    data = recipe.validate(changed(SMALL_RECIPE, data__mean=[0.0] * 3, data__std=[1.0] * 3, **look)).data
    request = Request(0, np.arange(8))
    source = Source(data, found, 0, train=False)
    stored = [pixels(Path(found.file(i)).read_bytes(), 3) for i in range(8)]
    for i, wanted in enumerate(source.cut(request, stored)):
        assert np.array_equal(window_of(found.file(i), data), wanted), found.key(i)
