"""Context-ablation scoring of citation candidates, ours against two full forward passes per candidate, one at a time.

`python -m benchmarks.scoring [--json OUT]`. Theirs is SelfCite's released way: for each candidate the whole prompt
without the cited sentences, and the one with nothing else, each through the model alone, with the logits of every
position. Ours is scorer=context_ablation, from texts to scores. Both have their model loaded.

Gate: all scores of both sides are the same, to 1e-5.

Candidates are what sampling gives for one statement: one to three ranges of one to three sentences. In `anywhere` each
range lies anywhere in the document, which leaves least to share; in `nearby` all lie within ten sentences of one place.

What can be gained in `anywhere`, with the default shape. A token costs 6.2 MFLOP in the layers and 16.4 in the head, a
token that sees another 4.1 kFLOP. Theirs: 22,580 tokens, all with logits, 510 GFLOP, and 80 for attention. Ours: what
stands behind a removed sentence is seen otherwise and must be computed again, and on average the first one removed
stands after a third of the document; so 18,600 tokens are left, nearly none with logits, and most of the attention, as
it is the later tokens that see much: 100 and 65 GFLOP. At one speed for all of it that would be 590 / 165 = 3.6. The
attention kernel runs at less than half the speed of matrix products on a CPU, which leaves about 3.0. Larger batches
(scorer.max_batch_tokens) share 3 % more tokens and are no faster; nor are other blocks of queries, and attention in
two parts without a mask, joined by their log-sum-exp, gains 5 % at most.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Comparison, compare, report, timed
from benchmarks.profiles import SHAPES, SPECIAL, build_model
from prefpipe.records import Completion, Message, completion_id, prompt_id
from prefpipe.scorers import ScoringContext
from prefpipe.scorers.context_ablation import ContextAblation
from prefpipe.settings import HardwareConfig, ModelConfig

TOLERANCE = 1e-5
"""Of a reward, nats a token, fp32."""
TARGET = 3.0
SENTENCE_TOKENS, STATEMENT_TOKENS, BEFORE_TOKENS, QUESTION_TOKENS = 20, 24, 64, 16
SPREADS = {"anywhere": None, "nearby": 10}


@dataclass(frozen=True)
class Citation:
    """A document as sentences, a question, the answer so far, and the candidates for what its last statement cites."""

    sentences: list[str]
    question: str
    before: str
    statement: str
    candidates: list[list[tuple[int, int]]]

    def prompt(self, kept: Sequence[int]) -> str:
        """With some of the sentences."""
        return "".join(self.sentences[number] for number in kept) + self.question

    def cited(self, candidate: Sequence[tuple[int, int]]) -> list[int]:
        """Sentences of a candidate."""
        return sorted({number for a, b in candidate for number in range(a, b + 1)})

    def completions(self) -> list[Completion]:
        """The candidates as rows for a scorer."""
        every = range(len(self.sentences))
        messages = [Message(role="user", content=self.prompt(every))]
        ends = np.cumsum([len(sentence) for sentence in self.sentences]).tolist()
        spans = [[start, end] for start, end in zip([0, *ends], ends, strict=False)]
        rows = []
        for number, candidate in enumerate(self.candidates):
            cite = "".join(f"[{a}-{b}]" for a, b in candidate)
            text = f"{self.before}{self.statement}<cite>{cite}</cite></statement>"
            prompt = prompt_id(messages)
            row = Completion(
                prompt_id=prompt,
                completion_id=completion_id(prompt, text, number, 0),
                messages=messages,
                source="benchmark",
                text=text,
                meta={"sentence_spans": spans, "statement": 0},
            )
            rows.append(row)
        return rows


def citation(vocabulary: int, *, context: int, candidates: int, spread: int | None, seed: int = 0) -> Citation:
    """Random words. context: tokens of the document."""
    rng = np.random.default_rng(seed)

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(vocabulary - len(SPECIAL), size=count))

    number = context // SENTENCE_TOKENS
    low, high = 0, number - 3
    if spread is not None:
        low = int(rng.integers(max(1, high - spread)))
        high = min(high, low + spread)
    made: list[list[tuple[int, int]]] = []
    while len(made) < candidates:
        starts = sorted({int(s) for s in rng.integers(low, high, size=rng.integers(1, 4))})
        ranges = [(start, start + int(rng.integers(3))) for start in starts]
        apart = all(b + 1 < c for (_, b), (c, _) in pairwise(ranges))
        if apart and ranges not in made:
            made.append(ranges)
    return Citation(
        [words(SENTENCE_TOKENS) + " " for _ in range(number)],
        words(QUESTION_TOKENS),
        f"{words(BEFORE_TOKENS)} </statement>",
        f" {words(STATEMENT_TOKENS)} ",
        made,
    )


@torch.no_grad()
def one_at_a_time(model: torch.nn.Module, tokenizer: object, given: Citation) -> list[float]:
    """SelfCite's reward, mean log p(statement | cited sentences) - mean log p(statement | the others)."""

    def mean_logp(kept: Sequence[int]) -> float:
        turns = [{"role": "user", "content": given.prompt(kept)}]
        head = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) + given.before  # type: ignore[attr-defined]
        start = len(tokenizer(head, add_special_tokens=False)["input_ids"])  # type: ignore[operator]
        ids = tokenizer(head + given.statement, add_special_tokens=False, return_tensors="pt")["input_ids"]  # type: ignore[operator]
        logits = model(input_ids=ids).logits[0, start - 1 : -1]
        return logits.log_softmax(-1).gather(-1, ids[0, start:, None]).mean().item()

    every = range(len(given.sentences))
    rewards = []
    for candidate in given.candidates:
        cited = given.cited(candidate)
        rewards.append(mean_logp(cited) - mean_logp([number for number in every if number not in cited]))
    return rewards


