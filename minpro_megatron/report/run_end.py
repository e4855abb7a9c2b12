"""What a run leaves when it ends: its report, then its summary."""

import logging
from pathlib import Path

from minpro_megatron.monitor.summary import RunSummary, write_summary
from minpro_megatron.report.report import write_report

log = logging.getLogger(__name__)


def record_end(run_dir: Path, summary: RunSummary) -> None:
    """Writes the report and then the summary, whose presence says that the run has finished: whatever moment the
    process dies at, a run with a summary lacks nothing.

    A report that cannot be written is logged with its traceback: a run does not fail over its pictures.
    """
    try:
        write_report(run_dir, summary)
    except Exception:
        log.warning("the report could not be written; the run itself is finished", exc_info=True)
    write_summary(run_dir, summary)
