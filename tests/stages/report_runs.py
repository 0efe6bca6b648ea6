"""Small real runs for the tests of analyze and report, written with prefpipe.artifacts like the stages do."""

import random
from pathlib import Path

import orjson

from prefpipe.artifacts import Plan, draft
from prefpipe.files import write_json
from prefpipe.records import Completion, EvalResult, Pair, Prompt, ScoredCompletion, Split, prompt_id
from prefpipe.statistics import wilson

MODEL = {"name": "tiny", "path": "builtin:tiny"}
NUM_HELDOUT = 40

HOSTILE = (
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(2)>",
    "{{7*7}} {% raw %}",
    "safe\u202etxt.exe\u2066",
    "zero\u200bwidth\ufeff",
    "\x1b[31mred\x1b[0m\x07",
    "<!-- --> ]]> &lt;b&gt; \"quoted' javascript:alert(3)",
)


def publish(
    out: Path, schema: str, records: list, *, stage: str, uses: dict, parents: dict | None = None, **counts
) -> Path:
    with draft(out, Plan(stage, schema, uses, parents or {})) as art:
        filtered, quarantined = counts.get("filtered", {}), counts.get("quarantined", [])
        rows_out = counts.get("rows_out", len(records))
        rows_in = rows_out + sum(filtered.values()) + len(quarantined)
        art.commit(0, records, rows_in=rows_in, rows_out=rows_out, filtered=filtered, quarantined=quarantined)
    return out


def question(index: int) -> str:
    return f"A box holds {index + 2} pens. How many pens are in {index % 7 + 2} boxes?"


def prompts(split: Split, num: int) -> list[Prompt]:
    start = 0 if split is Split.train else 1000
    found = []
    for index in range(start, start + num):
        messages = [{"role": "user", "content": question(index)}]
        answer = str((index + 2) * (index % 7 + 2))
        found.append(
            Prompt(prompt_id=prompt_id(messages), messages=messages, source="arithmetic", split=split, answer=answer)
        )
    return found


def completion(prompt: Prompt, text: str, correct: bool, **extra) -> ScoredCompletion:
    return ScoredCompletion(
        prompt_id=prompt.prompt_id,
        completion_id=f"{prompt.prompt_id}-{len(text)}",
        messages=prompt.messages,
        source=prompt.source,
        split=prompt.split,
        answer=prompt.answer,
        text=text,
        scores={"correct": float(correct)},
        finish_reason="stop",
        **extra,
    )


def evaluate(
    folder: Path, right: list[bool], *, uses: dict, parents: dict, texts: dict[int, str] | None = None
) -> None:
    """The evals and eval_samples of held-out prompts of which right[i] says whether prompt i was answered well."""
    heldout = prompts(Split.heldout, len(right))
    low, high = wilson(sum(right), len(right))
    value = sum(right) / len(right)
    results = [
        EvalResult(task="accuracy", metric="accuracy", value=value, low=low, high=high, n=len(right)),
        EvalResult(task="maj_at_k", metric="maj@4", value=value / 2, low=low / 2, high=high / 2, n=len(right)),
    ]
    samples = []
    for index, (prompt, correct) in enumerate(zip(heldout, right, strict=True)):
        steps = f"Each box has the same number of pens. The answer is {prompt.answer if correct else 1}."
        samples.append(completion(prompt, (texts or {}).get(index, steps), correct))
    publish(folder / "evals", "eval/1", results, stage="evaluate", uses=uses, parents=parents)
    publish(folder / "eval_samples", "scored/1", samples, stage="evaluate", uses=uses, parents=parents)


def verdicts(num_right: int, *, num: int = NUM_HELDOUT, seed: int = 0) -> list[bool]:
    right = [index < num_right for index in range(num)]
    random.Random(seed).shuffle(right)
    return right


def train(folder: Path, *, uses: dict, parents: dict, steps: int = 20, chosen_slope: float = -1.0) -> None:
    """A checkpoint whose curves fall and rise in straight lines."""
    with draft(folder, Plan("train", "checkpoint/1", uses, parents)) as art:
        (art.work / "model.safetensors").write_bytes(b"weights")
        rows, times = [], []
        for step in range(1, steps + 1):
            chosen, rejected = 0.02 * step, -0.05 * step
            rows.append(
                {
                    "step": step,
                    "epoch": step / steps,
                    "train/loss": 0.69 - 0.02 * step,
                    "train/rewards/chosen": chosen,
                    "train/rewards/rejected": rejected,
                    "train/rewards/margin": chosen - rejected,
                    "train/rewards/accuracy": min(1.0, 0.5 + 0.02 * step),
                    "train/logps/chosen": -100 + chosen_slope * step,
                    "train/logps/rejected": -110.0 - 2 * step,
                    "train/grad_norm": 3.0 / step,
                    "train/learning_rate": 5e-7 * (1 - step / steps),
                }
            )
            times.append({"step": step, "seconds": 0.5, "tokens_per_second": 2000.0})
        for name, lines in (("metrics.jsonl", rows), ("timing.jsonl", times)):
            (art.work / name).write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in lines))
        art.add_files(["model.safetensors", "metrics.jsonl", "timing.jsonl"])


