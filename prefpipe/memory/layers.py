"""What the layers keep for the backward pass, by the tokens of a micro-batch that pass through them."""

from typing import NamedTuple

from prefpipe.memory.setting import FLOAT, Setting, trained_parameters

QUERY_BLOCK = 256
"""As in training/attention.py; a test compares them."""


class _Layout(NamedTuple):
    """Tokens of a micro-batch as they pass through the layers.

    tokens: in all rows. read: those that the last layer computes. scored: those that the head sees. copied: tokens
    whose keys and values are copied, because they follow a shared prompt, with the prompt's. masked, masked_last:
    elements of the masks of a layer, and of the last one. cells: query-key pairs of one head. encoded: tokens of the
    encoder.
    """

    tokens: int
    read: int
    scored: int
    copied: int = 0
    masked: int = 0
    masked_last: int = 0
    cells: int = 0
    encoded: int = 0


def _layout(setting: Setting) -> _Layout:
    lengths, pairwise = setting.lengths, setting.loss.pairwise
    scored = sum(p.chosen + p.rejected for p in lengths)
    sides = 2 if pairwise else 1
    if setting.shape.encoder_layers:
        width = max(max(p.chosen, p.rejected) for p in lengths)
        encoded = len(lengths) * max(p.prompt for p in lengths)
        rows = sides * len(lengths)
        cells = rows * width * (width + max(p.prompt for p in lengths)) + encoded * max(p.prompt for p in lengths)
        return _Layout(rows * width, rows * width, scored, cells=cells, encoded=encoded)
    if setting.batching == "padded":
        width = max(p.prompt + max(p.chosen, p.rejected) for p in lengths)
        tokens = sides * len(lengths) * width
        return _Layout(tokens, tokens, scored, cells=tokens * width)
    shared = setting.batching == "shared"
    # (tokens of the document, of the shared prompt that it sees before them, read of it)
    documents = [(p.prompt + p.chosen, 0, p.chosen + 1) for p in lengths]
    if pairwise:
        documents += [(p.rejected, p.prompt, p.rejected) for p in lengths if shared]
        documents += [(p.prompt + p.rejected, 0, p.rejected + 1) for p in lengths if not shared]
    return _Layout(
        tokens=sum(own for own, _, _ in documents),
        read=sum(read for _, _, read in documents),
        scored=scored,
        copied=sum(own + before for own, before, _ in documents if before),
        masked=sum(_mask(own, own + before) for own, before, _ in documents if before),
        masked_last=sum(_mask(read, own + before) for own, before, read in documents),
        cells=sum(own * (own + before) for own, before, _ in documents),
    )


def _mask(queries: int, keys: int) -> int:
    """Elements of the masks of a document's query blocks (attention._in_blocks)."""
    before = keys - queries
    starts = range(0, queries, QUERY_BLOCK)
    return sum(min(QUERY_BLOCK, queries - start) * (before + min(start + QUERY_BLOCK, queries)) for start in starts)


class Layer(NamedTuple):
    """Bytes. saved: kept from the forward to the backward pass. work: needed for a while in the backward pass, with
    what is recomputed. parameters: how many are trained."""

    saved: int
    work: int
    parameters: int


