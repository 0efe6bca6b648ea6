"""run folder → one self-contained HTML file: no scripts, nothing fetched, model text inert."""

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


def report(run_dir: Path, *, out: Path) -> None:
    """Write the report of a run, or of a sweep (a run with points/), to the file `out`.

    The same artifacts give the same bytes. What is not there yet is said to be missing.
    """
    from prefpipe.report.collect import load_run
    from prefpipe.report.page import render

    page = render(load_run(run_dir))
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.rename(out)
    log.info("%s: report of %s, %d kB", out, run_dir, len(page.encode()) // 1000)
