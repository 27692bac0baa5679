"""Counts of what the server does, in the text form that Prometheus reads.

Source of the form: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from collections import Counter, defaultdict

BUCKETS_S = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters since the start; used from the server's event loop only."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._in_bucket: Counter[tuple[str, float]] = Counter()
        self._tokens: Counter[tuple[str, str]] = Counter()

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count a finished request of a known path."""
        self._requests[path, status] += 1
        self._seconds[path] += seconds
        for bound in BUCKETS_S:
            if seconds <= bound:
                self._in_bucket[path, bound] += 1

    def count_tokens(self, model: str, *, prompt: int, completion: int) -> None:
        """Count the tokens of one answer."""
        self._tokens[model, "prompt"] += prompt
        self._tokens[model, "completion"] += completion

    def to_text(self, gauges: dict[str, tuple[str, float]]) -> str:
        """Return everything, and gauges as name -> (help, value now)."""
        lines = _head("requests_total", "counter", "Requests by path and status.")
        for (path, status), count in sorted(self._requests.items()):
            lines.append(f'ptuning_requests_total{{path="{path}",status="{status}"}} {count}')
        lines += _head("request_seconds", "histogram", "Time from request to last byte.")
        for path in sorted(self._seconds):
            label = f'path="{path}"'
            total = sum(count for (known, _), count in self._requests.items() if known == path)
            for bound in BUCKETS_S:
                count = self._in_bucket[path, bound]
                lines.append(f'ptuning_request_seconds_bucket{{{label},le="{bound}"}} {count}')
            lines.append(f'ptuning_request_seconds_bucket{{{label},le="+Inf"}} {total}')
            lines.append(f"ptuning_request_seconds_sum{{{label}}} {self._seconds[path]:.6f}")
            lines.append(f"ptuning_request_seconds_count{{{label}}} {total}")
        lines += _head("tokens_total", "counter", "Tokens by model, read and written.")
        for (model, kind), count in sorted(self._tokens.items()):
            lines.append(f'ptuning_tokens_total{{model="{model}",kind="{kind}"}} {count}')
        for name, (help_text, value) in gauges.items():
            lines += _head(name, "gauge", help_text)
            lines.append(f"ptuning_{name} {value:g}")
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, help_text: str) -> list[str]:
    return [f"# HELP ptuning_{name} {help_text}", f"# TYPE ptuning_{name} {kind}"]
