"""plan: parameters, FLOPs and bytes before anything is spent. Imports no torch."""

from pathlib import Path
from typing import Any

from growmoe.models.presets import preset as find_preset
from growmoe.planning.derived import config_of, describe
from growmoe.planning.recipes import plan_recipe
from growmoe.recipe_yaml import load_recipe


def run(
    recipe: Path | None,
    overrides: list[str],
    preset: str | None,
    config: Path | None,
    context: int | None,
) -> dict[str, Any]:
    """The accounting of one model, or of every stage of a recipe."""
    if recipe is not None:
        return {"recipe": str(recipe), "stages": plan_recipe(load_recipe(recipe, overrides))}
    if preset is not None:
        return {"preset": preset, **describe(find_preset(preset), context)}
    assert config is not None
    return {"config": str(config), **describe(config_of(config), context)}
