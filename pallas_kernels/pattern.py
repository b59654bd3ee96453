"""N:M patterns: keep n of every m consecutive entries."""

import dataclasses
import re

MAX_M = 16


@dataclasses.dataclass(frozen=True, order=True)
class Pattern:
    """Keep `n` of every `m` consecutive entries along one axis; 1 <= n <= m <= 16.

    >>> Pattern.parse("2:4").density
    0.5

    Raises:
      ValueError: n or m out of range.
    """

    n: int
    m: int

    def __post_init__(self):
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 1 <= self.n <= self.m):
            raise ValueError(
                f"pattern {self.n}:{self.m}: n:m keeps n of every m consecutive entries, so it"
                " needs integers with 1 <= n <= m; for example '2:4'"
            )
        if self.m > MAX_M:
            raise ValueError(f"pattern {self.n}:{self.m}: m is at most {MAX_M}")

    @classmethod
    def parse(cls, text: "str | Pattern") -> "Pattern":
        """The pattern written as "n:m"; a `Pattern` is returned as it is."""
        if isinstance(text, Pattern):
            return text
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text) if isinstance(text, str) else None
        if not match:
            raise ValueError(f"pattern {text!r} is not of the form 'n:m'; for example '2:4'")
        return cls(int(match[1]), int(match[2]))

    def __str__(self):
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """Share of the entries that are kept, n / m."""
        return self.n / self.m

    @property
    def is_dense(self) -> bool:
        """Whether everything is kept (n == m)."""
        return self.n == self.m

    @property
    def bits(self) -> int:
        """Bits that a stored position takes: enough for 0 .. m-1, and none when n == m."""
        return 0 if self.is_dense else (self.m - 1).bit_length()

    def check_divides(self, size: int, what: str) -> None:
        """Raises a ValueError unless `m` divides `size`, the length of the axis `what`."""
        if size % self.m:
            raise ValueError(
                f"{what} has {size} entries, which is not a multiple of {self.m}, as the pattern"
                f" {self} needs; choose a multiple of {self.m}, another pattern, or dense"
            )

    def kept(self, size: int) -> int:
        """Entries kept of `size` (a multiple of m)."""
        return size // self.m * self.n

    def metadata_bytes(self, size: int) -> int:
        """Bytes of packed positions for `size` entries (a multiple of m)."""
        return -(-self.kept(size) * self.bits // 8)
