"""Near-duplicate removal of prompts against datasketch's own loop over MinHashLSH: same texts, sets and threshold.

`python -m benchmarks.deduplicate [--prompts N] [--json OUT]`. Each side runs in a process of its own, which reports the
seconds of its work, without imports, and the peak of its resident set above what it was before. Gate: both remove
nearly the same number of texts, and ours none that is not similar.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import Comparison, compare, report

NUM_PROMPTS, THRESHOLD = 100_000, 0.8
TARGET = round(1 / 1.1, 3)
"""At most 1.1 times its time."""
EDITED = 4
"""One text in so many is another one with a few words changed."""


def texts(number: int) -> list[str]:
    """Prompts of 10 to 120 words."""
    rng = random.Random(0)
    vocabulary = [f"word{i}" for i in range(20_000)]
    made: list[str] = []
    for place in range(number):
        if place % EDITED == 1:
            found = made[rng.randrange(place)].split()
            for _ in range(rng.randrange(1 + len(found) // 20)):
                found[rng.randrange(len(found))] = rng.choice(vocabulary)
        else:
            found = rng.choices(vocabulary, k=rng.randint(10, 120))
        made.append(" ".join(found))
    return made


def ours(found: list[str]) -> int:
    """How many texts go."""
    from prefpipe.sources.near_duplicates import Sketches
    from prefpipe.words import words

    sketches = Sketches()
    for text in found:
        sketches.add(words(text))
    return len(sketches.near(THRESHOLD, found.__getitem__))


def theirs(found: list[str]) -> int:
    """The loop of datasketch's documentation, with its generator, which spares it the making of permutations."""
    from datasketch import MinHash, MinHashLSH

    from prefpipe.sources.near_duplicates import NUM_PERMUTATIONS, SHINGLE
    from prefpipe.words import words

    def shingles(text: str) -> set[bytes]:
        known = words(text)
        return {" ".join(known[i : i + SHINGLE]).encode() for i in range(max(1, len(known) - SHINGLE + 1))}

    index, removed = MinHashLSH(THRESHOLD, NUM_PERMUTATIONS), 0
    for place, minhash in enumerate(MinHash.generator(map(shingles, found), num_perm=NUM_PERMUTATIONS)):
        if index.query(minhash):
            removed += 1
        else:
            index.insert(place, minhash)
    return removed


SIDES = {"ours": ours, "theirs": theirs}


def run(repeats: int = 3, *, num_prompts: int = NUM_PROMPTS) -> list[Comparison]:
    """The race. SystemExit where a side fails or the sides remove other numbers."""
    figures: dict[str, dict[str, float]] = {}

    def side(kind: str) -> float:
        command = [sys.executable, "-m", "benchmarks.deduplicate", "--side", kind, "--prompts", str(num_prompts)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        if done.returncode:
            raise SystemExit(f"deduplicate, {kind}:\n{done.stderr[-2000:]}")
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        figures[kind] = found
        return found["seconds"]

    row = compare(
        f"near_duplicates_{num_prompts}",
        ours=lambda: side("ours"),
        theirs=lambda: side("theirs"),
        repeats=repeats,
        warm_up=False,
        peer="datasketch",
        target=TARGET,
        threads=1,
    )
    removed = {kind: int(found["removed"]) for kind, found in figures.items()}
    if not 0.8 < removed["ours"] / removed["theirs"] < 1.25:
        raise SystemExit(f"gate: the sides remove other numbers of texts: {removed}")
    details = {f"{kind}_removed": number for kind, number in removed.items()}
    details |= {f"{kind}_memory_mib": round(found["memory_mib"]) for kind, found in figures.items()}
    ratio = figures["ours"]["memory_mib"] / figures["theirs"]["memory_mib"]
    return [replace(row, peak_memory_ratio=round(ratio, 3), details=details)]


def _resident(key: str) -> float:
    """MiB of this process, from Linux: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def _one_side(kind: str, num_prompts: int) -> None:
    """Run a side in this process; the last line that it prints is JSON."""
    import datasketch  # noqa: F401

    import prefpipe.sources.near_duplicates  # noqa: F401

    found = texts(num_prompts)
    before = _resident("VmRSS")
    started = time.perf_counter()
    removed = SIDES[kind](found)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "removed": removed, "memory_mib": _resident("VmHWM") - before}))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deduplicate", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=NUM_PROMPTS)
    parser.add_argument("--side", choices=sorted(SIDES), help="used by this program itself")
    args = parser.parse_args()
    if args.side:
        _one_side(args.side, args.prompts)
        return
    report(run(args.repeats, num_prompts=args.prompts), args.json)


if __name__ == "__main__":
    main()
