"""The filter: a text in, a verdict out, and nothing that goes wrong lets a text pass.

    text -> views -> windows -> stage 1, on every window -> stage 2, on those that stage 1 does not clear -> highest score

What both stages have read is scored by both. A text is as sensitive as the most sensitive window of any of its views. Each text
is judged by itself: alone, in a batch or streamed it gets the same verdict, to the bit.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from safety.normalize import BudgetError, View, views
from safety.stream import AnswerStream
from safety.taxonomy import KEYS
from safety.verdict import MAX_BYTES, POINTS, REASONS, Verdict
from safety.weights import FOLDER, WeightsError, read
from safety.windows import Window, windows

CANARIES = Path(__file__).parent / "data" / "canaries.jsonl"
MIN_CANARIES, MIN_SEPARATION = 20, 0.5

READS, READS_PER = 6, 4096
"""Stage 2 reads the READS most suspicious windows of a text, and one more for every READS_PER characters."""

ROOMS = ((4, 256), (2, 1024))
"""And of every view by themselves its single segments and its pairs: so many, and one more for every so many characters.

Stage 1 suspects hundreds of windows of a long text, and a request that hides in it is rarely among the first. Segments cost the
least, and it stands out best in them; in a pair it is whole where it lies across a boundary. That each kind has its room keeps
what looks worse from filling several places at once, and what a short view decodes from being crowded out by a long one.
"""

WHOLE = 32
"""A text with no more suspicious windows than this is read to the end, whatever is found: its score is its worst window's."""

CHUNK = 1 << 17
"""Characters of windows that stage 1 reads in one call; nothing depends on it but memory and speed."""


class Stage(Protocol):
    """`classifier.Linear` and `classifier.Transformer`."""

    def logits(self, texts: Sequence[str]) -> Any: ...


