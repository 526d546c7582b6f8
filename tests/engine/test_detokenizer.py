"""Stop strings: found as soon as they are complete, wherever tokens begin and end, and cut from the text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rollout.engine.detokenizer import Detokenizer

CORPUS = [
    "the end of the story",
    "END. then stop here",
    "Ünïcödé naïve 東京 \U0001f600 done",
    "a\n\nb\n\nc",
    "12 34 56",
]
SPECIAL = "<|end|>"


@cache
def byte_level() -> Detokenizer:
    """As GPT-2, Llama 3 and Qwen: a character may be several tokens, and a token several characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return Detokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL))


@cache
def with_byte_fallback() -> Detokenizer:
    """As Llama 2 and Gemma: spaces are underscores, the first one is dropped, unknown characters are bytes."""
    pieces = ["<unk>", SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyzEND.12\n", "▁th", "en", "▁then", "st", "op", "▁stop", "▁▁"]
    merges = [("▁t", "h"), ("e", "n"), ("▁th", "en"), ("s", "t"), ("o", "p"), ("▁st", "op"), ("▁", "▁")]
    merges = [pair for pair in merges if all(part in pieces for part in pair) and "".join(pair) in pieces]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([SPECIAL])
    return Detokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL))


TEXTS = {"byte level": byte_level, "byte fallback": with_byte_fallback}


def ids_of(text: Detokenizer, string: str) -> list[int]:
    tokenizer = text._tokenizer
    assert tokenizer is not None
    return list(tokenizer(string, add_special_tokens=False)["input_ids"])


def special(text: Detokenizer) -> int:
    assert text._tokenizer is not None
    return int(text._tokenizer.convert_tokens_to_ids(SPECIAL))


def stopped_at(text: Detokenizer, ids: Sequence[int], stops: Sequence[str]) -> int | None:
    """Return the number of tokens until a stop string is complete, checking after each as the loop does."""
    return next((n for n in range(1, len(ids) + 1) if text.ends_at_stop((), ids[:n], stops)), None)


def test_tokenizers_split_characters_over_tokens() -> None:
    text = byte_level()
    assert len(ids_of(text, "\U0001f600")) > 1 or len(ids_of(text, "\U0001f601")) > 1
    assert len(ids_of(text, "the end")) < len("the end")
    for text in (byte_level(), with_byte_fallback()):
        ids = ids_of(text, "then 東 stop")
        assert text.decode(ids) == "then 東 stop"
        assert text.decode([*ids, special(text)]) == "then 東 stop"


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize(
    ("written", "stops", "left"),
    [
        ("then stop here", ("stop",), "then "),
        ("then stop here", ("st",), "then "),
        ("then stop here", ("n s",), "the"),
        ("then stop here", (" ",), "then"),
        ("a東京b", ("京",), "a東"),
        ("a\U0001f601b", ("\U0001f601b",), "a"),
        ("naïve end", ("ï",), "na"),
        ("then stop here", ("here", "stop"), "then "),
        ("a\n\nb", ("\n\n",), "a"),
        ("END. then", ("END.",), ""),
    ],
)
def test_text_ends_before_the_earliest_stop_string(name: str, written: str, stops: tuple[str, ...], left: str) -> None:
    text = TEXTS[name]()
    ids = ids_of(text, written)
    count = stopped_at(text, ids, stops)
    assert count is not None
    assert text.before_stop((), ids[:count], stops) == left
    decoded = text.decode(ids[: count - 1])
    assert not any(stop in decoded for stop in stops), "it stopped no token later than it could"
    assert text.before_stop((), ids, stops) == left, "what comes after does not change the text"


@pytest.mark.parametrize("name", TEXTS)
def test_absent_stop_string_does_not_stop(name: str) -> None:
    text = TEXTS[name]()
    ids = ids_of(text, "then stop here")
    assert stopped_at(text, ids, ("sto p", "Stop", "stop  ")) is None
    assert text.before_stop((), ids, ("sto p",)) == "then stop here"
    assert text.before_stop((), ids, ()) == "then stop here"


