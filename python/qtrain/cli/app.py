"""The typer app, and how it shows errors."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

# what a user can mend; everything else is a defect of ours and keeps its traceback
USER_ERRORS = (ValueError, OSError, FloatingPointError, NotImplementedError, ImportError)


class FriendlyGroup(TyperGroup):
    """Shows an error that the user can mend as one red line, and exits with 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except USER_ERRORS as error:
            if ctx.params.get("debug"):
                raise
            console = Console(stderr=True, soft_wrap=True)
            console.print(f"error: {error}", style="red", markup=False, highlight=False)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=FriendlyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
) -> None:
    """Train, quantize and compare models with qkernels.

    Every command leaves a run directory. Killed at any moment, the same command goes on where the
    run stopped, to the same bits.
    """
