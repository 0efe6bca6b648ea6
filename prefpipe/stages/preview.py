"""pairs → what training will see of the first of them: each token with its role, as text and as one HTML file."""

import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prefpipe import artifacts, models
from prefpipe.errors import ConfigError, DataError
from prefpipe.losses import Loss
from prefpipe.records import Demonstration, Pair, Split
from prefpipe.settings import ModelConfig, SelectionConfig, TrainingConfig

if TYPE_CHECKING:
    from prefpipe.prompts import ChatTemplate
    from prefpipe.report.preview import Shown, ShownBatch
    from prefpipe.training.batches import Fitted

log = logging.getLogger(__name__)


class Found(NamedTuple):
    """One example to show: where it comes from, and what it was before truncation."""

    row: int
    source: str
    fitted: "Fitted"


def preview(
    data: Mapping[str, Sequence[Path]],
    out: Path,
    *,
    model: ModelConfig,
    policy: Path,
    loss: Loss,
    training: TrainingConfig,
    selection: SelectionConfig,
    num_examples: int,
) -> str:
    """Write the preview of the first examples to the file `out`; returns it as text for this process's stdout.

    Encoded, cut and collated by what training calls; no weights are loaded. Rows are read only as far as needed.

    Args:
        data: as stage=train reads them. policy: a folder whose tokenizer and config are read.
    Raises:
        DataError: no row can be trained on.
    """
    from prefpipe.report.preview import Preview, html, is_coloured, terminal
    from prefpipe.training.data import training_rows

    template = models.load_template(model, policy, rewards=loss.of_rewards)
    batching, facts = _batching(training, template)
    left_out: Counter[str] = Counter()
    found = list(
        _first(training_rows(data), num_examples, template, training, loss=loss, selection=selection, counts=left_out)
    )
    if not found:
        raise DataError(f"no row is left to train on, of {left_out.total()}: {dict(left_out)}")
    examples, batches = _collated(found, template, training, batching, loss=loss, weighted=selection.name != "none")
    folders = [path for paths in data.values() for path in paths]
    total = sum(artifacts.manifest(path)["num_records"] for path in folders)
    facts |= {
        "loss": loss.describe(),
        "length": f"at most {training.max_tokens} tokens; a prompt is cut to no less than {training.max_prompt_tokens}",
    }
    notes = [f"Left out on the way: {', '.join(f'{n} {why}' for why, n in left_out.items())}."] if left_out else []
    if selection.name != "none" or training.order != "shuffled":
        notes.append(
            f"In the order of the data: selection={selection.name} and training.order={training.order} need all rows."
        )
    title = f"{' + '.join(map(str, folders))}: {len(found)} examples from {total} rows"
    made = Preview(title, facts, notes, examples, batches)
    _write(out, html(made))
    return terminal(made, coloured=is_coloured(sys.stdout)) + f"\n{out}\n"


def _first(
    rows: Iterable[Pair | Demonstration],
    num: int,
    template: "ChatTemplate",
    training: TrainingConfig,
    *,
    loss: Loss,
    selection: SelectionConfig,
    counts: Counter[str],
) -> Iterator[Found]:
    """The first `num` examples of the training split; counts: of rows before them that give none, by reason."""
    from prefpipe.prompts import TemplateError
    from prefpipe.training.batches import encode_row

    shown = 0
    for row, pair in enumerate(rows):
        if pair.split != Split.train:
            counts["other_split"] += 1
            continue
        try:
            parts = encode_row(
                pair, row, template, training, pairwise=loss.pairwise, all_turns=loss.all_turns, selection=selection
            )
        except TemplateError as error:
            counts[error.code] += 1
            continue
        for fitted in parts:
            if fitted.example is None:
                counts["too_long"] += 1
                continue
            yield Found(row, pair.source, fitted)
            shown += 1
            if shown == num:
                return


def _batching(training: TrainingConfig, template: "ChatTemplate") -> tuple[str, dict[str, str]]:
    """The batching to show; "auto" depends on the weights, so its first candidate stands for it."""
    if template.decoder_start is None:
        if training.batching != "auto":
            return training.batching, {"batching": training.batching}
        first = "shared; training.batching=auto takes it unless its numbers differ from the model's own"
        return "shared", {"batching": first}
    if training.batching not in ("auto", "padded"):
        raise ConfigError(
            f"training.batching={training.batching} lays a prompt and its completions into one row, but this model is "
            f"an encoder-decoder, which keeps them apart; use training.batching=auto"
        )
    return "padded", {"batching": "padded, each prompt once in the encoder"}


def _collated(
    found: Sequence[Found],
    template: "ChatTemplate",
    training: TrainingConfig,
    batching: str,
    *,
    loss: Loss,
    weighted: bool,
) -> tuple[list["Shown"], list["ShownBatch"]]:
    """The examples as the tensors of their micro-batches say, and the layout of each micro-batch."""
    from prefpipe.report.preview import Shown, ShownBatch, token_texts
    from prefpipe.training.batches import collate, micro_batches
    from prefpipe.training.views import Side, sides_of, stretches

    tokenizer = template.tokenizer
    added = {token for token, what in tokenizer.added_tokens_decoder.items() if what.special}
    special = frozenset({*tokenizer.all_special_ids, *added})

    def decode(ids: list[int]) -> str:
        decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(decoded, str)
        return decoded

    def texts(side: Side) -> list[str]:
        prompt, completion = [t.id for t in side.prompt], [t.id for t in side.completion]
        if template.decoder_start is None:
            return token_texts(decode, prompt + completion)
        return token_texts(decode, prompt) + token_texts(decode, completion)

    encoded = [one.fitted.example for one in found]
    examples = [example for example in encoded if example is not None]
    shown: dict[int, Shown] = {}
    batches = []
    for micro in micro_batches(examples, range(len(examples)), training):
        batch = collate([examples[i] for i in micro], batching, pairwise=loss.pairwise)
        before = [found[i].fitted for i in micro]
        keep_first = template.bos is not None
        sides = sides_of(batch, before, special=special, keep_first=keep_first, of_rewards=loss.of_rewards)
        for i, both in zip(micro, sides, strict=True):
            weight = examples[i].weight if weighted else None
            shown[i] = Shown(
                found[i].row, examples[i].pair_id, found[i].source, weight, [(side, texts(side)) for side in both]
            )
        places = stretches(batch, len(micro))
        rows, width = batch.input_ids.shape
        used = sum(place.end - place.start for place in places)
        prompts = None if batch.encoder_ids is None else (batch.encoder_ids.shape[0], batch.encoder_ids.shape[1])
        numbers = [i + 1 for i in micro]
        batches.append(ShownBatch(batching, (rows, width), rows * width - used, prompts, numbers, places))
    return [shown[i] for i in range(len(found))], batches


def _write(out: Path, page: str) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.rename(out)
    log.info("%s: preview", out)
