"""Number tasks of the embedded workload: every completion writes out its steps, then the answer.

A task draws operands from a `random.Random` and returns (prompt, completion). Steps keep each next
token close to what decides it (least significant digit first, carries written down), because the
model that must learn them has six layers of width 128. Whole numbers only; no text from elsewhere.
"""

from __future__ import annotations

from random import Random

HEX_DIGITS = "0123456789ABCDEF"
ROMAN_PLACES = (
    ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX"),
    ("", "X", "XX", "XXX", "XL", "L", "LX", "LXX", "LXXX", "XC"),
    ("", "C", "CC", "CCC"),
)
# (large unit, small unit, small units in one large unit)
UNITS = (
    ("feet", "inches", 12),
    ("pounds", "ounces", 16),
    ("weeks", "days", 7),
    ("hours", "minutes", 60),
    ("gallons", "pints", 8),
    ("yards", "spans", 4),
)
GOODS = ("tea", "milk", "bread", "rice", "salt", "soap", "corn", "oil", "eggs", "jam", "flour", "cheese")


def _lines(steps: list[str], answer: str) -> str:
    return "\n".join([*steps, f"answer: {answer}"])


def _equal_length_digits(random: Random) -> tuple[int, int, int]:
    """The number of digits (3 or 4), the lowest and the highest number of that length."""
    length = random.randint(3, 4)
    return length, 10 ** (length - 1), 10**length - 1


def add(random: Random) -> tuple[str, str]:
    """Two numbers of equal length, 100..999 or 1000..9999, column by column from the right."""
    length, low, high = _equal_length_digits(random)
    left, right = random.randint(low, high), random.randint(low, high)
    steps, written, carry = [], "", 0
    for place in range(length):
        a, b = left // 10**place % 10, right // 10**place % 10
        total = a + b + carry
        step = f"{a}+{b}+{carry}={total:02d}"
        carry, digit = divmod(total, 10)
        written = f"{digit}{written}"
        if place == length - 1 and carry:
            written = f"{carry}{written}"
        steps.append(f"{step} ->{written}")
    return f"add {left} and {right}", _lines(steps, written)


def subtract(random: Random) -> tuple[str, str]:
    """Numbers of equal length (3 or 4 digits) whose difference has that length too; borrows written."""
    length, low, high = _equal_length_digits(random)
    small = random.randint(low, high - low)
    large = random.randint(small + low, high)
    steps, written, borrow = [], "", 0
    for place in range(length):
        a, b = large // 10**place % 10, small // 10**place % 10
        digit = a - b - borrow
        step = f"{a}-{b}-{borrow}={digit % 10}"
        borrow = int(digit < 0)
        written = f"{digit % 10}{written}"
        steps.append(f"{step}{' borrow' if borrow else ''} ->{written}")
    return f"subtract {small} from {large}", _lines(steps, written)


def multiply(random: Random) -> tuple[str, str]:
    """100..9999 times 2..9, digit by digit from the right with the carry added."""
    length, low, high = _equal_length_digits(random)
    number, factor = random.randint(low, high), random.randint(2, 9)
    steps, written, carry = [], "", 0
    for place in range(length):
        a = number // 10**place % 10
        total = a * factor + carry
        step = f"{a}*{factor}+{carry}={total:02d}"
        carry, digit = divmod(total, 10)
        written = f"{digit}{written}"
        if place == length - 1 and carry:
            written = f"{carry}{written}"
        steps.append(f"{step} ->{written}")
    return f"multiply {number} by {factor}", _lines(steps, written)


def divide(random: Random) -> tuple[str, str]:
    """Long division of 200..9999 by 2..9; the first digit is at least the divisor."""
    length, _, _ = _equal_length_digits(random)
    divisor = random.randint(2, 9)
    number = random.randint(divisor * 10 ** (length - 1), 10**length - 1)
    steps, written, rest = [], "", 0
    for digit in str(number):
        part = rest * 10 + int(digit)
        quotient, after = divmod(part, divisor)
        written += str(quotient)
        steps.append(f"{rest}{digit}/{divisor}={quotient} r{after} ->{written}")
        rest = after
    return f"divide {number} by {divisor}", _lines(steps, f"{written} rest {rest}")


