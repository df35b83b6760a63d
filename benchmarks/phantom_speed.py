"""Images that one core draws per second of its time: bare rendering, and full record with texts, boxes, PNG bytes.

Run from the repository root: `python benchmarks/phantom_speed.py`.
"""

import argparse
import time
from collections.abc import Callable

from training.data.phantom import phantom_record, render_phantom


def images_per_second(function: Callable, size: int, count: int, rounds: int) -> float:
    """Images per second of processor time, best of several rounds: other work on the machine disturbs less."""
    function(7, 0, size)
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        for index in range(count):
            function(7, index, size)
        best = min(best, time.process_time() - start)
    return count / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="images per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256])
    arguments = parser.parse_args()
    for size in arguments.sizes:
        for name, function in (("render", render_phantom), ("record", phantom_record)):
            speed = images_per_second(function, size, arguments.count, arguments.rounds)
            print(f"{size:4d} px  {name}  {speed:7.1f} images/s")


if __name__ == "__main__":
    main()
