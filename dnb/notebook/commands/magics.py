"""`%dtrain` and `%%dtrain`: each verb of the table parses its line and calls the function of the same name."""

from __future__ import annotations

import re
from typing import Any

from IPython.core.magic import Magics, line_cell_magic, magics_class, no_var_expand

from dnb.errors import DnbError
from dnb.notebook.commands.corrections import corrected
from dnb.notebook.commands.verbs import VERBS, begin_of, call, load_verbs, run_line

_QUESTION = re.compile(r"^(\s*)%dtrain\s+(\w+)\s*\?{1,2}\s*$", re.MULTILINE)


def help_table() -> str:
    """Return the table of verbs, as the magic's docstring: `%dtrain?` shows it."""
    from dnb.notebook.commands.help_text import help_on  # torch: not before somebody asks

    return help_on()


@magics_class
class DtrainMagics(Magics):
    """One root, verbs as in the API; arguments name variables, or are expressions in braces."""

    @no_var_expand
    @line_cell_magic
    def dtrain(self, line: str, cell: str | None = None) -> Any:
        """%dtrain VERB [ARGUMENTS]; %dtrain help lists the verbs.

        As a cell magic, %%dtrain [--on 0,2-3|all] [--local] runs the cell on engines; %%dtrain VERB takes the lines of
        the cell for the rest of its own.
        """
        load_verbs()
        try:
            return self._run(line, cell)
        except DnbError as error:
            error.args = tuple(corrected(each, line) if isinstance(each, str) else each for each in error.args)
            raise

    def _run(self, line: str, cell: str | None) -> Any:
        if cell is not None and begin_of(line)[0] in VERBS:
            return run_line(f"{line}\n{cell}", shell=self.shell)
        if cell is not None and line.strip() != "--help":
            from dnb.notebook.commands.pool_commands import CELL  # torch: not before a cell is run

            return call(CELL, line, shell=self.shell, cell=cell)
        return run_line(line, shell=self.shell)

    # IPython asks an object for its docstring by this name before it reads `__doc__`
    setattr(dtrain, "getdoc", help_table)  # noqa: B010 - no attribute that a type knows


def ask_for_help(lines: list[str]) -> list[str]:
    """Transform `%dtrain fit?`, which IPython takes for a question on `fit`, into `%dtrain help fit`."""
    return [_QUESTION.sub(r"\g<1>%dtrain help \g<2>", line) for line in lines]


def register(shell: Any) -> None:
    """Make the magics known to a shell, once or again."""
    shell.register_magics(DtrainMagics)
    transforms = shell.input_transformers_cleanup
    if ask_for_help not in transforms:
        transforms.append(ask_for_help)
