"""``python -m tests.sweeps.drive SWEEP RUNS [key=value ...]``: a driver with the fake target and two workers."""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.errors import UserError
from mixers.config import parse_overrides
from sweeps.definition import load_sweep
from sweeps.driver import run_sweep
from sweeps.live import view_for
from tests.sweeps.fake_target import TARGET


def main() -> int:
    sweep_file, runs, *overrides = sys.argv[1:]
    sweep = load_sweep(sweep_file, parse_overrides(tuple(overrides)))
    view = view_for(as_json=True, quiet=False)
    try:
        return run_sweep(sweep, Path(runs), view, n_workers=2, tracked=False, target=TARGET).exit_code
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
