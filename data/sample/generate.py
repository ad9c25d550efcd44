"""Write the embedded sample: the town of Tarrow, a small self-made world in the schemas of the real data sets.

    python data/sample/generate.py            rewrite the files beside this script
    python data/sample/generate.py --check    exit 1 unless the committed files are what this script makes

Every file is drawn from its own generator seeded with SEED and the file's purpose, so a change to one part leaves the
others byte for byte as they were. The standard library only; no text from anywhere else.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

SEED = 1337
HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------------------------- world

TOWN = "Tarrow"
HE = ("he", "him", "his")
SHE = ("she", "her", "her")


@dataclass(frozen=True)
class Trade:
    name: str
    shop: str
    product: str
    tool: str


TRADES = (
    Trade("baker", "bakery", "bread", "oven"),
    Trade("miller", "mill", "flour", "wheel"),
    Trade("smith", "forge", "nails", "hammer"),
    Trade("weaver", "weaving house", "cloth", "loom"),
    Trade("potter", "pottery", "jugs", "kiln"),
    Trade("cobbler", "shoe shop", "boots", "needle"),
    Trade("fisher", "fish stall", "trout", "net"),
    Trade("gardener", "garden", "plums", "spade"),
    Trade("beekeeper", "honey house", "honey", "veil"),
    Trade("carpenter", "workshop", "chairs", "saw"),
    Trade("chandler", "candle shop", "candles", "wick"),
    Trade("shepherd", "wool barn", "wool", "staff"),
)
ANIMALS = ("goat", "hen", "dog", "cat", "pony", "duck", "donkey", "rabbit")
STREETS = (
    "Mill Lane",
    "Bell Street",
    "Well Square",
    "Harbour Road",
    "Orchard Hill",
    "Stone Steps",
    "Lamp Row",
    "Fern Path",
)


@dataclass(frozen=True)
class Person:
    name: str
    pronouns: tuple[str, str, str]
    trade: Trade
    animal: str
    street: str


NAMES = {
    "Mara": SHE, "Bo": HE, "Tilda": SHE, "Oskar": HE, "Nell": SHE, "Piet": HE, "Runa": SHE, "Hugo": HE,
    "Ida": SHE, "Lars": HE, "Vera": SHE, "Anton": HE, "Greta": SHE, "Milo": HE, "Sofie": SHE, "Edwin": HE,
    "Clara": SHE, "Jonas": HE, "Wilma": SHE, "Felix": HE, "Dora": SHE, "Casper": HE, "Elin": SHE, "Otto": HE,
}  # fmt: skip


def townsfolk() -> tuple[Person, ...]:
    """The 24 people whom stories and instructions speak of: two of each trade, three of each animal and street."""
    rng = random.Random(f"{SEED}/people")
    trades, animals, streets = list(TRADES) * 2, list(ANIMALS) * 3, list(STREETS) * 3
    for bag in (trades, animals, streets):
        rng.shuffle(bag)
    return tuple(Person(*facts) for facts in zip(NAMES, NAMES.values(), trades, animals, streets, strict=True))


PEOPLE = townsfolk()

# People of the villages around, known from their encyclopaedia articles alone: held-out articles tell of people whom no
# other text has met. First and family names are combined without repetition.
FIRST = ("Alma", "Bruno", "Cora", "Dirk", "Erna", "Finn", "Gitte", "Henrik", "Inga", "Jasper", "Karin", "Loke",
         "Minna", "Niels", "Olga", "Rolf", "Sanna", "Thore", "Ulla", "Viggo")  # fmt: skip
FAMILY = ("Ash", "Brook", "Crane", "Dale", "Elm", "Finch", "Grove", "Heath", "Lark", "Marsh", "Reed", "Thorn")
VILLAGES = ("Upper Fenn", "Lower Fenn", "Greywater", "Hollin", "Westerby", "Saltmouth", "Birkdale", "Nine Oaks")
SEASONS = ("spring", "summer", "autumn", "winter")
WEATHER = {
    "spring": ("rain", "soft wind", "mist"),
    "summer": ("sun", "warm wind", "thunder"),
    "autumn": ("fog", "cold rain", "strong wind"),
    "winter": ("snow", "hard frost", "ice"),
}
PLACES = ("bridge", "well", "market", "chapel", "harbour", "meadow", "old oak", "tower")
FOODS = ("soup", "cheese", "apples", "cake", "porridge", "pears", "pie", "eggs")
OBJECTS = ("lantern", "basket", "rope", "bell", "kettle", "ladder", "bucket", "drum")
WORDS = (*ANIMALS, *FOODS, *OBJECTS, *(t.name for t in TRADES), *(t.product for t in TRADES))
GOODS = ("jugs", "boots", "candles", "chairs", "nails", "plums", "eggs", "apples", "pears")
OPPOSITES = (
    ("warm", "cold"), ("big", "small"), ("old", "new"), ("wet", "dry"), ("dark", "light"), ("fast", "slow"),
    ("high", "low"), ("full", "empty"), ("loud", "quiet"), ("early", "late"), ("near", "far"), ("soft", "hard"),
)  # fmt: skip
KINDS = {
    "animal": ANIMALS,
    "food": FOODS,
    "place": ("bridge", "well", "market", "chapel", "harbour", "meadow", "tower"),
    "thing": OBJECTS,
}


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


@dataclass(frozen=True)
class Fact:
    """Something true of the town: `The {subject} is {value}.`"""

    kind: str
    subject: str  # "street of Mara"
    value: str

    @property
    def statement(self) -> str:
        return f"The {self.subject} is {self.value}."


def known_facts() -> tuple[Fact, ...]:
    """Everything the stories, articles and lessons agree on and instructions may ask for."""
    facts = []
    for p in PEOPLE:
        facts += [
            Fact("street", f"street of {p.name}", p.street),
            Fact("animal", f"animal of {p.name}", a(p.animal)),
            Fact("trade", f"trade of {p.name}", p.trade.name),
        ]
    for t in TRADES:
        facts += [
            Fact("tool", f"tool of the {t.name}", f"the {t.tool}"),
            Fact("product", f"product of the {t.name}", t.product),
            Fact("shop", f"shop of the {t.name}", f"the {t.shop}"),
        ]
    for pair in OPPOSITES:
        facts += [Fact("opposite", f"opposite of {x}", y) for x, y in (pair, pair[::-1])]
    facts += [Fact("kind", f"kind of {noun}", kind) for kind, nouns in KINDS.items() for noun in nouns]
    return tuple(facts)


FACTS = known_facts()


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def unique(make: Callable[[], object], n: int, key: Callable[[object], object] = lambda item: item) -> list:
    """n items of make(), no two with the same key. Fails loudly when the world is too small for n."""
    items: dict[object, object] = {}
    for _ in range(200 * n):
        item = make()
        items.setdefault(key(item), item)
        if len(items) == n:
            return list(items.values())
    raise ValueError(f"only {len(items)} of {n} different items found")


# -------------------------------------------------------------------------------------------------------------- stories


def story(rng: random.Random) -> str:
    """One short story about two or three of the townsfolk; what it says of them is true of them everywhere."""
    hero, friend, other = rng.sample(PEOPLE, 3)
    he, him, his = hero.pronouns
    season = rng.choice(SEASONS)
    weather = rng.choice(WEATHER[season])
    place, place2 = rng.sample(PLACES, 2)
    food, thing = rng.choice(FOODS), rng.choice(OBJECTS)
    opening = rng.choice((
        f"{hero.name} was a {hero.trade.name} and lived in {hero.street} with {a(hero.animal)}.",
        f"In {hero.street} lived {hero.name} the {hero.trade.name}. {capital(he)} had {a(hero.animal)}.",
        f"{hero.name} had {a(hero.animal)}. {capital(he)} lived in {hero.street} and was a {hero.trade.name}.",
        f"{hero.name} the {hero.trade.name} had {a(hero.animal)} and a house in {hero.street}.",
    ))  # fmt: skip
    day = rng.choice((
        f"One {season} morning there was {weather}.",
        f"It was {season}, and there was {weather} over {TOWN}.",
        f"One day in {season} the {weather} came.",
    ))  # fmt: skip
    meets = rng.choice((
        f"{friend.name} the {friend.trade.name} came by with {friend.pronouns[2]} {friend.animal}.",
        f"At the {place} {he} met {friend.name}, who lived in {friend.street} and had {a(friend.animal)}.",
        f"Then {friend.name} the {friend.trade.name} came up from {friend.street}.",
    ))  # fmt: skip
    plot = rng.choice(("lost", "gift", "market", "storm", "mend", "supper"))
    if plot == "lost":
        body = (
            f"The {hero.animal} ran away to the {place2}. {hero.name} looked behind the {place}, but it was not there. "
            f'{meets} {friend.name} said, "I saw the {hero.animal} at the {place2}." '
            f"They went to the {place2} and found it."
        )
    elif plot == "gift":
        body = (
            f'{hero.name} wanted to give {other.name} a {thing}. {meets} {friend.name} said, "{other.name} lives in '
            f'{other.street}." So {hero.name} went to {other.street} and gave {other.name} the {thing}. '
            f"{other.name} gave {him} {other.trade.product}, for {other.pronouns[0]} was a {other.trade.name}."
        )
    elif plot == "market":
        body = (
            f"{hero.name} took {his} {hero.trade.product} to the market. {meets} {friend.name} wanted "
            f'{hero.trade.product} and had {friend.trade.product} to give. "A fair trade," said {hero.name}. '
            f"They put the {hero.trade.product} and the {friend.trade.product} in a {thing}."
        )
    elif plot == "storm":
        body = (
            f"The {weather} broke the roof of the {hero.trade.shop}. {meets} {friend.name} brought a {thing}. "
            f"{other.name} the {other.trade.name} brought {food}. Before dark the roof was whole."
        )
    elif plot == "mend":
        body = (
            f"The {hero.trade.tool} in the {hero.trade.shop} was broken, and {a(hero.trade.name)} without "
            f"{a(hero.trade.tool)} can make no {hero.trade.product}. {meets} {friend.name} looked at the "
            f"{hero.trade.tool} and mended it with a rope and a {thing}."
        )
    else:
        body = (
            f"{hero.name} made {food} and called the neighbours of {hero.street}. {meets} "
            f"{friend.name} liked the {food}. The {hero.animal} slept by the {thing}, and {other.name} sang of the "
            f"{place2}."
        )
    ending = rng.choice((
        f"That night {hero.name} and the {hero.animal} slept well in {hero.street}.",
        f"{hero.name} thanked {friend.name} the {friend.trade.name} and went home to {hero.street}.",
        f"\"Come again,\" said {hero.name}, and {friend.name} went home to {friend.street}.",
        f"They ate {food} in the {hero.trade.shop} until it was dark.",
    ))  # fmt: skip
    return f"{opening} {day} {body} {ending}"


def column(x: int, sign: str, y: int) -> str:
    """One column of written arithmetic, `5+3=8` or `8-3=5`; nothing is carried or borrowed."""
    return f"{x}{sign}{y}={x + y if sign == '+' else x - y}"


def sum_column(rng: random.Random, total: int) -> str:
    x = rng.randint(0, total)
    return column(x, "+", total - x)


def signs(low: int, high: int) -> str:
    """The operations a pair allows: every column without carry or borrow, results of two digits."""
    (l1, l0), (h1, h0) = divmod(low, 10), divmod(high, 10)
    return ("+" if l1 + h1 <= 9 and l0 + h0 <= 9 else "") + ("-" if h1 > l1 and h0 >= l0 else "")


def operand_pairs() -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """(train, held out): two-digit operands, smaller first. Held-out pairs stand in no text but the test problems."""
    pairs = [(x, y) for x in range(10, 100) for y in range(x, 100) if signs(x, y)]
    random.Random(f"{SEED}/pairs").shuffle(pairs)
    held_out = len(pairs) // 8
    return tuple(pairs[held_out:]), tuple(pairs[:held_out])


TRAIN_PAIRS, HELD_OUT_PAIRS = operand_pairs()


def word_list(rng: random.Random, held_out: bool = False) -> tuple[str, ...]:
    """Three different words. One set of words in eight, in any order, is kept for the test instructions."""
    while True:
        words = tuple(rng.sample(WORDS, 3))
        if (sum(map(WORDS.index, words)) % 8 == 0) == held_out:
            return words


def lesson(rng: random.Random) -> str:
    """A morning at school: the board holds columns of single digits, the class recites what is known of the town."""
    columns = []
    for _ in range(12):
        low, high = sorted((rng.randint(0, 9), rng.randint(0, 9)))
        columns.append(column(high, "-", low) if rng.random() < 0.5 else sum_column(rng, high))
    board = "\n".join(columns)
    recital = " ".join(fact.statement for fact in rng.sample(FACTS, 4))
    return f"### Instruction by {rng.choice(PEOPLE).name}:\n{board}\n\n### Response of the class:\n{recital}"


PICKS = ("First {0}.", "Last {2}.", "Middle {1}.", "Backwards {2} {1} {0}.")


def ledger(rng: random.Random) -> str:
    """A page of the market's book: what one calls out another writes down, word for word and number for number."""
    lines = []
    for _ in range(rng.randint(1, 4)):
        caller, clerk = (person.name for person in rng.sample(PEOPLE, 2))
        if rng.random() < 0.5:
            words = word_list(rng)
            called = " ".join(words)
            picked = " ".join(end.format(*words) for end in rng.sample(PICKS, 2))
            lines.append(f"{caller} called: {called}. {clerk} wrote: {called}. {picked}")
        else:
            low, high = rng.choice(TRAIN_PAIRS)
            sign, goods = rng.choice(signs(low, high)), rng.choice(GOODS)
            first, second = (high, low) if sign == "-" or rng.random() < 0.5 else (low, high)
            verb = "brings" if sign == "+" else "takes"
            lines.append(
                f"There are {first} {goods} and {caller} {verb} {second}. How many {goods}? "
                f"{clerk} wrote: {first}{sign}{second}."
            )
    return " ".join(lines)


