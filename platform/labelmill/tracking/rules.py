"""Rules of promotion: `test/top1 >= champion + 0.2 and test/ece <= 0.05`, read by a small grammar, never executed.

    rule        comparison ("and" comparison)*
    comparison  sum (">=" | ">" | "<=" | "<") sum
    sum         product (("+" | "-") product)*
    product     value ("*" value)*
    value       NUMBER | METRIC | WHO | WHO ":" METRIC | "(" sum ")" | "-" value

METRIC is a name as the run holds it; one with spaces or brackets goes into quotes: 'seconds/wait for data'. Names may
hold `/`, `-` and `.`, so a minus between two values has spaces around it, and there is no division (`0.9 * champion`).
WHO is an alias (`champion`, `previous`) or `version 3`; alone it stands for the same metric of that version, where the
comparison names exactly one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from labelmill.errors import UserError, did_you_mean

WHO = ("champion", "previous")
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![\w/.])"
    r"|(?P<name>[A-Za-z_][\w./-]*)"
    r"|(?P<quoted>'[^']*'|\"[^\"]*\"|`[^`]*`)"
    r"|(?P<op>>=|<=|>|<|[-+*():]))"
)
_LONGEST, _DEEPEST = 1000, 20
_equal = partial(math.isclose, rel_tol=1e-9)
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    # 0.3 >= 0.1 + 0.2 is meant to hold, whatever the last bit says
    ">=": lambda a, b: a >= b or _equal(a, b),
    ">": lambda a, b: a > b and not _equal(a, b),
    "<=": lambda a, b: a <= b or _equal(a, b),
    "<": lambda a, b: a < b and not _equal(a, b),
}


class RuleError(UserError):
    """A rule that can't be read, or names a metric that isn't there."""


@dataclass(frozen=True)
class Number:
    """A constant."""

    value: float


@dataclass(frozen=True)
class Metric:
    """A metric of the version that is to be promoted (`who` empty) or of an alias or version number.

    While a rule is read, an alias that stands alone has no name yet.
    """

    name: str
    who: str = ""


@dataclass(frozen=True)
class Sum:
    """Terms added up; each with a sign of 1.0 or -1.0."""

    terms: tuple[tuple[float, Term], ...]


@dataclass(frozen=True)
class Product:
    """Factors multiplied."""

    factors: tuple[Term, ...]


Term = Number | Metric | Sum | Product


@dataclass(frozen=True)
class Comparison:
    """`left op right`; `text` as it was written."""

    left: Term
    op: str
    right: Term
    text: str


@dataclass(frozen=True)
class Rule:
    """A rule that was read; it holds when every comparison does."""

    text: str
    comparisons: tuple[Comparison, ...]

    @property
    def who(self) -> set[str]:
        """Aliases and version numbers whose metrics it needs."""
        return {m.who for c in self.comparisons for side in (c.left, c.right) for m in _metrics(side) if m.who}


@dataclass(frozen=True)
class Outcome:
    """What a comparison came to.

    Attributes:
        text: the comparison.
        left, right: its two values; NaN where there was nothing to compare with.
        holds: whether it is fulfilled.
        note: why it was decided without numbers; empty otherwise.
    """

    text: str
    left: float
    right: float
    holds: bool
    note: str = ""


def evaluate(
    rule: Rule, own: dict[str, float], others: dict[str, dict[str, float] | None], own_name: str = "the candidate"
) -> list[Outcome]:
    """The comparisons of a rule with the numbers filled in; the rule holds when all do.

    Args:
        own: metrics of the version that is to be promoted.
        others: metrics of each of `rule.who`; None for an alias that points nowhere. A comparison with it holds: the
            first champion has nothing to beat.

    A value that isn't finite makes its comparison false. Raises RuleError for a metric that isn't there.
    """
    found = []
    for comparison in rule.comparisons:
        absent = sorted(
            m.who
            for side in (comparison.left, comparison.right)
            for m in _metrics(side)
            if m.who and others.get(m.who) is None
        )
        if absent:
            for m in (m for side in (comparison.left, comparison.right) for m in _metrics(side) if not m.who):
                _look_up(m, own, others, own_name)  # a misspelt name must not pass the first time
            found.append(Outcome(comparison.text, math.nan, math.nan, True, f"there is no {absent[0]} yet"))
            continue
        left, right = (_value(side, own, others, own_name) for side in (comparison.left, comparison.right))
        finite = math.isfinite(left) and math.isfinite(right)
        note = "" if finite else "a value isn't finite"
        found.append(Outcome(comparison.text, left, right, finite and _COMPARE[comparison.op](left, right), note))
    return found


def _value(term: Term, own: dict[str, float], others: dict[str, dict[str, float] | None], own_name: str) -> float:
    match term:
        case Number(value):
            return value
        case Metric():
            return _look_up(term, own, others, own_name)
        case Sum(terms):
            return sum(sign * _value(part, own, others, own_name) for sign, part in terms)
        case Product(factors):
            return math.prod(_value(part, own, others, own_name) for part in factors)


def _look_up(metric: Metric, own: dict[str, float], others: dict[str, dict[str, float] | None], own_name: str) -> float:
    held = others[metric.who] if metric.who else own
    assert held is not None
    if metric.name not in held:
        whose = own_name if not metric.who else metric.who if metric.who in WHO else f"version {metric.who}"
        known = did_you_mean(metric.name, held) or " Its run has none."
        raise RuleError(f"rule: {whose} has no metric {metric.name!r}.{known}")
    return held[metric.name]


def _metrics(term: Term) -> Iterator[Metric]:
    match term:
        case Metric():
            yield term
        case Sum(terms):
            for _, part in terms:
                yield from _metrics(part)
        case Product(factors):
            for part in factors:
                yield from _metrics(part)


# --- reading --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Token:
    kind: str  # number, name, quoted, op, end
    text: str
    start: int
    stop: int


def parse(text: str) -> Rule:
    """Reads a rule. Raises RuleError with the place that can't be read."""
    return _Reader(text).rule()