class _Blocked(Exception):
    """A text that cannot be judged; `reason` says why."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class Filter:
    """Judges texts, conversations and answers.

    A filter that could not be loaded is no exception but a filter that blocks everything: `problem` is then the reason code,
    and `detail` says more. No argument switches a stage off.

    Args:
        operating_point: `strict`, `balanced` or `loose`: which of the fixed thresholds counts.
        weights: Another folder of weights, with its own canaries.jsonl.

    Raises:
        ValueError: there is no such operating point.
    """

    def __init__(self, operating_point: str = "balanced", *, weights: Path | str | None = None) -> None:
        if operating_point not in POINTS:
            raise ValueError(f"operating_point is {operating_point!r}; there are {', '.join(POINTS)}")
        self.operating_point = operating_point
        self.problem = self.detail = self.model = ""
        folder = FOLDER if weights is None else Path(weights)
        try:
            self._load(folder)
            self._try_canaries(CANARIES if weights is None else folder / CANARIES.name)
        except WeightsError as error:
            self.problem, self.detail = error.reason, str(error)
        except (Exception, SystemExit) as error:
            self.problem, self.detail = "failed_load", f"{type(error).__name__}: {error}"

    def _load(self, folder: Path) -> None:
        files, calibration = read(folder)
        self.model = calibration["seal"][:12]
        try:
            if calibration["version"] != 3 or tuple(calibration["categories"]) != KEYS:
                raise ValueError("calibration.json is of another version or taxonomy")
            self._scales = [_Scale(calibration[stage]["a"], calibration[stage]["b"]) for stage in ("linear", "transformer")]
            self._together = Together(*(float(calibration["together"][field.name]) for field in fields(Together)))
            self._thresholds = {name: float(calibration["thresholds"][name]["threshold"]) for name in POINTS}
            bound = float(calibration["linear"]["clear_below"])
            # Stage 1 may clear only what every operating point would let pass.
            lowest = self._thresholds["strict"]
            if not 0 <= bound <= lowest <= self._thresholds["balanced"] <= self._thresholds["loose"] <= 1:
                raise ValueError("the thresholds are not in order")
            self._clear, self._certain = _logit(bound), _logit(self._thresholds["loose"])
            pieces = {key: int(calibration["transformer"][key]) for key in ("length", "overlap")}
            self._stages = _stages(files, pieces)
        except (Exception, SystemExit) as error:
            raise WeightsError("weights_unreadable", f"{folder}: {type(error).__name__}: {error}") from error

    def _try_canaries(self, path: Path) -> None:
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            texts, labels = [row["text"] for row in rows], [row["label"] for row in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError("canary_failed", f"{path} cannot be read: {error!r}") from error
        if len(rows) < MIN_CANARIES or set(labels) != {0, 1}:
            raise WeightsError("canary_failed", f"{path} needs {MIN_CANARIES} prompts of both labels")
        found = self.check_batch(texts)
        broken = next((verdict.reason for verdict in found if not verdict.categories), None)
        if broken:
            raise WeightsError("canary_failed", f"a canary could not be judged: {broken}")
        scores = [[verdict.score for verdict, label in zip(found, labels) if label == wanted] for wanted in (0, 1)]
        gap = min(scores[1]) - max(scores[0])
        if not gap >= MIN_SEPARATION:
            raise WeightsError(
                "canary_failed", f"sensitive and harmless canaries are {gap:.3f} apart, {MIN_SEPARATION} are needed"
            )

    # Judging

    def check(self, text: Any) -> Verdict:
        """Judge one text."""
        return self.check_batch([text])[0]

    def check_batch(self, texts: Iterable[Any]) -> list[Verdict]:
        """Judge texts; the verdicts in their order, each as if the text were alone."""
        cases = [_Case(text) for text in texts]
        if self.problem:
            return [self.blocked(self.problem) for _ in cases]
        try:
            self._first_stage(cases)
        except (Exception, SystemExit):
            # One of them may have broken the call for all: each by itself.
            for case in cases:
                case.reset()
                with _failing(case, "failed_linear"):
                    self._first_stage([case])
        for case in cases:
            with _failing(case, "failed_transformer"):
                self._second_stage(case)
        return [self._decide(case) for case in cases]

    def blocked(self, reason: str) -> Verdict:
        """The verdict on what cannot be judged. Raises KeyError for a code that is not in `REASONS`."""
        assert REASONS[reason]
        return Verdict(True, 1.0, reason, operating_point=self.operating_point, model=self.model)

    def _first_stage(self, cases: list[_Case]) -> None:
        """Stage 1 on every window of every view."""
        chunk: list[_Read] = []
        size = 0
        for case in cases:
            for read_ in case.windows():
                chunk.append(read_)
                size += len(read_.text)
                if size >= CHUNK:
                    self._score_first(chunk)
                    chunk, size = [], 0
        if chunk:
            self._score_first(chunk)

    def _score_first(self, chunk: list[_Read]) -> None:
        places: dict[str, int] = {}
        for read_ in chunk:
            places.setdefault(read_.text, len(places))
        logits = _checked(self._stages[0].logits(list(places)), len(places))
        scaled = self._scales[0].sensitive(logits)
        for read_ in chunk:
            at = places[read_.text]
            value = scaled[at]
            if value < self._clear:
                if value > read_.case.clear.value:
                    read_.case.clear = _Scored(value, 0, read_, logits[at])
            else:
                read_.case.suspect(value, read_)

    def _second_stage(self, case: _Case) -> None:
        """Stage 2 on the windows that stage 1 does not clear, the most suspicious first.

        The score of a prompt is the highest of all its windows. Of a text of more than `WHOLE` suspicious ones no more is read
        once every operating point has decided.
        """
        if case.reason:
            return
        suspects = case.suspects()
        for first, read_ in suspects:
            logits = _checked(self._stages[1].logits([read_.text]), 1)
            value = self._together(first, self._scales[1].sensitive(logits)[0])
            if not math.isfinite(value):  # a NaN is above nothing: the window would not count
                raise _Blocked("not_finite")
            if value > case.read.value:
                case.read = _Scored(value, 1, read_, logits[0])
            if value >= self._certain and len(suspects) > WHOLE:
                break

    def _decide(self, case: _Case) -> Verdict:
        if case.reason:
            return self.blocked(case.reason)
        try:
            best = max(case.read, case.clear, key=lambda scored: scored.value)
            if best.window is None:
                return self.blocked("empty")
            score = _sigmoid(best.value)
            # Equal rounding on both sides: what stage 1 clears stays below every threshold.
            sensitive = score >= self._thresholds[self.operating_point]
            categories = self._scales[best.stage].categories(best.logits)
            likeliest = max(categories, key=lambda key: categories[key])
            if not math.isfinite(score) or not all(map(math.isfinite, categories.values())):
                return self.blocked("not_finite")
            return Verdict(
                sensitive=bool(sensitive),
                score=score,
                reason="clear" if not sensitive else likeliest if categories[likeliest] >= 0.5 else "sensitive",
                categories=categories,
                span=best.window.span() if sensitive else None,
                view=best.window.view.name,
                operating_point=self.operating_point,
                model=self.model,
            )
        except (Exception, SystemExit):
            return self.blocked("failed_decision")

    # Conversations and answers

    def check_conversation(self, messages: Any) -> Verdict:
        """Judge a conversation: all of it as one text, and what each role says without the others.

        The text of every message counts, whatever its role: a request may be spread over turns, put into the mouth of the
        assistant, or hidden in a tool's result. Messages are `{"role": ..., "content": text or parts}`; pictures among the
        parts are not read. `span` refers to all texts joined by line breaks.
        """
        try:
            said = [(message["role"], content_text(message["content"])) for message in messages]
            if not said or isinstance(messages, str | bytes | Mapping):
                raise ValueError("no messages")
        except (Exception, SystemExit):
            return self.blocked(self.problem or "bad_messages")
        together = "\n".join(text for _, text in said)
        texts = [together]
        for role in dict.fromkeys(role for role, _ in said):
            texts.append("\n".join(text for other, text in said if other == role))
        texts = list(dict.fromkeys(texts))
        found = self.check_batch([text for text in texts if text.strip()] or [together])
        first = found[0]
        worst = max(found, key=lambda verdict: (verdict.sensitive, verdict.score))
        if worst is first or worst.score == first.score:
            return first
        return Verdict(**{**worst.__dict__, "span": None})

    def check_answer(self, prompt: Any, answer: Any) -> Verdict:
        """Judge an answer to a prompt: the prompt, and the answer as `AnswerStream` judges it while it comes."""
        asked = self.check(prompt)
        if asked.sensitive:
            return asked
        if not isinstance(answer, str):
            return self.blocked(self.problem or "not_text")
        stream = self.answer_stream()
        for _ in stream.feed(answer):
            pass
        for _ in stream.close():
            pass
        return stream.verdict

    def answer_stream(self) -> AnswerStream:
        """A checker for an answer that comes in pieces."""
        return AnswerStream(self)


def content_text(content: Any) -> str:
    """The text of a message's content: a string, or parts of which those with text count. Raises ValueError."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ValueError("content is neither text nor a list of parts")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif not isinstance(part, Mapping) or "text" in part or part.get("type") == "text":
            raise ValueError("a part that is neither text nor a picture")
    return "".join(texts)