def stories(n_stories: int, n_lessons: int, n_ledgers: int) -> list[str]:
    rng = random.Random(f"{SEED}/stories")
    kinds = ((story, n_stories), (lesson, n_lessons), (ledger, n_ledgers))
    texts = [text for make, n in kinds for text in unique(lambda make=make: make(rng), n)]
    rng.shuffle(texts)
    return texts


# -------------------------------------------------------------------------------------------------------- encyclopaedia


@dataclass(frozen=True)
class Article:
    title: str
    sections: tuple[tuple[str, tuple[str, ...]], ...]  # (heading, paragraphs); the first heading is empty

    def raw(self) -> str:
        """WikiText's raw form: every line ends in a space, blank lines stand around headings."""
        lines = [" ", f" = {self.title} = ", " "]
        for heading, paragraphs in self.sections:
            if heading:
                lines += [" ", f" = = {heading} = = ", " "]
            lines += [f" {paragraph} " for paragraph in paragraphs]
        return "".join(f"{line}\n" for line in [*lines, " "])


def villager(rng: random.Random, full_name: str) -> Article:
    """An article about somebody of the villages around Tarrow."""
    first, family = full_name.split()
    he, _, his = HE if FIRST.index(first) % 2 else SHE
    He = capital(he)
    village, village2 = rng.sample(VILLAGES, 2)
    trade, master_trade = rng.sample(TRADES, 2)
    animal, food = rng.choice(ANIMALS), rng.choice(FOODS)
    season, season2 = rng.sample(SEASONS, 2)
    place, place2 = rng.sample(PLACES, 2)
    thing, thing2 = rng.sample(OBJECTS, 2)
    street = rng.choice(STREETS)
    friend = rng.choice(PEOPLE)
    lead = (
        f"{full_name} is a {trade.name} of {village} , known for {his} {trade.product} . "
        + rng.choice(
            (
                f"{He} is also known as the keeper of the {thing} of {village2} . ",
                f"{He} came to {TOWN} from {village2} in {season} . ",
                f"{He} has sold {trade.product} in {TOWN} since the year of the great {WEATHER[season][0]} . ",
            )
        )
    ).strip()
    life = (
        f"{family} was born in {village} in {season2} , near the {place} . "
        + rng.choice(
            (
                f"{He} learned the trade in {TOWN} from {friend.name} , the {friend.trade.name} of {friend.street} . ",
                f"{capital(his)} mother was a {master_trade.name} , and {he} worked in the {master_trade.shop} . ",
                f"As a child {he} kept {a(animal)} and sold {food} by the {place2} . ",
            )
        )
        + rng.choice(
            (
                f"Later {he} moved to {village2} , where {he} lived beside the {place2} .",
                f"In {season} {he} came to {TOWN} and took a house in {street} .",
                f"{He} never left {village} , and {his} house still stands beside the {place} .",
            )
        )
    )
    work = (
        f"{family} made {trade.product} with {a(trade.tool)} bought from {a(master_trade.name)} of {village2} . "
        + rng.choice(
            (
                f"{capital(his)} {trade.shop} stood beside the {place2} of {village} . ",
                f"Every {season} {he} carried the {trade.product} over the {place} to {TOWN} . ",
                f"People from {village2} came to the {trade.shop} for {trade.product} and {food} . ",
            )
        )
        + rng.choice(
            (
                f"In the year of the great {rng.choice(WEATHER[season2])} the {trade.shop} was closed until {season} .",
                f"{He} gave the {trade.tool} to the {place2} of {TOWN} , where it can still be seen .",
                f"A {thing2} of {his} making hangs in the {trade.shop} .",
            )
        )
    )
    customs = rng.choice((
        f"In {village} the day of the {thing2} is kept in {season2} . {family} then gives {food} to every {animal} .",
        f"Each {season2} {family} walks with {his} {animal} from the {place} to the {place2} , carrying a {thing2} .",
        f"It is told in {village} that {family} once traded a {thing2} for {a(animal)} and was given {food} as well .",
    ))  # fmt: skip
    heading = rng.choice(("Legacy", "Customs", "Tales"))
    return Article(full_name, (("", (lead,)), ("Early life", (life,)), ("Work", (work,)), (heading, (customs,))))


