"""What the tests of scorers that ask a judge share: settings for a local server, and how a question is read."""

import re
from pathlib import Path
from typing import Any

from fault_server import FaultServer

from prefpipe.api import ApiConfig


def api(server: FaultServer, folder: Path) -> ApiConfig:
    """Little patience; a failed request fails no run."""
    return ApiConfig(
        base_url=server.url,
        model="m",
        cache=str(folder / "api"),
        max_attempts=2,
        backoff_seconds=0.01,
        max_failed_fraction=1.0,
    )


def marked(request: dict[str, Any]) -> dict[str, str]:
    """The texts between the marks of a question, by the marks' names."""
    text = request["messages"][-1]["content"]
    tag = re.search(r"marks that end in (\w+)", text)
    assert tag is not None
    found = re.findall(rf"<([\w-]+)-{tag[1]}>\n(.*?)\n</\1-{tag[1]}>", text, flags=re.DOTALL)
    return dict(found)
