"""Artifacts: a folder of `part-*.jsonl` and a `manifest.json` that marks it as done and holds schema and provenance.

An artifact appears whole (by one rename) or not at all. While it is written, part by part, it is beside its place as
`<name>.partial`; a part counts once its note under `progress/` exists, so a killed run resumes after its last part.
Everything but `provenance.json` (times, host, command line) is a function of inputs and settings, byte for byte.

reading.py reads and verifies, plans.py compares what is wanted with what is there, drafts.py writes and publishes.
"""

from prefpipe.artifacts.accounts import Account
from prefpipe.artifacts.drafts import RECORDS_PER_PART, Draft, draft
from prefpipe.artifacts.plans import (
    NotKnownError,
    Outlook,
    Plan,
    PlanFound,
    changes,
    differences,
    is_planning,
    outlook,
    planning,
)
from prefpipe.artifacts.reading import (
    BUFFER_BYTES,
    digest,
    is_complete,
    manifest,
    partial_path,
    read,
    read_rows,
    verify,
)

__all__ = [
    "BUFFER_BYTES",
    "RECORDS_PER_PART",
    "Account",
    "Draft",
    "NotKnownError",
    "Outlook",
    "Plan",
    "PlanFound",
    "changes",
    "differences",
    "digest",
    "draft",
    "is_complete",
    "is_planning",
    "manifest",
    "outlook",
    "partial_path",
    "planning",
    "read",
    "read_rows",
    "verify",
]
