"""`python -m benchmarks`: every benchmark on a CPU, results under benchmarks/results/."""

from pathlib import Path

from benchmarks import deduplicate, driver, generation, memory_plan, pairing, scoring, train_step, vllm_generation
from benchmarks.harness import report

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run them one after the other; each writes its file as soon as it is done."""
    report(train_step.run(sweep_profile="hh"), RESULTS / "train_step_cpu.json")
    report(generation.run(threads=1), RESULTS / "generation_cpu.json")
    python = vllm_generation.find_python()
    if python is None:
        print("vllm_generation: skipped, as there is no environment with vLLM; `make test-vllm` makes one")
    else:
        report(vllm_generation.run(python), RESULTS / "vllm_generation_cpu.json")
    report(pairing.run(), RESULTS / "pairing_cpu.json")
    report(deduplicate.run(), RESULTS / "deduplicate_cpu.json")
    report(scoring.run(), RESULTS / "scoring_cpu.json")
    report(driver.run(), RESULTS / "driver_cpu.json")
    memory_plan.run(list(memory_plan.CASES), RESULTS / "memory_plan_cpu.json")


if __name__ == "__main__":
    main()