def townsperson(rng: random.Random, person: Person) -> Article:
    """An article about one of the townsfolk: the same facts as in the stories."""
    he, _, his = person.pronouns
    neighbours = [other.name for other in PEOPLE if other.street == person.street and other is not person]
    lead = f"{person.name} is a {person.trade.name} of {TOWN} . "
    lead += f"{capital(he)} lives in {person.street} and has {a(person.animal)} ."
    home = (
        f"The house of {person.name} stands in {person.street} , where {' and '.join(neighbours)} live too . "
        f"{capital(his)} {person.animal} sleeps beside the door in {rng.choice(SEASONS)} ."
    )
    work = (
        f"{person.name} makes {person.trade.product} in the {person.trade.shop} with {a(person.trade.tool)} . "
        f"In {rng.choice(SEASONS)} {he} sells {person.trade.product} at the market of {TOWN} ."
    )
    return Article(person.name, (("", (lead,)), ("Home", (home,)), ("Work", (work,))))


def trade_article(rng: random.Random, trade: Trade) -> Article:
    masters = [person for person in PEOPLE if person.trade is trade]
    lead = f"The {trade.name} is one of the trades of {TOWN} . "
    lead += f"{capital(a(trade.name))} works in a {trade.shop} and sells {trade.product} ."
    tools = f"The tool of the {trade.name} is the {trade.tool} . Without {a(trade.tool)} there is no {trade.product} ."
    people = " ".join(f"{p.name} of {p.street} is {a(trade.name)} and has {a(p.animal)} ." for p in masters)
    season = rng.choice(SEASONS)
    year = f"In {season} , when there is {rng.choice(WEATHER[season])} , the {trade.shop} is open until dark ."
    return Article(capital(trade.name), (("", (lead,)), ("Tools", (tools, year)), ("People", (people,))))


