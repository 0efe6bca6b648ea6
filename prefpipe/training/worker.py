"""Main of each training process: `python -m prefpipe.training.worker CONFIG --work DIR`. No Hydra, a frozen config."""

import argparse
import logging
import os
from pathlib import Path

from prefpipe.config import load_run_config, register_schemas
from prefpipe.logs import log_to, report_errors, set_up_logging
from prefpipe.models import import_transformers
from prefpipe.processes import die_with_parent
from prefpipe.rounds import Layout


def main() -> None:
    """Train as the frozen config says. Its inputs are resolved already: folders, not names."""
    parser = argparse.ArgumentParser(prog="python -m prefpipe.training.worker", description=main.__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--world-size", type=int, default=1, help="how many processes torchrun starts, on all nodes")
    args = parser.parse_args()
    die_with_parent()
    set_up_logging()
    first = int(os.environ.get("RANK", 0)) == 0
    if not first:  # what all processes say, the first one says
        logging.getLogger().handlers[0].setLevel(logging.WARNING)
    with report_errors():
        register_schemas()
        run = load_run_config(args.config)
        if first:
            log_to(Layout(Path(run.paths.runs) / run.exp_name, run.point, run.round).log_file("train"))
        import_transformers()
        from prefpipe.ladder import Attempt
        from prefpipe.training.data import training_rows
        from prefpipe.training.loop import Job, train

        given = {"pairs": run.inputs.pairs, "demonstrations": run.inputs.demonstrations}
        inputs = {name: [Path(folder) for folder in folders or ()] for name, folders in given.items()}
        assert run.inputs.checkpoint
        assert run.inputs.reference
        job = Job(
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
            world_size=args.world_size,
        )
        attempt = Attempt(
            args.work,
            job.policy,
            job.model,
            job.loss,
            job.training,
            job.hardware,
            reference_is_policy=job.policy == job.reference,
            reference_given=job.reference_logps is not None,
        )
        with attempt.answered():
            train(job)
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()
    logging.shutdown()


if __name__ == "__main__":
    main()
