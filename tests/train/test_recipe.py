import json
import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from edgeprune.errors import UsageError
from edgeprune.train import PRESETS, Recipe

BAD: list[tuple[str, Any]] = [
    ("epochs", -1),
    ("lr", 0.0),
    ("lr", -0.1),
    ("lr", math.nan),
    ("lr", math.inf),
    ("batch_size", 1),
    ("momentum", 1.0),
    ("weight_decay", -1e-4),
    ("warmup_share", 1.0),
    ("temperature", 0.0),
    ("distill_weight", 1.1),
    ("label_smoothing", 1.0),
    ("crop_padding", -1),
    ("optimizer", "adam"),
    ("feature_weight", -1.0),
    ("mixup", -0.1),
    ("cutmix", math.inf),
    ("ema_decay", 1.0),
    ("norms", "layer"),
    ("clip_norm", -1.0),
    ("precision", "fp16"),
    ("choose", "first"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_values_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name} cannot be"):
        Recipe(**{name: value})


def test_edges_are_taken() -> None:
    Recipe(epochs=0, momentum=0.0, weight_decay=0.0, warmup_share=0.0, distill_weight=1.0, batch_size=2, crop_padding=0)


def test_a_recipe_is_a_value() -> None:
    recipe = Recipe(epochs=2)
    assert recipe == Recipe(epochs=2) != Recipe(epochs=3)
    assert Recipe(**json.loads(json.dumps(recipe.to_json()))) == recipe
    with pytest.raises(FrozenInstanceError):
        recipe.epochs = 3  # type: ignore[misc]


def test_presets_are_recipes_that_can_be_changed() -> None:
    assert {name: Recipe.preset(name).epochs for name in PRESETS} == {"quick": 3, "standard": 40, "long": 150}
    assert Recipe.preset("long", lr=0.3, epochs=2) == Recipe(lr=0.3, epochs=2, ema_decay=0.999)
    with pytest.raises(UsageError, match="unknown preset 'slow'"):
        Recipe.preset("slow")
