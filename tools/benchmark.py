"""Measure training steps, maskers and the loader on this machine.

    tools/benchmark.py step vision_base --batch 4
    tools/benchmark.py masks
    tools/benchmark.py loader 'shards/train-*.tar' --workers 0 2 4

Each command prints a table. What it compares is measured in turns in one process, so that other work on the machine
slows both sides alike; times are medians. --json FILE also writes the table and the settings to a file.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import logging
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data2vec.core.batch import Batch
from data2vec.core.config import Experiment, Precision, Switch
from data2vec.core.data.pipeline import TrainData
from data2vec.core.data.shards import ShardWriter
from data2vec.core.data.tar import read, scan
from data2vec.core.errors import ConfigError, Data2VecError, DataError
from data2vec.core.model.data2vec import Data2Vec
from data2vec.core.model.mask import Mask
from data2vec.core.overrides import apply_overrides, validate
from data2vec.core.training.engine import TorchEngine, choose_device, uses_bf16
from data2vec.core.training.flops import matmul_rate, step_flops
from data2vec.core.training.trainer import make_mask
from data2vec.vision import AugmentConfig, BlockMasker, InverseBlockMasker, Vision
from data2vec.vision.masker import block_hidden, inverse_block_hidden
from data2vec.vision.masker_reference import block_mask_reference, inverse_block_mask_reference

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
_CPU_BATCH = 4  # of models as wide as base and wider, when no batch is asked for
_WIDE = 512
_GIB = 2.0**30

Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """A table: its heading, its columns (key of a row: heading) and rows, and what else belongs to the figures."""

    command: str
    title: str
    columns: dict[str, str]
    rows: list[Row]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def to_rich(self) -> Table:
        """For a terminal; ratios and times get three digits."""
        table = Table(title=self.title, title_justify="left", caption="\n".join(self.notes), caption_justify="left")
        for heading in self.columns.values():
            table.add_column(heading, justify="right", overflow="fold")
        for row in self.rows:
            table.add_row(*(_shown(row.get(key)) for key in self.columns))
        return table

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"command": self.command, "settings": self.settings, "machine": machine(), "rows": self.rows}


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, cores that may be used, GPU, versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(), "cores": cores, "threads": torch.get_num_threads(), "gpu": gpu,
        "torch": torch.__version__, "python": sys.version.split()[0],
    }  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


# step


@dataclass
class Variant:
    """One way to run a recipe's step, its input and masks on the device, and the seconds that its steps took."""

    name: str
    engine: TorchEngine
    batch: Batch
    mask: Mask
    peak_gib: float = 0.0
    forward_backward: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)

    def run(self) -> tuple[float, float]:
        """One update; returns the seconds of forward and backward, and of clipping, optimiser and teacher."""
        engine, number = self.engine, len(self.update)
        _wait(engine.device)
        start = _mark(engine.device)
        engine.forward_backward(self.batch, self.mask, count=self.mask.count, update=number)
        middle = _mark(engine.device)
        engine.step(1e-6, number + 1)  # a small rate: noise shall not drive the weights anywhere
        end = _mark(engine.device)
        _wait(engine.device)
        return _between(start, middle), _between(middle, end)

    def measure(self) -> None:
        """Run once and remember how long it took."""
        forward_backward, update = self.run()
        self.forward_backward.append(forward_backward)
        self.update.append(update)

    def row(self, flops: float, limit: float, samples: int) -> Row:
        """The medians; ``flops`` of a sample's step, ``limit`` the device's rate."""
        parts = statistics.median(self.forward_backward), statistics.median(self.update)
        seconds = statistics.median(map(sum, zip(self.forward_backward, self.update, strict=True)))
        rate = flops * samples / seconds
        return {
            "variant": self.name, "samples_per_second": samples / seconds, "step_ms": 1e3 * seconds,
            "forward_backward_ms": 1e3 * parts[0], "update_ms": 1e3 * parts[1],
            "tflops": rate / 1e12, "mfu": rate / limit, "peak_gib": self.peak_gib,
        }  # fmt: skip


