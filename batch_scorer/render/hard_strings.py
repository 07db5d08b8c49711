"""Strings that tokenizers read differently: a fast one has to get them right before it is used.

Pieces of text, each beside each: where a tokenizer cuts a text depends on what stands on both
sides.
"""

from collections.abc import Iterable

_PIECES = (
    # Blanks of every kind, alone and in rows.
    *("", " ", "  ", "   ", "\t", " \t", "\n", "\n\n", " \n", "\n ", "\r\n", "\r", "\x0b", "\x0c"),
    *("\x85", "\u00a0", " \u00a0", "\u2002", "\u2028", "\u202f", "\u3000", "\ufeff", "\u200b"),
    # Letters and words, their contractions and their cases.
    *("a", "B", "word", "Word", "WORD", "wordWord"),
    *("don't", "I'LL", "we\u2019re", "'s", "'S", "\u017f"),
    *("\u00e9", "e\u0301", "\u00df", "\u0130", "\u01c5"),
    *("\u00aa", "\u2c7c", "na\u00efve", "\u0300x"),
    *("\u0416\u0438", "\u03a3\u03c2", "\u05e9\u05c1"),
    *("\u0639\u0631\u0628\u064a", "\u0915\u094d\u0937", "\u0e01\u0e33"),
    *("\u4e2d\u6587", "\u3072\u3089", "\u30ab\u30bf", "\ud55c\uad6d"),
    *("\uac01\u11a8", "\uff37\uff49", "\U00020bb7"),
    # Digits and other numbers.
    *("7", "42", "2026", "3.14159", "1,000,000"),
    *("123456789012", "\u0663\u0664", "\u00bd", "\u2167", "x\u00b2"),
    # Marks, code and links.
    *(".", "...", "!?", "--", "_", "__init__", "::", "</a>"),
    *("{\n\t", "()", "#", "$", "%", "\\n", "\u00ab\u00bb"),
    *("https://a.b/c?d=e", "a@b.c", "\u20ac", "\u2192", "\u00b7"),
    *("\u2581", "\u2581a", "\u0120", "\u010a"),
    # Emoji, joined and coloured; controls; private use; what decoding damaged bytes leaves.
    *("\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f466"),
    *("\U0001f44d\U0001f3fd", "\U0001f1e9\U0001f1ea"),
    *("\u2764\ufe0f", "\x00", "\x07", "\x1b[0m", "\x7f"),
    *("\u200e", "\u202e", "\ue000", "\ufffd", "\uffff"),
    *("\U0010fffd", "\U000e0041"),
)  # fmt: skip
_LONG = (
    *(
        unit * times
        for unit in ("a", "ab", "Aa", " ", "\n", "\t", "0", "=", "\u00e9", "\u4e2d", "\U0001f600")
        for times in (17, 300, 5000)
    ),
    "Donaudampfschiff" * 40,
    "\u00a0".join(["one", "Two", "3"] * 40),
    "a\u0301" * 400,
    "".join(map(chr, range(0x20, 0x250))),
    " ".join(map(chr, range(0x20, 0x250))),
)
_MOST_SPELLINGS = 48


def hard_strings(special: Iterable[str]) -> list[str]:
    """The strings, also those in which the `special` tokens of a vocabulary are spelt."""
    spellings = sorted(special, key=lambda text: (len(text), text))
    half = _MOST_SPELLINGS // 2
    if len(spellings) > _MOST_SPELLINGS:
        spellings = spellings[:half] + spellings[-half:]
    beside = ("", " ", "\n", "a", "\u00e9", "7", "<", "|>")
    return [
        *(left + right for left in _PIECES for right in _PIECES),
        *(f"a{left} {right}B" for left in _PIECES[::3] for right in _PIECES[::5]),
        *_LONG,
        *(
            text
            for spelling in spellings
            for text in (
                *(left + spelling + right for left in beside for right in beside),
                spelling[:-1],
                spelling[1:],
                spelling.upper(),
                spelling + spelling,
            )
        ),
    ]
