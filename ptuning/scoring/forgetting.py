"""What tuning has cost: the base's own answers to general prompts, and what is left of them.

The loss is that of the base's greedy answers, token by token with the right beginning given
(teacher forcing): low for the base, which said them itself, and higher the more is forgotten.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ptuning.output import signed

MUCH_FORGOTTEN = 0.3  # nats per token: few answers stay the same beyond (docs/forgetting.md)
ADVICE = (
    "Tuning changed most answers outside the task. To keep more of the base, mix in general rows "
    "(--mix) or train a prefix with --preset gentle: docs/forgetting.md."
)


@dataclass(frozen=True)
class RetentionRow:
    """One general prompt with both answers; losses and divergence in nats, summed over tokens.

    num_tokens counts those of the base's answer, its end included. The divergence is that of the
    tuned model's next-token distribution from the base's, at those tokens.
    """

    prompt: str
    base: str
    tuned: str
    num_tokens: int
    base_loss: float
    tuned_loss: float
    divergence: float

    @property
    def change(self) -> float:
        """Loss per token, tuned minus base: above 0 where something was forgotten."""
        return (self.tuned_loss - self.base_loss) / self.num_tokens

    @property
    def is_same(self) -> bool:
        """Whether both answers are the same text."""
        return self.base == self.tuned


@dataclass(frozen=True)
class Retention:
    """All general prompts; the figures are means over tokens, in nats."""

    source: str  # the file of the prompts
    rows: Sequence[RetentionRow]

    @property
    def num_tokens(self) -> int:
        """Tokens of the base's answers."""
        return sum(row.num_tokens for row in self.rows)

    @property
    def base_loss(self) -> float:
        """Loss of the base on its own answers."""
        return sum(row.base_loss for row in self.rows) / self.num_tokens

    @property
    def tuned_loss(self) -> float:
        """Loss of the tuned model on the base's answers."""
        return sum(row.tuned_loss for row in self.rows) / self.num_tokens

    @property
    def change(self) -> float:
        """Loss of the tuned model minus that of the base: above 0 where something was forgotten."""
        return self.tuned_loss - self.base_loss

    @property
    def divergence(self) -> float:
        """Divergence of the tuned model's next-token distribution from the base's."""
        return sum(row.divergence for row in self.rows) / self.num_tokens

    @property
    def num_same(self) -> int:
        """Prompts that both answer with the same text."""
        return sum(row.is_same for row in self.rows)

    def by_name(self) -> dict[str, float]:
        """Return the figures by their names in predict_results.json."""
        return {
            "retention_prompts": len(self.rows),
            "retention_base_loss": round(self.base_loss, 4),
            "retention_tuned_loss": round(self.tuned_loss, 4),
            "retention_loss_change": round(self.change, 4),
            "retention_divergence": round(self.divergence, 4),
            "retention_same_answers": self.num_same,
        }

    def line(self) -> str:
        """Say it in a line, and in a second one how to forget less, where much was forgotten."""
        text = (
            f"Forgetting: {self.num_same} of {len(self.rows)} general prompts answered as before "
            f"tuning; loss on the base's answers from {self.base_loss:.3f} to "
            f"{self.tuned_loss:.3f} ({signed(self.change, 3)})"
        )
        return f"{text}\n{ADVICE}" if self.change >= MUCH_FORGOTTEN else text