@pytest.mark.parametrize("name", TEXTS)
def test_part_of_a_character_is_not_the_character(name: str) -> None:
    text = TEXTS[name]()
    ids = ids_of(text, "a\U0001f601")
    assert len(ids) >= 4
    assert stopped_at(text, ids, ("\U0001f601",)) == len(ids)
    assert stopped_at(text, ids, ("\U0001f602",)) is None, "its first three bytes are the same"


@pytest.mark.parametrize("name", TEXTS)
def test_special_tokens_are_no_text(name: str) -> None:
    text = TEXTS[name]()
    ids = ids_of(text, "then end")
    between = [*ids[:1], special(text), *ids[1:], special(text)]
    assert text.decode(between) == text.decode(ids)
    assert stopped_at(text, between, (SPECIAL, "|end|")) is None


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("seed", range(4))
def test_stop_string_is_found_at_its_last_token(name: str, seed: int) -> None:
    """Random tokens, so that words, bytes of characters and invalid bytes stand side by side."""
    print("seed", seed)
    text, rng = TEXTS[name](), random.Random(seed)
    alphabet = ids_of(text, " then stop 東京 \U0001f600 END. naïve a\n\nb") * 3 + ids_of(text, "ab12") + [special(text)]
    found = 0
    for _ in range(25):
        ids = [rng.choice(alphabet) for _ in range(40)]
        whole = text.decode(ids)
        at = rng.randrange(max(1, len(whole)))
        stops = [whole[at : at + rng.randint(1, 9)] or "zzz", rng.choice(["京b", "nE", " ", "\n\n", "zzz"])]
        stops = [stop for stop in stops if "\ufffd" not in stop] or ["zzz"]
        first = next((n for n in range(1, 41) if any(stop in text.decode(ids[:n]) for stop in stops)), None)
        assert stopped_at(text, ids, stops) == first, (ids, stops)
        if first is not None:
            found += 1
            cut = text.before_stop((), ids[:first], stops)
            decoded = text.decode(ids[:first])
            assert decoded.startswith(cut)
            assert any(decoded[len(cut) :].startswith(stop) for stop in stops)
            assert not any(stop in decoded[: len(cut) + len(stop) - 1] for stop in stops)
    assert found > 3


@pytest.mark.parametrize("name", TEXTS)
def test_a_stop_string_far_into_a_long_text_is_found(name: str) -> None:
    """Only the tail is decoded at most tokens; it must hold long stop strings whole."""
    text = TEXTS[name]()
    stop = "東京\U0001f601 stop \U0001f601東京 END."
    before = ids_of(text, "then naïve " * 30)
    ids = before + ids_of(text, stop)
    assert stopped_at(text, ids, (stop, "zzz")) == len(ids)
    assert text.before_stop((), ids, (stop,)) == text.decode(ids).removesuffix(stop)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("stop", ["京", "東京", "東京\U0001f601", "ï京東京", "東東東京京"])
def test_a_stop_string_amid_characters_of_many_bytes_is_found(name: str, stop: str) -> None:
    """A run of byte tokens decodes as a whole: a tail that begins within a character must not hide what follows."""
    text = TEXTS[name]()
    for before in ("東東東東東東東東東東", "東東東東東東東東東東東\U0001f601\U0001f601", "ïïïïïïïïïïïïïïï東"):
        ids = ids_of(text, before + stop + before)
        end = len(ids_of(text, before + stop))
        assert stopped_at(text, ids, (stop,)) == end
        assert text.before_stop((), ids[:end], (stop,)) == before


def test_text_is_empty_without_a_tokenizer() -> None:
    text = Detokenizer(None)
    assert text.decode([1, 2, 3]) == ""
    assert not text.ends_at_stop((), [1, 2, 3], ("a",))
    assert text.before_stop((), [1, 2, 3], ("a",)) == ""


