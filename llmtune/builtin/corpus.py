"""The text that ``builtin:tiny`` is pre-trained on: small English-like documents from templates and a seed.

Two aims. The model shall know general statistics of written language (words, digits, punctuation, paragraphs, turns of
a conversation), and it shall have learned to *copy* what stands earlier in its context, since every useful
fine-tuning task needs that. So each document quotes invented names that it introduced itself, and names are drawn
from so many syllables that nothing but copying can predict them.

The formats of the tuning tasks (``llmtune.builtin.tasks``) do not occur here, and names for which ``is_reserved`` holds
occur neither here nor in the tuning data: they are what the held-out questions ask about.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from random import Random

from llmtune.builtin import words as w

SEED = 20_25

_ONSETS = "b c d f g h j k l m n p r s t v w z b d k l m n r s t v br dr fl gr kr pl sh sk st th tr".split()
_VOWELS = "a e i o u a e i o u a e i o u ai ea ia ou y".split()
_CODAS = ["", "", "", "", "n", "n", "r", "l", "s", "t", "m", "k", "nd", "rn", "sh", "x"]

Speech = list[tuple[str, str]]
"""Turns of a conversation: (role, content)."""


def is_reserved(name: str) -> bool:
    """Whether ``name`` belongs to the eighth of all names that only held-out questions may use."""
    return zlib.crc32(name.encode()) % 8 == 0


def invent_word(rng: Random, syllables: int) -> str:
    """One pronounceable lower-case word of 1 to 3 syllables, e.g. ``velda``; there are millions."""
    parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)]
    return "".join(parts) + rng.choice(_CODAS)


def invent_name(rng: Random, *, reserved: bool = False) -> str:
    """A capitalised invented name, e.g. ``Velda``; from the reserved eighth only when asked for."""
    while True:
        name = invent_word(rng, rng.choice((1, 2, 2, 2, 3))).capitalize()
        if len(name) > 3 and is_reserved(name) == reserved:
            return name


class _Person:
    """Somebody with a name, pronouns, a town and a job, so that sentences about them agree."""

    def __init__(self, rng: Random) -> None:
        self.first = invent_name(rng)
        self.full = f"{self.first} {invent_name(rng)}" if rng.random() < 0.4 else self.first
        self.he, self.him, self.his = rng.choice((("he", "him", "his"), ("she", "her", "her")))
        self.town = invent_name(rng)
        self.job = rng.choice(w.JOBS)


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _thing(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.35:
        return f"{rng.choice(rng.choice((w.COLOURS, w.QUALITIES, w.MATERIALS)))} {rng.choice(w.THINGS)}"
    if kind < 0.45:
        return f"{rng.choice(w.QUALITIES)} {rng.choice(w.COLOURS)} {rng.choice(w.THINGS)}"
    return rng.choice(w.THINGS) if kind < 0.9 else f"{invent_word(rng, rng.choice((1, 2)))} {rng.choice(w.THINGS)}"


def _place(rng: Random) -> str:
    return (
        f"the {rng.choice(w.PLACES)}" if rng.random() < 0.6 else f"the {rng.choice(w.QUALITIES)} {rng.choice(w.PLACES)}"
    )


def _code(rng: Random) -> str:
    """A short code or number of the kinds people copy: ``4821``, ``KQ-93``, ``17:40``, ``$3.50``."""
    letters = "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 5)))
    time, price = f"{rng.randint(0, 23)}:{rng.randint(10, 59)}", f"${rng.randint(1, 99)}.{rng.randint(10, 99)}"
    return rng.choice((digits, f"{letters}-{digits}", f"{letters}{digits}", time, price))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _event(rng: Random, who: str, p: _Person) -> str:
    """One past-tense sentence about ``who``."""
    verb, thing, other = rng.choice(w.VERBS)[1], _thing(rng), invent_name(rng)
    n = rng.randint(2, 40)
    return _capital(
        rng.choice(
            (
                f"{who} {verb} {_a(thing)} in {_place(rng)}.",
                f"{who} {rng.choice(w.MOVES)} to {_place(rng)} and {verb} {_a(thing)}.",
                f"{who} {rng.choice(w.ADVERBS)} {verb} the {thing}, because {p.he} was {rng.choice(w.FEELINGS)}.",
                f"one {rng.choice(w.TIMES)}, {who} {verb} {n} {rng.choice(w.THINGS)}s.",
                f"in the {rng.choice(w.TIMES)} {who} met {other}, {_a(rng.choice(w.JOBS))} from {p.town}. {other} was "
                f"{rng.choice(w.FEELINGS)} and {rng.choice(w.VERBS)[1]} {_a(thing)}.",
                f"on {rng.choice(w.DAYS)} {who} sent {other} {_a(thing)}. {other} liked the {thing} very much.",
                f"it was {rng.choice(w.WEATHER)}, so {who} and {p.his} {rng.choice(w.KIN)} stayed at {_place(rng)}.",
                f"{who} said that the {thing} would cost {rng.randint(2, 90)} dollars.",
                f"if there were no {thing}, {who} could not have {verb} anything at all.",
                f"there were {n} people in {_place(rng)}, and most of them had {_a(thing)} with them.",
            )
        )
    )


def _narrative(rng: Random) -> str:
    p = _Person(rng)
    opening = rng.choice(
        (
            f"{p.full} was {_a(p.job)} who lived in {p.town}.",
            f"Once there was {_a(p.job)}. {_capital(p.his)} name was {p.full}. They called {p.him} {p.first}.",
            f"In the town of {p.town} there lived {_a(p.job)} named {p.full}.",
            f"This is the story of {p.full}, the {p.job} of {p.town}.",
        )
    )
    events = [_event(rng, rng.choice((p.first, p.he, p.full)), p) for _ in range(rng.randint(1, 5))]
    closing = rng.choice(
        (
            f"Everybody in {p.town} still remembers {p.full}.",
            f"That is how {p.first} became the best {p.job} in {p.town}.",
            f'"Thank you, {p.first}," said the people of {p.town}.',
            f"And {p.first} was {rng.choice(w.FEELINGS)} again.",
            "",
        )
    )
    return " ".join([opening, *events, closing]).strip()


def _facts(rng: Random) -> str:
    out = []
    for _ in range(rng.randint(2, 5)):
        first, second = rng.choice(w.OPPOSITES)
        member, group = rng.choice(w.BELONGS)
        unit, n, small = rng.choice(w.UNITS)
        i = rng.randrange(7)
        country, city, river = invent_name(rng), invent_name(rng), invent_name(rng)
        group = group.replace("_", " ")
        out.append(
            rng.choice(
                (
                    f"The opposite of {first} is {second}.",
                    f"{_capital(member)} is the name of {_a(group)}. Every {member} is {_a(group)}.",
                    f"One {unit} has {n} {small}. Half of {n} {small} is {int(n) / 2:g} {small}.",
                    f"The day after {w.DAYS[i]} is {w.DAYS[(i + 1) % 7]}.",
                    f"The capital of {country} is {city}. The river {river} runs through {city}.",
                    f"{country} is famous for its {rng.choice(w.FOODS)}. People from {country} speak {city}.",
                    f"{_a(rng.choice(w.ANIMALS)).capitalize()} likes to eat {rng.choice(w.FOODS)} and drink water.",
                    f"The {rng.choice(w.THINGS)} is of {rng.choice(w.MATERIALS)}, and it is {rng.choice(w.QUALITIES)}.",
                    f"The month before {w.MONTHS[i + 1]} is {w.MONTHS[i]}.",
                )
            )
        )
    return " ".join(out)


def _sum(rng: Random) -> tuple[str, str, int]:
    """A question in words, its worked answer and the result."""
    who, other, thing = invent_name(rng), invent_name(rng), rng.choice(w.THINGS)
    a, b, c = rng.randint(2, 60), rng.randint(2, 12), rng.randint(2, 9)
    return rng.choice(
        (
            (
                f"{who} has {a} {thing}s. {who} buys {b} more {thing}s. How many {thing}s does {who} have now?",
                f"{who} has {a} + {b} = {a + b} {thing}s in total.",
                a + b,
            ),
            (
                f"There are {c} boxes with {b} {thing}s in each box. How many {thing}s are there altogether?",
                f"Each box has {b} {thing}s, so there are {c} * {b} = {c * b} {thing}s.",
                c * b,
            ),
            (
                f"{who} had {a + b} {thing}s and gave {b} of them to a friend. How many {thing}s are left?",
                f"There are {a + b} - {b} = {a} {thing}s left.",
                a,
            ),
            (
                f"{c} children share {b * c} {thing}s equally. How many {thing}s does each child get?",
                f"Each child gets {b * c} / {c} = {b} {thing}s.",
                b,
            ),
            (
                f"A {thing} costs ${b}. {who} pays for {c} {thing}s and has ${a} left. How much money did {who} have?",
                f"The {thing}s cost {c} * {b} = ${b * c}. So {who} had {b * c} + {a} = ${a + b * c} at the start.",
                a + b * c,
            ),
            (
                f"{who} works {b} hours every day and earns ${c} an hour. How much does {who} earn in 5 days?",
                f"In one day {who} earns {b} * {c} = ${b * c}. In 5 days that is {b * c} * 5 = ${b * c * 5}.",
                b * c * 5,
            ),
            (
                f"{who} made {2 * a} {thing}s in the morning and half as many in the afternoon. How many is that?",
                f"In the afternoon {who} made {2 * a} / 2 = {a} {thing}s. That makes {2 * a} + {a} = {3 * a} {thing}s.",
                3 * a,
            ),
            (
                f"{who} is {a} years old and {other} is twice as old. How old will {other} be in {b} years?",
                f"{other} is 2 * {a} = {2 * a} years old now. In {b} years that will be {2 * a} + {b} = {2 * a + b}.",
                2 * a + b,
            ),
            (
                f"{who} reads {b} pages a day, {other} reads {c} pages more. How many pages do both read each day?",
                f"{other} reads {b} + {c} = {b + c} pages. Together they read {b} + {b + c} = {b + b + c} pages.",
                b + b + c,
            ),
            (
                f"If {who} spends {10 * c}% of {10 * b} dollars on a {thing}, how much money does {who} have left?",
                f"The {thing} costs {10 * b} * {10 * c} / 100 = ${b * c}. The rest is {10 * b} - {b * c} = "
                f"${10 * b - b * c}.",
                10 * b - b * c,
            ),
        )
    )


def _arithmetic(rng: Random) -> str:
    parts = []
    for _ in range(rng.randint(1, 3)):
        question, answer, result = _sum(rng)
        parts.append(f"{question} {answer}" + (f" The answer is {result}." if rng.random() < 0.5 else ""))
    return rng.choice((" ", "\n")).join(parts)


def _listing(rng: Random) -> str:
    p = _Person(rng)
    items = [rng.choice((_thing(rng), rng.choice(w.FOODS), invent_name(rng))) for _ in range(rng.randint(3, 6))]
    mark = rng.choice(("- ", "* ", "{}. ", "{}) ", ""))
    lines = [mark.format(i + 1) + item for i, item in enumerate(items)]
    head = rng.choice((f"{p.first} needs the following:", f"Things to bring to {p.town}:", f"List of {p.full}:"))
    tail = rng.choice(
        (
            f"So the list has {len(items)} lines: {', '.join(items[:-1])} and {items[-1]}.",
            f'The first line is "{items[0]}" and the last line is "{items[-1]}".',
            f"{p.first} read aloud: {'; '.join(items)}.",
            f"After {items[0]} comes {items[1]}.",
        )
    )
    return f"{head}\n" + "\n".join(lines) + f"\n{tail}"


def _passage(rng: Random) -> tuple[str, list[tuple[str, str, str]]]:
    """A short passage and questions about it: (question, short answer, full answer)."""
    p, q = _Person(rng), _Person(rng)
    thing, n, place, day = _thing(rng), rng.randint(2, 99), _place(rng), rng.choice(w.DAYS)
    sentences = [
        (f"{p.full} lives in {p.town}.", f"Where does {p.first} live?", p.town, f"{p.full} lives in {p.town}."),
        (f"{p.full} works as {_a(p.job)}.", f"What is the job of {p.first}?", p.job, f"{p.first} is {_a(p.job)}."),
        (
            f"On {day} {p.first} bought {_a(thing)} from {q.full}.",
            f"Who sold the {thing}?",
            q.full,
            f"{q.full} sold the {thing} to {p.first}.",
        ),
        (f"{p.first} paid {n} dollars.", f"How much did {p.first} pay?", str(n), f"{p.first} paid {n} dollars."),
        (f"They met at {place} in {q.town}.", "In which town did they meet?", q.town, f"They met in {q.town}."),
        (f"It happened on a {day}.", "On what day did it happen?", day, f"It was a {day}."),
        (f"{q.first} came with {thing}s.", f"What did {q.first} bring?", f"{thing}s", f"{q.first} brought {thing}s."),
    ]
    chosen = rng.sample(sentences, rng.randint(2, 5))
    return " ".join(s[0] for s in chosen), [(s[1], s[2], s[3]) for s in chosen]


def _questions(rng: Random) -> str:
    text, asked = _passage(rng)
    style = rng.choice((("Question: ", "Answer: "), ("Q: ", "A: "), ("", ""), ("- ", "- ")))
    rng.shuffle(asked)
    lines = [f"{style[0]}{q}\n{style[1]}{rng.choice((short, full))}" for q, short, full in asked]
    return f"{text}\n" + "\n".join(lines)


def _dialogue(rng: Random) -> str:
    a, b = invent_name(rng), invent_name(rng)
    thing, place, code = _thing(rng), _place(rng), _code(rng)
    turns = rng.sample(
        [
            (f"Good {rng.choice(w.TIMES[:3])}, {b}. I am {a}.", f"Hello, {a}. Nice to meet you!"),
            (f"Where is the {thing}?", f"The {thing} is in {place}."),
            (f"What is the number of your house, {b}?", f"It is {code}. Can you remember {code}?"),
            (f"Do you like {rng.choice(w.FOODS)}?", f"No, {a}, I don't. I'd rather have {rng.choice(w.FOODS)}."),
            (f"How are you today, {b}?", f"I'm {rng.choice(w.FEELINGS)}, thanks. And you, {a}?"),
            (f"Shall we go to {place}?", f"Yes! Let's go to {place}, {a}."),
        ],
        rng.randint(2, 4),
    )
    if rng.random() < 0.5:
        return "\n".join(f"{a}: {x}\n{b}: {y}" for x, y in turns)
    return " ".join(f'"{x}" {rng.choice(w.SAYS)} {a}. "{y}" {rng.choice(w.SAYS)} {b}.' for x, y in turns)


def _item(rng: Random) -> str:
    """Something worth copying: a name, an invented word, a thing, a code, a number."""
    return rng.choice(
        (invent_name(rng), invent_name(rng), f"{invent_name(rng)} {invent_name(rng)}", invent_word(rng, 2), _thing(rng),
         _thing(rng), _code(rng), str(rng.randint(0, 999)))
    )  # fmt: skip


def _copying(rng: Random) -> str:
    items = [_item(rng) for _ in range(rng.randint(2, 7))]
    a, b = items[0], items[1]
    quote = rng.choice(('"{}"', "'{}'", "({})", "[{}]", "{}", "<{}>", "*{}*", "/{}/", "{{{}}}"))
    quoted = [quote.format(x) for x in items]
    join = rng.choice((", ", " ", "; ", "\n", " - ", " / ", ",", " and "))
    return rng.choice(
        (
            f"{join.join(items)}\n{join.join(items)}",
            f"Say after me: {', '.join(items)}. Again: {', '.join(items)}.",
            f"The words are {' and '.join(items)}. In quotes: {', '.join(quoted)}.",
            f"{', '.join(quoted)} means {', '.join(items)}.",
            "\n".join(f"{x} = {quote.format(x)}" for x in items),
            f"Forwards: {join.join(items)}\nBackwards: {join.join(items[::-1])}",
            f"Her name is {a}. They call her {quote.format(a)}. The other one is {b}. They call it {quote.format(b)}.",
            f'Write {a} on the door. The door now says "{a}". Below it stands "{b}", and nobody knows what {b} means.',
            f"From {a} to {b} and from {b} to {a}.",
            f"{join.join(quoted)}\n{join.join(items)}",
        )
    )


def _notice(rng: Random) -> str:
    p, q, thing = _Person(rng), _Person(rng), _thing(rng)
    date = f"{rng.randint(1, 28)} {rng.choice(w.MONTHS)} {rng.randint(1700, 2099)}"
    return rng.choice(
        (
            f"Dear {p.first},\n\nthank you for the {thing}. It arrived in {q.town} on {rng.choice(w.DAYS)}. Please "
            f"come to {q.town} soon, {p.first}, and see it.\n\nYours,\n{q.full}",
            f"NOTICE\n\nThe {rng.choice(w.PLACES)} of {p.town} will be closed on {date}. Ask {p.full} "
            f"({_code(rng)}) for help. {p.first} will be in {p.town} until {rng.choice(w.DAYS)}.",
            f"{p.full} was born on {date} in {p.town}. {p.first}'s {rng.choice(w.KIN)}, {q.full}, came from {q.town} "
            f"to {p.town} in {rng.randint(1700, 2099)}.",
            f"How to make {_a(thing)}: first take some {rng.choice(w.MATERIALS)}. Then {rng.choice(w.ADVERBS)} add "
            f"the {rng.choice(w.THINGS)}s. Wait {rng.randint(2, 50)} minutes. The {thing} is ready. In {p.town} "
            f"the {thing} is called {q.first}, after {q.full}.",
        )
    )


def _symbols(rng: Random) -> str:
    if rng.random() < 0.2:
        script = rng.choice(w.OTHER_SCRIPTS)
        text = "".join(rng.choice(script) for _ in range(rng.randint(3, 12)))
        return f"{text} {rng.choice(('=', '/', '-', ':'))} {text}"
    chosen = rng.sample(w.SYMBOLS, rng.randint(1, 4))
    lines = [f"The sign {sign} is called {_a(name.replace('_', ' '))}." for sign, name in chosen]
    run = "".join(rng.choice(chosen)[0] for _ in range(rng.randint(2, 6)))
    word = rng.choice((invent_word(rng, 2), invent_name(rng)))
    return " ".join(lines) + rng.choice((f" For example: {run} and {run}.", f" So {run}{word}{run} has {word} inside."))


_KINDS: tuple[tuple[Callable[[Random], str], int], ...] = (
    (_narrative, 18), (_facts, 7), (_arithmetic, 9), (_listing, 8), (_questions, 14), (_dialogue, 9), (_copying, 24),
    (_notice, 8), (_symbols, 3),
)  # fmt: skip


def _chat(rng: Random) -> Speech:
    """A short conversation with plain answers in prose, some of them about a passage the user quotes."""
    turns: Speech = []
    if rng.random() < 0.25:
        turns.append(("system", rng.choice(("You are a helpful assistant.", f"Your name is {invent_name(rng)}."))))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.random()
        if kind < 0.45:
            text, asked = _passage(rng)
            question, short, full = rng.choice(asked)
            pair = (
                rng.choice((f"{text} {question}", f"{question} {text}", f"{text}\n\n{question}")),
                rng.choice((short, full)),
            )
        elif kind < 0.65:
            item = _item(rng)
            quote = rng.choice(('"{}"', "{}", "'{}'", "{}."))
            pair = f"{rng.choice(('Repeat', 'Say', 'Write', 'Copy'))} {quote.format(item)}", item
        elif kind < 0.8:
            question, answer, result = _sum(rng)
            pair = question, rng.choice((answer, f"{answer} The answer is {result}."))
        elif kind < 0.9:
            name = invent_name(rng)
            pair = f"My name is {name}.", f"Hello, {name}. How are you?"
        else:
            pair = f"Tell me about {_place(rng)}.", _facts(rng)
        turns += [("user", pair[0]), ("assistant", pair[1])]
    return turns


def documents(seed: int = SEED) -> Iterator[str | Speech]:
    """An endless stream of documents, the same for the same seed: prose as a string, conversations as turns."""
    rng = Random(seed)
    makers = [maker for maker, _ in _KINDS]
    weights = [weight for _, weight in _KINDS]
    while True:
        if rng.random() < 0.2:
            yield _chat(rng)
        else:
            yield rng.choices(makers, weights)[0](rng)
