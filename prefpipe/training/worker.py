"""Main of each training process: `python -m prefpipe.training.worker CONFIG --work DIR`. No Hydra, a frozen config."""

import argparse
import logging
from pathlib import Path

from prefpipe.config import load_run_config, register_schemas
from prefpipe.logs import log_to, report_errors, set_up_logging
from prefpipe.rounds import Layout


def main() -> None:
    """Train as the frozen config says. Its inputs are resolved already: folders, not names."""
    parser = argparse.ArgumentParser(prog="python -m prefpipe.training.worker", description=main.__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    set_up_logging()
    with report_errors():
        register_schemas()
        run = load_run_config(args.config)
        log_to(Layout(Path(run.paths.runs) / run.exp_name, run.point, run.round).log_file("train"))
        from prefpipe.training.data import training_rows
        from prefpipe.training.loop import Job, train

        given = {"pairs": run.inputs.pairs, "demonstrations": run.inputs.demonstrations}
        inputs = {name: [Path(folder) for folder in folders or ()] for name, folders in given.items()}
        assert run.inputs.checkpoint
        assert run.inputs.reference
        train(
            Job(
                pairs=training_rows(inputs),
                model=run.model,
                policy=Path(run.inputs.checkpoint),
                reference=Path(run.inputs.reference),
                loss=run.loss,
                training=run.training,
                hardware=run.hardware,
                seed=run.seed,
                work=args.work,
                cache=Path(run.paths.cache),
                selection=run.selection,
                reference_logps=Path(run.inputs.reference_logps) if run.inputs.reference_logps else None,
            )
        )
    logging.shutdown()


if __name__ == "__main__":
    main()