def run(
    repeats: int = 5,
    *,
    context: int = 2048,
    candidates: int = 10,
    shape: str = "7m_v32k",
    threads: int = 1,
    spreads: Sequence[str] = tuple(SPREADS),
) -> list[Comparison]:
    """The gate and the race of each spread."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-scoring-") as scratch:
        folder = build_model(SHAPES[shape], Path(scratch) / "model")
        settings = ScoringContext(
            ModelConfig(name="bench", path=str(folder)),
            lambda: folder,
            HardwareConfig(name="cpu", device="cpu", precision="fp32", num_threads=threads),
            cache=Path(scratch),
            work=Path(scratch),
        )
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        for name in spreads:
            vocabulary = SHAPES[shape].vocabulary
            given = citation(vocabulary, context=context, candidates=candidates, spread=SPREADS[name])
            completions, scorer = given.completions(), ContextAblation()
            apart = _gate(name, scorer.score(completions, settings), one_at_a_time(model, tokenizer, given))
            rows.append(
                compare(
                    f"context_ablation_{name}",
                    ours=timed(lambda s=scorer, c=completions: s.score(c, settings)),
                    theirs=timed(lambda g=given: one_at_a_time(model, tokenizer, g)),
                    repeats=repeats,
                    warm_up=False,  # the gate was one
                    peer="two forwards each",
                    target=TARGET,
                    threads=threads,
                    details={"candidates": candidates, "context": context, "shape": shape, "largest_difference": apart},
                )
            )
    return rows


def _gate(name: str, mine: Sequence[object], theirs: Sequence[float]) -> float:
    """The largest difference. SystemExit above the tolerance."""
    apart = [abs(a - b) if isinstance(a, float) else float("inf") for a, b in zip(mine, theirs, strict=True)]
    if not all(difference <= TOLERANCE for difference in apart):
        raise SystemExit(f"gate {name}: the scores differ by {max(apart):.1e}: {list(mine)} against {list(theirs)}")
    print(f"gate {name}: {len(apart)} scores agree, the largest difference {max(apart):.1e}")
    return max(apart)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scoring", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--context", type=int, default=2048, help="tokens of the document")
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7m_v32k")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    rows = run(args.repeats, context=args.context, candidates=args.candidates, shape=args.shape, threads=args.threads)
    report(rows, args.json)


if __name__ == "__main__":
    main()
