"""What stops a run that no longer learns, and where its metrics go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data2vec.core.errors import TrainingError
from data2vec.core.pretraining.data2vec import vitals
from data2vec.core.settings.fields import TrainConfig
from data2vec.core.training.health import HealthCheck
from data2vec.core.training.monitor import Monitor, read_metrics

GOOD = {"extractor_spread": 1.0, "target_spread": 0.9, "prediction_spread": 0.5, "loss": 1.0}
CONFIG = TrainConfig(min_target_spread=0.05, min_prediction_spread=0.01)


def health_check(warmup: int, modalities: tuple[str, ...] = ("",)) -> HealthCheck:
    return HealthCheck(vitals(CONFIG), collapse_after=5, warmup=warmup, modalities=modalities)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("keys", "component"),
    [
        (("loss",), "loss"),
        (("prediction_spread", "loss"), "prediction"),
        (("target_spread", "loss"), "teacher"),
        (("target_spread", "prediction_spread", "loss"), "teacher"),
        (("extractor_spread", "target_spread", "prediction_spread", "loss"), "extractor"),
    ],
)
def test_the_first_component_that_fails_is_named(value: float, keys: tuple[str, ...], component: str) -> None:
    with pytest.raises(TrainingError, match=rf"update 7: .*not finite .*first to fail was the {component}\). Try: "):
        health_check(0).check(7, GOOD | dict.fromkeys(keys, value))


@pytest.mark.parametrize(
    ("key", "what", "component"),
    [("target_spread", "targets", "teacher"), ("prediction_spread", "predictions", "prediction")],
)
def test_collapse_stops_within_collapse_after_updates(key: str, what: str, component: str) -> None:
    health = health_check(0)
    for update in range(1, 20):
        health.check(update, GOOD)
    for update in range(20, 24):
        health.check(update, GOOD | {key: 1e-4})
    with pytest.raises(TrainingError) as error:
        health.check(24, GOOD | {key: 1e-4})
    message = str(error.value)
    assert f"update 24: the {what} have collapsed ({key} is 0.0001, below" in message
    assert f"since update 20; the first to fail was the {component})" in message
    assert "Try: " in message


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_a_run_stops_exactly_when_low_for_long_enough(low: list[bool]) -> None:
    health = health_check(0)
    in_a_row = 0
    for update, is_low in enumerate(low, 1):
        in_a_row = in_a_row + 1 if is_low else 0
        values = GOOD | ({"target_spread": 0.01} if is_low else {})
        if in_a_row >= 5:
            with pytest.raises(TrainingError):
                health.check(update, values)
            return
        health.check(update, values)


def test_slow_starters_are_judged_after_warm_up() -> None:
    health = health_check(100)
    flat = GOOD | {"prediction_spread": 0.0}
    for update in range(1, 104):
        health.check(update, flat)
    with pytest.raises(TrainingError, match="since update 100"):
        health.check(104, flat)


def test_predictions_that_were_healthy_are_judged_during_warm_up() -> None:
    health = health_check(100)
    health.check(1, GOOD)
    for update in range(2, 6):
        health.check(update, GOOD | {"prediction_spread": 0.0})
    with pytest.raises(TrainingError, match="update 6: the predictions have collapsed"):
        health.check(6, GOOD | {"prediction_spread": 0.0})


def test_targets_are_judged_during_warm_up() -> None:
    health = health_check(100)
    for update in range(1, 5):
        health.check(update, GOOD | {"target_spread": 0.0})
    with pytest.raises(TrainingError, match="update 5: the targets have collapsed"):
        health.check(5, GOOD | {"target_spread": 0.0})


def test_a_resumed_check_goes_on_where_it_was() -> None:
    one = health_check(100)
    one.check(1, GOOD)
    for update in range(2, 6):
        one.check(update, GOOD | {"prediction_spread": 0.0})
    other = health_check(100)
    other.load_state(json.loads(json.dumps(one.state())), 5)
    with pytest.raises(TrainingError, match="since update 2"):
        other.check(6, GOOD | {"prediction_spread": 0.0})


def test_what_an_earlier_version_saved_is_read() -> None:
    health = health_check(100, modalities=("speech", "text"))
    health.load_state({"low_since": {"prediction_spread": 2}, "was_healthy": ["prediction_spread"]}, 5)
    with pytest.raises(TrainingError, match=r"update 6: the predictions of text have collapsed .* since update 2"):
        health.check(6, GOOD | {"prediction_spread": 0.0}, "text")


@pytest.mark.parametrize("signal", ["target_spread", "prediction_spread"])
def test_a_modality_collapses_beside_a_healthy_one(signal: str) -> None:
    health = health_check(0, modalities=("speech", "text"))
    for update in range(1, 30):  # text is low in updates 22, 24, 26 and 28
        low = update > 20 and update % 2 == 0
        health.check(update, GOOD | ({signal: 1e-4} if low else {}), "text" if update % 2 == 0 else "speech")
    with pytest.raises(TrainingError, match=r"update 30: the \w+ of text have collapsed .* since update 22;"):
        health.check(30, GOOD | {signal: 1e-4}, "text")


def test_a_rare_modality_is_judged_by_its_own_updates() -> None:
    health = health_check(0, modalities=("speech", "text"))
    for update in (100, 200, 300, 400):  # four updates of text: less than collapse_after, however far apart
        health.check(update, GOOD | {"target_spread": 0.0}, "text")
    with pytest.raises(TrainingError, match="update 500: the targets of text have collapsed"):
        health.check(500, GOOD | {"target_spread": 0.0}, "text")


def scalars(**values: float) -> dict[str, torch.Tensor]:
    return {key: torch.tensor(value) for key, value in (GOOD | values).items()}


def test_every_update_of_a_line_is_checked(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, health_check(0))
    monitor.add(1, scalars(), {}, samples=4, waited=0.0)
    monitor.add(2, scalars(loss=float("nan")), {}, samples=4, waited=0.0)
    monitor.add(3, scalars(), {}, samples=4, waited=0.0)
    with pytest.raises(TrainingError, match="update 2: the loss is not finite"):
        monitor.flush()
    monitor.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_updates_are_checked_between_lines(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, health_check(0))
    monitor.add(1, scalars(loss=1.0), {}, samples=4, waited=0.0)
    monitor.check()
    monitor.check()
    assert monitor.pending
    monitor.add(2, scalars(loss=2.0) | {"loss_cls": torch.tensor(7.0)}, {}, samples=4, waited=0.0)  # another modality
    line = monitor.flush()
    assert (line["update"], line["loss"], line["loss_cls"]) == (2, 1.5, 7.0)
    assert not monitor.pending
    monitor.add(3, scalars(loss=float("inf")), {}, samples=4, waited=0.0)
    with pytest.raises(TrainingError, match="update 3: the loss is not finite"):
        monitor.check()
    monitor.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [line]


def test_a_line_is_the_mean_of_its_updates(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, health_check(0))
    for update, loss in ((1, 1.0), (2, 2.0), (3, 6.0)):
        monitor.add(update, scalars(loss=loss), {}, samples=4, waited=0.0)
    line = monitor.flush(learning_rate=0.5, flops_per_sample=10.0, peak_flops=1e12)
    monitor.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [line]
    assert (line["update"], line["loss"], line["learning_rate"]) == (3, 3.0, 0.5)
    assert line["tflops"] == pytest.approx(10.0 * line["samples_per_second"] / 1e12)
    assert line["mfu"] == pytest.approx(line["tflops"])
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_lines_after_the_resumed_update_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 1}\n{"update": 2}\nnoise\n[1]\n{"update": 3}\n{"upd')
    monitor = Monitor(tmp_path, health_check(0), start_update=2)
    monitor.write({"update": 3, "loss": 1.0})
    monitor.close()
    assert read_metrics(path) == [{"update": 1}, {"update": 2}, {"update": 3, "loss": 1.0}]
    assert len(path.read_text().splitlines()) == 3


def test_metrics_on_a_full_disk_are_one_error(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, health_check(0))
    monitor._file.close()
    monitor._file = Path("/dev/full").open("w")  # noqa: SIM115  (the monitor closes it)
    with pytest.raises(TrainingError, match=r"metrics\.jsonl: cannot be written .*No space left on device"):
        monitor.write({"update": 1, "loss": 1.0})
    monitor.close()  # its buffer still holds the line: must not raise another error over the first
