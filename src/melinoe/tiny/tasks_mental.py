"""Mental arithmetic: tasks without written steps, which a model of this size can only partly do.

Same contract as `tasks_numbers`. Real text always leaves a model something it cannot foresee; the
tasks with written steps leave this one nothing (it answers 99.5 percent of them), and then a percent
of its likelihood is noise. Here first and last digits can be learned and those between cannot, so
the likelihood of the workload is that of a model with work left to do (docs/decisions/0005).
"""

from __future__ import annotations

from math import isqrt
from random import Random


def _answers(results: list[str]) -> str:
    return f"answer: {','.join(results)}"


def products(random: Random) -> tuple[str, str]:
    """Four products of two numbers 100..999, six digits each."""
    pairs = [(random.randint(100, 999), random.randint(100, 999)) for _ in range(4)]
    prompt = ", ".join(f"{a} * {b}" for a, b in pairs)
    return f"mentally {prompt}", _answers([f"{a * b:06d}" for a, b in pairs])


def quotients(random: Random) -> tuple[str, str]:
    """Three fractions a/b with 100 <= a < b <= 999, eight decimals each, rounded down."""
    pairs = [sorted(random.sample(range(100, 1000), 2)) for _ in range(3)]
    prompt = ", ".join(f"{a}/{b}" for a, b in pairs)
    return f"decimals of {prompt}", _answers([f"{a * 10**8 // b:08d}" for a, b in pairs])


def roots(random: Random) -> tuple[str, str]:
    """Square roots of four numbers 1000..9999, four decimals each, rounded down."""
    numbers = random.sample(range(1000, 10000), 4)
    results = [divmod(isqrt(number * 10**8), 10**4) for number in numbers]
    prompt = ", ".join(map(str, numbers))
    return f"roots of {prompt}", _answers([f"{whole}.{part:04d}" for whole, part in results])


def remainders(random: Random) -> tuple[str, str]:
    """Eight numbers 1000..9999 divided by one number 50..99: two digits of rest each."""
    divisor, numbers = random.randint(50, 99), random.sample(range(1000, 10000), 8)
    prompt = ", ".join(map(str, numbers))
    return f"rest by {divisor} of {prompt}", _answers([f"{number % divisor:02d}" for number in numbers])


TASKS = {task.__name__: task for task in (products, quotients, roots, remainders)}