def build_run(
    run: Path,
    *,
    rounds: int = 2,
    right: tuple[int, ...] = (12, 22, 30),
    loss: dict | None = None,
    seed: int = 0,
    hostile: bool = False,
    longer: int = 1,
    chosen_slope: float = -1.0,
) -> Path:
    """A finished run. right: prompts answered well before, after round 0, after round 1, … of NUM_HELDOUT.

    longer: how many times longer chosen texts are. hostile: put hostile texts into every field that holds text.
    """
    bad = HOSTILE if hostile else ("plain text",)
    loss = loss or {"name": "dpo", "beta": 0.1}
    shared = {"seed": seed, "model": MODEL}
    heldout, training_prompts = prompts(Split.heldout, NUM_HELDOUT), prompts(Split.train, 30)
    records = publish(
        run / "prompts",
        "prompt/1",
        training_prompts + heldout,
        stage="prepare",
        uses={"data_mixer": {"name": "arithmetic", "heldout_fraction": 0.1}, "seed": seed},
        filtered={"duplicate": 3},
        quarantined=[{"code": "not_json", "line": 7}, {"code": "not_json", "line": 9}],
    )
    task = {"accuracy": {"name": "accuracy", "max_prompts": None}}
    texts = dict(enumerate(bad)) if hostile else None
    evaluate(run / "base", verdicts(right[0], seed=1), uses={**shared, "task": task}, parents={"prompts": [records]})
    for round_ in range(rounds):
        folder = run / f"round_{round_}"
        completions = [
            Completion(
                prompt_id=prompt.prompt_id,
                completion_id=f"{prompt.prompt_id}-{index}",
                messages=prompt.messages,
                source=prompt.source,
                answer=prompt.answer,
                text=f"The answer is {index}. {bad[index % len(bad)]}",
                round=round_,
            )
            for prompt in training_prompts
            for index in range(2)
        ]
        generator = {"generator": {"name": "hf", "temperature": 1.0}, "round": round_, **shared}
        publish(
            folder / "completions",
            "completion/1",
            completions,
            stage="generate",
            uses=generator,
            parents={"prompts": [records]},
            rows_out=len(training_prompts),
        )
        scored = [completion(p, f"{p.answer} {bad[i % len(bad)]}", i % 2 == 0) for i, p in enumerate(training_prompts)]
        publish(
            folder / "scored",
            "scored/1",
            scored,
            stage="score",
            uses={"scorer": {"name": "exact_answer"}},
            parents={"completions": [folder / "completions"]},
        )
        pairs = [
            Pair(
                prompt_id=p.prompt_id,
                messages=[{"role": "system", "content": bad[i % len(bad)]}, *p.messages],
                source=bad[i % len(bad)] if hostile else p.source,
                chosen=f"It is {p.answer}. {bad[i % len(bad)]}" * longer,
                rejected=f"It is 1, maybe. {bad[-i % len(bad)]}",
                chosen_score=1.0,
                rejected_score=0.25 * (i % 3),
            )
            for i, p in enumerate(training_prompts[: 20 - round_])
        ]
        publish(
            folder / "pairs",
            "pair/1",
            pairs,
            stage="pair",
            uses={"pairer": {"name": "best_worst", "min_margin": 0.0}, "seed": seed},
            parents={"scored": [folder / "scored"]},
            filtered={"tie": 8, bad[0] if hostile else "too_close": 2 + round_},
        )
        uses = {**shared, "loss": loss, "training": {"learning_rate": 5e-7}, "round": round_}
        train(folder / "checkpoint", uses=uses, parents={"pairs": [folder / "pairs"]}, chosen_slope=chosen_slope)
        evaluate(
            folder,
            verdicts(right[round_ + 1], seed=1),
            uses={**shared, "task": task},
            parents={"prompts": [records], "checkpoint": [folder / "checkpoint"]},
            texts=texts,
        )
    return run


def write_loop(run: Path, seconds: list[float]) -> None:
    stages = ["generate", "score", "pair", "train", "evaluate"]
    entries = [
        {"stage": stages[i % 5], "round": i // 5, "seconds": value, "up_to_date": False}
        for i, value in enumerate(seconds)
    ]
    write_json(run / "loop.json", {"started": "2026-11-21T01:00:00Z", "stages": entries})