@pytest.mark.parametrize("name", TEXTS)
def test_text_is_what_follows_the_text_of_the_prompt(name: str) -> None:
    text = TEXTS[name]()
    for whole in (
        " then stop",
        "the end  then",
        "naïve 東京\U0001f601 END.",
        "\U0001f601\U0001f601東東東東東東東東東東東東",
        "a\n b",
    ):
        ids = ids_of(text, whole)
        for at in range(1, len(ids)):
            before, after = text.decode(ids[:at]), text.decode_after(ids[:at], ids[at:])
            assert before.rstrip("\ufffd") + after == text.decode(ids), at
            assert text.decode_after([*ids[:at], special(text)], ids[at:]) == after, "special tokens have no text"


def test_first_space_is_kept_and_may_begin_a_stop_string() -> None:
    text = with_byte_fallback()
    prompt, ids = ids_of(text, "the end"), ids_of(text, "then stop")
    assert text.decode(ids) == "then stop"
    assert text.decode_after(prompt, ids) == " then stop"
    assert text.ends_at_stop(prompt, ids, (" then",))
    assert not text.ends_at_stop((), ids, (" then",))
    assert text.before_stop(prompt, ids, (" stop",)) == " then"


@pytest.mark.parametrize("name", TEXTS)
def test_special_tokens_are_kept_if_wanted(name: str) -> None:
    text = Detokenizer(TEXTS[name]()._tokenizer, skip_special_tokens=False)
    ids = ids_of(text, "then")
    assert text.decode_after([*ids, special(text)], [*ids, special(text)]).strip() == f"then{SPECIAL}"
    assert text.before_stop(ids, [*ids, special(text), *ids], (SPECIAL,)).strip() == "then"


@pytest.mark.parametrize("name", TEXTS)
def test_stop_string_that_names_a_special_token_is_found_in_text_without_it(name: str) -> None:
    text = TEXTS[name]()
    then, stop = ids_of(text, "then"), ids_of(text, "stop")
    written = [*stop, *then, special(text), *stop, *then]
    stops = (text._whole.decode([special(text), *stop]),)
    end = stopped_at(text, written, stops)
    assert end == len(written) - len(then)
    assert text.before_stop((), written[:end], stops) == text.decode([*stop, *then])


def test_tokens_that_spell_a_special_one_stay_in_the_text_before_a_stop_string() -> None:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(30)}, unk_token="w0"))
    text = Detokenizer(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2"))
    ids = [25, 2, 21, 20]
    assert text.before_stop((7,), ids, ("w20",)) == " w25 w21 "
    assert text.before_stop((7,), [25, 2, 21, 2, 7], ("w2 w7",)) == " w25 w21"
    assert text.before_stop((7,), [2, 25, 9, 2, 7], ("9 w2",)) == " w25 w"


@pytest.mark.parametrize(("after", "text"), [(0, "a"), (2, "a"), (3, "a\n\nb"), (5, "a\n\nb"), (6, "a\n\nb\n\nc")])
def test_stop_string_within_the_first_tokens_does_not_count(after: int, text: str) -> None:
    """The text is a, \\n, \\n, b, \\n, \\n, c, one token each; a stop string counts by the token that completes it."""
    detokenizer = byte_level()
    assert detokenizer._tokenizer is not None
    ids = [token for character in "a\n\nb\n\nc" for token in ids_of(detokenizer, character)]
    stops = ("\n\n",)
    assert detokenizer.before_stop((), ids, stops, after) == text
    ends = [n for n in range(1, len(ids) + 1) if detokenizer.ends_at_stop((), ids[:n], stops, after)]
    assert (ends[0] if ends else None) == {"a": 3, "a\n\nb": 6, "a\n\nb\n\nc": None}[text]