# What a case holds


class _Read(NamedTuple):
    """A window to read; `kind` is 0 for a segment, 1 for a pair, 2 for a block, `order` where it comes among all of its text."""

    case: _Case
    view: View
    window: Window
    text: str
    kind: int
    order: int

    def span(self) -> tuple[int, int]:
        return self.view.origin(self.window.start, self.window.end)


@dataclass(frozen=True)
class _Scored:
    """The highest logit so far, after calibration; where, and by which stage."""

    value: float
    stage: int
    window: _Read | None
    logits: Any


_NOTHING = _Scored(-math.inf, 0, None, None)


class _Case:
    """One text on its way through the stages."""

    def __init__(self, text: Any) -> None:
        self.text = text
        self.reset()

    def reset(self) -> None:
        self.reason = ""
        self.clear = self.read = _NOTHING
        self._most = _Most(READS)
        self._kinds: dict[str, list[_Most]] = {}

    def windows(self) -> Iterator[_Read]:
        """Every window of every view; nothing of a text that cannot be judged."""
        found: list[View] = []
        with _failing(self, "failed_normalize"):
            _validate(self.text)
            self._most = _Most(READS + len(self.text) // READS_PER)
            found = views(self.text)
            if not found[0].text and len(found) == 1:
                raise _Blocked("empty")
        decoded = sum(len(view.text) for view in found[1:])
        order = 0
        for number, view in enumerate(found):
            kind, start = 0, -1
            with _failing(self, "failed_windows"):
                # All that a text decodes to has as much room as the text: what grows when it is decoded does not grow the work.
                size = len(view.text) * len(self.text) // max(len(self.text), decoded) if number else len(view.text)
                self._kinds[view.name] = [_Most(least + size // per) for least, per in ROOMS]
                for part in windows(view.text):
                    kind, start = (kind + 1 if part.start == start else 0), part.start
                    order += 1
                    yield _Read(self, view, part, part.read(view.text), kind, order)

    def suspect(self, value: float, read_: _Read) -> None:
        """Remember a window for stage 2 if it is among the most suspicious."""
        self._most.add(value, read_)
        if read_.kind < len(ROOMS):
            self._kinds[read_.view.name][read_.kind].add(value, read_)

    def suspects(self) -> list[tuple[float, _Read]]:
        """The windows for stage 2 with what stage 1 makes of them, the most suspicious first, equal texts once."""
        rooms = [self._most, *(most for kinds in self._kinds.values() for most in kinds)]
        once: dict[str, tuple[float, _Read]] = {}
        for value, read_ in sorted((entry for most in rooms for entry in most.entries()), key=lambda entry: entry[1].order):
            once.setdefault(read_.text, (value, read_))
        return sorted(once.values(), key=lambda entry: -entry[0])


class _Most:
    """The windows with the highest values, at most `room`; of equal values the first, of equal texts one.

    Or the same decoy, repeated, would keep stage 2 from what else there is.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._heap: list[tuple[float, int, _Read]] = []
        self._held: set[str] = set()

    def add(self, value: float, read_: _Read) -> None:
        if read_.text in self._held:
            return
        self._held.add(read_.text)
        entry = (value, -read_.order, read_)
        if len(self._heap) < self.room:
            heapq.heappush(self._heap, entry)
        else:
            self._held.remove(heapq.heappushpop(self._heap, entry)[2].text)

    def entries(self) -> list[tuple[float, _Read]]:
        """What is held, in no order."""
        return [(value, read_) for value, _, read_ in self._heap]


def _validate(text: Any) -> None:
    if not isinstance(text, str):
        raise _Blocked("not_text")
    if not text:
        raise _Blocked("empty")
    if len(text) >= MAX_BYTES:
        raise _Blocked("too_long")
    if not text.isascii():
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise _Blocked("surrogates") from error
        if size >= MAX_BYTES:
            raise _Blocked("too_long")


class _failing:
    """Turn whatever is raised inside into the case's reason."""

    def __init__(self, case: _Case, reason: str) -> None:
        self.case, self.reason = case, reason

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if error is None:
            return False
        if isinstance(error, _Blocked):
            self.case.reason = error.reason
        elif isinstance(error, BudgetError):
            self.case.reason = "budget_exceeded"
        elif isinstance(error, Exception | SystemExit):
            self.case.reason = self.reason
        else:
            return False
        return True


# Stages and scales


def _stages(files: dict[str, bytes], pieces: dict[str, int]) -> tuple[Stage, Stage]:
    from safety.classifier import Linear, Transformer

    linear = Linear.load(files["linear.npz"])
    return linear, Transformer(files["encoder.int8.onnx"], files["tokenizer.json"], **pieces)


class _Scale:
    """Platt's a and b of every output."""

    def __init__(self, a: Sequence[float], b: Sequence[float]) -> None:
        if not len(a) == len(b) == 1 + len(KEYS) or not all(map(math.isfinite, (*a, *b))) or a[0] <= 0:
            raise ValueError("the calibration of a stage is of another length or not finite")
        self.a, self.b = list(map(float, a)), list(map(float, b))

    def sensitive(self, logits: Any) -> list[float]:
        """Calibrated logits of column 0, float64."""
        values: list[float] = (self.a[0] * logits[:, 0].astype("float64") + self.b[0]).tolist()
        return values

    def categories(self, row: Any) -> dict[str, float]:
        return {key: _sigmoid(a * z + b) for key, a, b, z in zip(KEYS, self.a[1:], self.b[1:], row[1:].tolist())}


@dataclass(frozen=True)
class Together:
    """The logit of a window that both stages have read: slope z + cube z^3 + bias of z, what both say of it.

    It rises with z, so that the cube changes scores and no ranking; see `calibrate.bent`.

    Args:
        weight: Of the calibrated logit of stage 1 in z; that of stage 2 counts one.

    Raises:
        ValueError: it would fall with what a stage says, or not depend on it.
    """

    weight: float
    slope: float
    cube: float
    bias: float

    def __post_init__(self) -> None:
        rising = 0 <= self.weight < math.inf and 0 < self.slope < math.inf and 0 <= self.cube < math.inf
        if not (rising and math.isfinite(self.bias)):
            raise ValueError(f"what both stages say cannot be scored by {self}")

    def __call__(self, first: Any, second: Any) -> Any:
        """Of numbers, or of arrays of them, [N]."""
        z = self.weight * first + second
        return self.slope * z + self.cube * z**3 + self.bias


def _checked(logits: Any, count: int) -> Any:
    import numpy as np

    if not isinstance(logits, np.ndarray) or logits.shape != (count, 1 + len(KEYS)) or not np.isfinite(logits).all():
        raise _Blocked("not_finite")
    return logits


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def _logit(probability: float) -> float:
    if probability <= 0:
        return -math.inf
    return math.inf if probability >= 1 else math.log(probability / (1 - probability))
