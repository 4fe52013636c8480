"""The recipe: one YAML file that says what to build and how to serve it."""

from trtqwen.recipe.engines import LlmApiSettings, VllmSettings
from trtqwen.recipe.files import (
    BUNDLED,
    CHECKOUT,
    find_recipe,
    load_recipe,
    recipe_content,
    recipe_names,
)
from trtqwen.recipe.sections import (
    SECTIONS,
    TORCH_SERVING,
    CheckpointRecipe,
    DtypeChoice,
    EmbeddingSharding,
    EngineRecipe,
    Int8LayoutChoice,
    KvCache,
    Positive,
    Quant,
    Recipe,
    ServeRecipe,
    override,
)

__all__ = [
    "BUNDLED",
    "CHECKOUT",
    "SECTIONS",
    "TORCH_SERVING",
    "CheckpointRecipe",
    "DtypeChoice",
    "EmbeddingSharding",
    "EngineRecipe",
    "Int8LayoutChoice",
    "KvCache",
    "LlmApiSettings",
    "Positive",
    "Quant",
    "Recipe",
    "ServeRecipe",
    "VllmSettings",
    "find_recipe",
    "load_recipe",
    "override",
    "recipe_content",
    "recipe_names",
]
