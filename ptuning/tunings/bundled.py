"""Where the embedded default lies. Light: nothing heavy is imported."""

from pathlib import Path

NANO_DIR = Path(__file__).resolve().parents[1] / "nano" / "weights"
SAMPLE_DIR = Path(__file__).resolve().parents[2] / "AdvertiseGen" / "sample"  # in a checkout