class Layers:
    """What the layers keep for the backward pass, in the order of the forward pass."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.shape, self.at = setting, setting.shape, _layout(setting)
        self.small = 2 if setting.half else FLOAT
        narrow = setting.batching != "padded"
        shape = self.shape
        of_layer = trained_parameters(setting) // (shape.layers + shape.encoder_layers)
        of_layer = of_layer if setting.adapted else shape.layer_parameters
        encoder = [self._layer(of_layer, tokens=self.at.encoded) for _ in range(shape.encoder_layers)]
        decoder = [self._layer(of_layer, tokens=self.at.tokens) for _ in range(shape.layers - narrow)]
        if narrow:
            decoder.append(self._last(of_layer))
        self.each = [*encoder, *decoder]

    @property
    def final(self) -> int:
        """The last norm, the hidden states that the head reads, and the rotary embeddings of a packed row."""
        rotations = 2 * self.shape.attention // self.shape.heads if self.setting.batching != "padded" else 0
        return self._norm(self.at.tokens) + FLOAT * (self.shape.hidden * self.at.scored + rotations * self.at.tokens)

    @property
    def saved_in_all(self) -> int:
        """What all layers have saved at the end of the forward pass."""
        return sum(layer.saved for layer in self.each) + self.final

    @property
    def copies(self) -> int:
        """16-bit copies of the layers' weights, which autocast keeps as long as the backward pass needs them."""
        if not self.setting.half or self.setting.hardware.zero_stage or self.setting.model.adapter in ("lora", "qlora"):
            return 0
        return 2 * self.shape.linear_parameters

    def _layer(self, parameters: int, *, tokens: int) -> Layer:
        saved = self._attended(tokens, tokens, self.at.masked) + self._mlp(tokens, tokens)
        work = self._work(tokens, tokens)
        return self._checkpointed(Layer(saved, work, parameters), tokens)

    def _last(self, parameters: int) -> Layer:
        """The last layer, which computes only what is read (training/last_layer.py)."""
        tokens, read = self.at.tokens, self.at.read
        scattered = self.small * (self.shape.attention + 2 * self.shape.hidden) * read  # kept by index_copy
        saved = self._attended(tokens, read, self.at.masked_last) + self._mlp(tokens, read) + scattered
        return self._checkpointed(Layer(saved, self._work(tokens, read), parameters), tokens)

    def _checkpointed(self, layer: Layer, tokens: int) -> Layer:
        if not self.setting.training.gradient_checkpointing:
            return layer
        return Layer(FLOAT * self.shape.hidden * tokens, layer.saved + layer.work, layer.parameters)

    def _norm(self, tokens: int) -> int:
        """Its input, and, for the gradient of its weight, the input divided by its size."""
        return FLOAT * self.shape.hidden * tokens * (1 if self.setting.adapted else 2)

    def _attended(self, tokens: int, read: int, masked: int) -> int:
        """Norm, projections, queries, keys and values as attention saw them, and what came out."""
        shape, at, small = self.shape, self.at, self.small
        keys = shape.key_value if self.setting.batching == "padded" else shape.attention
        projected = shape.hidden * tokens + (shape.hidden * read if read < tokens else 0)
        # Where each row is a document, what comes out of attention is what the projection behind it gets.
        outputs = 1 if self.setting.batching == "padded" else 2
        attended = shape.attention * tokens + 2 * keys * (tokens + at.copied) + outputs * shape.attention * read
        scores = shape.heads * (2 * FLOAT + 1) * at.cells if shape.scored else 0
        sums = FLOAT * shape.heads * read
        cross = self._norm(tokens) + small * 3 * shape.attention * tokens if shape.encoder_layers else 0
        return (
            self._norm(tokens)
            + small * (projected + attended + masked)
            + scores
            + sums
            + cross
            + self._adapter(tokens, read, in_mlp=False)
        )

    def _mlp(self, tokens: int, read: int) -> int:
        """Norm, its output, and what the activation function took and gave."""
        shape = self.shape
        inner = (2 * shape.matrices - 2) * shape.intermediate
        return (
            self._norm(tokens) + self.small * (shape.hidden + inner) * read + self._adapter(tokens, read, in_mlp=True)
        )

    def _adapter(self, tokens: int, read: int, *, in_mlp: bool) -> int:
        if not self.setting.adapted:
            return 0
        rank = self.setting.model.adapter_rank or 16
        return FLOAT * rank * (self.shape.matrices * read if in_mlp else 2 * tokens + 2 * read)

    def _work(self, tokens: int, read: int) -> int:
        """Gradients of an MLP's two widest tensors and of the hidden states."""
        return self.small * 2 * self.shape.intermediate * read + FLOAT * 3 * self.shape.hidden * tokens
