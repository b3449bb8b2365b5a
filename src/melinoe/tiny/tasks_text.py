"""Text tasks of the embedded workload: words, letters, records, dates and truth values, step by step.

Same contract as `tasks_numbers`: a task draws from a `random.Random` and returns (prompt,
completion). Each task has words of its own, so that sequences differ in the experts they want.
"""

from __future__ import annotations

from random import Random
from string import ascii_uppercase

NAMES = (
    "ada", "ben", "cleo", "dina", "emil", "fay", "gus", "hana", "igor", "jana", "kurt", "lena",
    "milo", "nora", "otto", "pia", "ravi", "sara", "tom", "uma", "vera", "wim", "yara", "zeno",
)  # fmt: skip
CITIES = (
    "oslo", "rome", "lima", "cairo", "paris", "delhi", "tokyo", "accra", "quito", "bern", "riga", "dakar",
)  # fmt: skip
JOBS = (
    "baker", "nurse", "pilot", "judge", "miner", "tailor", "farmer", "singer", "lawyer", "painter", "smith",
)  # fmt: skip
COLOURS = (
    "red", "blue", "green", "teal", "gold", "pink", "grey", "white", "black", "brown", "lilac", "amber",
)  # fmt: skip
FRUITS = (
    "apple", "banana", "cherry", "damson", "elder", "fig", "grape", "hazel", "kiwi", "lemon", "mango",
    "nectar", "olive", "pear", "quince", "raisin", "sloe", "tomato", "ugli", "vanilla", "walnut", "yam",
)  # fmt: skip
ANIMALS = ("cat", "dog", "owl", "hen", "fox", "bee", "cow", "pig", "rat", "elk", "ant", "ape")
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MONTHS = (
    ("january", 31), ("february", 28), ("march", 31), ("april", 30), ("may", 31), ("june", 30),
    ("july", 31), ("august", 31), ("september", 30), ("october", 31), ("november", 30), ("december", 31),
)  # fmt: skip
ALPHABET = (
    "alfa", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo",
    "lima", "mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor",
    "whiskey", "xray", "yankee", "zulu",
)  # fmt: skip


def _lines(steps: list[str], answer: str) -> str:
    return "\n".join([*steps, f"answer: {answer}"])


def order(random: Random) -> tuple[str, str]:
    """Five to seven of 22 fruits put in alphabetical order by taking out the first again and again."""
    left = random.sample(FRUITS, random.randint(5, 7))
    prompt = "order " + " ".join(left)
    steps, taken = [], []
    while left:
        first = min(left)
        left.remove(first)
        taken.append(first)
        steps.append(" ".join([f"{first} |", *left]))
    return prompt, _lines(steps, " ".join(taken))


def date(random: Random) -> tuple[str, str]:
    """A day 1..28 of any month on a given weekday, and 1..28 days later; february has 28 days."""
    index = random.randrange(12)
    month, length = MONTHS[index]
    day, later, weekday = random.randint(1, 28), random.randint(1, 28), random.randrange(7)
    rest = later % 7
    passed = [WEEKDAYS[(weekday + step) % 7] for step in range(rest + 1)]
    steps = [f"{later}-{later - rest}={rest}: {' '.join(passed)}", f"{month} has {length}"]
    total = day + later
    if total > length:
        after, month = total - length, MONTHS[(index + 1) % 12][0]
        steps.append(f"{day}+{later}={total}-{length}={after}")
    else:
        after = total
        steps.append(f"{day}+{later}={total}")
    prompt = f"{WEEKDAYS[weekday]} {day} {MONTHS[index][0]}, {later} days later"
    return prompt, _lines(steps, f"{passed[-1]} {after} {month}")


def extract(random: Random) -> tuple[str, str]:
    """A sentence on a person (24 names, 11 jobs, 12 cities, age 18..79) turned into a JSON object."""
    name, job, city, age = (
        random.choice(NAMES),
        random.choice(JOBS),
        random.choice(CITIES),
        random.randint(18, 79),
    )
    sentence = random.choice(
        (
            f"{name} is a {job} of {age} who lives in {city}",
            f"in {city} lives {name}, aged {age}, who works as a {job}",
            f"the {job} {name} from {city} is {age} years old",
            f"at {age} our {job} in {city} goes by {name}",
        )
    )
    steps = [f"name {name}", f"age {age}", f"job {job}", f"city {city}"]
    record = f'{{"name":"{name}","age":{age},"job":"{job}","city":"{city}"}}'
    return f"extract: {sentence}", _lines(steps, record)


def lookup(random: Random) -> tuple[str, str]:
    """Five to seven of 12 colours, each with a code 10..99; five of them are asked for."""
    keys = random.sample(COLOURS, random.randint(5, 7))
    values = dict(zip(keys, random.sample(range(10, 100), len(keys)), strict=True))
    asked = random.sample(keys, 5)
    record = " ".join(f"{key}{value}" for key, value in values.items())
    steps = [" ".join(["found", *(f"{key}{values[key]}" for key in asked)])]
    answer = ",".join(str(values[key]) for key in asked)
    return f"codes {record}; find {' '.join(asked)}", _lines(steps, answer)