def step(arguments: argparse.Namespace) -> Result:
    """Time the training step of a recipe, eager and, where asked for and possible, compiled."""
    chosen = _sized(_experiment(arguments), arguments)
    name, modality = next(iter(chosen.modalities.items()))
    device = choose_device(chosen.train.device)
    samples = chosen.train.batch
    inputs = INPUTS[name](modality, samples) if name in INPUTS else None
    if inputs is None:
        raise ConfigError(
            [f"{chosen.name}: no random input is known for {name}; choose a recipe of {', '.join(INPUTS)}"]
        )
    batch = Batch(name, inputs.to(device), torch.arange(samples), torch.full((samples,), -1))
    bf16 = uses_bf16(chosen.train.precision, device)
    switches = {Switch.OFF: [Switch.OFF], Switch.ON: [Switch.OFF, Switch.ON]}
    wanted = switches.get(chosen.train.compile, [Switch.OFF, Switch.ON] if device.type == "cuda" else [Switch.OFF])
    limit = matmul_rate(device, torch.bfloat16 if bf16 else torch.float32)
    variants: list[Variant] = []
    flops = 0.0
    for switch in wanted:
        variant, flops = _variant(chosen, switch, batch, device)
        if not variants or variant.engine.compiled:  # without a compiler there is nothing to compare
            variants.append(variant)
    for _ in range(arguments.steps):
        for variant in variants:
            variant.measure()
    rows = [variant.row(flops, limit, samples) for variant in variants]
    for row in rows:
        row["ratio"] = row["samples_per_second"] / rows[0]["samples_per_second"]
    parameters = sum(p.numel() for p in variants[0].engine.model.student.parameters())
    settings = {
        "experiment": chosen.name, "parameters": parameters, "batch": samples, "device": str(device),
        "precision": "bf16" if bf16 else "fp32", "steps": arguments.steps, "gflop_per_sample": flops / 1e9,
        "matmul_tflops": limit / 1e12, "overrides": list(arguments.overrides),
    }  # fmt: skip
    columns = {
        "variant": "step", "samples_per_second": "samples/s", "step_ms": "ms", "forward_backward_ms": "forward + backward",
        "update_ms": "optimiser + teacher", "tflops": "TFLOP/s", "mfu": "MFU", "peak_gib": "peak GiB", "ratio": "ratio",
    }  # fmt: skip
    notes = [
        f"random input and masks already on the device; median of {arguments.steps} steps",
        f"{flops / 1e9:.4g} GFLOP a sample; MFU against {limit / 1e12:.3g} TFLOP/s of a large matrix product",
    ]
    if arguments.batch is None and device.type == "cpu":
        notes.append("the batch is small because this is a CPU; --batch changes it")
    if device.type == "cpu":
        notes.append("peak GiB is that of the whole process so far")
    title = f"{chosen.name}: {parameters / 1e6:.1f} M parameters, batch {samples}, {settings['precision']} on {device}"
    return Result("step", title, columns, rows, settings, notes)


def _variant(chosen: Experiment, switch: Switch, batch: Batch, device: torch.device) -> tuple[Variant, float]:
    """A warmed-up engine, and the floating-point operations of a sample's step."""
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Data2Vec.build(chosen).to(device)
    masker = chosen.modalities[batch.modality].build_masker()
    few = batch.first(2)
    flops = step_flops(model, few, make_mask(model, masker, few, seed=0, update=0).to(device)) / len(few)
    engine = TorchEngine(model, chosen.replace(train={"compile": switch, "device": str(device)}))
    mask = make_mask(model, masker, batch, seed=0, update=0).to(device)
    variant = Variant("compiled" if engine.compiled else "eager", engine, batch, mask)
    model.train()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(5 if cuda else 2):
        variant.run()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB; Linux counts KiB
    variant.peak_gib = (torch.cuda.max_memory_allocated(device) - before) / _GIB if cuda else resident
    return variant, flops


def _experiment(arguments: argparse.Namespace) -> Experiment:
    """What --sample and KEY=VALUE make of the named experiment file."""
    module = load_experiment(arguments.experiment)
    chosen = getattr(module, "sample" if arguments.sample else "experiment", None)
    if not isinstance(chosen, Experiment):
        raise ConfigError([f"{arguments.experiment}: defines no {'sample' if arguments.sample else 'experiment'}"])
    return apply_overrides(chosen, arguments.overrides)


