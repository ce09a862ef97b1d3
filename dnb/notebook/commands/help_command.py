"""The verb `%dtrain help`."""

from __future__ import annotations

from dnb.errors import ArgumentError
from dnb.notebook.commands.verbs import verb as enter
from dnb.notebook.output import say


@enter("help", group="help", rest="verb", example="%dtrain help fit")
def _help(verb: list[str]) -> None:
    """List the verbs, or tell the flags of one.

    Args:
        verb: the one whose flags are told; all verbs if left out.
    """
    from dnb.notebook.commands.help_text import help_on  # it reads the table that this module is a part of

    if len(verb) > 1:
        raise ArgumentError(f"%dtrain help tells one verb at a time: %dtrain help {verb[0]}")
    say(help_on(*verb))
