"""Captions that people wrote, made into rankings: some candidates for every picture, ranked by how far they agree with it.

    a picture with captions c1 ... c5   ->   its own c3, a neighbour's caption, c1 with a word exchanged, a stranger's caption
                                             ranked by agreement with c1 ... c5

What a candidate is worth is its mean similarity to what people wrote about the picture (the candidate itself left out), less
`MISTAKE` for each object that none of them mentions. So a reward model sees what a caption model does wrong: an
object too many, a colour exchanged, a sentence that suits a like picture.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmgpt.config import SourceConfig
from mmgpt.data.messages import ImageRef, MessageError, Rejected, user
from mmgpt.data.objects import made_up, vocabulary
from mmgpt.data.ranked import Preference
from mmgpt.data.sources import captions_of, draw_question, read_rows
from mmgpt.errors import UsageError

Embed = Callable[[Sequence[str]], Tensor]

FEWEST, MOST = 4, 9
"""Candidates a picture: what InstructGPT's labellers ranked at once (Ouyang et al. 2022, section 3.5)."""
LEAST_CAPTIONS = 3
MISTAKE = 0.1
MARGIN = 0.03
"""Candidates that are worth the same to within this are a tie."""
KINDS = ("own", "near", "exchanged", "far", "near", "any", "own", "near", "exchanged")
"""Where the candidates of a picture come from; K candidates take the first K."""
NEAR, FAR = 0.002, 0.05
"""Which share of all pictures, from the most alike on, counts as near, or as far."""
_WORD = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True)
class Captioned:
    """A picture and what people wrote about it."""

    image: ImageRef
    captions: list[str]
    where: str


@dataclass(frozen=True)
class Candidate:
    """A caption that somebody might give a picture.

    Args:
        text: The caption.
        vector: Its embedding [H], where it is known already.
        without: Which of the picture's own captions it is or was made of, and is not compared with.
        mistakes: Words in it that are known to be wrong.
    """

    text: str
    vector: Tensor | None = None
    without: int | None = None
    mistakes: int = 0


def rank_captions(source: SourceConfig, embed: Embed | None = None) -> Iterator[Preference | Rejected]:
    """Ranked candidates for each picture of a source with several captions a picture; the same ones every time.

    Args:
        source: `candidates` says how many a picture, `limit` counts pictures.
        embed: Sentences to unit vectors [N, H]; None takes all-MiniLM-L6-v2.

    Raises:
        UsageError: fewer or more candidates than people rank at once, or fewer pictures than that.
    """
    if not FEWEST <= source.candidates <= MOST:
        raise UsageError(f"source {source.path}: candidates is {source.candidates}, but must be 0 or from {FEWEST} to {MOST}")
    pictures: list[Captioned] = []
    for item in read_captioned(source):
        if isinstance(item, Rejected):
            yield item
        else:
            pictures.append(item)
    if len(pictures) <= MOST:
        raise UsageError(
            f"source {source.path}: {len(pictures)} pictures with {LEAST_CAPTIONS} or more captions are too few to draw "
            f"candidates from; more than {MOST} are needed"
        )
    if embed is None:
        from mmgpt.data.similarity import SentenceEncoder

        embed = SentenceEncoder()
    yield from _Ranker(pictures, embed, source).all()


def read_captioned(source: SourceConfig) -> Iterator[Captioned | Rejected]:
    """The pictures of a source that several captions are written about, up to its `limit`."""
    count = 0
    for row in read_rows(source):
        if isinstance(row, Rejected):
            yield row
            continue
        try:
            images, captions = captions_of(row, source)
        except MessageError as error:
            yield Rejected(error.reason, row.where, str(error))
            continue
        captions = list(dict.fromkeys(captions))
        if len(images) != 1 or len(captions) < LEAST_CAPTIONS:
            wanted = f"ranking takes one picture with {LEAST_CAPTIONS} captions or more"
            there = f"{len(images)} pictures and {len(captions)} captions"
            yield Rejected("few_captions", row.where, f"{there}; {wanted}")
        elif count == source.limit:
            return
        else:
            count += 1
            yield Captioned(images[0], captions, row.where)


