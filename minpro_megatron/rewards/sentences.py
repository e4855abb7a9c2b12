"""Extracts the formula of a sentence such as `the speed is $3$ m/s`, unless its words change the formula's meaning.

Only words that are known to add nothing are removed: `not $5$`, `more than $5$` and `$5$ or six` are unchanged, and
equal no number.
"""

import re

from minpro_megatron.rewards.units import has_unit_words_only

_DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]|\$\$")
_FORMULA = re.compile(r"(?<!\\)\$([^$]+?)(?<!\\)\$")
_WORD = re.compile(r"[A-Za-z']+")
_VARIABLE = re.compile(r"\$([a-zA-Z])\$(?= (?:is|are|equals?|be)\b)")  # the largest $n$ is 34
_BEFORE_FORMULA = re.compile(r"[^$\\\d=(\[{|+]*")
_LEADING_WORD = re.compile(r"([A-Za-z]{2,}) ")
_VERB = re.compile(r"(?i)\b(?:is|are|equals?|be)\b:? ?")
_CONNECTIVES = frozenset({
    "a", "also", "an", "and", "by", "equal", "exactly", "finally", "given", "hence", "indeed", "just", "namely", "now",
    "number", "of", "precisely", "simply", "so", "the", "then", "therefore", "thus", "to", "total", "value",
})  # fmt: skip
# May also precede a formula that no verb introduces.
_OPENINGS = _CONNECTIVES | {
    "answer", "are", "conclude", "final", "find", "gets", "get", "gives", "give", "has", "have", "he", "her",
    "his", "i", "in", "is", "it", "its", "me", "must", "my", "needs", "obtain", "our", "result", "she",
    "solution", "that", "there", "they", "this", "us", "was", "we", "which", "with", "yields", "makes", "pays",
    "earns", "costs", "takes", "spends",
}  # fmt: skip
# A clause before `is` may have any words but these.
_NEGATIONS = frozenset({
    "not", "no", "never", "cannot", "neither", "nor", "none", "without", "wrong", "incorrect", "false", "unlikely",
    "isn't", "aren't", "can't", "won't", "doesn't", "don't", "couldn't", "shouldn't", "wasn't", "opposite", "twice",
    "double", "except", "unless", "nothing", "nobody", "impossible", "if", "unknown", "undefined", "reciprocal",
})  # fmt: skip
# Words after a formula that may change its meaning.
_CHANGING = _NEGATIONS | frozenset({
    "or", "and", "but", "plus", "minus", "times", "less", "more", "least", "most", "above", "below", "over",
    "under", "up", "to", "from", "than", "other", "others", "exceeds", "besides", "as", "is", "was", "does",
    "has", "are", "were", "half", "halves", "third", "thirds", "quarter", "quarters", "fifths", "sixths",
    "squared", "cubed", "factorial", "choose", "mod", "modulo", "root", "divided", "multiplied", "hundred",
    "hundreds", "thousand", "thousands", "million", "millions", "billion", "billions", "trillion", "trillions",
    "dozen", "dozens", "score", "percent", "only", "one", "two", "three", "four", "five", "six", "seven", "eight",
    "nine", "ten", "eleven", "twelve", "maybe", "perhaps", "possibly", "otherwise", "when", "whenever", "where",
    "until", "multiples", "thus", "this", "plus-minus", "guess", "around", "about", "approximately", "roughly",
    "nearly", "almost", "any", "all", "excluding", "instead", "so",
})  # fmt: skip
_CLOSINGS = frozenset({
    "is the answer", "is the final answer", "is our answer", "is the result", "is correct", "in total", "in all",
    "altogether", "total", "is the solution", "as the answer", "as required", "in this case",
})  # fmt: skip


def without_words(text: str) -> str:
    """The formula of `text` (one line) with its unit; `text` unchanged if it has other words than a sentence has."""
    text = text.strip("*_` ")
    sentence = _VARIABLE.sub(r"\1", _DELIMITER.sub("$", text))
    rest = _behind_clause(sentence)
    if rest is None:
        return text
    formulas = list(_FORMULA.finditer(rest))
    if len(formulas) != 1:
        return text if rest is sentence else rest
    before, formula, after = rest[: formulas[0].start()], formulas[0][1].strip(), rest[formulas[0].end() :]
    if not formula or not _adds_nothing_before(before):
        return rest
    after = after.strip("*_` ").rstrip(".,;:*_` ")
    if not after or has_unit_words_only(after):
        return f"{formula} {after}".strip()
    return formula if _adds_nothing_behind(after) else f"{before} {formula} {after}"


def _behind_clause(text: str) -> str | None:
    """The text after `the answer is`; `text` unchanged if it has no such clause, None if the clause negates it."""
    before = _BEFORE_FORMULA.match(text)
    end = before.end() if before else 0
    verbs = list(_VERB.finditer(text, 0, end))
    if not verbs:
        return text
    verb = verbs[-1] if end < len(text) else verbs[0]
    if not _NEGATIONS.isdisjoint(_words(text[: verb.start()])):
        return None
    rest = text[verb.end() :]
    while (word := _LEADING_WORD.match(rest)) and word[1].lower() in _CONNECTIVES:
        rest = rest[word.end() :]
    return rest


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _adds_nothing_before(text: str) -> bool:
    return _OPENINGS.issuperset(_words(text)) and not re.search(r"[^A-Za-z',.;: *_]", text)


def _adds_nothing_behind(text: str) -> bool:
    """A noun that is counted or measured, and what it is of: `gallons of water`."""
    lowered = text.lower()
    if lowered in _CLOSINGS:
        return True
    words = _words(text)
    if re.search(r"[^A-Za-z',. *_-]", text) or not words or not _CHANGING.isdisjoint(words):
        return False
    return words[0].endswith("s") and not any(word.endswith(("th", "ths")) for word in words) and text[0].islower()