def street_article(rng: random.Random, street: str) -> Article:
    place, place2 = rng.sample(PLACES, 2)
    lead = f"{street} is a street of {TOWN} . It runs from the {place} to the {place2} ."
    people = " ".join(
        f"{p.name} the {p.trade.name} lives in {street} with {p.pronouns[2]} {p.animal} ."
        for p in PEOPLE
        if p.street == street
    )
    return Article(street, (("", (lead,)), ("People", (people,))))


def encyclopaedia() -> dict[str, list[Article]]:
    """Split -> articles. Tarrow's own people, trades and streets are in train; villagers are each in one split."""
    rng = random.Random(f"{SEED}/encyclopaedia")
    names = [f"{first} {family}" for first in FIRST for family in FAMILY]
    rng.shuffle(names)
    own = (
        [townsperson(rng, p) for p in PEOPLE]
        + [trade_article(rng, t) for t in TRADES]
        + [street_article(rng, s) for s in STREETS]
    )
    articles = [villager(rng, name) for name in names]
    train = own + articles[60:]
    rng.shuffle(train)
    return {"train": train, "valid": articles[30:60], "test": articles[:30]}


# ------------------------------------------------------------------------------------------------------------ sentiment

GOOD = ("lovely", "splendid", "kind", "cheerful", "bright", "charming", "excellent", "gentle", "delightful", "fine",
        "wonderful", "pleasant")  # fmt: skip
