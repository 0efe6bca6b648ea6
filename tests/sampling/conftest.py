"""The model that cites."""

from pathlib import Path

import pytest
from citing_model import save


@pytest.fixture(scope="session")
def citing_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model and its tokenizer; see citing_model."""
    return save(tmp_path_factory.mktemp("citing"))