def select(random: Random) -> tuple[str, str]:
    """Four to six people and their ages 10..99; who is over a multiple of ten, 20..80."""
    names = random.sample(NAMES, random.randint(4, 6))
    ages = [random.randint(10, 99) for _ in names]
    limit = random.randint(2, 8) * 10
    steps = []
    for name, age in zip(names, ages, strict=True):
        sign = ">" if age > limit else "<" if age < limit else "="
        steps.append(f"{name} {age}{sign}{limit} {'yes' if age > limit else 'no'}")
    chosen = [name for name, age in zip(names, ages, strict=True) if age > limit]
    table = "; ".join(f"{name} {age}" for name, age in zip(names, ages, strict=True))
    return f"{table}; who is over {limit}?", _lines(steps, " ".join(chosen) or "nobody")


def edit(random: Random) -> tuple[str, str]:
    """Six or seven distinct letters and four edits: reverse, drop, swap ends, replace or append."""
    letters = random.sample(ascii_uppercase, random.randint(6, 7))
    spare = [letter for letter in ascii_uppercase if letter not in letters]
    prompt = f"edit {''.join(letters)}: "
    names, steps = [], []
    for _ in range(4):
        kind = random.choice(("reverse", "drop first", "drop last", "swap ends", "replace", "append"))
        if kind == "reverse":
            letters.reverse()
        elif kind == "drop first":
            letters.pop(0)
        elif kind == "drop last":
            letters.pop()
        elif kind == "swap ends":
            letters[0], letters[-1] = letters[-1], letters[0]
        else:
            new = spare.pop(random.randrange(len(spare)))
            if kind == "append":
                letters.append(new)
                kind = f"append {new}"
            else:
                place = random.randrange(len(letters))
                kind = f"replace {letters[place]} by {new}"
                letters[place] = new
        names.append(kind)
        steps.append(f"{kind}: {''.join(letters)}")
    return prompt + ", ".join(names), _lines(steps, "".join(letters))


def logic(random: Random) -> tuple[str, str]:
    """(a op b) op (c op d) over four given truth values, each maybe negated; op is and, or."""
    words = ("false", "true")
    values = [random.randrange(2) for _ in range(4)]
    order = random.sample(range(4), 4)
    negated = [random.random() < 0.4 for _ in range(4)]
    operators = [random.choice(("and", "or")) for _ in range(3)]

    def apply(operator: str, left: int, right: int) -> int:
        return left & right if operator == "and" else left | right

    def write(atoms: list[str]) -> str:
        return f"({atoms[0]} {operators[0]} {atoms[1]}) {operators[1]} ({atoms[2]} {operators[2]} {atoms[3]})"

    names = ["not " * no + "pqrs"[place] for no, place in zip(negated, order, strict=True)]
    given = ["not " * no + words[values[place]] for no, place in zip(negated, order, strict=True)]
    atoms = [values[place] ^ no for no, place in zip(negated, order, strict=True)]
    left, right = apply(operators[0], *atoms[:2]), apply(operators[2], *atoms[2:])
    steps = [
        write(given),
        write([words[atom] for atom in atoms]),
        f"{words[left]} {operators[1]} {words[right]}",
    ]
    prompt = " ".join(f"{name}={words[value]}" for name, value in zip("pqrs", values, strict=True))
    return f"{prompt}: {write(names)}", _lines(steps, words[apply(operators[1], left, right)])


def count(random: Random) -> tuple[str, str]:
    """How often one animal appears among eight to twelve drawn from three; each is compared with it."""
    kinds = random.sample(ANIMALS, 3)
    animals = [random.choice(kinds) for _ in range(random.randint(8, 12))]
    asked = kinds[0]
    steps, seen = [], 0
    for animal in animals:
        seen += animal == asked
        steps.append(f"{animal} {asked} {f'yes {seen}' if animal == asked else 'no'}")
    return f"count {asked} in {' '.join(animals)}", _lines(["is " + " ".join(steps)], str(seen))


def cipher(random: Random) -> tuple[str, str]:
    """Five to eight letters moved 1..5 places on in the alphabet, Z followed by A."""
    letters = [random.randrange(26) for _ in range(random.randint(5, 8))]
    shift = random.randint(1, 5)
    moved = [ascii_uppercase[(letter + shift) % 26] for letter in letters]
    plain = [ascii_uppercase[letter] for letter in letters]
    steps = [f"{a}+{shift}={b}" for a, b in zip(plain, moved, strict=True)]
    return f"shift {''.join(plain)} by {shift}", _lines([" ".join(steps)], "".join(moved))


def spell(random: Random) -> tuple[str, str]:
    """Six to nine letters in the radio alphabet."""
    letters = [random.randrange(26) for _ in range(random.randint(6, 9))]
    steps = [f"{ascii_uppercase[letter]} {ALPHABET[letter]}" for letter in letters]
    answer = " ".join(ALPHABET[letter] for letter in letters)
    return f"spell {''.join(ascii_uppercase[letter] for letter in letters)}", _lines(steps, answer)


TASKS = {
    task.__name__: task for task in (order, date, extract, lookup, select, edit, logic, count, cipher, spell)
}
