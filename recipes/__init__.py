"""Recipes: strict YAML into typed, frozen sections; run directories; the pipeline of a folder of recipes."""

from recipes.interrupt import catch_interrupts

catch_interrupts()
