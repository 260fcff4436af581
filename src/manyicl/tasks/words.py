"""Split text of any script into words, for ROUGE, TF-IDF and the search for similar examples."""

from __future__ import annotations

import unicodedata

# Unlike `re` it knows scripts, pictographs and the characters that a reader sees as one. Transformers needs it too.
import regex  # type: ignore[import-untyped]

# Written without spaces between words: Chinese and Japanese, Thai, Lao, Khmer, Burmese and Tibetan. A character with
# its marks, such as the vowel above a Thai consonant, counts as a word.
_UNSPACED = (
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}\u3006\u30fc]\p{M}*"
)
# Two halves of a flag by themselves: \X would look back to the first of a row of flags for each of them.
_FLAG = r"\p{RI}\p{RI}?"
# A pictograph with all that joins it to one picture: skin tone, family. Characters of private use, and those younger
# than the tables of Unicode here, count alone as well.
_PICTURE = rf"{_FLAG}|(?=[\p{{So}}\p{{Extended_Pictographic}}\p{{Co}}\p{{Cn}}])\X"
_WORD = regex.compile(rf"{_PICTURE}|(?=[\p{{L}}\p{{M}}\p{{N}}]){_UNSPACED}|(?:(?!{_UNSPACED})[\p{{L}}\p{{M}}\p{{N}}])+")
_PART = regex.compile(rf"{_UNSPACED}|(?:(?!{_UNSPACED}).)+", regex.DOTALL)
_STARTS_UNSPACED = regex.compile(_UNSPACED)
_INVISIBLE = regex.compile(
    rf"(?P<picture>{_FLAG}|(?=\p{{Extended_Pictographic}})\X)|\p{{Default_Ignorable_Code_Point}}+"
)
_VARIATION_SELECTORS = dict.fromkeys(map(ord, "\ufe0e\ufe0f"))


def words(text: str) -> list[str]:
    """Split a text into folded words of letters, marks and digits.

    An emoji is a word by itself, and so is each character of a script that is written without spaces between words. On
    ASCII this is rouge-score's own tokenizer. That one deletes every other letter, so that two identical Russian
    texts score 0.

    >>> words("The caf\u00e9, \u8d64\u3044\u7bb1")
    ['the', 'café', '赤', 'い', '箱']
    """
    found: list[str] = _WORD.findall(folded(text))
    return found


def folded(text: str) -> str:
    """Return a text without differences that readers overlook: case, width and composition of letters, the unseen.

    ASCII is only lower-cased. Else it is Unicode's compatibility folding (NFKC with full case folding): ``ｶﾞ`` is
    ``ガ``, ``ﬁ`` is ``fi``, ``Straße`` is ``strasse``. Emoji keep what joins them.
    """
    if text.isascii():
        return text.lower()
    once = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return without_invisible(once)


def without_invisible(text: str) -> str:
    """Return a text without zero-width and other invisible characters, those within an emoji aside.

    They are Unicode's default ignorable characters: zero-width spaces and joiners, direction marks, soft hyphens,
    byte order marks, selectors between the text and the colour form of a sign.
    """
    if text.isascii():
        return text
    seen: str = _INVISIBLE.sub(lambda found: (found["picture"] or "").translate(_VARIATION_SELECTORS), text)
    return seen


def parts(word: str) -> list[str]:
    """Split what is between spaces where its script has none: each such character, and what comes between.

    >>> parts("ok\u5927\u5b66")
    ['ok', '大', '学']
    """
    if word.isascii():
        return [word]
    found: list[str] = _PART.findall(word)
    return found


def is_unspaced(word: str) -> bool:
    """Tell whether a word begins in a script that is written without spaces between words."""
    return not word.isascii() and _STARTS_UNSPACED.match(word) is not None