def sort(random: Random) -> tuple[str, str]:
    """Four or five distinct numbers 10..99; the smallest is taken out until none is left."""
    left = random.sample(range(10, 100), random.randint(4, 5))
    prompt = "sort " + ",".join(map(str, left))
    steps, taken = [], []
    while left:
        smallest = min(left)
        left.remove(smallest)
        taken.append(smallest)
        steps.append(f"take {smallest}" + (" left " + ",".join(map(str, left)) if left else ""))
    return prompt, _lines(steps, ",".join(map(str, taken)))


def compare(random: Random) -> tuple[str, str]:
    """The largest of four numbers 1000..9999 that often share leading digits."""
    first = random.randint(1000, 9999)
    numbers = [first]
    while len(numbers) < 4:
        shared = 10 ** random.randint(1, 4)
        number = max(1000, first // shared * shared + random.randrange(shared))
        if number not in numbers:
            numbers.append(number)
    random.shuffle(numbers)
    steps, best = [], numbers[0]
    for number in numbers[1:]:
        signs = []
        for a, b in zip(str(best), str(number), strict=True):
            signs.append(f"{a}{'=' if a == b else '<' if a < b else '>'}{b}")
            if a != b:
                break
        best = max(best, number)
        steps.append(f"{' '.join(signs)} keep {best}")
    return "largest of {}, {}, {}, {}".format(*numbers), _lines(steps, str(best))


def units(random: Random) -> tuple[str, str]:
    """Two measures, 1..9 large units and fewer small ones than one large unit holds; sum with carry."""
    large, small, size = random.choice(UNITS)
    a, b = random.randint(1, 9), random.randint(1, 9)
    c, d = random.randint(1, size - 1), random.randint(1, size - 1)
    total = c + d
    carry = int(total >= size)
    rest = total - size * carry
    check = f"{total}-{size}={rest} carry 1" if carry else f"{total}<{size} carry 0"
    steps = [f"{c}+{d}={total} {small}", check, f"{a}+{b}+{carry}={a + b + carry} {large}"]
    prompt = f"measure {a} {large} {c} {small} plus {b} {large} {d} {small}"
    return prompt, _lines(steps, f"{a + b + carry} {large} {rest} {small}")


def roman(random: Random) -> tuple[str, str]:
    """Two numbers 1..399 in roman numerals, place by place."""
    numbers = random.randint(1, 399), random.randint(1, 399)
    steps, written = [], []
    for number in numbers:
        parts = []
        for place in (2, 1, 0):
            digit = number // 10**place % 10
            if digit:
                parts.append((digit * 10**place, ROMAN_PLACES[place][digit]))
        written.append("".join(numeral for _, numeral in parts))
        steps.append(" ".join(f"{value}={numeral}" for value, numeral in parts))
    return f"roman {numbers[0]} and {numbers[1]}", _lines(steps, " and ".join(written))


def base(random: Random) -> tuple[str, str]:
    """Four hexadecimal digits to sixteen bits, or sixteen bits in groups of four to hexadecimal."""
    digits = [random.randrange(16) for _ in range(4)]
    bits = [f"{digit:04b}" for digit in digits]
    letters = [HEX_DIGITS[digit] for digit in digits]
    if random.random() < 0.5:
        steps = [f"{letter}={group}" for letter, group in zip(letters, bits, strict=True)]
        return f"hex {''.join(letters)} to binary", _lines(steps, " ".join(bits))
    steps = [f"{group}={letter}" for letter, group in zip(letters, bits, strict=True)]
    return f"binary {' '.join(bits)} to hex", _lines(steps, "".join(letters))


def bill(random: Random) -> tuple[str, str]:
    """Three goods, each 2..9 pieces at a price of 2..9: products and the running total."""
    goods = random.sample(GOODS, 3)
    pairs = [(random.randint(2, 9), random.randint(2, 9)) for _ in goods]
    steps, total = [], 0
    for (count, price), name in zip(pairs, goods, strict=True):
        cost = count * price
        steps.append(f"{name} {count}*{price}={cost} total {total}+{cost}={total + cost}")
        total += cost
    prompt = "bill " + ", ".join(
        f"{n} {count} at {price}" for n, (count, price) in zip(goods, pairs, strict=True)
    )
    return prompt, _lines(steps, str(total))


TASKS = {
    task.__name__: task for task in (add, subtract, multiply, divide, sort, compare, units, roman, base, bill)
}
