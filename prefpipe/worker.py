"""One stage in a process of its own: `python -m prefpipe.worker CONFIG [key=value …]`. No Hydra, a frozen config."""

import argparse
from pathlib import Path

from omegaconf import OmegaConf

from prefpipe.config import load_frozen, register_schemas
from prefpipe.logs import report_errors, set_up_logging


def main() -> None:
    """Run a frozen config, with a few keys set anew (stage, round, inputs.checkpoint)."""
    parser = argparse.ArgumentParser(prog="python -m prefpipe.worker", description=main.__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    set_up_logging()
    with report_errors():
        register_schemas()
        cfg = load_frozen(args.config)
        cfg.merge_with_dotlist(args.overrides)
        from prefpipe.run import run

        OmegaConf.resolve(cfg)
        run(cfg)


if __name__ == "__main__":
    main()
