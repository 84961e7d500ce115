"""Parsing of the option that a reply chooses.

The rules, in order; the first that finds an option decides:

1. a JSON field "answer" (also in a cut-off or malformed object); if there is one, no other rule applies;
2. a statement: "the answer is …", "Answer: …", "the correct option would be …"; the last one that names an
   option, since reasoning may try several before it concludes; "is not …" is no statement;
3. the reply's first line *is* an option, its mark, or its mark and text: "B", "(1) minute", "**attract**";
4. an assertion: "The vague sentence is **(0) Ted …**", "is: (C)", or a reply that begins "(1) is more formal";
   the first one counts, since what is said of other options comes later;
5. a reply that is marked up in one place only: "**(2) cinnamon**";
6. only one option's text or bracketed mark occurs in the reply at all.

Where a rule applies, a mark in brackets or before a text is the option's number, but the text of another option wins
over a mark that contradicts it. A bare number or letter that is itself an option's text is that text. Of several texts that match, the
longest wins. An unclear reply gives None, never a guess.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Literal

Numbering = Literal["letters", "zero", "one"]

_JSON_ANSWER = re.compile(r'"answer"\s*:\s*("(?:[^"\\]|\\.)*"?|-?\d+|\[[^\]]*\])', re.IGNORECASE)
_STATEMENT = re.compile(
    r"(?:\b(?:answer|option|choice|solution)\b[\s*_:]*(?:\bto (?:this|the) question\b\s*)?"
    r"(?:\b(?:is|are|would be|should be|must be)\b|[:=])|\bFinal answer\b)[\s:]*(?:most likely |probably |therefore |option |choice )?",
    re.IGNORECASE,
)
_ASSERTION = re.compile(r"(?:^\s*|\b(?:is|are|be|was|that|choose|choice|option)\b[\s:*_]*)(?=[(\[][A-J\d][)\]])")
_MARK = re.compile(
    r"(?:option|choice)?\s*(?:[(\[{]\s*([A-Ja-j]|\d{1,2})\s*[)\]}]|([A-J]|\d{1,2})(?![\w%°]|[.,:/]\d|'s|\s+[a-z0-9]))[\s.:,)\-]*"
)
_DECORATION = " \t\n*_`\"'“”‘’#>"


def parse_answer(text: str, choices: Sequence[str], *, numbering: Numbering = "letters") -> int | None:
    """The 0-based index of the option that a reply chooses, or None where that is unclear.

    Args:
      text: the reply.
      choices: the question's options.
      numbering: how the prompt numbered them: (A), (B) …; (0), (1) …; or (1), (2) ….
    """
    parser = _Parser(choices, numbering)
    if _JSON_ANSWER.search(text):
        return parser.json_field(text)
    for rule in (
        parser.statement,
        parser.whole_line,
        parser.assertion,
        parser.emphasis,
        parser.only_mention,
    ):
        if (answer := rule(text)) is not None:
            return answer
    return None


class _Parser:
    def __init__(self, choices: Sequence[str], numbering: Numbering):
        self.numbering = numbering
        self.count = len(choices)
        self.texts = [_normal(choice) for choice in choices]
        self.by_length = sorted(range(self.count), key=lambda k: -len(self.texts[k]))

    def json_field(self, text: str) -> int | None:
        for match in _JSON_ANSWER.finditer(text):
            raw = match[1]
            try:
                value = json.loads(raw)
            except json.JSONDecodeError:
                value = raw.strip('"')
            if isinstance(value, list):
                value = value[0] if len(value) == 1 else None
            if value is None:
                continue
            if isinstance(value, int) or re.fullmatch(r"\s*\(?\d{1,2}\)?\s*", str(value)):
                number = int(re.sub(r"\D", "", str(value)) or -1)
                # A number in a field is the option's number, unless there is no such option.
                found = self._index(str(number))
                return found if found is not None else self._exact(str(value))
            if (found := self.option_at(str(value))) is not None:
                return found
        return None

    def statement(self, text: str) -> int | None:
        found = None
        for match in _STATEMENT.finditer(text):
            rest = text[match.end() :]
            if not re.match(r"[\s*_]*(?:not|neither|n't)\b", rest) and (answer := self.option_at(rest)) is not None:
                found = answer
        return found

    def whole_line(self, text: str) -> int | None:
        line = next((line for line in text.splitlines() if line.strip()), "")
        return self.option_at(line, whole=True)

    def assertion(self, text: str) -> int | None:
        answers = (self.option_at(text[match.end() :]) for match in _ASSERTION.finditer(text))
        return next((answer for answer in answers if answer is not None), None)

    def emphasis(self, text: str) -> int | None:
        return _single(self.option_at(bold, whole=True) for bold in re.findall(r"\*\*(.+?)\*\*", text, re.DOTALL))

    def only_mention(self, text: str) -> int | None:
        marks = [self._index(mark) for mark in re.findall(r"\(([A-Ja-j]|\d)\)", text)]
        if marks:
            return _single(iter(marks))
        normal, found = _normal(text), set()
        for k in self.by_length:
            if self.texts[k] and re.search(rf"(?<!\w){re.escape(self.texts[k])}(?!\w)", normal):
                found.add(k)
                # The rest can no longer contain a shorter option that is part of this one.
                normal = normal.replace(self.texts[k], " ")
        return found.pop() if len(found) == 1 else None

    def option_at(self, rest: str, whole: bool = False) -> int | None:
        """The option that `rest` begins with; with `whole`, it must be all of `rest`."""
        rest = rest.lstrip(_DECORATION)
        match = _MARK.match(rest)
        marked = self._index(match[1] or match[2]) if match else None
        if match is None:
            return self._text(rest, whole)
        bracketed, after = match[1] is not None, rest[match.end() :].lstrip(_DECORATION)
        if not bracketed and (exact := self._text(rest, whole)) is not None:
            return exact
        if after.startswith("(") and after.rstrip(_DECORATION + ".").endswith(")"):  # "1 (repel)"
            after = after.rstrip(_DECORATION + ".")[1:-1]
        named = self._text(after, whole) if after.strip() else None
        if named is not None:
            return named
        if whole and _normal(after):
            return None
        return marked

    def _text(self, rest: str, whole: bool) -> int | None:
        """The longest option text that `rest` begins with."""
        normal = _normal(rest)
        for k in self.by_length:
            option = self.texts[k]
            if option and (normal == option if whole else re.match(rf"{re.escape(option)}(?!\w)", normal)):
                return k
        return None

    def _exact(self, value: str) -> int | None:
        return self.texts.index(_normal(value)) if _normal(value) in self.texts else None

    def _index(self, mark: str) -> int | None:
        """The index of a letter, or of a number in the prompt's numbering; letters are always understood."""
        if mark.isdigit():
            index = int(mark) - (self.numbering != "zero")
        else:
            index = ord(mark.upper()) - ord("A")
        return index if 0 <= index < self.count else None


def _single(answers: Iterator[int | None]) -> int | None:
    found = {answer for answer in answers if answer is not None}
    return found.pop() if len(found) == 1 else None


def _normal(text: str) -> str:
    """Lower case, single spaces, no decoration and no final full stop."""
    text = re.sub(r"[*_`\"“”]|(?<!\w)['‘’]|['‘’](?!\w)", "", text.lower().replace("’", "'"))
    return re.sub(r"\s+", " ", text).strip().rstrip(".").strip()
