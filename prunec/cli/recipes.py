from __future__ import annotations

from typing import Annotated

import typer

from prunec.cli import options

app = typer.Typer(
    help="The named methods that --recipe takes.\n\nExample: prunec recipes show slimgpt",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("list")
def listed(json: options.Json = None) -> None:
    """The shipped recipes, one line each.

    Example: prunec recipes list
    """
    from prunec.cli.console import Screen
    from prunec.passes.recipe import load_recipe, recipe_names

    screen = Screen(json=json)
    recipes = [load_recipe(name) for name in recipe_names()]
    screen.facts("Recipes", [[recipe.name, recipe.summary] for recipe in recipes])
    screen.write_json([recipe.to_dict() for recipe in recipes])


@app.command()
def show(name: Annotated[str, typer.Argument(metavar="NAME", help="A recipe.")]) -> None:
    """A recipe's settings, as YAML: copy it to a file, change it, and give its path to --recipe.

    Example: prunec recipes show slimgpt
    """
    from prunec.passes.recipe import load_recipe

    typer.echo(load_recipe(name).to_yaml(), nl=False)
