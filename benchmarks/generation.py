"""Our sampling against `transformers.generate` in fixed batches in file order, same prompts, samples and limits.

`python -m benchmarks.generation [--json OUT]`. Gate: greedy answers of both sides are the same, token for token.
"""

import argparse
import itertools
import random
from pathlib import Path

import torch

from benchmarks.harness import Comparison, compare, report
from prefpipe.generators import request_seed
from prefpipe.generators.hf import HF, Engine, Request
from prefpipe.models import ASSETS
from prefpipe.settings import HardwareConfig, ModelConfig
from prefpipe.sources.arithmetic import arithmetic_problems

NUM_PROMPTS, NUM_SAMPLES, MAX_NEW_TOKENS, THEIR_BATCH = 256, 8, 96, 32


def requests(engine: Engine, num_samples: int) -> list[Request]:
    """Prompts of varying length: one to four problems in one."""
    rng, problems = random.Random(0), arithmetic_problems(0)
    made = []
    for place in range(NUM_PROMPTS):
        text = " ".join(row["question"] for row in itertools.islice(problems, rng.randint(1, 4)))
        ids = engine.template.prompt([{"role": "user", "content": text}])
        made.append(Request(place, ids, [request_seed(0, 0, str(place), s) for s in range(num_samples)]))
    return made


def theirs(engine: Engine, rows: list[Request], *, sample: bool) -> list[list[int]]:
    """transformers.generate, left-padded batches of prompts in file order."""
    answers: list[list[int]] = []
    pad = engine.tokenizer.pad_token_id
    samples = NUM_SAMPLES if sample else 1
    for start in range(0, len(rows), THEIR_BATCH):
        batch = [row.prompt_ids for row in rows[start : start + THEIR_BATCH]]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        how = (
            {"do_sample": True, "temperature": 1.0, "top_k": 0, "num_return_sequences": samples}
            if sample
            else {"do_sample": False}
        )
        out = engine.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=mask,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=sorted(engine.template.stop_ids),
            pad_token_id=pad,
            **how,
        )
        for row in out[:, width:].tolist():
            end = next((i for i, token in enumerate(row) if token in engine.template.stop_ids), len(row) - 1)
            answers.append(row[: end + 1])
    return answers


def run(repeats: int = 5) -> list[Comparison]:
    """The gate, then the race."""
    model, hardware = ModelConfig(name="tiny", path="builtin:tiny"), HardwareConfig(name="cpu", device="cpu")
    engine = Engine(model, ASSETS / "tiny", hardware)
    greedy = HF(num_samples=1, temperature=0.0, max_new_tokens=MAX_NEW_TOKENS)
    rows = requests(engine, 1)
    mine = engine.sample(rows, greedy)
    same = sum(mine[i][0].token_ids == answer for i, answer in enumerate(theirs(engine, rows, sample=False)))
    if same < 0.99 * len(rows):
        raise SystemExit(f"gate: only {same} of {len(rows)} greedy answers agree")
    print(f"gate: {same} of {len(rows)} greedy answers agree token for token")
    sampled, rows = HF(num_samples=NUM_SAMPLES, max_new_tokens=MAX_NEW_TOKENS), requests(engine, NUM_SAMPLES)
    return [
        compare(
            f"hf_generation_{NUM_PROMPTS}x{NUM_SAMPLES}",
            ours=lambda: engine.sample(rows, sampled),
            theirs=lambda: theirs(engine, rows, sample=True),
            repeats=repeats,
        )
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    report(run(args.repeats), args.json)


if __name__ == "__main__":
    main()