class _Ranker:
    """Candidates for the pictures of one source.

    Letters in shapes: P pictures, N captions of all pictures, H width of the embedding.
    """

    def __init__(self, pictures: list[Captioned], embed: Embed, source: SourceConfig):
        self.pictures, self.embed, self.source = pictures, embed, source
        self.vectors = embed([text for picture in pictures for text in picture.captions]).split(
            [len(picture.captions) for picture in pictures]
        )
        self.means = torch.nn.functional.normalize(torch.stack([part.mean(0) for part in self.vectors]), dim=-1)  # [P, H]

    def all(self) -> Iterator[Preference | Rejected]:
        drawn = []
        for place, picture in enumerate(self.pictures):
            candidates = self._candidates(place, rng := random.Random(f"candidates/{place}/{picture.captions[0]}"))
            rng.shuffle(candidates)
            drawn.append(candidates)
        new = [candidate.text for candidates in drawn for candidate in candidates if candidate.vector is None]
        vectors = iter(self.embed(new) if new else ())
        for place, (picture, candidates) in enumerate(zip(self.pictures, drawn)):
            worth = [self._worth(place, one, next(vectors) if one.vector is None else one.vector) for one in candidates]
            answers = [self.source.answer.replace("{}", candidate.text) for candidate in candidates]
            pairs = [
                (better, worse)
                for better, high in enumerate(worth)
                for worse, low in enumerate(worth)
                if high - low > MARGIN
            ]
            compared = len(answers) * (len(answers) - 1) // 2
            if pairs:
                prompt = [user(draw_question(self.source.question, f"0/{picture.where}"), [picture.image])]
                yield Preference(prompt, answers, pairs, compared, picture.where)
            else:
                yield Rejected("only_ties", picture.where, "no candidate agrees better with the captions than another")

    def _candidates(self, place: int, rng: random.Random) -> list[Candidate]:
        """Different captions for a picture, `source.candidates` of them where there are as many."""
        picture, vectors = self.pictures[place], self.vectors[place]
        alike = (self.means @ self.means[place]).argsort(descending=True).tolist()
        others = [other for other in alike if other != place]
        reach = {"near": max(3, round(NEAR * len(others))), "far": max(6, round(FAR * len(others))), "any": len(others)}
        own = list(range(len(picture.captions)))
        rng.shuffle(own)
        found: dict[str, Candidate] = {}
        for kind in KINDS[: self.source.candidates]:
            candidate = None
            if kind == "own" and own:
                number = own.pop()
                candidate = Candidate(picture.captions[number], vectors[number], number)
            elif kind == "exchanged":
                candidate = self._exchanged(place, rng)
            for _ in range(8):
                if candidate is not None and candidate.text not in found:
                    break
                other = rng.choice(others[: reach.get(kind, reach["near"])])
                number = rng.randrange(len(self.pictures[other].captions))
                candidate = Candidate(self.pictures[other].captions[number], self.vectors[other][number])
            if candidate is not None:
                found.setdefault(candidate.text, candidate)
        return list(found.values())

    def _exchanged(self, place: int, rng: random.Random) -> Candidate | None:
        """A caption of the picture with one word exchanged for one that none of its captions has; None where none can be."""
        captions = self.pictures[place].captions
        there = {word.lower() for caption in captions for word in _WORD.findall(caption)}
        for number in rng.sample(range(len(captions)), len(captions)):
            words = list(_WORD.finditer(captions[number]))
            for found in rng.sample(words, len(words)):
                choices = [word for word in vocabulary().exchanged.get(found[0].lower(), ()) if word not in there]
                if choices:
                    word = rng.choice(choices)
                    word = word.capitalize() if found[0][0].isupper() else word
                    text = captions[number][: found.start()] + word + captions[number][found.end() :]
                    return Candidate(text, without=number, mistakes=1)
        return None

    def _worth(self, place: int, candidate: Candidate, vector: Tensor) -> float:
        """How far a candidate, whose embedding is [H], agrees with what people wrote: at most 1."""
        kept = [number for number in range(len(self.vectors[place])) if number != candidate.without]
        references = [self.pictures[place].captions[number] for number in kept]
        mistakes = max(candidate.mistakes, len(made_up(candidate.text, references)))
        return float((self.vectors[place][kept] @ vector).mean()) - MISTAKE * mistakes
