"""What a training run reads: pairs, and for SFT demonstrations, or completions taken as such."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from prefpipe import artifacts
from prefpipe.errors import ArtifactError
from prefpipe.records import Completion, Demonstration, Pair, ScoredCompletion, demonstration

log = logging.getLogger(__name__)

COMPLETIONS: dict[str, type[Completion]] = {kind.schema: kind for kind in (Completion, ScoredCompletion)}


def training_rows(inputs: Mapping[str, Sequence[Path]]) -> Iterator[Pair | Demonstration]:
    """The rows of all artifacts, streamed; `inputs` is the name under inputs. → folders.

    Raises ArtifactError when an artifact holds something else than its name says.
    """
    for folder in inputs.get("pairs", ()):
        yield from artifacts.read(folder, Pair, key="inputs.pairs")
    for folder in inputs.get("demonstrations", ()):
        yield from demonstrations(folder)


def demonstrations(folder: Path) -> Iterator[Demonstration]:
    """Of demonstration/1, and of completion/1 and scored/1, whose texts are taken whatever they score.

    A completion that was cut at generator.max_new_tokens would teach to stop there; those are left out with a warning.
    """
    key = "inputs.demonstrations"
    schema = artifacts.manifest(folder, key=key)["schema"]
    if schema == Demonstration.schema:
        yield from artifacts.read(folder, Demonstration, key=key)
        return
    if schema not in COMPLETIONS:
        raise ArtifactError(
            f"{key}={folder} holds {schema}, but {', '.join((Demonstration.schema, *COMPLETIONS))} is read here; give "
            f"pairs as inputs.pairs, and make demonstrations with stage=prepare or stage=pair pairer=pseudo_label"
        )
    num_cut = 0
    for completion in artifacts.read(folder, COMPLETIONS[schema], key=key):
        if completion.finish_reason == "length":
            num_cut += 1
        else:
            yield demonstration(completion)
    if num_cut:
        log.warning("%s: %d completions were cut at generator.max_new_tokens and are left out", folder, num_cut)