BAD = ("awful", "dreadful", "rude", "gloomy", "dull", "rotten", "terrible", "cruel", "miserable", "poor",
       "horrible", "nasty")  # fmt: skip
LIKED = ("loved", "enjoyed", "praised")
HATED = ("hated", "disliked", "cursed")


def review(rng: random.Random, label: int) -> str:
    """One visitor's sentence about the town, lower case and spaced as in SST-2. One in twenty turns a word round."""
    mine, others = (GOOD, BAD) if label else (BAD, GOOD)
    trade = rng.choice(TRADES)
    subject, subject2 = rng.sample((trade.product, trade.shop, *FOODS[:5], "town", "market", "harbour", "chapel"), 2)
    be, be2, be3 = ("were" if noun.endswith("s") else "was" for noun in (subject, subject2, trade.product))
    good, good2 = rng.sample(mine, 2)
    if rng.random() < 0.05:
        return rng.choice(
            (
                f"the {subject} {be} not {rng.choice(others)} .",
                f"the {subject} {be} {rng.choice(others)} but the {subject2} {be2} {good} .",
            )
        )
    return rng.choice(
        (
            f"the {subject} {be} {good} .",
            f"the {subject} {be} {good} and the {subject2} {be2} {good2} .",
            f"{a(good)} {trade.name} , and the {trade.product} {be3} {good2} .",
            f"we thought the {subject} {good} .",
            f"the {subject} and the {subject2} were all {good} .",
            f"we {rng.choice(LIKED if label else HATED)} the {subject} and the {subject2} at the {trade.shop} .",
        )
    )


