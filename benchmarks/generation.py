"""Our sampling against `transformers.generate` in fixed batches in file order, same prompts, samples and limits; and
with the calculator against without.

`python -m benchmarks.generation [--json OUT]`. Gates: greedy answers of both sides are the same, token for token; the
calculator's results are right.
"""

import argparse
import itertools
import operator
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import Comparison, compare, report, timed
from prefpipe.generators import request_seed
from prefpipe.generators.hf import HF, Engine, Request
from prefpipe.models import ASSETS
from prefpipe.settings import HardwareConfig, ModelConfig
from prefpipe.sources.arithmetic import arithmetic_problems

NUM_PROMPTS, NUM_SAMPLES, MAX_NEW_TOKENS, THEIR_BATCH = 256, 8, 96, 32
TARGET = 1.8
"""Theirs / ours in time, at full size on two cores."""
CALCULATOR_BATCH, CALCULATOR_REPEATS = 32, 5
LEAST_AGREEMENT = 0.99
"""Share of greedy answers that must be the same; two equal best tokens may fall either way."""


def requests(engine: Engine, num_prompts: int, num_samples: int) -> list[Request]:
    """Prompts of varying length: one to four problems in one."""
    rng, problems = random.Random(0), arithmetic_problems(0)
    made = []
    for place in range(num_prompts):
        text = " ".join(row["question"] for row in itertools.islice(problems, rng.randint(1, 4)))
        ids = engine.template.prompt([{"role": "user", "content": text}])
        made.append(Request(place, ids, [request_seed(0, 0, str(place), s) for s in range(num_samples)]))
    return made


def theirs(engine: Engine, rows: Sequence[Request], *, sample: bool) -> list[list[int]]:
    """transformers.generate, left-padded batches of prompts in file order. Greedy takes one answer of each prompt."""
    answers: list[list[int]] = []
    pad, stops = engine.tokenizer.pad_token_id, engine.template.stop_ids
    for start in range(0, len(rows), THEIR_BATCH):
        batch = [row.prompt_ids for row in rows[start : start + THEIR_BATCH]]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        samples = {"temperature": 1.0, "top_k": 0, "num_return_sequences": len(rows[0].seeds)} if sample else {}
        out = engine.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=sorted(stops),
            pad_token_id=pad,
            do_sample=sample,
            **samples,
        )
        for row in out[:, width:].tolist():
            end = next((i for i, token in enumerate(row) if token in stops), len(row) - 1)
            answers.append(row[: end + 1])
    return answers


def calculator(engine: Engine, repeats: int, threads: int | None) -> Comparison:
    """One batch of 32 rows with and without: seconds per 1000 tokens, as right results give texts of another length."""
    rows = requests(engine, CALCULATOR_BATCH, 1)
    details: dict[str, int] = {}

    def side(*, on: bool) -> float:
        generator = HF(num_samples=1, max_new_tokens=MAX_NEW_TOKENS, calculator=on)
        started = time.perf_counter()
        answers = [answer for (answer,) in engine.sample(rows, generator).values()]
        seconds = time.perf_counter() - started
        num_tokens = sum(len(answer.token_ids) for answer in answers)
        details["tokens_with" if on else "tokens_without"] = num_tokens
        if on:
            details["results"] = sum(len(answer.calculator["forced"]) for answer in answers if answer.calculator)
            refuse_wrong_results([engine.template.decode(answer.token_ids) for answer in answers])
        return 1000 * seconds / num_tokens

    row = compare(
        f"hf_calculator_1x{CALCULATOR_BATCH}",
        ours=lambda: side(on=True),
        theirs=lambda: side(on=False),
        repeats=CALCULATOR_REPEATS * repeats,
        peer="without, s per 1000 tokens",
        target=round(1 / 1.10, 3),
        threads=threads,
        details=details,
    )
    print(f"calculator: {details}")
    return row


def refuse_wrong_results(texts: Sequence[str]) -> None:
    """The gate: whole numbers, as in these problems, worked out by Python."""
    operators = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    for text in texts:
        for left, sign, right, result in re.findall(r"<<([0-9]+)([-+*])([0-9]+)=(.*?)>>", text):
            if result != str(operators[sign](int(left), int(right))):
                raise SystemExit(f"gate: {left}{sign}{right}={result}")


def run(
    repeats: int = 5, *, num_prompts: int = NUM_PROMPTS, num_samples: int = NUM_SAMPLES, threads: int | None = None
) -> list[Comparison]:
    """The gate, then the race."""
    model = ModelConfig(name="tiny", path="builtin:tiny")
    engine = Engine(model, ASSETS / "tiny", HardwareConfig(name="cpu", device="cpu", num_threads=threads))
    rows = requests(engine, num_prompts, 1)
    mine = engine.sample(rows, HF(num_samples=1, temperature=0.0, max_new_tokens=MAX_NEW_TOKENS))
    same = sum(mine[i][0].token_ids == answer for i, answer in enumerate(theirs(engine, rows, sample=False)))
    if same < LEAST_AGREEMENT * num_prompts:
        raise SystemExit(f"gate: only {same} of {num_prompts} greedy answers agree")
    print(f"gate: {same} of {num_prompts} greedy answers agree token for token")
    generator = HF(num_samples=num_samples, max_new_tokens=MAX_NEW_TOKENS)
    rows = requests(engine, num_prompts, num_samples)
    return [
        compare(
            f"hf_generation_{num_prompts}x{num_samples}",
            ours=timed(lambda: engine.sample(rows, generator)),
            theirs=timed(lambda: theirs(engine, rows, sample=True)),
            repeats=repeats,
            peer="transformers",
            target=TARGET,
            threads=threads,
        ),
        calculator(engine, repeats, threads),
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=NUM_PROMPTS)
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    rows = run(args.repeats, num_prompts=args.prompts, num_samples=args.samples, threads=args.threads)
    report(rows, args.json)


if __name__ == "__main__":
    main()
