"""mmpretrain's inference API on ENC checkpoints and on what fold makes of them."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import ROOT, digits_config, train
from mmpretrain import ImageClassificationInferencer, get_model, inference_model
from mmpretrain.apis import ModelHub
from sklearn.datasets import load_digits

from enc_plugin import ENCConv2d
from enc_plugin.deploy import fold_checkpoint

ENC = ROOT / "configs" / "digits" / "resnet8_enc-ws_1xb64.py"
STOCK = ROOT / "configs" / "digits" / "resnet8_1xb64.py"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """``(config, checkpoint)`` of a short ENC run, and of the same folded."""
    folder = tmp_path_factory.mktemp("inference")
    train(digits_config(folder, epochs=2))
    fold_checkpoint(ENC, folder / "epoch_2.pth", folder / "stock.pth")
    return {"enc": (str(ENC), str(folder / "epoch_2.pth")), "folded": (str(STOCK), str(folder / "stock.pth"))}


@pytest.fixture(scope="module")
def image():
    return np.repeat((load_digits().images[3] * (255 / 16)).astype(np.uint8)[..., None], 3, axis=-1)


def test_get_model_and_the_inferencer_agree_on_enc_and_folded_checkpoints(checkpoints, image):
    results = {}
    for name, (config, checkpoint) in checkpoints.items():
        model = get_model(config, pretrained=checkpoint, device="cpu")
        assert isinstance(model.backbone.conv1, ENCConv2d) == (name == "enc")
        by_path = ImageClassificationInferencer(config, pretrained=checkpoint, device="cpu")
        (results[name],) = by_path(image)
        (by_model,) = ImageClassificationInferencer(model)(image)
        np.testing.assert_array_equal(by_model["pred_scores"], results[name]["pred_scores"])
    np.testing.assert_allclose(results["enc"]["pred_scores"], results["folded"]["pred_scores"], rtol=1e-4, atol=1e-6)
    assert results["enc"]["pred_class"] == results["folded"]["pred_class"]
    assert results["enc"]["pred_class"] in [str(digit) for digit in range(10)]


def test_inference_model_takes_a_registered_name_and_a_checkpoint_of_ones_own(
    checkpoints, image, tmp_path, monkeypatch
):
    # inference_model asks mmpretrain's model index for the task; a checkpoint of one's own needs an entry there.
    monkeypatch.setattr(ModelHub, "_models_dict", dict(ModelHub._models_dict))
    entries = "".join(
        f"- Name: own-{name}\n  In Collection: Own\n  Config: {config}\n  Weights: {checkpoint}\n"
        "  Results:\n  - Task: Image Classification\n    Dataset: digits\n    Metrics: {Top 1 Accuracy: 0}\n"
        for name, (config, checkpoint) in checkpoints.items()
    )
    (tmp_path / "metafile.yml").write_text(f"Collections:\n- Name: Own\nModels:\n{entries}")
    (tmp_path / "model-index.yml").write_text("Import:\n- metafile.yml\n")
    ModelHub.register_model_index(tmp_path / "model-index.yml")
    enc, folded = (inference_model(f"own-{name}", image, device="cpu") for name in checkpoints)
    np.testing.assert_allclose(enc["pred_scores"], folded["pred_scores"], rtol=1e-4, atol=1e-6)
    again = inference_model("own-folded", image, pretrained=checkpoints["folded"][1], device="cpu")
    np.testing.assert_array_equal(again["pred_scores"], folded["pred_scores"])


def test_a_stock_network_does_not_take_the_free_weights_of_enc_layers(checkpoints):
    with pytest.raises(ValueError, match="10 of its layers are ENC but plain in this model"):
        get_model(str(STOCK), pretrained=checkpoints["enc"][1])