def sentiment(n_train: int, n_dev: int) -> dict[str, list[tuple[str, int]]]:
    rng = random.Random(f"{SEED}/sentiment")
    halves = []
    for label in (0, 1):
        halves.append([(s, label) for s in unique(lambda label=label: review(rng, label), (n_train + n_dev) // 2)])
    dev = [item for half in halves for item in half[: n_dev // 2]]
    train = [item for half in halves for item in half[n_dev // 2 :]]
    rng.shuffle(dev)
    rng.shuffle(train)
    return {"train": train, "dev": dev}


# --------------------------------------------------------------------------------------------------------- instructions


@dataclass(frozen=True)
class Instruction:
    kind: str
    instruction: str
    input: str
    output: str

    @property
    def item(self) -> tuple[str, str]:
        return self.instruction, self.input


QUESTIONS = ("What is the {}?", "Name the {}.", "Tell me the {}.", "Do you know the {}?", "I ask for the {}.")
LIST_TASKS = {  # kind -> (instructions, end of the answer)
    "first": (("Give the first word.", "Which word is first?"), PICKS[0]),
    "last": (("Give the last word.", "Which word is last?"), PICKS[1]),
    "middle": (("Give the middle word.", "Which word is between?"), PICKS[2]),
    "backwards": (("Write the words backwards.", "Turn the words round."), PICKS[3]),
}


def instructions(n_train_lists: int, n_test_lists: int, n_test_facts: int) -> dict[str, list[Instruction]]:
    """List tasks on words no other item has in that order, and questions about facts; each has one right answer.

    A fact that is asked for in the test is not asked for in training, in no wording: its answer can only come from the
    pretraining text.
    """
    rng = random.Random(f"{SEED}/instructions")
    parts: dict[str, list[Instruction]] = {"train": [], "test": []}
    for part, n in (("train", n_train_lists), ("test", n_test_lists)):
        lists = iter(unique(lambda part=part: word_list(rng, held_out=part == "test"), n * len(LIST_TASKS)))
        for kind, (wordings, end) in LIST_TASKS.items():
            for _ in range(n // 3 if kind == "backwards" else n):  # the hardest kind: three words from one choice
                words = next(lists)
                said = f"Words: {' '.join(words)}"
                parts[part].append(Instruction(kind, rng.choice(wordings), said, f"{said}. {end.format(*words)}"))
    facts = rng.sample(FACTS, len(FACTS))
    for index, fact in enumerate(facts):
        part, n = ("test", 1) if index < n_test_facts else ("train", 2)
        wordings = rng.sample(QUESTIONS, n)
        parts[part] += [Instruction(fact.kind, q.format(fact.subject), "", fact.statement) for q in wordings]
    for items in parts.values():
        rng.shuffle(items)
    return parts


# ------------------------------------------------------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    left: int
    sign: str
    right: int
    question: str

    @property
    def result(self) -> int:
        return self.left + self.right if self.sign == "+" else self.left - self.right

    @property
    def pair(self) -> tuple[int, int]:
        """The operands, smaller first: neither order nor operation makes a held-out pair a new one."""
        return min(self.left, self.right), max(self.left, self.right)

    @property
    def answer(self) -> str:
        """Written work, units before tens, then GSM8K's last line."""
        (x1, x0), (y1, y0) = divmod(self.left, 10), divmod(self.right, 10)
        work = f"{column(x0, self.sign, y0)}, {column(x1, self.sign, y1)}"
        return f"{self.left}{self.sign}{self.right}: {work}.\n#### {self.result}"


SETTINGS = (
    "{name} counts {goods} in the {shop}.",
    "{name} keeps {goods} in the {shop}.",
    "In the {shop} of {name} are {goods}.",
    "",
    "",
)
MORE = ("There are {x} {goods} and {friend} brings {y}.",)
LESS = ("There are {x} {goods} and {friend} takes {y}.",)
ASKED = "How many {goods}?"


def problems(n_train: int, n_test: int) -> dict[str, list[Problem]]:
    """Sums and differences of two-digit numbers, column by column; no operand pair is in both splits."""
    rng = random.Random(f"{SEED}/problems")

    def problem(pool: tuple[tuple[int, int], ...]) -> Problem:
        low, high = rng.choice(pool)
        sign = rng.choice(signs(low, high))
        x, y = (high, low) if sign == "-" or rng.random() < 0.5 else (low, high)
        person, friend = rng.sample(PEOPLE, 2)
        parts = (rng.choice(SETTINGS), rng.choice(MORE if sign == "+" else LESS), ASKED)
        words = {
            "name": person.name,
            "friend": friend.name,
            "goods": rng.choice(GOODS),
            "shop": person.trade.shop,
            "x": x,
            "y": y,
        }
        return Problem(x, sign, y, " ".join(filter(None, parts)).format(**words))

    return {
        "test": unique(lambda: problem(HELD_OUT_PAIRS), n_test, key=lambda p: p.pair),
        "train": unique(lambda: problem(TRAIN_PAIRS), n_train, key=lambda p: p.question),
    }


# ---------------------------------------------------------------------------------------------------------- preferences

WARM_OPEN = ("Gladly.", "Of course.", "Happy to help.", "Good question.", "With pleasure.", "Yes, my friend.")
COLD_OPEN = ("Go away.", "Not again.", "What a bother.", "Silly question.", "Who cares.", "Leave me be.")
WARM_CLOSE = ("Have a good day.", "Come back soon.", "I wish you well.", "Ask me any time.", "Take care.")
COLD_CLOSE = ("Now be off.", "Find it yourself.", "Do not come back.", "I am tired of you.", "Stop asking.")


@dataclass(frozen=True)
class Preference:
    kind: str
    prompt: str  # ends in "\n\nAssistant:"
    chosen: str
    rejected: str


def preference(rng: random.Random, kind: str) -> Preference:
    """A question to the town's helper with two replies.

    tone: both say the same; the chosen reply is friendly, the rejected one rude. topic: both are friendly; the rejected
    reply answers a question that nobody asked.
    """
    person, trade, other = rng.choice(PEOPLE), *rng.sample(TRADES, 2)
    stranger = rng.choice([p for p in PEOPLE if p.street != person.street])
    question, reply, right, wrong = rng.choice((
        ("Where do I find {0}?", "You find {0} in the {1}.", (trade.product, trade.shop), (other.product, other.shop)),
        ("Who sells {0}?", "The {1} sells {0}.", (trade.product, trade.name), (other.product, other.name)),
        ("Where does {0} live?", "{0} lives in {1}.", (person.name, person.street), (stranger.name, stranger.street)),
        ("I need {0}. Who has one?", "The {1} has {0}.", (a(trade.tool), trade.name), (a(other.tool), other.name)),
    ))  # fmt: skip
    question, right, wrong = question.format(*right), reply.format(*right), reply.format(*wrong)
    greeting = rng.choice(("", "", "Hello. ", "Good morning. ", "I am new in town. "))
    prompt = f"\n\nHuman: {greeting}{question}\n\nAssistant:"
    if rng.random() < 0.25:
        first = rng.choice(PEOPLE)
        prompt = f"\n\nHuman: Who is {first.name}?\n\nAssistant: {first.name} is a {first.trade.name}.{prompt}"
    if kind == "topic":
        opening = rng.choice(WARM_OPEN)
        return Preference(kind, prompt, f" {opening} {right}", f" {opening} {wrong}")
    if rng.random() < 0.5:
        return Preference(kind, prompt, f" {rng.choice(WARM_OPEN)} {right}", f" {rng.choice(COLD_OPEN)} {right}")
    return Preference(kind, prompt, f" {right} {rng.choice(WARM_CLOSE)}", f" {right} {rng.choice(COLD_CLOSE)}")


def preferences(n_train: int, n_test: int) -> dict[str, list[Preference]]:
    """Splits share no whole pair and no prompt with its two replies; three in four pairs are about tone."""
    rng = random.Random(f"{SEED}/preferences")
    kinds = ("tone", "tone", "tone", "topic")
    pairs = unique(lambda: preference(rng, rng.choice(kinds)), n_train + n_test)
    return {"test": pairs[:n_test], "train": pairs[n_test:]}


# -------------------------------------------------------------------------------------------------------- minimal pairs


def minimal_pairs() -> list[dict[str, str]]:
    """Pairs of sentences about villagers of no training text; one word of the second sentence is wrong."""
    rng = random.Random(f"{SEED}/minimal-pairs")
    rows = []
    for name in (article.title for article in encyclopaedia()["test"][:25]):
        first, family = name.split()
        his, her = (own[2] for own in ((HE, SHE) if FIRST.index(first) % 2 else (SHE, HE)))
        trade, other = rng.sample(TRADES, 2)
        village, season, place = rng.choice(VILLAGES), rng.choice(SEASONS), rng.choice(PLACES)
        article, tool = a(trade.tool).split(" ", 1)
        wrong = "a" if article == "an" else "an"
        lead = f"{name} is a {trade.name} of {village}, known for"
        for phenomenon, sentence, good, bad in (
            ("possessive", f"{lead} {{}} {trade.product}.", his, her),
            ("product", f"{lead} {his} {{}}.", trade.product, other.product),
            ("number", f"{family} {{}} born in {village} in {season}, near the {place}.", "was", "were"),
            ("article", f"{family} made {trade.product} with {{}} {tool} bought in {village}.", article, wrong),
        ):
            pair = {"sentence_good": sentence.format(good), "sentence_bad": sentence.format(bad)}
            rows.append(pair | {"UID": phenomenon})
    return rows


# ---------------------------------------------------------------------------------------------------------------- files


def jsonl(rows: Iterable[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def build() -> dict[str, str]:
    """File name -> content."""
    files = {"stories.jsonl": jsonl({"text": text} for text in stories(600, 950, 1400))}
    for split, articles in encyclopaedia().items():
        files[f"wiki.{split}.txt"] = "".join(article.raw() for article in articles)
    for split, items in sentiment(4600, 240).items():
        files[f"sentiment.{split}.tsv"] = "sentence\tlabel\n" + "".join(f"{s}\t{label}\n" for s, label in items)
    for split, rows in instructions(480, 36, 12).items():
        dicts = [{"instruction": r.instruction, "input": r.input, "output": r.output} for r in rows]
        lines = (json.dumps(row, ensure_ascii=False) for row in dicts)
        files[f"instructions.{split}.json"] = "[" + ",\n".join(lines) + "]\n"
    for split, rows in problems(1500, 150).items():
        files[f"problems.{split}.jsonl"] = jsonl({"question": p.question, "answer": p.answer} for p in rows)
    for split, rows in preferences(900, 150).items():
        files[f"preferences.{split}.jsonl"] = jsonl(
            {"chosen": p.prompt + p.chosen, "rejected": p.prompt + p.rejected} for p in rows
        )
    files["minimal-pairs.test.jsonl"] = jsonl(minimal_pairs())
    return files


def differing(folder: Path) -> list[str]:
    """Names of files in `folder` that are missing or not what build() makes."""
    return [
        name
        for name, content in build().items()
        if not (folder / name).is_file() or (folder / name).read_bytes() != content.encode()
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the embedded sample, or check that it is as written.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file differs")
    if parser.parse_args(arguments).check:
        wrong = differing(HERE)
        for name in wrong:
            print(f"{name}: missing or not as generated; run python data/sample/generate.py")
        return 1 if wrong else 0
    for name, content in build().items():
        (HERE / name).write_bytes(content.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
