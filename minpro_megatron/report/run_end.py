"""The files that a run writes at its end: the report, then the summary."""

import logging
from pathlib import Path

from minpro_megatron.monitor.summary import RunSummary, write_summary
from minpro_megatron.report.report import write_report

log = logging.getLogger(__name__)


def record_end(run_dir: Path, summary: RunSummary) -> None:
    """Writes the report and then the summary. A summary means that the run has finished, so it is written last:
    whenever the process dies, a run with a summary is complete.

    If the report cannot be written, the error is logged with its traceback, and the run still succeeds.
    """
    try:
        write_report(run_dir, summary)
    except Exception:
        log.warning("the report could not be written; the run itself is finished", exc_info=True)
    write_summary(run_dir, summary)
