"""Token counts of real rows: benchmarks need neither ADGEN nor the published tokenizer.

ADGEN holds the counts of the first 320 rows of AdvertiseGen's train.json, with the tokenizer of
ChatGLM-6B and the published limits of 64 and 64 tokens. This command printed them, and does so for
any other file:

    python -m benchmarks.row_lengths --rows_file AdvertiseGen/train.json --tokenizer DIR --rows 320

Each number has four digits: two for the prompt with [gMASK], two for the answer with <sop> and
<eop>. The first 16 rows have 1,547 tokens.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import NamedTuple

from ptuning.data.dataset import load_training_dataset
from ptuning.data.prompts import RowFormat
from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.tunings.loading import NANO_DIR

MAX_LENGTH = 64  # tokens of prompt and of answer, as published
PER_LINE = 18


class RowLength(NamedTuple):
    """One row: tokens before <sop>, and from <sop> on."""

    prompt: int
    answer: int


NUMBERS = """
2263 3463 3563 2863 4063 4256 4563 2646 4763 4963 5063 1063 4338 4863 3663 3363 2955 3738
5263 3039 5263 4363 4758 3063 2648 3263 2047 3363 4940 4939 1459 2663 3563 3563 2963 3063
2162 2659 2660 2649 5763 4550 4163 4963 3063 4663 3563 6055 3462 2663 4763 4663 2348 4144
4959 3063 4263 5263 5263 4963 3842 3363 5454 2563 2863 6463 2263 2263 3763 4451 3663 2463
2260 1963 3662 3763 2361 2242 3363 2445 2563 2063 2863 4355 3163 6463 4863 4363 2447 1763
2044 3759 5163 4763 5263 4655 2357 3660 5263 1455 1453 1463 1456 1963 2163 3463 4063 5463
1453 6163 2562 3563 2363 3863 3063 3241 3160 3463 3457 4663 2963 4563 2063 3063 3464 5263
3953 2963 2651 3752 2563 4863 3740 4063 3856 3763 4563 4763 4063 2343 3463 3163 2563 2561
6463 3463 1739 5363 2663 6163 5163 4163 2642 1564 2163 3563 5964 3263 2044 2053 2637 4063
2861 4755 4463 2963 5163 3963 1348 1357 2257 2553 2558 4363 4363 3663 5663 2863 4563 4163
2861 4463 1961 3864 3763 6463 5363 3164 3963 4951 2963 4663 5163 4163 2962 4163 2763 2859
5360 5563 2963 3763 2463 5263 4863 4552 4563 2363 4659 6038 3057 2964 2463 3563 4650 5263
4463 4063 2955 5063 3263 3244 2651 3263 3663 2645 3952 3663 3362 4163 4063 2963 3263 5563
3251 3463 4863 3863 4260 4163 1963 3349 4063 3363 3363 4159 3063 0951 4858 6463 3346 3342
1463 5763 3060 3960 1645 1663 1659 1663 2755 6463 2853 3063 4063 3454 3850 4056 3863 3463
3450 4963 3263 4651 3663 3363 3760 2863 4363 2353 3463 3949 5763 2763 4763 4762 4263 3263
2334 2763 6463 5258 3460 4463 3552 3761 4042 2763 2461 6363 3463 2640 1961 5159 5463 5563
3363 3861 3163 6455 4264 4563 4161 3662 4263 2538 3961 3740 3445 5860
"""
ADGEN = tuple(RowLength(int(word[:2]), int(word[2:])) for word in NUMBERS.split())


def lengths_of(rows_file: Path, tokenizer: str, count: int) -> list[RowLength]:
    """Return the lengths of the first `count` rows of a file, or of all if it has fewer."""
    dataset, _ = load_training_dataset(
        rows_file,
        ChatGLMTokenizer.from_pretrained(tokenizer),
        RowFormat(
            prompt_column="content",
            response_column="summary",
            max_source_length=MAX_LENGTH,
            max_target_length=MAX_LENGTH,
        ),
        max_rows=count,
    )
    rows = [dataset[index]["labels"] for index in range(len(dataset))]
    prompts = [int((labels == -100).sum()) for labels in rows]
    return [
        RowLength(prompt, len(labels) - prompt)
        for prompt, labels in zip(prompts, rows, strict=True)
    ]


def main(argv: list[str]) -> int:
    """Print the four-digit numbers."""
    parser = ArgumentParser(prog="python -m benchmarks.row_lengths", description=__doc__)
    parser.add_argument("--rows_file", type=Path, required=True, help="rows to count")
    parser.add_argument("--tokenizer", default=str(NANO_DIR), help="folder of the tokenizer")
    parser.add_argument("--rows", type=int, default=320, help="rows from the beginning of the file")
    flags = parser.parse_args(argv)
    found = lengths_of(flags.rows_file, flags.tokenizer, flags.rows)
    words = [f"{length.prompt:02}{length.answer:02}" for length in found]
    for start in range(0, len(words), PER_LINE):
        sys.stdout.write(" ".join(words[start : start + PER_LINE]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
