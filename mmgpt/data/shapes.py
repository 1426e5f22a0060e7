"""Pictures that the project draws itself: coloured shapes with a caption, so that nothing has to be fetched to try a run."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from mmgpt.data.messages import Sample, assistant, user

COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 200),
    "yellow": (220, 190, 40),
    "purple": (140, 60, 170),
    "black": (30, 30, 30),
}
SIDES = {"triangle": 3, "square": 4, "circle": 40}
QUESTIONS = ("What is shown?", "Which colour is it?", "Which shape is it?")


@dataclass(frozen=True)
class ShapeImage:
    """One drawing, made when it is read (a `LazyImage`)."""

    name: str
    colour: str
    shape: str
    seed: int
    size: int = 64

    def read(self) -> bytes:
        from PIL import Image, ImageDraw

        rng = random.Random(self.seed)
        shade = rng.randint(200, 255)
        picture = Image.new("RGB", (self.size, self.size), (shade, shade, shade))
        radius = self.size * rng.uniform(0.22, 0.38)
        x, y = (rng.uniform(radius, self.size - radius) for _ in range(2))
        turn = -math.pi / 2 if self.shape != "square" else math.pi / 4
        turn += rng.uniform(-0.2, 0.2)
        sides = SIDES[self.shape]
        points = [
            (x + radius * math.cos(turn + 2 * math.pi * i / sides), y + radius * math.sin(turn + 2 * math.pi * i / sides))
            for i in range(sides)
        ]
        ImageDraw.Draw(picture).polygon(points, fill=COLOURS[self.colour])
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return buffer.getvalue()


def draw_shapes(split: str | None, count: int = 512) -> Iterator[Sample]:
    """Samples with one drawing and one question each; the splits `train` and `val` share no drawing."""
    for number in range(count):
        rng = random.Random(f"shapes/{split}/{number}")
        colour, shape = rng.choice(sorted(COLOURS)), rng.choice(sorted(SIDES))
        image = ShapeImage(f"shapes/{split}/{number}.png", colour, shape, rng.getrandbits(32))
        question = rng.choice(QUESTIONS)
        answer = {QUESTIONS[0]: f"a {colour} {shape}", QUESTIONS[1]: colour, QUESTIONS[2]: shape}[question]
        yield Sample([user(question, [image]), assistant(answer)], f"shapes[{split} {number}]")