class _Reader:
    def __init__(self, text: str) -> None:
        if len(text) > _LONGEST:
            raise RuleError(f"rule: {len(text)} characters; at most {_LONGEST} are read.")
        self.text, self.at, self.depth = text, 0, 0
        self.tokens: list[_Token] = []
        place = 0
        while text[place:].strip():
            match = _TOKEN.match(text, place)
            if match is None:
                self.fail(place + len(text[place:]) - len(text[place:].lstrip()), "can't be read")
            kind = str(match.lastgroup)
            self.tokens.append(_Token(kind, match[kind], match.start(kind), match.end()))
            place = match.end()
        self.tokens.append(_Token("end", "", len(text), len(text)))

    def fail(self, place: int, why: str) -> NoReturn:
        shown = f"{self.text[:place]}»{self.text[place:]}«" if place < len(self.text) else f"{self.text}»«"
        raise RuleError(
            f"rule: {shown}: {why}. Write for example: test/top1 >= champion + 0.2 and test/ece <= 0.05 (spaces around "
            "a minus; names with spaces in quotes)."
        )

    @property
    def next(self) -> _Token:
        return self.tokens[self.at]

    def take(self, *texts: str) -> _Token | None:
        token = self.next
        if token.kind in ("op", "name") and token.text in texts:
            self.at += 1
            return token
        return None

    def rule(self) -> Rule:
        comparisons = [self.comparison()]
        while self.take("and"):
            comparisons.append(self.comparison())
        if self.next.kind != "end":
            self.fail(self.next.start, "the rule should end here, or go on with `and`")
        return Rule(self.text, tuple(comparisons))

    def comparison(self) -> Comparison:
        begin = self.next.start
        left = self.sum()
        op = self.take(*_COMPARE)
        if op is None:
            self.fail(self.next.start, "a comparison (>=, >, <=, <) is missing")
        right = self.sum()
        text = self.text[begin : self.tokens[self.at - 1].stop].strip()
        found = [m.name for side in (left, right) for m in _metrics(side)]
        names = set(found) - {""}
        if "" in found and len(names) != 1:
            self.fail(begin, "a bare alias stands for the metric of its comparison, which must name exactly one")
        if not names:
            self.fail(begin, "a comparison needs a metric")
        name = next(iter(names))
        return Comparison(_fill(left, name), op.text, _fill(right, name), text)

    def sum(self) -> Term:
        terms = [(1.0, self.product())]
        while op := self.take("+", "-"):
            terms.append((-1.0 if op.text == "-" else 1.0, self.product()))
        return terms[0][1] if len(terms) == 1 else Sum(tuple(terms))

    def product(self) -> Term:
        factors = [self.value()]
        while self.take("*"):
            factors.append(self.value())
        return factors[0] if len(factors) == 1 else Product(tuple(factors))

    def value(self) -> Term:
        token = self.next
        self.depth += 1
        if self.depth > _DEEPEST:
            self.fail(token.start, f"nested deeper than {_DEEPEST}")
        try:
            if self.take("-"):
                return Sum(((-1.0, self.value()),))
            if self.take("("):
                inner = self.sum()
                if not self.take(")"):
                    self.fail(self.next.start, "a closing bracket is missing")
                return inner
        finally:
            self.depth -= 1
        if token.kind not in ("number", "name", "quoted") or token.text == "and":
            self.fail(token.start, "a number or a metric is missing")
        self.at += 1
        if token.kind == "number":
            return Number(float(token.text))
        if token.kind == "quoted":
            return Metric(self.unquoted(token))
        who = ""
        if token.text in WHO:
            who = token.text
        elif token.text == "version" and self.next.kind == "number":
            who = self.next.text
            if not who.isdigit():
                self.fail(self.next.start, "a version is a whole number")
            self.at += 1
        if not who:
            return Metric(token.text)
        if not self.take(":"):
            return Metric("", who)
        name = self.next
        if name.kind not in ("name", "quoted"):
            self.fail(name.start, "a metric is missing")
        self.at += 1
        return Metric(self.unquoted(name) if name.kind == "quoted" else name.text, who)

    def unquoted(self, token: _Token) -> str:
        if len(token.text) <= 2:
            self.fail(token.start, "an empty name")
        return token.text[1:-1]


def _fill(term: Term, name: str) -> Term:
    """The term with `name` where an alias stood alone."""
    match term:
        case Metric("", who):
            return Metric(name, who)
        case Sum(terms):
            return Sum(tuple((sign, _fill(part, name)) for sign, part in terms))
        case Product(factors):
            return Product(tuple(_fill(part, name) for part in factors))
    return term
