"""stage=pair on many scored completions against reading, parsing and writing the same rows with orjson, and its memory.

`python -m benchmarks.pairing [--completions N] [--json OUT]`. Each side runs in a process of its own, which reports the
seconds of its work, without imports, and the peak of its resident set. The target of 1/3 says: at most three times the
time of the plain loop, which parses each row, makes nothing of it, and writes it back.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.harness import Comparison, compare, report

NUM_COMPLETIONS = 1_000_000
PEAK_MIB = 500
"""What the stage may take, however many completions there are."""


@dataclass(frozen=True)
class Profile:
    """What the rows are like.

    samples: completions of each prompt. token_ids: of each completion, as sampled; 0 for given ones.
    together: whether a prompt's completions stand one after the other, or in as many passes over the prompts.
    """

    pairer: str
    samples: int
    token_ids: int
    together: bool = True


PROFILES = {
    "sampled": Profile("correct_incorrect", samples=8, token_ids=120),
    "rated": Profile("best_worst", samples=2, token_ids=0),
    "spread": Profile("best_worst", samples=2, token_ids=0, together=False),
}


def run(
    repeats: int = 3, *, num_completions: int = NUM_COMPLETIONS, names: list[str] | None = None
) -> list[Comparison]:
    """Every profile. SystemExit where a side fails, or the stage makes no pairs."""
    return [_race(name, PROFILES[name], repeats, num_completions) for name in names or PROFILES]


def _race(name: str, profile: Profile, repeats: int, num_completions: int) -> Comparison:
    with tempfile.TemporaryDirectory() as folder:
        scored = Path(folder) / "scored"
        make(scored, profile, num_completions)
        peaks: dict[str, float] = {"ours": 0.0, "theirs": 0.0}

        def side(kind: str) -> float:
            command = [sys.executable, "-m", "benchmarks.pairing", "--side", kind, str(scored), profile.pairer]
            done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
            if done.returncode:
                raise SystemExit(f"pairing, {name}, {kind}:\n{done.stderr[-2000:]}")
            found = json.loads(done.stdout.splitlines()[-1])
            peaks[kind] = max(peaks[kind], found["peak_mib"])
            return float(found["seconds"])

        row = compare(
            f"pair_{name}_{num_completions}",
            ours=lambda: side("ours"),
            theirs=lambda: side("theirs"),
            repeats=repeats,
            warm_up=False,
            peer="orjson read, parse, write",
            target=round(1 / 3, 3),
            threads=1,
        )
        size = sum(file.stat().st_size for file in scored.glob("part-*.jsonl"))
        details = {f"{kind}_peak_mib": round(peak) for kind, peak in peaks.items()}
        details |= {"allowed_peak_mib": PEAK_MIB, "input_mib": round(size / 2**20)}
    if peaks["ours"] > PEAK_MIB:
        print(f"{row.profile}: peak memory {peaks['ours']:.0f} MiB is over {PEAK_MIB}")
    return replace(row, peak_memory_ratio=round(peaks["ours"] / peaks["theirs"], 3), details=details)


def make(out: Path, profile: Profile, num_completions: int) -> None:
    """An artifact of scored completions: prompts of 60 words, completions of 20 to 140."""
    from prefpipe import artifacts
    from prefpipe.artifacts import Plan
    from prefpipe.records import ScoredCompletion

    with artifacts.draft(out, Plan("score", ScoredCompletion.schema, uses={})) as draft:
        draft.commit_stream(_rows(profile, num_completions))


def _rows(profile: Profile, num_completions: int) -> Iterator[object]:
    from prefpipe.records import Message, ScoredCompletion

    rng = random.Random(0)
    vocabulary = [f"{stem}{i}" for i in range(500) for stem in ("a", "some", "longish", "considerable")]
    passages = [" ".join(rng.choices(vocabulary, k=rng.randint(20, 140))) for _ in range(2000)]
    prompts = [" ".join(rng.choices(vocabulary, k=60)) for _ in range(2000)]
    ids = [[rng.randrange(32_000) for _ in range(profile.token_ids)] for _ in range(50)]
    num_prompts = num_completions // profile.samples
    places = ((p, s) for p in range(num_prompts) for s in range(profile.samples))
    if not profile.together:
        places = ((p, s) for s in range(profile.samples) for p in range(num_prompts))
    for prompt, sample in places:
        yield ScoredCompletion(
            prompt_id=f"{prompt * 0x9E3779B97F4A7C15 % 2**64:016x}",
            completion_id=f"{prompt * profile.samples + sample:016x}",
            messages=[Message(role="user", content=f"{prompts[prompt % 2000]} {prompt}")],
            source="benchmark",
            answer="42",
            text=f"{passages[rng.randrange(2000)]} {sample}",
            token_ids=ids[rng.randrange(50)],
            logp=-50.0 * rng.random(),
            finish_reason="stop" if profile.token_ids else "given",
            seed=rng.randrange(2**63),
            model="0123456789abcdef",
            scores={"score": float(rng.randrange(2)) if profile.token_ids else rng.random()},
        )


def ours(scored: Path, pairer: str, out: Path) -> None:
    """The stage."""
    from prefpipe import artifacts
    from prefpipe.components import COMPONENTS
    from prefpipe.stages.pair import pair

    pair([scored], out / "pairs", pairer=COMPONENTS["pairer"][pairer](), seed=0)
    if not artifacts.manifest(out / "pairs")["num_records"]:
        raise SystemExit("no pair was made")


def theirs(scored: Path, pairer: str, out: Path) -> None:
    """The least that any program does that reads the rows as JSON and writes as many."""
    import orjson

    with (out / "rows.jsonl").open("wb") as written:
        for part in sorted(scored.glob("part-*.jsonl")):
            with part.open("rb") as lines:
                for line in lines:
                    written.write(orjson.dumps(orjson.loads(line), option=orjson.OPT_APPEND_NEWLINE))


SIDES = {"ours": ours, "theirs": theirs}


def _one_side(kind: str, scored: Path, pairer: str) -> None:
    """Run a side in this process; the last line that it prints is JSON."""
    import orjson  # noqa: F401

    import prefpipe.stages.pair  # noqa: F401

    with tempfile.TemporaryDirectory(dir=scored.parent) as out:
        started = time.perf_counter()
        SIDES[kind](scored, pairer, Path(out))
        seconds = time.perf_counter() - started
    # Not ru_maxrss, which starts at what the process that started this one had.
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024
    print(json.dumps({"seconds": seconds, "peak_mib": peak}))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pairing", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--completions", type=int, default=NUM_COMPLETIONS)
    parser.add_argument("--profile", action="append", choices=sorted(PROFILES))
    parser.add_argument("--side", nargs=3, metavar=("SIDE", "SCORED", "PAIRER"), help="used by this program itself")
    args = parser.parse_args()
    if args.side:
        _one_side(args.side[0], Path(args.side[1]), args.side[2])
        return
    report(run(args.repeats, num_completions=args.completions, names=args.profile), args.json)


if __name__ == "__main__":
    main()
