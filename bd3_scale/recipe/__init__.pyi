from bd3_scale.recipe.checks import check_recipe as check_recipe
from bd3_scale.recipe.load import load_recipe as load_recipe
from bd3_scale.recipe.load import resolved_yaml as resolved_yaml
from bd3_scale.recipe.model import ModelRecipe as ModelRecipe
from bd3_scale.recipe.schema import Recipe as Recipe
from bd3_scale.recipe.section import RecipeError as RecipeError
from bd3_scale.recipe.vocabulary import Vocabulary as Vocabulary
