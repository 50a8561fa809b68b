"""Weights of a run as files that other programs read.

    uv run tools/convert.py consolidate runs/vision_base                 # -> runs/vision_base/weights/
    uv run tools/convert.py consolidate runs/vision_base/checkpoints/update-000100000 --out FOLDER

``consolidate`` writes the whole student and the whole teacher of a checkpoint, whatever engine and however many ranks
wrote it, as ``student.safetensors`` and ``teacher.safetensors`` (names as in ``data2vec.core.Data2Vec``, fp32), beside
the run's ``config.yaml``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data2vec.core.errors import CheckpointError, Data2VecError
from data2vec.core.files import replacing
from data2vec.core.run.folder import CONFIGURATION
from data2vec.core.run.load import load_run


def consolidate(run: Path, out: Path | None) -> Path:
    """Write the weights of a run; returns their folder.

    Raises:
        CheckpointError: no such run, or the folder cannot be written to.
    """
    loaded = load_run(run, device="cpu")
    folder = out or loaded.folder / "weights"
    state = loaded.model.state_dict()
    teacher, student = (_under(state, prefix) for prefix in ("teacher.encoder.", "student."))
    heads = {name: value for name, value in state.items() if name.startswith(("predictors.", "mask_tokens."))}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, tensors in (("student", {**student, **heads}), ("teacher", teacher)):
            # Contiguous copies: a teacher may share tensors with its student.
            copies = {key: value.clone().contiguous() for key, value in tensors.items()}
            with replacing(folder / f"{name}.safetensors") as temporary:
                save_file(copies, temporary, metadata={"run": str(run.name), "update": str(loaded.update)})
        shutil.copyfile(loaded.folder / CONFIGURATION, folder / CONFIGURATION)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written ({error}); free space, or name another --out") from None
    return folder


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("consolidate", help="whole weights of student and teacher from any checkpoint")
    command.add_argument("run", type=Path, help="a run's folder, or one of its checkpoints")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="where to (default: RUN/weights)")
    arguments = parser.parse_args(argv)
    try:
        folder = consolidate(arguments.run, arguments.out)
    except Data2VecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for path in sorted(folder.iterdir()):
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
