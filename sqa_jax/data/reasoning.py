"""Extraction of a chain of thought from a free-text reply: the argument as plain text, without its verdict.

Teachers answer first and argue afterwards, in chat style: "The answer is **(1) metaphor**. Here's why: …
Let me know if …". A student is to reason *before* it answers, so the leading verdict is removed (the recipe states the
answer at the end), and so are the phrases of a chat.
"""

from __future__ import annotations

import re

_STATEMENT = (
    r"(?:(?:so|therefore|thus|hence)?,?\s*the (?:correct |best |right )?(?:answer|option|choice) (?:is|would be)\b)"
)
_OPENING = re.compile(rf"{_STATEMENT}|\(?\d\)|option \(?\d", re.IGNORECASE)
_CLOSING = re.compile(rf"{_STATEMENT}|\(\d\)\W*$", re.IGNORECASE)
_CHAT_PHRASES = re.compile(
    r"here(?:'|’)?s (?:why|how|a breakdown|the (?:explanation|reasoning))[^\n:.]*[:.]|let me know\b[^\n]*|^\s*(?:explanation|reasoning|solution|answer):",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE = re.compile(r"[^\n]+?(?:[.!?](?=\s|$)|(?=\n)|$)")


def chain_of_thought(reply: str) -> str:
    """The argument of a free-text reply as one paragraph; "" where it is a verdict only.

    Removes the first and the last sentence where they are the verdict, and everywhere markup, list markers, the
    numbers before options, and the phrases of a chat.
    """
    text = re.sub(r"[*_`#]{2,}", "", reply)
    text = re.sub(r"^\s*(?:[*•-]|#+|\d+\.)\s+", "", text, flags=re.MULTILINE)
    text = re.sub(r"(?<!\w)[*_](\w[^*\n]*)[*_](?!\w)", r"\1", text)
    text = _CHAT_PHRASES.sub("", text)
    sentences = [found for match in _SENTENCE.finditer(text) if (found := match[0].strip())]
    if sentences and _OPENING.match(sentences[0]):
        sentences = sentences[1:]
    if sentences and _CLOSING.match(sentences[-1]):
        sentences = sentences[:-1]
    text = " ".join(sentences)
    return re.sub(r"\(\d\)\s+(?=\w)", "", text).strip()
