"""English sentences for the sample speech, put together from templates and word lists."""

from __future__ import annotations

import numpy as np

# The core words of Google's Speech Commands (Warden 2018, arXiv 1804.03209).
WORDS = (
    "yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go",
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
)  # fmt: skip

_LISTS = {
    "adjective": """angry big black blue brave bright broken busy calm careful cheap clean clever cold curious dark deep
        dry early easy empty famous fast flat foreign free fresh friendly gentle golden grey green happy heavy honest
        huge hungry large late lazy loose loud lucky modern narrow nervous new noisy old pale patient plain polite
        poor proud quick quiet rare red rich rough round sad sharp shy silver simple slow small smooth soft strange
        strong sudden sweet tall thick thin tiny tired usual warm weak wide wild wise wooden yellow young""",
    "thing": """apple bag ball basket bell boat book bottle bowl box bread bridge bucket button cake camera candle
        card carpet chair cheese clock cloth coat coin cup curtain desk door drum engine envelope feather fence flag
        flower fork glass glove hammer hat house jar jewel key kite knife ladder lamp leaf letter machine map mirror
        needle newspaper orange package paper pencil piano picture pillow plate pocket potato purse ribbon ring rope
        shell shirt shoe spoon stone table ticket towel toy treasure umbrella vase violin watch wheel window""",
    "being": """artist baby baker bear bird boy captain cat chicken child cousin cow crowd doctor dog donkey driver duck
        farmer father fisherman fox friend girl goat guard guest horse judge king lion mother mouse neighbour nurse
        owl painter pigeon pilot player queen rabbit sailor sheep singer sister soldier squirrel stranger student
        teacher thief tiger uncle visitor waiter wolf woman worker writer""",
    "did": """admired borrowed bought brought built carried caught changed chose cleaned collected counted covered
        described drew dropped enjoyed examined followed forgot found gathered gave hid imagined invited kept left
        lost loved measured moved noticed offered opened painted picked pulled pushed reached remembered repaired
        saved saw sent shared sold stole threw took touched wanted washed watched""",
    "place": """airport attic beach barn castle cellar church city corner desert factory field forest garden harbour
        hill hospital hotel island kitchen lake library market meadow mountain museum office palace park playground
        port restaurant river road roof school shop stable station street theatre tower town valley village wall
        yard zoo""",
    "where": "above across after around before behind below beside between by from in into near on over past through "
    "to towards under",
    "name": """Adam Alice Anna Ben Carol Charles Daniel David Emma Frank George Grace Hannah Henry Jack James Jane
        John Julia Kate Laura Lucy Mark Mary Oliver Oscar Paul Peter Rose Ruth Sam Sarah Sophie Susan Thomas Victor""",
    "number": "zero one two three four five six seven eight nine",
    "way": "up down left right",
    "switch": "on off",
    "command": "stop go",
    "answer": "yes no",
}  # fmt: skip
_TEMPLATES = (
    "the {adjective} {being} {did} the {thing} {where} the {place}",
    "{name} {did} the {adjective} {thing}",
    "{name} and {name} {did} {thing} number {number}",
    "my {being} {did} the {thing} of the {adjective} {being}",
    "turn {way} {where} the {adjective} {place}",
    "{being} number {number} {did} the {place}",
    "please switch the {thing} {switch} {when}",
    "{answer} the {being} {did} it {where} the {thing}",
    "{command} {where} the {place} and look {way}",
    "our {place} is {where} the {adjective} {place}",
    "is the {thing} {where} the {adjective} {thing}",
    "call {number} {number} {number} {number} {when}",
    "my {being} was {adjective} and {adjective}",
    "{when} {name} {did} {number} of them {where} the {place}",
    "{way} and {way} then {number} steps {way}",
    "did the {being} {command} {where} the {place}",
)
_CHOICES = {name: tuple(words.split()) for name, words in _LISTS.items()}
_CHOICES["when"] = (
    "again", "already", "at last", "at night", "early", "every day", "later", "now", "once more", "soon", "today",
    "together", "tomorrow", "yesterday",
)  # fmt: skip


def sentence(generator: np.random.Generator) -> str:
    """A random sentence of four to eleven words, without punctuation, which would make espeak-ng pause."""
    parts = []
    for part in _TEMPLATES[generator.integers(len(_TEMPLATES))].split():
        start, brace, rest = part.partition("{")
        if brace:
            name, _, end = rest.partition("}")
            choices = _CHOICES[name]
            part = start + choices[generator.integers(len(choices))] + end
        parts.append(part)
    return " ".join(parts)
