"""`%dtrain` and `%%dtrain`: each verb of the table parses its line and calls the function of the same name."""

from __future__ import annotations

from typing import Any

from IPython.core.magic import Magics, line_cell_magic, magics_class, no_var_expand

from dnb.notebook.commands import plan_command, pool_commands, run_commands
from dnb.notebook.commands.verbs import call, run_line

# Each fills the table of verbs where it is imported.
VERB_MODULES = (pool_commands, plan_command, run_commands)


@magics_class
class DtrainMagics(Magics):
    """One root, verbs as in the API; arguments name variables, or are expressions in braces."""

    @no_var_expand
    @line_cell_magic
    def dtrain(self, line: str, cell: str | None = None) -> Any:
        """%dtrain VERB [ARGUMENTS].

        Of the pool: start, status, add, remove, spares, chaos, doctor, shutdown. Of the run: plan, fit, wait, pause,
        resume, stop, set, prove, checkpoint, attach, dashboard, compare, export. Of both: panel.

        As a cell magic, %%dtrain [--on 0,2-3|all] [--local] runs the cell on engines.
        """
        if cell is not None:
            return call(pool_commands.CELL, line, shell=self.shell, cell=cell)
        return run_line(line, shell=self.shell)
