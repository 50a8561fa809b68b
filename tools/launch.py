"""Train an experiment on many devices, one process for each.

    uv run deepspeed --num_gpus 8 tools/launch.py                                    # experiments/vision_base.py
    uv run deepspeed --num_gpus 8 tools/launch.py experiments/speech_base_v2.py engine.zero_stage=3 data.train=...
    uv run deepspeed --hostfile hosts tools/launch.py ...                            # several hosts
    uv run torchrun --nproc-per-node 8 tools/launch.py ...
    srun uv run python tools/launch.py ...                                           # in a SLURM job

The first argument is the experiment's file, the user's own included; what follows is what `uv run FILE` takes: settings
(KEY=VALUE), --print-config, --sample. Without GPUs the ranks are CPU processes. docs/scaling.md has a command for each
case.
"""

from __future__ import annotations

import re
import sys

from recipes import load_experiment

from data2vec.core.errors import ConfigError
from data2vec.core.run.choices import Choices
from data2vec.core.run.cli import main as run
from data2vec.core.settings.fields import Recipe

_DEFAULT = "experiments/vision_base.py"
_LOCAL_RANK = re.compile(r"--local[-_]rank(=\d+)?")  # DeepSpeed's launcher adds it; the environment says the same


def main(argv: list[str] | None = None) -> None:
    """Load the experiment and run it; exits as the experiment itself would."""
    arguments = [word for word in (sys.argv[1:] if argv is None else argv) if not _LOCAL_RANK.fullmatch(word)]
    name = arguments.pop(0) if arguments and arguments[0].endswith(".py") else _DEFAULT
    try:
        module = load_experiment("vision_base" if name == _DEFAULT else name)
        experiment, sample, before = (getattr(module, name, None) for name in ("experiment", "sample", "before"))
        if not isinstance(experiment, Recipe | Choices):
            raise ConfigError([f"{name}: defines no `experiment`; see CONTRIBUTING.md on how to add one"])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    run(
        experiment, sample, arguments, before=before, command=f"tools/launch.py {name}",
        document=f"{__doc__}\n{module.__doc__ or ''}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