def load_experiment(name: str) -> Any:
    """The module of ``experiments/NAME.py``, or of the file that the user names.

    Raises:
        ConfigError: no such file.
    """
    path = Path(name) if name.endswith(".py") else EXPERIMENTS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarked_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        known = ", ".join(sorted(file.stem for file in EXPERIMENTS.glob("*.py")))
        raise ConfigError([f"{name}: no such experiment; choose one of {known}, or the path of a file NAME.py"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _sized(chosen: Experiment, arguments: argparse.Namespace) -> Experiment:
    """The experiment with the device, precision and batch that are measured."""
    batch = arguments.batch or chosen.train.micro_batch or chosen.train.batch
    device = choose_device(arguments.device)
    if arguments.batch is None and device.type == "cpu" and chosen.transformer.width >= _WIDE:
        batch = min(batch, _CPU_BATCH)
    train = {
        "device": arguments.device, "precision": Precision(arguments.precision), "compile": Switch(arguments.compile),
        "batch": batch, "micro_batch": None,
    }  # fmt: skip
    chosen = chosen.replace(train=train)
    validate(chosen)
    return chosen


def _vision_input(modality: Vision, samples: int) -> Tensor:
    size = modality.image_size
    return torch.randn(samples, modality.channels, size, size, generator=torch.Generator().manual_seed(0))


# What stands for a batch of each modality: (settings, samples) to inputs on the CPU.
INPUTS: dict[str, Callable[[Any, int], Tensor]] = {"vision": _vision_input}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _mark(device: torch.device) -> Any:
    """A point in time: on a GPU in its own queue, so that nothing waits for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    """Seconds."""
    seconds: float = end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
    return seconds


# masks


def masks(arguments: argparse.Namespace) -> Result:
    """Time the vision maskers against a plain Python loop over samples and patches."""
    side, samples = arguments.grid, arguments.batch
    shape, total = (side, side), side * side
    ids = torch.arange(samples)
    block, inverse = BlockMasker(), InverseBlockMasker()
    hidden, visible = block_hidden(block.ratio, total), total - inverse_block_hidden(inverse.ratio, total)

    def block_loop(generator: random.Random) -> object:
        return block_mask_reference(shape, generator, hidden=hidden)

    def inverse_loop(generator: random.Random) -> object:
        return inverse_block_mask_reference(shape, generator, visible=visible)

    rows = []
    for kind, masker, loop in (("block", BlockMasker, block_loop), ("inverse_block", InverseBlockMasker, inverse_loop)):
        for count in arguments.masks:
            ours: list[float] = []
            plain: list[float] = []
            vectorised = masker(masks=count)
            for number in range(arguments.rounds + 1):
                calls = [_timed(lambda u: vectorised(ids, shape, seed=0, update=u), 10 * number + i) for i in range(10)]
                looped = _timed(lambda u: [loop(random.Random(f"{u} {i}")) for i in range(samples * count)], number)
                if number:  # the first round warms up
                    ours += calls
                    plain.append(looped)
            times = statistics.median(ours), statistics.median(plain)
            rows.append(
                {"masker": kind, "masks": count, "vectorised_ms": 1e3 * times[0], "loop_ms": 1e3 * times[1],
                 "ratio": times[1] / times[0]}
            )  # fmt: skip
    columns = {
        "masker": "masker", "masks": "masks", "vectorised_ms": "vectorised ms", "loop_ms": "loop ms", "ratio": "ratio",
    }  # fmt: skip
    settings = {"batch": samples, "grid": side, "rounds": arguments.rounds}
    return Result("masks", f"masks of {samples} samples, grid {side} x {side}", columns, rows, settings)


def _timed(call: Callable[[int], object], argument: int) -> float:
    start = time.perf_counter()
    call(argument)
    return time.perf_counter() - start


# loader


def loader(arguments: argparse.Namespace) -> Result:
    """Time the loader with several numbers of workers against a plain loop over image files in one process."""
    chosen = _experiment(arguments)
    validate(chosen)
    modality = chosen.modalities.get("vision")
    if not isinstance(modality, Vision):
        raise ConfigError([f"{chosen.name}: the loader benchmark reads images; choose a recipe of vision"])
    with tempfile.TemporaryDirectory(prefix="data2vec-benchmark-") as name:
        folder = Path(name)
        shards = arguments.shards or _made_shards(folder, arguments.images, max(64, modality.image_size * 2))
        data = TrainData.open(shards, modality, data=chosen.data, seed=0, cache=folder / "cache")
        files = _as_files(data, folder / "files", arguments.images)
        contestants = {"plain loop": lambda: _plain(files, modality, arguments.batch)}
        for workers in arguments.workers:
            config = chosen.replace(data={"workers": workers}).data
            opened = TrainData.open(shards, modality, data=config, seed=0, cache=folder / "cache")
            contestants[f"{workers} workers"] = lambda opened=opened: opened.batches(0, arguments.batch)
        skip = max(arguments.workers)
        rates: dict[str, list[float]] = {key: [] for key in contestants}
        for _ in range(arguments.rounds):
            for key, start in contestants.items():
                rates[key].append(_rate(start(), skip, arguments.samples))
    medians = {key: statistics.median(values) for key, values in rates.items()}
    rows = [
        {"loader": key, "samples_per_second": rate, "ratio": rate / medians["plain loop"]}
        for key, rate in medians.items()
    ]
    settings = {
        "experiment": chosen.name, "shards": arguments.shards or "made", "samples_of_set": data.total,
        "batch": arguments.batch, "samples": arguments.samples, "rounds": arguments.rounds,
    }  # fmt: skip
    what = arguments.shards or f"{data.total} made JPEG images"
    columns = {"loader": "loader", "samples_per_second": "samples/s", "ratio": "ratio"}
    title = f"{chosen.name}: {what}, {modality.image_size} x {modality.image_size} pixels, batch {arguments.batch}"
    return Result("loader", title, columns, rows, settings)


def _rate(batches: Iterator[Any], skip: int, samples: int) -> float:
    """Samples a second, after what the workers prepare while they start."""
    for _ in range(1 + skip):
        next(batches)
    done, start = 0, time.perf_counter()
    while done < samples:
        done += len(next(batches))
    seconds = time.perf_counter() - start
    batches.close()  # type: ignore[attr-defined]
    return done / seconds


def _made_shards(folder: Path, images: int, side: int) -> str:
    """Shards of smooth random JPEG images with some grain, 4 : 3."""
    generator = np.random.default_rng(0)
    with ShardWriter(folder / "shards", "train", "vision", samples_per_shard=max(1, images // 4)) as writer:
        for number in range(images):
            coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((side * 4 // 3, side), Image.Resampling.BICUBIC), dtype=np.float32)
            grain = generator.normal(0, 6, smooth.shape).astype(np.float32)
            file = io.BytesIO()
            Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(file, format="JPEG", quality=90)
            writer.write(f"{number:06d}", {"jpg": file.getvalue()})
    return str(folder / "shards" / "train-*.tar")


def _as_files(data: TrainData, folder: Path, most: int) -> list[Path]:
    """The first images of the shards as single files, for the plain loop."""
    folder.mkdir()
    files: list[Path] = []
    for number in range(len(data.shards.shards)):
        path = data.shards.path(number)
        with path.open("rb") as tar:
            for entry in scan(path)[: most - len(files)]:
                members = read(tar.fileno(), entry, path.name).members
                extension = next((e for e in Vision.extensions if e in members), None)
                if extension is not None:
                    files.append(folder / f"{len(files):06d}.{extension}")
                    files[-1].write_bytes(members[extension])
    if not files:
        raise DataError(f"{data.shards.spec}: holds no images")
    return files


class ImageFiles(torch.utils.data.Dataset[Tensor]):
    """The plain way: open a file with PIL, transform it with torchvision."""

    def __init__(self, files: Sequence[Path], modality: Vision) -> None:
        from torchvision.transforms import InterpolationMode, v2

        augment: AugmentConfig = modality.augment
        size, bicubic = modality.image_size, InterpolationMode.BICUBIC
        steps: list[Any] = [v2.Resize(size, interpolation=bicubic), v2.CenterCrop(size)]
        if augment.crop_scale is not None:
            steps = [v2.RandomResizedCrop(size, scale=augment.crop_scale, interpolation=bicubic)]
        if augment.translate:
            steps.append(v2.RandomCrop(size, padding=augment.translate))
        if augment.flip:
            steps.append(v2.RandomHorizontalFlip(augment.flip))
        if augment.colour_jitter:
            jitter = augment.colour_jitter
            steps.append(v2.ColorJitter(jitter, jitter, jitter if modality.channels == 3 else 0.0))
        steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(modality.mean, modality.std)]
        self.files, self.mode, self.transform = files, "RGB" if modality.channels == 3 else "L", v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Tensor:
        transformed: Tensor = self.transform(Image.open(self.files[number]).convert(self.mode))
        return transformed


def _plain(files: Sequence[Path], modality: Vision, batch: int) -> Iterator[Tensor]:
    """Batches without end from one process, in a new order every epoch."""
    dataset = ImageFiles(files, modality)
    endless = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=2**31)
    yield from torch.utils.data.DataLoader(dataset, batch, sampler=endless)


# command line


def _add_experiment(command: argparse.ArgumentParser, *, option: bool) -> None:
    text = "a name in experiments/, or the path of a file (default vision_base); the file is run"
    if option:
        command.add_argument("--experiment", default="vision_base", metavar="NAME", help=text)
    else:
        command.add_argument("experiment", nargs="?", default="vision_base", metavar="EXPERIMENT", help=text)
    command.add_argument("--sample", action="store_true", help="its sample variant")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _add_step(command: argparse.ArgumentParser) -> None:
    _add_experiment(command, option=False)
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change a setting of the experiment")
    command.add_argument("--device", default="auto", help="auto (default), cpu, cuda ...")
    command.add_argument(
        "--precision", choices=[p.value for p in Precision], default="auto", help="auto: bf16 on a GPU"
    )
    switch = "on: eager and compiled side by side; off: eager alone; auto: on on a GPU, off elsewhere"
    command.add_argument("--compile", choices=[s.value for s in Switch], default="auto", help=switch)
    batch = "samples of a step (default: the recipe's micro_batch; on a CPU fewer)"
    command.add_argument("--batch", type=_positive, metavar="N", help=batch)
    command.add_argument("--steps", type=_positive, default=12, metavar="N", help="measured steps (default 12)")


def _add_masks(command: argparse.ArgumentParser) -> None:
    command.add_argument("--batch", type=_positive, default=128, metavar="N", help="samples (default 128)")
    command.add_argument("--grid", type=_positive, default=14, metavar="N", help="patches along a side (default 14)")
    masks = "masks of each sample (default 1 16)"
    command.add_argument("--masks", type=_positive, nargs="+", default=[1, 16], metavar="M", help=masks)
    command.add_argument("--rounds", type=_positive, default=10, metavar="N", help="repetitions (default 10)")


def _add_loader(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "shards", nargs="?", metavar="SHARDS", help="as data.train; default: images made for the purpose"
    )
    _add_experiment(command, option=True)
    command.add_argument("--workers", type=_count, nargs="+", default=[0, 1, 2], metavar="N", help="default 0 1 2")
    command.add_argument("--batch", type=_positive, default=32, metavar="N", help="samples of a batch (default 32)")
    command.add_argument("--samples", type=_positive, default=512, metavar="N", help="timed each time (default 512)")
    command.add_argument(
        "--images", type=_positive, default=256, metavar="N", help="images made or unpacked (default 256)"
    )
    command.add_argument("--rounds", type=_positive, default=3, metavar="N", help="repetitions (default 3)")
    command.set_defaults(overrides=[])


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], Result], Callable[[argparse.ArgumentParser], None]]] = {
    "step": (step, _add_step),
    "masks": (masks, _add_masks),
    "loader": (loader, _add_loader),
}


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (run, add) in COMMANDS.items():
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        add(command)
        command.add_argument("--json", type=Path, metavar="FILE", help="also write the table and the settings there")
        command.set_defaults(run=run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 2 a user's error, 130 interrupted."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    arguments = _parser().parse_args(argv)
    console = Console(highlight=False)
    try:
        result: Result = arguments.run(arguments)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    except (Data2VecError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    console.print(result.to_rich(), width=max(console.width, 100))
    used = machine()
    gpu = f", {used['gpu']}" if used["gpu"] else ""
    console.print(f"{used['processor']}, {used['cores']} cores{gpu}, torch {used['torch']}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
