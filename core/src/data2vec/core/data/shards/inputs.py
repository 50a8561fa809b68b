"""The member of a sample that is the input of its modality.

A key ends at the first dot of a file's name (WebDataset's rule), so the extension of ``x.input.jpg`` is ``input.jpg``,
and forty files ``clip.0000.jpg`` to ``clip.0039.jpg`` are one sample. The first can be used; the second is a mistake.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self

from data2vec.core.data.shards.tar import TarSample
from data2vec.core.errors import DataError, one_line
from data2vec.core.modality import Modality

_SHOWN = 3  # members that a problem names


def last_ending(extension: str) -> str:
    """Give what follows the last dot: ``jpg`` of ``input.jpg``."""
    return extension.rpartition(".")[2]


@dataclass(frozen=True)
class Inputs:
    """Finds the input among the members of a sample.

    Args:
        modality: its name.
        extensions: those that it reads, in the order in which it looks for them.
        member: ``data.member``, the extension to take where a sample has it (``input.jpg``).
    """

    modality: str
    extensions: tuple[str, ...]
    member: str | None = None

    @classmethod
    def of(cls, modality: Modality | type[Modality], member: str | None = None) -> Self:
        """Those of a modality; ``member`` counts where its last ending is one that the modality reads."""
        fits = member is not None and last_ending(member) in modality.extensions
        return cls(modality.name, modality.extensions, member if fits else None)

    def present(self, sample: TarSample) -> TarSample:
        """The sample with its input under the plain ending that decoders look for, or with its problem."""
        if sample.problem is not None:
            return sample
        members = sample.members
        chosen = self.member
        if chosen is None or chosen not in members:
            if any(extension in members for extension in self.extensions):
                return sample
            fitting = [extension for extension in members if last_ending(extension) in self.extensions]
            if len(fitting) != 1:
                return replace(sample, problem=self._problem(sample, sorted(fitting)))
            chosen = fitting[0]
        others = {name: place for name, place in members.items() if name not in (chosen, *self.extensions)}
        return TarSample(sample.key, {last_ending(chosen): members[chosen], **others})

    def _problem(self, sample: TarSample, fitting: Sequence[str]) -> str:
        if fitting:
            name, first = sample.key.rpartition("/")[2], fitting[0]
            dashed = f"{name}-{first.rpartition('.')[0].replace('.', '-')}.{last_ending(first)}"
            return (
                f"holds {len(fitting)} members that could be its {self.modality} input ({_listed(fitting)}): a key "
                f"ends at its first dot, so rename files without dots ({dashed}), or choose a member with "
                f"data.member={first} (tools/shard.py: --member {first})"
            )
        found = _listed(sorted(sample.members))
        return f"holds no {self.modality} input: its members are {found}, one of {_listed(self.extensions)} is needed"


def check_share(what: str, counted: int, problems: Sequence[str], most: float) -> None:
    """Refuse samples of which too many cannot be used, as their headers show.

    Args:
        what: names them in the error.
        counted: all samples.
        problems: a line for each of those that cannot be used.
        most: the share that may be.

    Raises:
        DataError: it is larger, or none can be used.
    """
    if problems and (len(problems) == counted or len(problems) > most * counted):
        share = f"{len(problems)} of {counted} samples cannot be used"
        allowed, advice = "", ""
        if len(problems) < counted:
            allowed = f", more than data.max_broken={most:g} allows"
            advice = "; mend the shards, or raise data.max_broken"
        raise DataError(f"{what}: {share}{allowed}; the first: {problems[0]}{advice}")


def unusable(place: str, samples: Iterable[TarSample]) -> list[str]:
    """A line for each sample that cannot be used."""
    return [one_line(f"{place}: {sample.key}: {sample.problem}") for sample in samples if sample.problem is not None]


def _listed(extensions: Sequence[str]) -> str:
    if len(extensions) <= _SHOWN + 1:
        return ", ".join(f".{extension}" for extension in extensions)
    return ", ".join(f".{extension}" for extension in extensions[:_SHOWN]) + f" to .{extensions[-1]}"
