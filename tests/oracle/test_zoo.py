"""Preflight over models nobody here wrote, and those of all shipped recipes: they train as their authors wrote them."""

import pytest
from authors import checks_of

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.train import models

ZOO = {
    "timm": {
        64: "resnet18 resnet26d resnetblur18 seresnet18 skresnet18 ecaresnet26t resnest14d dla34 hrnet_w18_small "
        "ese_vovnet19b_dw ghostnet_050 ghostnetv2_100 mobilenetv2_050 mobilenetv3_small_050 mobilenetv3_large_075 "
        "mobilenetv4_conv_small_050 lcnet_050 tinynet_e fbnetc_100 spnasnet_100 efficientnet_b0 efficientnet_lite0 "
        "mixnet_s hardcorenas_a semnasnet_075 mnasnet_small rexnet_100 repvgg_a0 mobileone_s0 regnetx_002 regnety_002 "
        "densenet121 resnetv2_50 resnetv2_50x1_bit cspresnet50 darknet17 gernet_s lambda_resnet26t convnextv2_atto "
        "edgenext_xx_small mobilevit_xxs mobilevitv2_050 fastvit_t8 repvit_m0_9 efficientvit_b0 poolformer_s12 "
        "starnet_s1 inception_next_tiny tresnet_m",
        96: "xception41 legacy_xception inception_v3",
        139: "inception_resnet_v2",
        224: "levit_128s efficientvit_m0 pit_ti_224 visformer_tiny xcit_nano_12_p16_224 mixer_s32_224",
    },
    "torchvision": {64: "resnet50 squeezenet1_1 mobilenet_v2 shufflenet_v2_x0_5 convnext_tiny swin_t", 96: "googlenet"},
}
NAMED = [
    (library, name, size) for library, sizes in ZOO.items() for size, names in sizes.items() for name in names.split()
]


pytestmark = pytest.mark.usefixtures("one_thread")


def from_zoo(library, name):
    if library == "timm":
        import timm

        return timm.create_model(name, num_classes=10, drop_rate=0.1)
    import torchvision

    more = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return getattr(torchvision.models, name)(num_classes=10, **more)


def test_the_zoo_is_large_enough():
    assert len(NAMED) >= 60


@pytest.mark.parametrize("library, name, size", NAMED, ids=[f"{n}" for _, n, _ in NAMED])
def test_models_train_as_their_authors_wrote_them(library, name, size):
    found, seen = checks_of(lambda: from_zoo(library, name), size)
    assert found == {"model": None, "masks": None}
    assert not seen.changed


def test_it_passes_the_models_of_all_shipped_recipes():
    """Each model of a shipped recipe once, on smaller pictures than the recipe's where those are large."""
    sizes, found = {"inception-resnet-v2": 139}, {}
    for name in recipes.shipped():
        recipe = recipes.read(name)
        model = recipe.model.model_dump_json()
        if model in found:
            continue
        channels, size = recipe.data.channels, sizes.get(recipe.model.name, min(recipe.data.image_size, 64))
        found[model], _ = checks_of(lambda r=recipe, c=channels: models.build(r.model, c, 10, r.seed), size, channels)
    assert len(found) >= 5 and all(checks == {"model": None, "masks": None} for checks in found.values()), found
