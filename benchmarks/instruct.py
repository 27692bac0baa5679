"""Filtering speed of `ptuning generate`: ROUGE-L of each instruction with all those kept before.

    python -m benchmarks.instruct [--rows 52000] [--json FILE]

The instructions are synthetic, of 4 to 20 words out of 8,000, half of them Chinese; the published
filter takes 17.5 us for a pair of English seeds.
"""

import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from random import Random

from tqdm import tqdm

from benchmarks.setting import json_file, machine, refuse_below_one, write_json
from ptuning.data.similarity import Pool

SEED = 20261128
THRESHOLD = 0.7


def synthetic_texts(count: int, least: int, most: int) -> list[str]:
    """Return that many texts of least to most words: English, or pairs of Han characters."""
    rng = Random(SEED - 4 + least)
    han = [chr(0x4E00 + int(rng.random() * 3000)) for _ in range(4000)]
    texts = []
    for index in range(count):
        length = least + int(rng.random() * (most - least + 1))
        places = [int(rng.random() ** 2 * 4000) for _ in range(length)]
        chinese = "".join(han[place] + han[place - 1] for place in places)
        texts.append(chinese if index % 2 else " ".join(f"word{place}" for place in places))
    return texts


def measure(count: int) -> dict[str, float]:
    """Filter `count` instructions; times in seconds and microseconds."""
    texts = synthetic_texts(count, 4, 20)
    pool = Pool(texts[:1])
    pairs, started = 0, time.perf_counter()
    for text in tqdm(texts[1:], disable=not sys.stderr.isatty()):
        pairs += len(pool.texts)
        if pool.scores(text).max() <= THRESHOLD:
            pool.add(text)
    spent = time.perf_counter() - started
    return {"rows": count, "kept": len(pool.texts), "time_s": spent, "pair_us": 1e6 * spent / pairs}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print one line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=52_000)
    parser.add_argument("--json", type=json_file)
    options = parser.parse_args(arguments)
    refuse_below_one(parser, options, "rows")
    result = measure(options.rows)
    sys.stdout.write(
        f"{machine()}\n{result['rows']:,} rows, {result['kept']:,} kept: {result['time_s']:.1f} s, "
        f"{result['pair_us']:.3f} us a pair\n"
    )
    write_json(options, {"machine": machine(), **result})


if __name__ == "__main__":
    main()
