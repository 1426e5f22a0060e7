"""What captions name, and what they make up."""

from hypothesis import given
from hypothesis import strategies as st

from mmgpt.data.objects import count_made_up, made_up, named, plurals, vocabulary


def test_names_are_kinds_in_singular_and_plural():
    assert named("Two puppies chase a Frisbee along the beaches.") == {"dog", "frisbee", "beach"}
    assert named("Nothing of note.") == set()
    assert plurals("puppy") == ["puppies"] and plurals("bench") == ["benches"] and plurals("boy") == ["boys"]


def test_what_nobody_mentions_is_made_up():
    references = ["A man rides his bike down a hill.", "A cyclist on a path."]
    assert made_up("A man on a bicycle.", references) == set()
    assert made_up("A man with a dog on a bicycle.", references) == {"dog"}


def test_a_wider_or_a_narrower_word_is_no_mistake_but_a_neighbour_is():
    assert made_up("An animal in the snow.", ["A dog in the snow."]) == set()
    assert made_up("A dog in the snow.", ["An animal in the snow."]) == set()
    assert made_up("A cat in the snow.", ["A dog in the snow."]) == {"cat"}
    assert made_up("A woman sits.", ["A man sits."]) == {"woman"}


def test_counts_by_caption_and_by_object():
    found = count_made_up(
        ["A dog with a ball.", "A dog with a cat and a car.", "Nothing."], [["A dog plays with a ball."], ["A dog."], ["A dog."]]
    )
    assert (found.captions, found.wrong, found.objects, found.invented) == (3, 1, 5, 2)
    assert found.sentences == 1 / 3 and found.instances == 2 / 5


@given(st.lists(st.sampled_from(sorted(vocabulary().kinds)), max_size=8))
def test_nobody_makes_up_what_he_says_himself(words):
    caption = " and ".join(words)
    assert made_up(caption, [caption]) == set()
    assert made_up(caption, []) == named(caption)


def test_every_word_of_the_file_means_something():
    words = vocabulary()
    assert set(words.within) == set(words.kinds.values())
    for word, others in words.exchanged.items():
        assert others and word not in others
