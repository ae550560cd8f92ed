import pytest

from tests.bench.prompts import PromptKind, PromptShape


def ids(shape: PromptShape, seed: int, key: str) -> list[int]:
    prompt = shape.build(seed, key)
    assert isinstance(prompt, list)
    return prompt


def test_ids_have_the_length_and_the_range() -> None:
    prompt = ids(PromptShape(5000), 0, "x")
    assert len(prompt) == 5000
    assert min(prompt) >= 1000
    assert max(prompt) < 40_000
    assert set(ids(PromptShape(100, id_start=3, id_stop=5), 0, "x")) == {3, 4}


def test_seed_and_key_make_the_prompt() -> None:
    shape = PromptShape(64)
    assert ids(shape, 1, "x") == ids(shape, 1, "x")
    assert ids(shape, 1, "x") != ids(shape, 2, "x")


def test_a_prefix_cache_finds_nothing_unless_asked() -> None:
    prompts = [ids(PromptShape(64), 7, f"measured/{i}") for i in range(50)]
    assert len({prompt[0] for prompt in prompts}) > 45


def test_the_shared_prefix_is_exactly_as_long_as_asked() -> None:
    shape = PromptShape(64, shared_prefix_tokens=48)
    one, two = ids(shape, 7, "one"), ids(shape, 7, "two")
    assert len(one) == 64
    assert one[:48] == two[:48]
    assert one[48:50] != two[48:50]
    assert ids(shape, 8, "one")[:48] != one[:48]


def test_text_has_as_many_words_as_tokens_asked() -> None:
    shape = PromptShape(30, PromptKind.TEXT, shared_prefix_tokens=10)
    one, two = shape.build(1, "one"), shape.build(1, "two")
    assert isinstance(one, str)
    assert isinstance(two, str)
    assert len(one.split()) == 30
    assert one.split()[:10] == two.split()[:10]
    assert one != two


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="length 0"):
        PromptShape(0)
    with pytest.raises(ValueError, match="shared prefix 9"):
        PromptShape(8, shared_prefix_tokens=9)
    with pytest.raises(ValueError, match=r"\[5, 5\)"):
        PromptShape(8, id_start=5, id_stop=5)
