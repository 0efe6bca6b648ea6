"""`python -m benchmarks`: every benchmark, results under benchmarks/results/."""

from pathlib import Path

from benchmarks import generation
from benchmarks.harness import report


def main() -> None:
    """Run them one after the other."""
    report(generation.run(), Path(__file__).parent / "results" / "generation_cpu.json")


if __name__ == "__main__":
    main()
