from __future__ import annotations

from typing import Annotated

import typer

from prunec.cli import options

app = typer.Typer(
    help="The named methods that --recipe takes.\n\nExample: prunec recipes show slimgpt",
    no_args_is_help=True,
    rich_markup_mode=None,
)


Training = Annotated[
    bool, typer.Option("--recovery", help="Of the training afterwards: what `recover` takes.")
]


@app.command("list")
def listed(recovery: Training = False, json: options.Json = None) -> None:
    """The shipped recipes, one line each.

    Example: prunec recipes list
    """
    from prunec.cli.console import Screen
    from prunec.passes.recipe import load_recipe, recipe_names
    from prunec.recovery.settings import load_recovery, recovery_names

    screen = Screen(json=json)
    if recovery:
        trainings = [load_recovery(name) for name in recovery_names()]
        screen.facts("Recoveries", [[training.name, training.paper] for training in trainings])
        screen.write_json([training.to_dict() for training in trainings])
        return
    recipes = [load_recipe(name) for name in recipe_names()]
    screen.facts("Recipes", [[recipe.name, recipe.summary] for recipe in recipes])
    screen.write_json([recipe.to_dict() for recipe in recipes])


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A recipe.")],
    recovery: Training = False,
) -> None:
    """A recipe's settings, as YAML: copy it to a file, change it, and give its path to --recipe.

    Example: prunec recipes show slimgpt

    Example: prunec recipes show slimgpt --recovery
    """
    from prunec.passes.recipe import load_recipe
    from prunec.recovery.settings import load_recovery

    typer.echo((load_recovery if recovery else load_recipe)(name).to_yaml(), nl=False)
