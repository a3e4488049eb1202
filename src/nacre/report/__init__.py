"""The report of a run: three charts and one page that works anywhere, made from its files alone.

The same files give the same report, byte for byte.
"""

from nacre.report.files import RunFiles, StageView, load_run
from nacre.report.page import write
from nacre.report.tables import ledger_table, stage_table

__all__ = ["RunFiles", "StageView", "ledger_table", "load_run", "stage_table", "write"]
