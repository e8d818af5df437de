"""What the vision tower looks at: the attention that transformers gives out, without ever making all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memdb.models import saliency
from memdb.models.llava_onevision import VISION_BATCH
from memdb.models.load import load_model
from memdb.models.saliency import column_means
from tests.model_cases import other_spec, pictures, plain, relative, wrapped


@pytest.fixture(scope="module", params=["tiny", "other"])
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return "random:0" if request.param == "tiny" else other_spec(tmp_path_factory.mktemp("model"))


@torch.inference_mode()
def by_transformers(spec: str, pixels: Tensor, layer: int) -> Tensor:
    """(F, P): column means of the probabilities that eager attention gives out, of one layer."""
    tower = plain(spec).network.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        probabilities = tower(pixels, output_attentions=True).attentions[layer]  # (F, heads, P, P)
    finally:
        tower.set_attn_implementation(before)
    return probabilities.mean((1, 2))


def seen(model: object, count: int) -> tuple[list[object], Tensor]:
    """Pixels as our model takes them, and as transformers does."""
    shown = [model.prepare(picture) for picture in pictures(count)]  # type: ignore[attr-defined]
    whole = torch.stack([torch.from_numpy(picture.copy()) for picture in shown])
    return shown, (whole.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def test_it_is_the_attention_that_transformers_gives_out(spec: str) -> None:
    """In more frames than pass the tower at once, with an odd number of patches a side, pooled as its own function
    pools features.
    """
    model, count = wrapped(spec), VISION_BATCH + 2
    shown, pixels = seen(model, count)
    tokens, found = model.salient_tokens(shown)  # type: ignore[arg-type]
    assert torch.equal(tokens, model.visual_tokens(shown))  # type: ignore[arg-type]
    means = by_transformers(spec, pixels, -1)
    assert torch.allclose(means.sum(-1), torch.ones(count))  # every row of probabilities sums to 1
    truth = plain(spec).network.model.apply_pooling(means[..., None])[..., 0]
    assert found.dtype == torch.float32
    assert found.shape == (count, model.shape.frame_tokens)
    assert relative(found, truth) < 1e-5
    assert float(found.std()) > 1e-3 * float(found.mean()), "it is not flat"


@pytest.mark.parametrize(("feature_layer", "layer"), [(-1, 1), (-2, 0), (1, 0), (2, 1), ([0, -2], 0), (0, 0)])
def test_the_layer_is_the_last_whose_output_is_used(feature_layer: object, layer: int) -> None:
    model = load_model("random:0", device="cpu", dtype="float32")
    attentions = [part.self_attn for part in model._network.model.vision_tower.encoder.layers]  # type: ignore[attr-defined]
    model._network.config.vision_feature_layer = feature_layer  # type: ignore[attr-defined]
    assert model._last_kept_attention() is attentions[layer]  # type: ignore[attr-defined]


def test_nothing_stays_behind_in_the_network() -> None:
    model = wrapped()
    shown, _ = seen(model, 1)
    attention = model._last_kept_attention()  # type: ignore[attr-defined]
    model.salient_tokens(shown)  # type: ignore[arg-type]
    assert not attention.q_proj._forward_hooks
    assert not attention.k_proj._forward_hooks


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_steps_do_not_change_the_means_and_bound_the_matrix(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saliency, "ROWS_AT_ONCE", rows)
    largest = 0
    softmax = Tensor.softmax

    def counted(self: Tensor, *args: object) -> Tensor:
        nonlocal largest
        largest = max(largest, self.shape[2])
        return softmax(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Tensor, "softmax", counted)
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 25, 8, generator=random) for _ in range(2))
    found = column_means(q, k, 0.3)
    assert largest == min(rows, 25)
    truth = F.softmax(q.double() @ k.double().transpose(2, 3) * 0.3, -1).mean((1, 2))
    assert relative(found.double(), truth) < 1e-6


def test_a_bf16_tower_is_averaged_in_fp32(tmp_path: Path) -> None:
    model = load_model("random:0", device="cpu", dtype="bfloat16")
    shown, _ = seen(model, 2)
    _, found = model.salient_tokens(shown)  # type: ignore[arg-type]
    _, exact = wrapped().salient_tokens(shown)  # type: ignore[arg-type]
    assert found.dtype == torch.float32
    assert relative(found, exact) < 5e-2
