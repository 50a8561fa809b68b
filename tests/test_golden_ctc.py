"""Agreement with the authors' fine-tuned recognisers (CTC), of data2vec 1.0 and 2.0."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from data2vec.core import Batch
from data2vec.core.finetuning.recognition import RecognitionTask, Transcribed, required_frames
from data2vec.core.finetuning.transcripts import greedy
from data2vec.core.settings.fields import NormOrder, TransformerConfig
from data2vec.core.settings.finetuning import FrameMaskConfig, Freeze, LetterConfig
from data2vec.core.settings.finetuning import Recognition as Settings
from data2vec.core.testing import Golden, load_module, relative_error
from data2vec.speech import PositionsConfig, Speech
from data2vec.speech.published import our_name, student_state

released = load_module("released_of_speech", Path(__file__).with_name("released.py"))
TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


def ours(name: str) -> str:
    """Our name of one of their parameters."""
    if name.startswith("w2v_encoder.proj."):
        return name.replace("w2v_encoder.proj", "projection")
    found = our_name(name.removeprefix("w2v_encoder.w2v_model."))
    assert found is not None, name
    return "mask_token" if found == "mask_tokens.speech" else found.replace("student.", "backbone.encoder.")


@pytest.mark.parametrize("name", ["audio1_ctc", "audio2_ctc"])
class TestLetters:
    @pytest.fixture
    def golden(self, name: str) -> Golden:
        golden: Golden = released.released(name)[0]
        return golden

    @pytest.fixture
    def task(self, name: str, golden: Golden) -> RecognitionTask:
        second = name == "audio2_ctc"
        speech = Speech(
            channels=(24,) * 7, dropout=0.0, positions=PositionsConfig(width=95, depth=5, groups=16), alibi=second,
        )  # fmt: skip
        recipe = Settings(
            modalities={"speech": speech},
            transformer=TransformerConfig(
                depth=2, width=32, heads=4, mlp_ratio=3.0 if second else 2.0, norm_order=NormOrder.POST, norm_eps=1e-5
            ),
            freeze=Freeze.EXTRACTOR,
            letters=LetterConfig(symbols=tuple(golden.meta["letters"])),
            frame_masks=FrameMaskConfig(time=0.65 if not second else 0.0, channels=0.0),
        )
        task = RecognitionTask.build(recipe)
        weights = released.released(name)[1]
        prefix = "w2v_encoder.w2v_model."
        encoder = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        head = {ours(key): value for key, value in weights.items() if not key.startswith(prefix)}
        released.loaded(task, student_state(encoder), head)
        return task

    @staticmethod
    def clip(golden: Golden, key: str) -> Transcribed:
        target = golden[key.replace("input", "target")].long()[None]
        return Transcribed(golden[key][None], target, torch.tensor([target.shape[1]]))

    def test_every_clip(self, task: RecognitionTask, golden: Golden, name: str) -> None:
        for number, said in enumerate(golden.meta["clips"]):
            clip = self.clip(golden, f"input_{number}")
            features, _ = task.backbone(clip.inputs)
            assert relative_error(features[0], golden[f"encoder_{number}"]) < TOLERANCE
            logits, frames = task.logits(clip)
            assert frames.tolist() == [said["frames"]]
            assert relative_error(logits[0], golden[f"logits_{number}"]) < TOLERANCE
            assert relative_error(task.losses(logits, frames, clip), golden[f"ctc_loss_{number}"]) < TOLERANCE
            letters = [symbol for symbol, _, _ in greedy(logits[0])]
            assert letters == golden[f"greedy_ids_{number}"].tolist()
            assert [task.letters.symbols[letter] for letter in letters] == said["greedy"].split()
            text = said["target"].replace(" ", "").replace("|", " ")
            assert task.letters.encode(text) == golden[f"target_{number}"].tolist()
            assert task.letters.decode(task.letters.encode(text)) == text.strip()

    def test_clips_in_a_batch_are_clips_alone(self, task: RecognitionTask, golden: Golden, name: str) -> None:
        clips = [golden[f"input_{number}"] for number in range(3)]
        lengths = torch.tensor([len(clip) for clip in clips])
        inputs = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
        targets = [golden[f"target_{number}"].long() for number in range(3)]
        sizes = torch.tensor([len(target) for target in targets])
        padded = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True)
        together = Transcribed(inputs, padded, sizes, lengths)
        logits, frames = task.logits(together)
        wanted = torch.stack([golden[f"ctc_loss_{number}"] for number in range(3)])
        assert relative_error(task.losses(logits, frames, together), wanted) < TOLERANCE
        for number in range(3):
            assert relative_error(logits[number, : frames[number]], golden[f"logits_{number}"]) < TOLERANCE
        if name == "audio1_ctc":  # what lies in the padding reaches the clips of the released code
            theirs: Tensor = golden["padded_batch_logits"]
            assert relative_error(logits[2, : frames[2]], theirs[2, : frames[2]]) > 0.01

    def test_a_transcript_longer_than_its_clip(self, task: RecognitionTask, golden: Golden, name: str) -> None:
        clip = self.clip(golden, "too_short_input")
        step = task(clip)
        assert float(step.total.detach()) == float(golden["too_short_ctc_loss"]) == 0.0
        assert float(step.losses["too_long"]) == 1.0
        assert int(required_frames(clip.targets, clip.target_lengths)) > int(task.logits(clip)[1])
        ordinary = task(self.clip(golden, "input_0"))
        assert float(ordinary.losses["too_long"]) == 0.0

    def test_gradients(self, task: RecognitionTask, golden: Golden, name: str) -> None:
        for number in range(3):
            task(self.clip(golden, f"input_{number}")).total.backward()

        def part(theirs: str) -> tuple[str, slice]:
            third = next((number for number, letter in enumerate("qkv") if f".{letter}_proj." in theirs), None)
            return ours(theirs), slice(None) if third is None else slice(32 * third, 32 * third + 32)

        errors = released.gradient_errors(task, golden, part)
        assert len(errors) > 25
        errors = {key: error for key, error in errors.items() if not key.endswith("k_proj.bias")}
        assert max(errors.values()) < GRADIENT_TOLERANCE, errors
        frozen = {name for name, p in task.named_parameters() if p.grad is None}
        assert frozen == {ours(key) for key in golden.meta["no_gradient"]} | (
            {"mask_token"} if name == "audio1_ctc" else set()
        )


def test_masks_are_the_authors() -> None:
    """As many hidden frames as compute_mask_indices hides on average (probability 0.65, length 10: about 49 %)."""
    recipe = Settings(
        modalities={"speech": Speech(channels=(8,) * 7, positions=PositionsConfig(depth=0))},
        transformer=TransformerConfig(depth=1, width=128, heads=2),
        letters=LetterConfig(symbols=("_", "|", "a")),
        frame_masks=FrameMaskConfig(time=0.65, channels=0.5, channel_length=16),
    )
    task = RecognitionTask.build(recipe).train()
    batch = Batch("speech", torch.randn(64, 64_000), torch.arange(64), torch.full((64,), -1))
    prepared = task.prepare(batch, seed=0, update=0)
    assert prepared.hidden is not None
    assert prepared.silent is not None
    assert 0.45 < float(prepared.hidden.float().mean()) < 0.53
    assert 0.30 < float(prepared.silent.float().mean()) < 0.45  # 4 spans of 16 of 128 channels, some of which overlap
    assert prepared.silent.any(1).all()
    again = task.prepare(batch, seed=0, update=0)
    assert again.hidden is not None
    assert torch.equal(again.hidden, prepared.hidden)
    assert task.eval().prepare(batch, seed=0, update=0).hidden is None
